"""The processors that a GPU is nearest to. Memory lies where the thread runs that is the first to touch it."""

import contextlib
import os
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Protocol

_DEVICES = Path("/sys/bus/pci/devices")


class PciDevice(Protocol):
    """As torch.cuda.get_device_properties tells it."""

    pci_domain_id: int
    pci_bus_id: int
    pci_device_id: int


def cpus_near(device: PciDevice) -> frozenset[int]:
    """Numbers of processors; none where the system doesn't tell."""
    address = f"{device.pci_domain_id:04x}:{device.pci_bus_id:02x}:{device.pci_device_id:02x}.0"
    try:
        text = (_DEVICES / address / "local_cpulist").read_text()
    except OSError:
        return frozenset()
    ranges = [part.split("-") for part in text.strip().split(",") if part]
    return frozenset(cpu for ends in ranges for cpu in range(int(ends[0]), int(ends[-1]) + 1))


@contextlib.contextmanager
def running_on(cpus: frozenset[int]) -> Iterator[None]:
    """This thread runs on those of `cpus` that it may run on, if there are any, and then where it could before."""
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else frozenset()
    near = cpus & before
    if near:
        _move_to(near)
    try:
        yield
    finally:
        if near:
            _move_to(before)


def _move_to(cpus: Set[int]) -> None:
    # Where the system refuses, the memory is only slower.
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, cpus)


__all__ = ["PciDevice", "cpus_near", "running_on"]
