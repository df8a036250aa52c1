"""Blocks to a medium and back: io_uring against threads, beside direct I/O by hand and a copy in memory.

Each call moves one block, and ends when it is there. What a disk gives varies from one second to the next, so only
times over each other, taken round by round, tell one way of writing from another.
"""

import mmap
import os
import tempfile
from collections.abc import Callable

import torch
from torch import Tensor

from bench.harness import Case
from pykern.offload.engine import Engine

SIZE = 64 << 20
REQUEST = 4 << 20


def source(aligned: bool) -> Tensor:
    """A block on whole pages, as pinned arenas have them, or beside them, as torch allocates."""
    memory = torch.full((SIZE + 2 * mmap.PAGESIZE,), 1, dtype=torch.uint8, device="cpu")
    begin = -memory.data_ptr() % mmap.PAGESIZE
    return memory[begin + (0 if aligned else 64) :][:SIZE]


def engine(transfers: str | None) -> Engine:
    """Of a file, or of memory."""
    folder = None if transfers is None else tempfile.gettempdir()
    return Engine(folder, capacity=2 * SIZE, threads=1, slots=[SIZE], buffer_bytes=SIZE, transfers=transfers or "best")


def out(engine: Engine, block: Tensor) -> Callable[[], None]:
    def write() -> None:
        item = engine.store([block], [0], SIZE, slot=0)
        if not engine.settle(item):
            raise OSError(engine.take_failure())
        engine.release(item)

    return write


def back(engine: Engine, block: Tensor) -> Callable[[], None]:
    item = engine.store([block], [0], SIZE, slot=0)
    engine.settle(item)
    return lambda: engine.load(item)


def by_hand(write: bool) -> dict[str, Callable[[], None]]:
    """As `dd` does it with direct I/O; nothing where the file system has none."""
    try:
        file = os.open(tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR | os.O_DIRECT)
    except OSError:
        return {}
    pages = mmap.mmap(-1, SIZE)
    pages.write(b"\1" * SIZE)
    view = memoryview(pages)
    os.posix_fallocate(file, 0, SIZE)

    def move() -> None:
        for begin in range(0, SIZE, REQUEST):
            part = view[begin : begin + REQUEST]
            os.pwrite(file, part, begin) if write else os.preadv(file, [part], begin)

    if not write:
        for begin in range(0, SIZE, REQUEST):
            os.pwrite(file, view[begin : begin + REQUEST], begin)
    return {f"direct I/O, {REQUEST >> 20} MiB at a time": move}


def make(write: bool, aligned: bool) -> dict[str, Callable[[], None]]:
    move, block = out if write else back, source(aligned)
    best, threads = engine("best"), engine("threads")
    calls = {f"pykern, {best.description}": move(best, block)}
    if threads.description != best.description:
        calls[f"pykern, {threads.description}"] = move(threads, block)
    return {**calls, **by_hand(write)}


def make_in_memory(write: bool) -> dict[str, Callable[[], None]]:
    block = source(False)
    target = torch.empty_like(block)
    return {
        "pykern, memory": (out if write else back)(engine(None), block),
        "copy_": lambda: target.copy_(block),
    }


def cases() -> list[Case]:
    shape = f"{SIZE >> 20} MiB"
    return [
        Case("offload", "media out", f"{shape}, whole pages", lambda: make(True, True), bytes=SIZE),
        Case("offload", "media out", f"{shape}, any address", lambda: make(True, False), bytes=SIZE),
        Case("offload", "media back", shape, lambda: make(False, False), bytes=SIZE),
        Case("offload", "media out", f"{shape}, memory", lambda: make_in_memory(True), bytes=2 * SIZE),
        Case("offload", "media back", f"{shape}, memory", lambda: make_in_memory(False), bytes=2 * SIZE),
    ]
