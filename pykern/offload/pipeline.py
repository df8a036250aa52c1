"""Runs a pipeline rank's plan: blocks of saved tensors leave and come back at the actions that the plan names."""

import contextlib
import os
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from statistics import median

import torch
from torch import Tensor

from . import recipes
from .block_store import BlockStore
from .coding import Coding, check_codec, is_lossy
from .engine import Rates
from .planning.types import Action, Plan, Transfer
from .saving import Copy, Kept, Packed, Packing, saved_tensors_hooks, unpacked
from .streams import StreamDevice
from .tensors import placeholder, plain_tensors, take_memory

# Parts of a block begin at multiples of this; large ones at those of a page, so that they go to a file without being
# copied on the way.
_PART_ALIGNMENT = 256
_PAGE = 4096
_LARGE_PART = 1 << 18


class _BlockCopy(Copy):
    """A copy that lies in a block."""

    __slots__ = ("block", "coding", "offset", "size")

    def __init__(self, resident: Tensor, *arguments: object) -> None:
        super().__init__(resident, *arguments)
        self.size = resident.numel()
        self.offset = -1
        self.block: _Block | None = None
        self.coding: Coding | None = None

    def leaving(self) -> Tensor:
        """What is copied out."""
        return self.resident if self.coding is None else self.coding.encode(self.resident)

    def data(self) -> Tensor:
        resident = self.resident
        if resident is not None:
            return resident
        part = self.block.bytes().narrow(0, self.offset, self.size)
        return part if self.coding is None else self.coding.decode(part)


