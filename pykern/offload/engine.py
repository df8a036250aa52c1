"""The native engine's ops, and the lifetime of one engine."""

import os
import shutil
import tempfile
import warnings
import weakref

import torch
from torch import Tensor

from .. import _native  # noqa: F401  (registers the ops)

_open = torch.ops.pykern.offload_open.default
_error = torch.ops.pykern.offload_error.default
_close = torch.ops.pykern.offload_close.default
_store = torch.ops.pykern.offload_store.default
_settle = torch.ops.pykern.offload_settle.default
_reserve = torch.ops.pykern.offload_reserve.default
_unreserve = torch.ops.pykern.offload_unreserve.default
_load = torch.ops.pykern.offload_load.default
_release = torch.ops.pykern.offload_release.default
_map_allocations = torch.ops.pykern.offload_map_allocations.default
_synchronize = torch.ops.pykern.offload_synchronize.default
_take_failure = torch.ops.pykern.offload_take_failure.default
_description = torch.ops.pykern.offload_description.default
_counters = torch.ops.pykern.offload_counters.default
_reset_counters = torch.ops.pykern.offload_reset_counters.default

# The order of Engine::counters in csrc/offload/engine.h.
_COUNTERS = (
    "offloads", "offloaded_bytes", "reloads", "reloaded_bytes", "forwards", "forwarded_bytes",
    "stall_seconds", "queue_seconds", "slots", "peak_slots", "slot_bytes", "peak_slot_bytes", "extent_bytes",
)  # fmt: skip

# By how much the storage grows when it is full and has no fixed capacity. A file starts at that size.
ARENA_GROWTH = 64 << 20
FILE_GROWTH = 256 << 20


def return_freed_memory(threshold: int) -> bool:
    """Makes the C library map allocations of `threshold` bytes or more, so that they leave the process when freed.

    Process-wide. False, and nothing happens, where the library can't, or where the environment decides it.
    """
    return "MALLOC_MMAP_THRESHOLD_" not in os.environ and _map_allocations(threshold)


def spill_folder(path: str | os.PathLike | None) -> str:
    """The folder of a spill file: `path`, which must exist, or the system's temporary folder."""
    folder = os.fspath(path) if path is not None else tempfile.gettempdir()
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"path: expected an existing folder, got {folder!r}; create it or pass another")
    return folder


def warn_if_in_memory(owner: str, engine: "Engine", folder: str | None, stacklevel: int) -> None:
    if engine.description == "file, in memory":
        warnings.warn(
            f"{owner}: {folder} lies in memory (tmpfs), so nothing is saved by spilling there; "
            "pass path= a folder on a disk",
            stacklevel=stacklevel + 1,
        )


class Engine:
    """A C++ engine: a medium (arena or spill file), its slots, and the threads that copy.

    Closed when the last reference goes; whoever holds an item of it holds the engine.
    """

    def __init__(
        self, folder: str | None, capacity: int | None, threads: int, queue_bytes: int, delay_seed: int | None
    ) -> None:
        if folder is None:
            limit = capacity or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            initial, growth = 0, ARENA_GROWTH
        else:
            limit = -1 if capacity is None else -(-capacity // 4096) * 4096
            initial, growth = capacity or FILE_GROWTH, FILE_GROWTH
        self.handle = _open(
            folder or "", limit, initial, growth, threads, queue_bytes, -1 if delay_seed is None else delay_seed
        )
        self._closing = weakref.finalize(self, _close, self.handle)
        error = _error(self.handle)
        if error:
            self.close()
            if folder is None:
                raise MemoryError(f"capacity: {error}; pass a smaller capacity")
            raise OSError(
                f"path: {error} (spill file in {folder}, {shutil.disk_usage(folder).free} bytes free there); "
                "pass path= a folder with more room, or a smaller capacity="
            )
        self.description: str = _description(self.handle)

    def close(self) -> None:
        self._closing()

    def store(self, parts: list[Tensor], offsets: list[int], nbytes: int) -> int:
        """Starts writing a block of `nbytes` that consists of 1-D uint8 tensors, each at its offset.

        The parts are copied from where they lie, and held until the block is written or released. Returns the item's
        number, or -1 if there is no room, or writing has failed: the caller keeps the parts.
        """
        return _store(self.handle, parts, offsets, nbytes)

    def settle(self, item: int) -> bool:
        """Waits until the item is written, and drops its parts.

        False if the write failed: the item then keeps its parts, and loads are answered from them.
        """
        return _settle(self.handle, item)

    def reserve(self, item: int) -> None:
        """Starts reading the item and keeps what was read until `unreserve`."""
        _reserve(self.handle, item)

    def unreserve(self, item: int) -> None:
        _unreserve(self.handle, item)

    def load(self, item: int) -> Tensor:
        """The block's bytes, uint8 [nbytes]; waits for them if need be. What lies between the parts is undefined."""
        return _load(self.handle, item)

    def release(self, item: int) -> None:
        _release(self.handle, item)

    def synchronize(self) -> None:
        _synchronize(self.handle)

    def take_failure(self) -> str:
        """Why writing or growing failed since the last call, or an empty string."""
        return _take_failure(self.handle)

    def counters(self) -> dict[str, float]:
        values = dict(zip(_COUNTERS, _counters(self.handle), strict=True))
        return {name: value if name.endswith("seconds") else int(value) for name, value in values.items()}

    def reset_counters(self) -> None:
        _reset_counters(self.handle)
