"""The planner's schedules on torch.distributed.pipelining, with and without offload."""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, distributed
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining.schedules import _Action, _batch_p2p, _ComputationType, _PipelineScheduleRuntime
from torch.distributed.pipelining.stage import _PipelineStageBase
from torch.nn.parallel import DistributedDataParallel

from .pipeline import PipelineOffload
from .planning.orders import make_order
from .planning.planner import plan, replan
from .planning.types import Order, Plan, Times
from .sends import Step, safe_waits
from .stages import ReceiveBuffers, Watched, drop_outputs, without_messages_to_itself
from .streams import StreamDevice

_SENDS = ("SEND_F", "SEND_B")
_WAITS = ("WAIT_SEND_F", "WAIT_SEND_B")
_RECEIVES = ("RECV_F", "RECV_B")
_COMPUTATIONS = ("F", "B", "I", "W")


class SchedulePlanned(_PipelineScheduleRuntime):
    """Any schedule of the planner's table, run by PyTorch's own pipeline runtime.

    The modules of stages may be sharded by `fully_shard`, over another dimension of the mesh than the pipeline's, and
    may take and return DTensors; or be wrapped by DistributedDataParallel, with whole backwards and stages that were
    told `input_args` and `output_args`.

    Args:
        schedule: "gis", "gis_h", "po", "1f1b", "1f1b_interleaved", "zb_v", "v_half" or "v_min".
        stages: this rank's stages, of torch.distributed.pipelining, sorted by index: those of
            `pykern.stages_of_rank(schedule, rank, devices, chunks)`.
        n_microbatches: into how many the batch is split.
        loss_fn: f(output, target) -> scalar loss of one microbatch. Without it, forwards only.
        group: microbatches per group of GIS, and between two chunks of PO; the devices, and half of them, by default.
        split_backward: whether backwards of the input and of the weights are separate actions. None: as the schedule
            was published, which is whole ones for 1F1B and separate ones for the others. Torch 2.11 can't separate
            those of a stage with a torch.autograd.Function, as pykern's ops are: False, there.
        keywords: further ones of PyTorch's schedules: args_chunk_spec, kwargs_chunk_spec, output_merge_spec,
            scale_grads.

    Raises:
        ValueError: an unknown schedule; stages that are not those of this rank; a split backward of stages in
            DistributedDataParallel.
    """

    def __init__(
        self,
        schedule: str,
        stages: list[_PipelineStageBase],
        n_microbatches: int,
        loss_fn: Callable[..., Tensor] | None = None,
        *,
        group: int | None = None,
        split_backward: bool | None = None,
        **keywords: Any,
    ) -> None:
        if not stages:
            raise ValueError("stages: expected this rank's stages, got none")
        devices, count = stages[0].group_size, stages[0].num_stages
        if count % devices:
            raise ValueError(
                f"stages: expected the same number on each of {devices} ranks, got {count} altogether; "
                f"split the model into a multiple of {devices}"
            )
        self.order = make_order(
            schedule, devices, count // devices, n_microbatches, group=group, split_backward=split_backward
        )
        expected = _stages_of_rank(self.order, stages[0].group_rank, count // devices, schedule)
        if [stage.stage_index for stage in stages] != expected:
            raise ValueError(
                f"stages: rank {stages[0].group_rank} of {schedule!r} has the stages {expected}, "
                f"got {[stage.stage_index for stage in stages]}"
            )
        self._splits = any(action.kind == "W" for actions in self.order.ranks for action in actions)
        if self._splits and any(isinstance(stage.submod, DistributedDataParallel) for stage in stages):
            raise ValueError(
                "split_backward: DistributedDataParallel averages gradients in whole backwards alone; "
                "pass split_backward=False, or use fully_shard"
            )
        super().__init__(stages, n_microbatches, loss_fn, **keywords)
        self.pipeline_order = {
            rank: [
                _Action(self.order.stage(rank, chunk), _ComputationType(kind), microbatch)
                for kind, chunk, microbatch in actions
            ]
            for rank, actions in enumerate(self.order.ranks)
        }
        self._prepare_schedule_with_comms(self.pipeline_order)
        self._chunk_of = {stage.stage_index: chunk for chunk, stage in enumerate(stages)}

    def _initialize_stages(self, *arguments: Any, **keywords: Any) -> None:
        with contextlib.ExitStack() as stack:
            for stage in self._stages:
                stack.enter_context(without_messages_to_itself(stage))
            super()._initialize_stages(*arguments, **keywords)

    def _assert_unsharded(self, stage: _PipelineStageBase) -> None:
        # The first thing that the runtime does for a computation: before it waits for what it needs.
        super()._assert_unsharded(stage)
        if self._splits:
            # A split backward looks for the parameters that the forward used. Inner modules may have let them go since.
            for module in stage.submod.modules():
                if isinstance(module, FSDPModule):
                    module.unshard()


def _stages_of_rank(order: Order, rank: int, chunks: int, schedule: str) -> list[int]:
    if order.chunks != chunks:
        raise ValueError(
            f"stages: {schedule!r} has {order.chunks} stages per rank, got {chunks}"
            + "".join(f"; {note}" for note in order.notes)
        )
    return [order.stage(rank, chunk) for chunk in range(chunks)]


def stages_of_rank(schedule: str, rank: int, devices: int, chunks: int) -> list[int]:
    """The indices of the stages that a rank holds, of devices * chunks altogether."""
    return _stages_of_rank(make_order(schedule, devices, chunks, 1), rank, chunks, schedule)


class ScheduleGIS(SchedulePlanned):
    """Grouped interleaved schedule: interleaved 1F1B with less memory, and less still with smaller groups.

    Rank i of d, with v stages each, holds at most group * (v - 1) + d - i blocks, where interleaved 1F1B holds
    d * (v - 1) + 2 * (d - i) - 1. Groups of d microbatches (the default) idle for (d - 1) * (F + I), those of d / 2 for
    (v - 1) * d / 2 * (F + I - W) more. From PipeOffload (arXiv 2503.01328).

    Arguments are those of `SchedulePlanned` without the first.
    """

    def __init__(
        self, stages: list[_PipelineStageBase], n_microbatches: int, loss_fn: Callable[..., Tensor] | None = None,
        **keywords: Any,
    ) -> None:  # fmt: skip
        super().__init__("gis", stages, n_microbatches, loss_fn, **keywords)


class SchedulePipeOffload(SchedulePlanned):
    """PipeOffload: what stages save for the backward waits outside of the device's memory (arXiv 2503.01328).

    With the schedule "po" and half of the chunks offloaded, a rank holds a quarter of what it would otherwise; with
    all of them, a few blocks whatever the number of stages. What leaves is what autograd saves, and the inputs that a
    stage received; outputs go once they are sent. Inputs and outputs of the whole model, and what the caller
    holds, stay. Gradients are equal bit for bit to those of the same schedule without offload.

    Times, sizes and bandwidths that are not given are measured in the first step, whose blocks leave as soon and come
    back as late as they can, and the plan is made anew from them for the second step, on all ranks alike.

    Args:
        stages, n_microbatches, loss_fn, group, split_backward, keywords: as for `SchedulePlanned`.
        schedule: any of its names.
        offload: "half" or "full" of the chunks, or how many, the first ones first; "none", to let a budget choose; or
            a Plan made for this schedule.
        storage: "memory", "file" or "pinned"; see `PipelineOffload`.
        path: folder of the file.
        times: seconds of each stage's actions, as `pykern.plan` takes them.
        block_bytes: what each stage saves for the backward of one microbatch.
        bandwidth: bytes per second of copies out and back.
        planning: further arguments of `pykern.plan`, such as budget, host_budget, file_bandwidth, directions, stall.
        min_bytes, codec, skip, threads, map_allocations, device: as for `PipelineOffload`.

    `offload` (a PipelineOffload) has the plan and the counters.
    """

    def __init__(
        self,
        stages: list[_PipelineStageBase],
        n_microbatches: int,
        loss_fn: Callable[..., Tensor] | None = None,
        *,
        schedule: str = "po",
        offload: str | int | Plan = "half",
        storage: str = "memory",
        path: str | os.PathLike | None = None,
        times: Times | Sequence | None = None,
        block_bytes: int | Sequence[int] | None = None,
        bandwidth: float | tuple[float, float] | None = None,
        planning: Mapping[str, Any] | None = None,
        group: int | None = None,
        split_backward: bool | None = None,
        min_bytes: int = 1 << 12,
        codec: str | None = None,
        skip: Callable[[Tensor], bool] | None = None,
        threads: int = 2,
        map_allocations: bool = True,
        device: StreamDevice | str | None = None,
        debug_delays: int | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(
            schedule, stages, n_microbatches, loss_fn, group=group, split_backward=split_backward, **keywords
        )
        if isinstance(offload, Plan):
            first = offload
            self._measured, self._is_guessed = {}, False
        else:
            given = {"times": times, "bytes": block_bytes, "bandwidth": bandwidth}
            # Whatever is chosen leaves at once and comes back late, as if copies took no time.
            guessed = {"times": (1.0, 1.0, 1.0), "bytes": 1, "bandwidth": 1e6}
            self._measured = {name: value for name, value in given.items() if value is not None}
            self._is_guessed = len(self._measured) < len(given)
            known = guessed if self._is_guessed else self._measured
            first = plan(
                schedule, len(self.order.ranks), self.order.chunks, n_microbatches, offload=offload, group=group,
                split_backward=split_backward, **known, **(planning or {}),
            )  # fmt: skip
        if first.order.ranks != self.order.ranks:
            raise ValueError("offload: the plan is for another order of actions; make it for this schedule and counts")
        self.offload = PipelineOffload(
            first, self.rank, storage=storage, path=path, min_bytes=min_bytes, codec=codec, skip=skip,
            threads=threads,
            parameters=[tensor for stage in stages for tensor in (*stage.submod.parameters(), *stage.submod.buffers())],
            map_allocations=map_allocations, device=device, sizes_known=not self._is_guessed, debug_delays=debug_delays,
        )  # fmt: skip
        self.offload.measuring = self._is_guessed
        self._buffers = {stage.stage_index: ReceiveBuffers(stage) for stage in stages}
        self._stage_of = {stage.stage_index: stage for stage in stages}
        self._waits = safe_waits(
            [_steps(self.pipeline_order_with_comms[rank]) for rank in range(len(self.order.ranks))]
        )
        self._sends: dict[tuple[str, int, int], list] = {}
        self._performed = 0
        # Whose outputs the next stage has, on this same rank.
        self._passed_on: tuple[_PipelineStageBase, int] | None = None
        for name in _SENDS:
            self._comp_type_to_function_map[_ComputationType(name)] = self._send
        for name in _WAITS:
            if name in _ComputationType.__members__:
                self._comp_type_to_function_map[_ComputationType(name)] = _nothing

    # --- what torch's runtime calls -----------------------------------------------------------------

    def _initialize_stages(self, *arguments: Any, **keywords: Any) -> None:
        super()._initialize_stages(*arguments, **keywords)
        for buffers in self._buffers.values():
            buffers.empty()

    def _step_microbatches(self, *arguments: Any, **keywords: Any) -> None:
        self._performed, self._passed_on = 0, None
        self._sends.clear()
        if self._has_backward:
            self.offload.begin_step()
        with contextlib.ExitStack() as stack:
            for stage in self._stages:
                stack.enter_context(
                    Watched(stage, self._buffers[stage.stage_index], self._around_forward, self._around_backward)
                )
            super()._step_microbatches(*arguments, **keywords)
        for works in self._sends.values():
            _wait(works)
        self._sends.clear()
        if self._has_backward:
            self.offload.end_step()
            if self._is_guessed:
                self._plan_anew()

    def _assert_unsharded(self, stage: _PipelineStageBase) -> None:
        super()._assert_unsharded(stage)
        self._before_computation()

    def _maybe_compute_loss(
        self, stage: _PipelineStageBase, output: Any, target_mbs: Any, mb_index: int, *rest
    ) -> None:
        context = contextlib.nullcontext()
        if self._has_backward and stage.is_last:
            context = self.offload.loss(self._chunk_of[stage.stage_index], mb_index)
        with context:
            super()._maybe_compute_loss(stage, output, target_mbs, mb_index, *rest)

    # --- what they do -------------------------------------------------------------------------------

    def _plan_anew(self) -> None:
        """From what all ranks measured in the step that has ended; given values stay."""
        counters = self.offload.counters()
        seconds, sizes = counters["seconds"], counters["block_bytes"]
        own = {}
        for stage in self._stages:
            chunk = self._chunk_of[stage.stage_index]
            whole = seconds.get(("B", chunk), 0.0)
            backward = seconds.get(("I", chunk), whole / 2), seconds.get(("W", chunk), whole / 2)
            own[stage.stage_index] = (seconds["F", chunk], *backward, sizes[chunk])
        group = self._stages[0].group
        ranks: list[Any] = [None] * len(self.order.ranks)
        distributed.all_gather_object(ranks, (own, self.offload.measure_bandwidth()), group=group)
        stages = [values for _, values in sorted(item for stages, _ in ranks for item in stages.items())]
        forward, backward_input, backward_weight, block_bytes = zip(*stages, strict=True)
        out, back = (min(values) for values in zip(*(rates for _, rates in ranks), strict=True))
        measured = {
            "times": Times(forward, backward_input, backward_weight), "bytes": block_bytes, "bandwidth": (out, back),
        }  # fmt: skip
        self.offload.set_plan(replan(self.offload.plan, **{**measured, **self._measured}))
        self.offload.measuring = self._is_guessed = False

    def _before_computation(self) -> None:
        if self._passed_on is not None:
            drop_outputs(*self._passed_on)
            self._passed_on = None
        due = self._waits[self.rank]
        for message in [message for message in self._sends if due[message] <= self._performed]:
            _wait(self._sends.pop(message))
        if self._has_backward:
            self.offload.before_action()

    def _around_forward(
        self, stage: _PipelineStageBase, microbatch: int, received: list[Tensor], given: list[Tensor]
    ) -> contextlib.AbstractContextManager:
        self._performed += 1
        if not self._has_backward:
            return contextlib.nullcontext([])
        if stage.stage_index + 1 in self._stage_of:
            self._passed_on = stage, microbatch
        return self.offload.forward(self._chunk_of[stage.stage_index], microbatch, received=received, given=given)

    def _around_backward(
        self, stage: _PipelineStageBase, kind: str, microbatch: int
    ) -> contextlib.AbstractContextManager:
        self._performed += 1
        if not self._has_backward:
            return contextlib.nullcontext()
        return self.offload.backward(kind, self._chunk_of[stage.stage_index], microbatch)

    def _send(self, action: _Action, context: Any) -> None:
        """Sends without keeping what was sent until the end of the step, as torch before 2.15 does."""
        stage = self._stage_of[action.stage_index]
        forward = action.computation_type.value == "SEND_F"
        get = stage.get_fwd_send_ops if forward else stage.get_bwd_send_ops
        self._sends[_message(action)] = _batch_p2p(get(action.microbatch_index))
        if forward:
            drop_outputs(stage, action.microbatch_index)


def _nothing(action: _Action, context: Any) -> None:
    pass


def _wait(works: list) -> None:
    for work in works:
        work.wait()
    works.clear()


def _message(action: _Action) -> tuple[str, int, int]:
    return action.computation_type.value, action.stage_index, action.microbatch_index


def _steps(actions: list[_Action]) -> list[Step]:
    """A rank's actions as `safe_waits` looks at them."""
    steps, received = [], set()
    for action in actions:
        name, stage, microbatch = _message(action)
        if name in _SENDS:
            steps.append(Step("send", (name, stage, microbatch)))
        elif name in _RECEIVES:
            sender = ("SEND_F", stage - 1, microbatch) if name == "RECV_F" else ("SEND_B", stage + 1, microbatch)
            received.add(sender)
            steps.append(Step("receive", sender))
        elif name in _COMPUTATIONS:
            senders = {"F": ("SEND_F", stage - 1), "B": ("SEND_B", stage + 1), "I": ("SEND_B", stage + 1)}
            needed = senders.get(name)
            message = (*needed, microbatch) if needed else None
            steps.append(Step("compute", needs=(message,) if message in received else ()))
    return steps