class _Block:
    """What one stage saves for one microbatch, and the inputs that it received."""

    def __init__(self, owner: "PipelineOffload", action: Action) -> None:
        self.action = action
        self._owner = owner
        # Weak: what the graph drops before the block leaves need not be copied.
        self._copies: list[weakref.ref[_BlockCopy]] = []
        self._inputs: list[tuple[Tensor, Packed]] = []
        self._item = -1
        self._away = self._reserved = self._ended = False

    @property
    def is_away(self) -> bool:
        return self._away

    def add(self, copy: _BlockCopy) -> None:
        copy.block = self
        copy.coding = Coding.of(copy.resident, copy.dtype, self._owner._codec)
        if copy.coding is not None:
            copy.size = copy.coding.nbytes
        self._copies.append(weakref.ref(copy))

    def add_input(self, tensor: Tensor, packed: Packed) -> None:
        """A tensor whose memory comes and goes with the block: the runtime holds it until the backward."""
        self._inputs.append((tensor, packed))

    def living(self) -> list[_BlockCopy]:
        return [copy for copy in (reference() for reference in self._copies) if copy is not None]

    def _engine(self):
        return self._owner._store.engine

    def nbytes(self) -> int:
        return self._place()[1]

    def _place(self) -> tuple[list[tuple[_BlockCopy, int]], int]:
        """What lives, each with its offset in the block, and the block's size."""
        placed, end = [], 0
        for copy in self.living():
            alignment = _PAGE if copy.size >= _LARGE_PART else _PART_ALIGNMENT
            offset = -(-end // alignment) * alignment
            placed.append((copy, offset))
            end = offset + copy.size
        return placed, end

    def offload(self) -> int:
        """Starts copying out; how many bytes, or -1 if there is no room for them."""
        placed, nbytes = self._place()
        if not placed:
            return 0
        for copy, offset in placed:
            copy.offset = offset
        parts, offsets = [copy.leaving() for copy, _ in placed], [offset for _, offset in placed]
        self._item = self._owner._store.store(self.action[1:], parts, offsets, nbytes)
        return -1 if self._item < 0 else nbytes

    def release(self) -> bool:
        """Drops the block's memory once it is written; False if it could not be, and stays."""
        if self._item < 0 or not self._engine().settle(self._item):
            return False
        for copy in self.living():
            copy.resident = None
        for tensor, _ in self._inputs:
            take_memory(tensor, placeholder(tensor))
        self._away = True
        return True

    def reload(self) -> None:
        if self._away and not self._reserved:
            self._engine().reserve(self._item)
            self._reserved = True

    def spill(self) -> None:
        if self._item >= 0:
            self._owner._store.spill(self._item)

    def fetch(self) -> None:
        if self._away:
            self._owner._store.fetch(self._item)

    def bytes(self) -> Tensor:
        """The whole block, uint8, for use in the stream that computes now; waits for it if need be."""
        if self._ended:
            raise RuntimeError(
                f"{self._name()} was needed after its last backward action had ended, which frees it; "
                "keep such tensors by skip="
            )
        with self._owner._stalled():
            return self._engine().load(self._item)

    def restore_inputs(self) -> None:
        if self._away:
            for tensor, packed in self._inputs:
                take_memory(tensor, _unpack(packed))

    def end(self) -> None:
        """The last backward action has ended: nothing of the block is needed any more."""
        if self._ended:
            return
        self._ended = True
        for tensor, _ in self._inputs:
            take_memory(tensor, placeholder(tensor))
        self._inputs = []
        if self._item >= 0:
            if self._reserved:
                self._engine().unreserve(self._item)
            self._engine().release(self._item)

    def _name(self) -> str:
        return f"PipelineOffload: the block of chunk {self.action.chunk}, microbatch {self.action.microbatch}"


class PipelineOffload:
    """Moves what the stages of one pipeline rank save for the backward, as a plan says.

    What a stage saves in the forward of one microbatch is a block; a block leaves and comes back in one piece, at the
    actions that the plan's transfers name, and is freed when its last backward action (the whole backward, or that of
    the weights) has ended. Until then it may be unpacked any number of times: a split backward does so twice. Inputs
    that a stage received are a part of its block: while it is away, they have their size and no memory.

    The caller tells of every action of the rank, in the plan's order::

        offload = PipelineOffload(plan, rank, parameters=model)
        offload.begin_step()
        with offload.forward(chunk, microbatch, received=inputs):
            outputs = stage(*inputs)
        with offload.backward("B", chunk, microbatch):
            torch.autograd.backward(outputs, gradients)
        ...
        offload.end_step()

    Ranks that share a switch are not held to the turns that the plan gives their copies: a barrier before each copy
    would order the hosts, which run ahead of their devices. Copies that meet share the link, and the later one ends
    when it would have in turns. So where copies take about as long as what they hide behind, plan with the bandwidth
    that the ranks of a pair have while both copy.

    `SchedulePipeOffload` does this on torch.distributed.pipelining. Blocks need not look the same from one microbatch,
    or step, to the next. Gradients are equal bit for bit to those without offload, unless there is a codec.

    Args:
        plan: from `pykern.plan`.
        rank: whose of the plan's transfers to run.
        storage: "memory", a second arena of ordinary memory; "file", an unnamed file for all blocks, read and written
            around the page cache where the file system allows; "pinned", the host's memory, for blocks on a GPU. With
            "memory" and "pinned", blocks of the plan's tier "file" go to a file as well.
        path: folder of the file; the system's temporary folder by default.
        min_bytes: smaller saved tensors stay.
        codec: None, or a lossy one of `StagingLayout`, "float8_e4m3" or "int8": see `ActivationOffload`. What comes
            back from a block that left has the codec's error, what stayed has none.
        parameters: a module, or tensors, whose storages stay. Parameters are known without it, except by detached
            views of them; buffers are not.
        skip: called with each remaining saved tensor; True keeps it.
        threads: threads that copy, per engine.
        map_allocations: with a file, set glibc's M_MMAP_THRESHOLD so that freed memory leaves the process; see
            `ActivationOffload`.
        device: with storage="pinned": the GPU, by default the current one; or another `StreamDevice`.
        sizes_known: whether the plan was made with the sizes of blocks: each then has its slot, and what is stored is
            allocated once. With "pinned", larger blocks than that stay.

    Raises:
        ValueError, TypeError: an argument is not as above.
        OSError: the file can't be made.
        RuntimeError: from an action, if it is not the plan's next one, or a read fails. A failed write keeps the
            block, and warns once.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        *,
        storage: str = "memory",
        path: str | os.PathLike | None = None,
        min_bytes: int = 1 << 12,
        codec: str | None = None,
        parameters: torch.nn.Module | Iterable[Tensor] = (),
        skip: Callable[[Tensor], bool] | None = None,
        threads: int = 2,
        map_allocations: bool = True,
        device: StreamDevice | str | None = None,
        sizes_known: bool = True,
        debug_delays: int | None = None,
    ) -> None:
        check_codec(codec)
        self._codec = codec
        self._store = BlockStore(storage, path, threads, device, map_allocations, debug_delays)
        self._packing = Packing(
            "PipelineOffload", min_bytes=min_bytes, parameters=parameters, skip=skip,
            accepts=self._store.accepts, lossy=is_lossy(codec), copy_type=_BlockCopy, made=self._on_copy,
        )  # fmt: skip
        self._blocks: dict[tuple[int, int], _Block] = {}
        self._newest: _Block | None = None
        self._warned = False
        self._next = self._transferred = 0
        self.measuring = False
        """Whether the times of actions are taken, which makes an accelerator wait for each to end."""
        self.rank = rank
        self.set_plan(plan, sizes_known)

    def set_plan(self, plan: Plan, sizes_known: bool = True) -> None:
        """Follow another plan from the next step on."""
        ranks = len(plan.order.ranks)
        if not 0 <= self.rank < ranks:
            raise ValueError(f"rank: the plan has ranks 0 to {ranks - 1}, got {self.rank}")
        if self._blocks:
            raise RuntimeError("plan: can't change within a step; end it first")
        # Opening closes the engine of the plan before, and may fail.
        self._closed = True
        self._store.open(plan, self.rank, sizes_known)
        self._closed = False
        self.plan = plan
        self._actions = plan.order.ranks[self.rank]
        self._transfers = plan.transfers[self.rank]
        self.reset_counters()

    def synchronize(self) -> None:
        """Waits until all copies have ended: what the counters tell of the storage is then settled."""
        self._store.engine.synchronize()

    def close(self) -> None:
        """Ends the threads and frees the storage now. Dropping the last reference does the same."""
        self._closed = True
        self._store.close()

    def measure_bandwidth(self) -> Rates:
        """Bytes per second of the storage, out and back; before `begin_step` or after `end_step`."""
        return self._store.measure()

    # --- a step -------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Forgets the blocks of a step that was not ended, and begins with the plan's first action."""
        if self._closed:
            raise RuntimeError("PipelineOffload: closed, so nothing can be offloaded; set a plan, or make another")
        for block in self._blocks.values():
            block.end()
        self._blocks.clear()
        self._newest = None
        self._next = self._transferred = 0
        self._live = self._live_bytes = 0
        self._packing.find_parameters()

    def before_action(self) -> None:
        """Runs the transfers that are due before the next action, unless that has been done.

        To be called as early as the action before has ended, so that copies run while the rank waits for its input.
        """
        while self._transferred < len(self._transfers) and self._transfers[self._transferred].before <= self._next:
            transfer = self._transfers[self._transferred]
            self._transferred += 1
            self._run(transfer)

    @contextlib.contextmanager
    def forward(
        self, chunk: int, microbatch: int, *, received: Iterable[Tensor] = (), given: Iterable[Tensor] = ()
    ) -> Iterator[list[Tensor]]:
        """Around the forward of a chunk, whose saved tensors become a block.

        received: inputs made for this forward alone, which nobody but the backward needs any more. given: other
        inputs, which stay, whatever shows them. Gives a list of the received inputs; the tensors that it holds at the
        end are those whose memory comes and goes, for callers that make others of the same memory.
        """
        action = self._begin("F", chunk, microbatch)
        held = list(received)
        for tensor in (plain for each in held for plain in plain_tensors(each)):
            # If a stage of this rank made it, what that follows from belongs to another block, and may be away by now.
            recipes.forget(tensor)
        block = self._newest = _Block(self, action)
        self._packing.begin(held, given)
        start = self._now()
        with saved_tensors_hooks(self._packing.pack, _unpack):
            yield held
        self._measure(action, self._now() - start)
        for tensor in held:
            packed = self._packing.pack(tensor)
            if not isinstance(packed, Kept):
                block.add_input(tensor, packed)
        self._blocks[chunk, microbatch] = block
        size = self._sizes[chunk, microbatch] = block.nbytes()
        self._add_live(1, size)
        self._next += 1

    @contextlib.contextmanager
    def loss(self, chunk: int, microbatch: int) -> Iterator[None]:
        """Around what is computed from the forward that ended last: what it saves is a part of the same block."""
        block = self._blocks.get((chunk, microbatch))
        if block is None or block is not self._newest:
            yield
            return
        start = self._now()
        with saved_tensors_hooks(self._packing.pack, _unpack):
            yield
        self._measure(block.action, self._now() - start, again=True)
        before, size = self._sizes[chunk, microbatch], block.nbytes()
        self._sizes[chunk, microbatch] = size
        self._add_live(0, size - before)

    @contextlib.contextmanager
    def backward(self, kind: str, chunk: int, microbatch: int) -> Iterator[None]:
        """Around a backward action: "B", the whole one, "I", that of the input, or "W", that of the weights."""
        action = self._begin(kind, chunk, microbatch)
        block = self._blocks.get((chunk, microbatch))
        stalled = self._stalls.get(action, 0.0)
        start = self._now()
        if block is not None:
            block.restore_inputs()
        yield
        waited = self._stalls.get(action, 0.0) - stalled
        self._measure(action, self._now() - start - waited)
        if block is not None and kind != "I":
            del self._blocks[chunk, microbatch]
            if not block.is_away or block._reserved:
                self._add_live(-1, -self._sizes[chunk, microbatch])
            block.end()
        self._next += 1

    def end_step(self) -> None:
        self.before_action()
        if self._next != len(self._actions):
            done, asked = self._next, len(self._actions)
            raise RuntimeError(f"PipelineOffload: the step ended after {done} of the plan's {asked} actions")

    # --- account ------------------------------------------------------------------------------------

    def reset_counters(self) -> None:
        """Sets all counters to zero; not within a step."""
        self._live = self._live_bytes = self._peak = self._peak_bytes = 0
        self._offloads = self._offloaded_bytes = self._stayed = 0
        self._stalls: dict[Action, float] = {}
        self._seconds: dict[tuple[str, int], list[float]] = {}
        self._sizes: dict[tuple[int, int], int] = {}
        self._packing.reset_counters()
        self._store.engine.reset_counters()

    def counters(self) -> dict[str, object]:
        """Since the start, `reset_counters` or `set_plan`:

        - offloads, offloaded_bytes: blocks that left, and their bytes;
        - stayed: blocks that were to leave, but for which the storage had no room or failed;
        - peak_blocks, peak_bytes: most blocks (bytes of blocks) that were in memory at once, from the start of a
          block's forward, or of its way back, to its release or end; planned_peak_blocks: what the plan says of it;
        - stall_seconds, and stalls, by action: time that actions waited for copies out and back;
        - block_bytes: by chunk, the largest block; seconds: by kind and chunk, the median time of an action, while
          `measuring`;
        - kept, kept_bytes: saved tensors that stayed, by reason;
        - engine: the counters of the engine that copies.
        """
        block_bytes: dict[int, int] = {}
        for (chunk, _), size in self._sizes.items():
            block_bytes[chunk] = max(size, block_bytes.get(chunk, 0))
        return {
            "offloads": self._offloads,
            "offloaded_bytes": self._offloaded_bytes,
            "stayed": self._stayed,
            "peak_blocks": self._peak,
            "planned_peak_blocks": self.plan.peak_blocks[self.rank],
            "peak_bytes": self._peak_bytes,
            "stall_seconds": sum(self._stalls.values()),
            "stalls": dict(self._stalls),
            "block_bytes": block_bytes,
            "seconds": {key: median(values) for key, values in self._seconds.items()},
            "kept": dict(self._packing.kept),
            "kept_bytes": dict(self._packing.kept_bytes),
            "engine": self._store.engine.counters(),
        }

    # --- inner --------------------------------------------------------------------------------------

    def _begin(self, kind: str, chunk: int, microbatch: int) -> Action:
        self.before_action()
        action = Action(kind, chunk, microbatch)
        planned = self._actions[self._next] if self._next < len(self._actions) else "the end of the step"
        if action != planned:
            raise RuntimeError(f"PipelineOffload: action {self._next} of rank {self.rank} is {planned}, got {action}")
        return action

    def _on_copy(self, copy: _BlockCopy, small: bool) -> None:
        if not small:
            self._newest.add(copy)

    def _run(self, transfer: Transfer) -> None:
        place = (transfer.chunk, transfer.microbatch)
        block = self._blocks.get(place)
        if block is None:
            return
        if transfer.kind == "offload":
            size = block.offload()
            if size < 0:
                self._stay()
            else:
                self._offloads += 1
                self._offloaded_bytes += size
        elif transfer.kind == "release":
            with self._stalled():
                away = block.release()
            if away:
                self._add_live(-1, -self._sizes[place])
            elif block._item >= 0:
                self._stay()
        elif transfer.kind == "reload":
            if block.is_away:
                self._add_live(1, self._sizes[place])
            block.reload()
        elif transfer.kind == "spill":
            block.spill()
        elif transfer.kind == "fetch":
            block.fetch()

    def _stay(self) -> None:
        self._stayed += 1
        failure = self._store.engine.take_failure()
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"PipelineOffload: {failure or 'the storage has no room'}; blocks that can't be moved stay in memory",
                RuntimeWarning, stacklevel=4,
            )  # fmt: skip

    def _add_live(self, blocks: int, bytes_: int) -> None:
        self._live += blocks
        self._live_bytes += bytes_
        self._peak = max(self._peak, self._live)
        self._peak_bytes = max(self._peak_bytes, self._live_bytes)

    @contextlib.contextmanager
    def _stalled(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self._next < len(self._actions):
            action = self._actions[self._next]
            self._stalls[action] = self._stalls.get(action, 0.0) + time.perf_counter() - start

    def _now(self) -> float:
        if self.measuring and torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter()

    def _measure(self, action: Action, seconds: float, again: bool = False) -> None:
        if not self.measuring:
            return
        values = self._seconds.setdefault((action.kind, action.chunk), [])
        if again:
            values[-1] += seconds
        else:
            values.append(seconds)


def _unpack(packed: Packed) -> Tensor:
    return unpacked(packed, _unpack)
