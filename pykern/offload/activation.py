"""Activations wait for the backward outside of the model's memory."""

import os
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .coding import Coding, check_codec, is_lossy
from .cuda_device import CudaDevice
from .engine import Engine, machine_memory, return_freed_memory, spill_folder, warn_if_in_memory
from .saving import Copy, Packed, Packing, Saved, is_on_cpu, saved_tensors_hooks, unpacked
from .streamed import StreamedEngine
from .streams import StreamDevice

_QUEUE_BYTES = {"memory": 32 << 20, "file": 32 << 20, "memory+file": 32 << 20, "pinned": 512 << 20}
"""How much may be on its way out, by storage, unless told otherwise."""


class _Copy(Copy):
    """A copy that is in memory still, or an item of the engine, whose slot goes back when the copy dies."""

    __slots__ = ("_coding", "engine", "item")

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.item: int | None = None
        self.engine: Engine | StreamedEngine | None = None
        self._coding: Coding | None = None

    def move(self, engine: Engine | StreamedEngine, codec: str | None) -> bool:
        """Hands the bytes to the engine; False if it has no room."""
        coding = Coding.of(self.resident, self.dtype, codec)
        source = self.resident if coding is None else coding.encode(self.resident)
        item = engine.store([source], [0], source.numel())
        if item < 0:
            return False
        self._coding = coding
        self.engine, self.item = engine, item
        weakref.finalize(self, engine.release, item).atexit = False
        self.resident = None
        return True

    def data(self) -> Tensor:
        resident = self.resident
        if resident is not None:
            return resident
        block = self.engine.load(self.item)
        return block if self._coding is None else self._coding.decode(block)


class _Group:
    """The tensors that one graph node saved; the backward needs them together.

    Groups form a chain from each to the one before it, in which groups without living members are skipped.
    """

    __slots__ = ("_members", "node", "previous")

    def __init__(self, node: int, previous: "_Group | None") -> None:
        self.node = node
        self._members: list[weakref.ref[Saved]] = []
        self.previous = previous

    def add(self, saved: Saved) -> None:
        self._members.append(weakref.ref(saved))
        saved.group = self

    def members(self) -> list[Saved]:
        return [member for reference in self._members if (member := reference()) is not None]

    def is_living(self) -> bool:
        return any(reference() is not None for reference in self._members)

    def living_previous(self) -> "_Group | None":
        while self.previous is not None and not self.previous.is_living():
            self.previous = self.previous.previous
        return self.previous


