"""Where a plan's blocks go: the engine that is opened for a plan, and the slot of each block in it."""

import os
import time
from collections.abc import Callable, Sequence

from torch import Tensor

from .cuda_device import CudaDevice
from .engine import (
    Engine, Rates, machine_memory, measured_rates, return_freed_memory, spill_folder, warn_if_in_memory, whole_pages,
)  # fmt: skip
from .planning.types import Copy, Plan
from .saving import is_on_cpu
from .streamed import StreamedEngine
from .streams import StreamDevice

STORAGES = ("memory", "file", "pinned")


class BlockStore:
    """An engine, opened anew for each plan: planned blocks have slots of their own, as far as they fit into them."""

    def __init__(
        self,
        storage: str,
        path: str | os.PathLike | None,
        threads: int,
        device: StreamDevice | str | None,
        map_allocations: bool,
        delay_seed: int | None,
    ) -> None:
        if storage not in STORAGES:
            raise ValueError(f"storage: expected 'memory', 'file' or 'pinned', got {storage!r}")
        if storage != "pinned" and device is not None:
            raise ValueError(f"device: only storage='pinned' has one, got storage={storage!r}; leave device out")
        self._storage, self._threads, self._delay_seed = storage, threads, delay_seed
        self._folder = spill_folder(path)
        self._device: StreamDevice | None = None
        self.accepts: Callable[[Tensor], bool] = is_on_cpu
        if storage == "pinned":
            self._device = device if hasattr(device, "compute_stream") else CudaDevice(device)
            self.accepts = self._device.accepts
        self._map_allocations = map_allocations
        self.engine: Engine | StreamedEngine | None = None
        self._copies: dict[tuple[int, int], Copy] = {}
        self._slots: list[int] = []
        self._first_of_file = 0

    def open(self, plan: Plan, rank: int, sizes_known: bool) -> None:
        """Makes room for a plan's blocks; no block may be stored at this moment.

        sizes_known: the plan's slots have the sizes that blocks will have. Otherwise room is made as it is needed.
        """
        self.close()
        self._copies = {(copy.chunk, copy.microbatch): copy for copy in plan.copies[rank]}
        host, file = [], []
        if sizes_known:
            host, file = list(plan.slot_bytes[rank]), list(plan.file_slot_bytes[rank]) if plan.file_slot_bytes else []
        has_file = self._storage == "file" or any(copy.tier == "file" for copy in plan.copies[rank])
        folder = self._folder if has_file else None
        # All of a file's slots lie in it; those of an arena are the host's alone.
        self._slots, self._first_of_file = (host + file, len(host)) if self._storage == "file" else (host, len(host))
        # The plan bounds what is on its way out, since a release waits. Buffers of loads go when their block ends.
        keywords = {"threads": self._threads, "queue_bytes": 1 << 50, "delay_seed": self._delay_seed, "buffer_bytes": 0}
        if self._storage == "pinned":
            spill = Engine(folder, **keywords) if has_file else None
            # Beside the plan's slots: room for what is on its way to and from the file.
            largest = max(file, default=0)
            passing = [largest] * -(-plan.staging_bytes[rank] // largest) if largest else []
            self.engine = StreamedEngine(self._device, slot_bytes=host + passing or None, file=spill)
        elif self._storage == "file" or not has_file:
            self.engine = Engine(folder, **keywords, slots=self._slots)
        else:
            memory = sum(map(whole_pages, host)) or machine_memory()
            self.engine = Engine(folder, **keywords, slots=self._slots, memory=memory)
        if has_file:
            if self._storage != "pinned":
                warn_if_in_memory("PipelineOffload", self.engine, folder, stacklevel=4)
            if self._map_allocations:
                return_freed_memory(1 << 16)

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()

    def store(self, block: tuple[int, int], parts: Sequence[Tensor], offsets: Sequence[int], nbytes: int) -> int:
        """Starts copying out; the engine's item, or -1 if there is no room."""
        copy = self._copies[block]
        is_file = copy.tier == "file"
        slot = copy.slot + (self._first_of_file if is_file else 0)
        if not 0 <= slot < len(self._slots) or self._slots[slot] < nbytes:
            slot = -1
        # Streams copy to the host, and the plan says when a block goes on from there.
        tier = copy.tier if len(self.engine.tiers) == 2 and self._device is None else None
        return self.engine.store(parts, offsets, nbytes, slot=slot, tier=tier)

    def measure(self, nbytes: int = 16 << 20) -> Rates:
        """Bytes per second of blocks of `nbytes`, one at a time, out and back."""
        if not isinstance(self.engine, StreamedEngine):
            return self.engine.measure(nbytes)
        return measured_rates(self.engine, self._device.allocate(nbytes), self._now)

    def _now(self) -> float:
        self._device.synchronize(self._device.record(self._device.compute_stream()))
        return time.perf_counter()

    def spill(self, item: int) -> None:
        if isinstance(self.engine, StreamedEngine):
            self.engine.spill(item)

    def fetch(self, item: int) -> None:
        if isinstance(self.engine, StreamedEngine):
            self.engine.fetch(item)