class ActivationOffload:
    """Moves what autograd saves for the backward out of the model's memory, and back in time for it.

    A context manager around the forward of any model (the backward may lie inside or outside of it)::

        offload = pykern.ActivationOffload(storage="file", parameters=model)
        for batch in data:
            with offload:
                loss = model(batch)
            loss.backward()

    Gradients are equal bit for bit to those without it, unless there is a codec: every tensor comes back with its
    bytes, shape, strides and alignment. Copies run on threads of their own. A storage that is saved several times,
    whole or as views, is copied once and comes back as views of one buffer. Tensors that the backward needs while they
    are still being written are handed back from memory. In the backward, the tensors of the next graph nodes are read
    ahead. Unpacking may happen any number of times (`retain_graph`, double backward); a copy goes when the graph that
    needs it goes.

    A saved tensor that is modified in place before the backward raises autograd's own error, as without offload.
    As there, changes that no version counter sees (through `.data` or numpy) do not; the backward then gets the old or
    the new bytes or some of both. Storages that are freed and refilled by hand between forward and backward must be
    named by `parameters` or `skip`, but for parameters, such as those that FSDP2 gathers.

    Under `torch.nn.utils.checkpoint` without reentry, what the checkpoints save (their inputs) is offloaded. Around a
    model from `torch.compile`, what the compiled graphs save is; inside of a compiled function the context is a graph
    break. One object serves any number of steps, microbatches in flight, and threads (hooks are per thread: enter the
    context in each).

    Args:
        storage: where to. CPU tensors go to "memory", a second arena of ordinary memory, stand-in for pinned host
            memory; or to "file", an unnamed file written and read around the page cache where the file system allows;
            or to "memory+file", the file behind an arena: above seven eighths of its capacity the oldest are spilled.
            CUDA tensors go to "pinned" host memory: copies run on streams beside the computation, which waits for
            them by events; the host waits for nothing. That memory lies at the processor nearest to the GPU. Such
            steps can't be captured in a CUDA graph, whose replays would write to slots that others have by then.
        min_bytes: smaller saved tensors stay. A small view of a large storage is copied, to free the storage.
        keep_last: this many of the most recently saved storages stay, since the backward begins with them.
        prefetch: graph nodes whose tensors are read ahead in the backward. With storage="pinned", as many as take the
            time of a large tensor's copy: about eight in a transformer.
        capacity: bytes of the arena or file. What no longer fits stays in memory, and is counted. By default the
            storage grows as needed; a file is made with 256 MiB, or with `capacity`, before training starts. With
            storage="memory+file", of the arena, by default half of the machine's memory; the file grows.
        path: folder of the file; the system's temporary folder by default. With storage="pinned", a file is made
            only if a path is given: the oldest tensors go there when the host's memory has no room for more.
        device: with storage="pinned", the CUDA device whose tensors are offloaded; by default the current one. Or
            any StreamDevice, such as a SimulatedDevice.
        codec: None, or a lossy one of StagingLayout, "float8_e4m3" or "int8": what leaves in float32, bfloat16 or
            float16 takes one byte an element, and comes back with the codec's error. The gradients' is then of that
            order: try it as one would a lower precision. What stays (small, last, without room) is exact.
        parameters: a module, or tensors, whose storages stay. Parameters are known without it, except by detached
            views of them; buffers are not.
        skip: called with each remaining tensor; True keeps it.
        threads: threads that copy.
        queue_bytes: bytes of tensors whose writing has not ended, at most (or one larger tensor); the forward waits
            for the storage beyond that. By default 32 MiB; 512 MiB of device memory with storage="pinned".
        map_allocations: with a file, set glibc's M_MMAP_THRESHOLD to `min_bytes`, for the whole process and
            for good. Otherwise its heap keeps most of the memory that the activations gave up. An environment that
            sets MALLOC_MMAP_THRESHOLD_ has precedence.

    Raises:
        TypeError, ValueError: an argument is not as above.
        NotImplementedError: a CUDA tensor is saved, and `storage` is not "pinned".
        OSError: the file can't be made or preallocated.
        RuntimeError: `storage="pinned"` without a CUDA device; from the backward, if a read fails. A failed write
            keeps the tensor, and warns once.
    """

    def __init__(
        self,
        storage: str = "memory",
        *,
        min_bytes: int = 1 << 18,
        keep_last: int = 1,
        prefetch: int = 1,
        capacity: int | None = None,
        path: str | os.PathLike | None = None,
        codec: str | None = None,
        parameters: torch.nn.Module | Iterable[Tensor] = (),
        skip: Callable[[Tensor], bool] | None = None,
        threads: int = 2,
        queue_bytes: int | None = None,
        map_allocations: bool = True,
        device: torch.device | str | StreamDevice | None = None,
        debug_delays: int | None = None,
    ) -> None:
        if storage not in _QUEUE_BYTES:
            raise ValueError(f"storage: expected 'memory', 'file', 'memory+file' or 'pinned', got {storage!r}")
        if queue_bytes is None:
            queue_bytes = _QUEUE_BYTES[storage]
        for name, value, least in (
            ("min_bytes", min_bytes, 0), ("keep_last", keep_last, 0), ("prefetch", prefetch, 0),
            ("threads", threads, 1), ("queue_bytes", queue_bytes, 1),
        ):  # fmt: skip
            _check_integer(name, value, least)
        check_codec(codec)
        if capacity is not None:
            _check_integer("capacity", capacity, 1)
        if path is not None and storage == "memory":
            raise ValueError("path: storage='memory' has no folder; leave path out")
        if storage != "pinned" and device is not None:
            raise ValueError(f"device: only storage='pinned' has one, got storage={storage!r}; leave device out")
        if storage == "pinned" and debug_delays is not None:
            raise ValueError("debug_delays: storage='pinned' has none; pass device=HuntingDevice(seed)")
        if skip is not None and not callable(skip):
            raise TypeError(f"skip: expected a function of a tensor, got {type(skip).__name__}")

        folder = spill_folder(path) if storage.endswith("file") or path is not None else None
        self.storage = storage
        accepts = is_on_cpu
        keywords = {"threads": threads, "queue_bytes": queue_bytes, "delay_seed": debug_delays}
        if storage == "pinned":
            device = device if hasattr(device, "compute_stream") else CudaDevice(device)
            accepts = device.accepts
            file = None if folder is None else Engine(folder, **keywords)
            self._engine = StreamedEngine(device, capacity=capacity, queue_bytes=queue_bytes, file=file)
        elif storage == "memory+file":
            file = self._engine = Engine(folder, **keywords, memory=capacity or machine_memory() // 2)
        else:
            file = self._engine = Engine(folder, **keywords, capacity=capacity)
        if file is not None:
            warn_if_in_memory("ActivationOffload", file, folder, stacklevel=2)

        if map_allocations and storage.endswith("file"):
            return_freed_memory(max(min_bytes, 1 << 16))

        self._keep_last, self._prefetch, self._codec = keep_last, prefetch, codec
        self._packing = Packing(
            "ActivationOffload", min_bytes=min_bytes, parameters=parameters, skip=skip, accepts=accepts,
            lossy=is_lossy(codec), copy_type=_Copy, made=self._on_copy, handed_out=self._on_saved,
        )  # fmt: skip
        self._lock = self._packing.lock
        self._last: deque[weakref.ref[_Copy]] = deque()
        self._newest = threading.local()
        self._visited: _Group | None = None
        self._window: list[weakref.ref[_Copy]] = []
        self._warned = self._closed = False
        self.reset_stats()

    # --- context ------------------------------------------------------------------------------------

    def __enter__(self) -> "ActivationOffload":
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break()
        if self._closed:
            raise RuntimeError("ActivationOffload: closed, so nothing can be offloaded; make another")
        self._packing.find_parameters()
        self._hooks = saved_tensors_hooks(self._packing.pack, self._unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        # Any such object ends what this thread entered last.
        self._hooks.__exit__(*exception)

    def synchronize(self) -> None:
        """Waits until everything offloaded so far is written and its memory is free."""
        self._engine.synchronize()
        self._report_failure()

    def close(self) -> None:
        """Ends the threads and frees the storage now; tensors still saved there are lost.

        Dropping the last reference does the same.
        """
        self._closed = True
        self._engine.close()

    def stats(self) -> dict[str, object]:
        """Counters since the start or `reset_stats`.

        - offloads, offloaded_bytes; reloads, reloaded_bytes: copies out and back that have ended;
        - forwards, forwarded_bytes: tensors handed back before their memory was given up;
        - deduplicated, deduplicated_bytes: saved tensors that an existing copy served, and the bytes of their own;
        - recomputed, recomputed_bytes: outputs of pykern's norms and activation functions, which the backward makes
          again from the tensors that these saved;
        - kept, kept_bytes: by reason: parameter, small, last (of `keep_last`), capacity (no room, or the storage
          failed), skipped (by `skip`), unsupported (sparse and other layouts, lazy conjugates,
          subclasses that don't tell what they are made of);
        - stall_seconds, queue_seconds: time that the backward waited for reads, and the forward for the queue;
        - slots, slot_bytes (in use now), peak_slots, peak_slot_bytes, extent_bytes (size of the arena or file);
        - spills, spilled_bytes: copies from memory to the file behind it; file_bytes: of the slots in use, the file's;
        - medium: "memory"; "file, direct, io_uring", "file, direct, threads" or "file, buffered"; for a folder that is
          no disk, "file, in memory"; "memory, then" one of these; or whose pinned memory.
        """
        with self._lock:
            return {
                **self._engine.counters(),
                "deduplicated": self._packing.deduplicated,
                "deduplicated_bytes": self._packing.deduplicated_bytes,
                "recomputed": self._packing.recomputed,
                "recomputed_bytes": self._packing.recomputed_bytes,
                "kept": dict(self._packing.kept),
                "kept_bytes": dict(self._packing.kept_bytes),
                "medium": self._engine.description,
            }

    def reset_stats(self) -> None:
        """Sets all counters to zero and the peaks to what is in use."""
        with self._lock:
            self._engine.reset_counters()
            self._packing.reset_counters()
            for copy in self._waiting():
                self._packing.count_kept("last", copy.resident.numel())

    # --- forward ------------------------------------------------------------------------------------

    def _on_copy(self, copy: _Copy, small: bool) -> None:
        if not small:
            self._packing.count_kept("last", copy.resident.numel())
            self._last.append(weakref.ref(copy))
            self._move_oldest()

    def _on_saved(self, saved: Saved) -> None:
        # The number of the next node to be made tells which tensors were saved by the same one.
        node = torch._C._autograd._get_sequence_nr()
        group = getattr(self._newest, "group", None)
        if group is None or group.node != node:
            group = self._newest.group = _Group(node, group)
            group.living_previous()
        group.add(saved)

    def _waiting(self) -> list[_Copy]:
        """The last copies that are still needed."""
        return [copy for copy in (reference() for reference in self._last) if copy is not None]

    def _move_oldest(self) -> None:
        """Offloads all but the last `keep_last` copies that are still needed."""
        waiting = self._waiting()
        excess = max(0, len(waiting) - self._keep_last)
        for copy in waiting[:excess]:
            size = copy.resident.numel()
            self._packing.count_kept("last", -size, -1)
            if not copy.move(self._engine, self._codec):
                self._packing.count_kept("capacity", size)
                self._report_failure()
        self._last = deque(weakref.ref(copy) for copy in waiting[excess:])

    def _report_failure(self) -> None:
        failure = self._engine.take_failure()
        if failure and not self._warned:
            self._warned = True
            warnings.warn(
                f"ActivationOffload: {failure}; activations that can't be moved stay in memory", RuntimeWarning,
                stacklevel=3,
            )  # fmt: skip

    # --- backward -----------------------------------------------------------------------------------

    def _unpack(self, packed: Packed) -> Tensor:
        if isinstance(packed, Saved) and packed.copy.resident is None:
            self._read_ahead(packed)
        return unpacked(packed, self._unpack)

    def _read_ahead(self, saved: Saved) -> None:
        """Reserves the copies of this node and of the next ones in reverse order, and lets the others go."""
        with self._lock:
            if saved.group is self._visited:
                return
            self._visited = saved.group
            wanted = {saved.copy: None}
            group: _Group | None = saved.group
            for _ in range(1 + self._prefetch):
                if group is None:
                    break
                wanted.update((member.copy, None) for member in group.members() if member.copy.item is not None)
                group = group.living_previous()
            before = [copy for copy in (reference() for reference in self._window) if copy is not None]
            for copy in wanted:
                if copy not in before:
                    copy.engine.reserve(copy.item)
            for copy in before:
                if copy not in wanted:
                    copy.engine.unreserve(copy.item)
            self._window = [weakref.ref(copy) for copy in wanted]


def _check_integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
