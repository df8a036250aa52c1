"""Our orders in the hands of torch.distributed.pipelining: its validator, communication, dry run and liveness, and its
own schedules beside ours."""

from itertools import product
from types import SimpleNamespace

import pytest
from torch import nn
from torch.distributed.pipelining import schedules as pipelining

from pykern.offload.planning.orders import SCHEDULES, make_order
from pykern.offload.planning.simulation import live_blocks
from pykern.offload.planning.types import Order


def as_torch(order: Order) -> dict[int, list]:
    return {
        rank: [pipelining._Action.from_str(f"{order.stage(rank, a.chunk)}{a.kind}{a.microbatch}") for a in actions]
        for rank, actions in enumerate(order.ranks)
    }


def stages(order: Order) -> list[SimpleNamespace]:
    """What the constructors of torch's schedules look at, of the stages of rank 0."""
    return [
        SimpleNamespace(
            stage_index=order.stage(0, chunk), num_stages=order.devices * order.chunks, group_rank=0,
            group_size=order.devices, is_first=chunk == 0, is_last=False, has_backward=True, submod=nn.Identity(),
        )
        for chunk in range(order.chunks)
    ]  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_torch_accepts_and_runs_every_order(schedule):
    for devices, chunks, microbatches, split in product((1, 2, 3, 4), (1, 2, 3), (1, 4, 7), (True, False)):
        order = make_order(schedule, devices, chunks, microbatches, split_backward=split)
        ours, count = as_torch(order), devices * chunks
        ranks = pipelining._validate_schedule(ours, devices, count, microbatches)
        assert ranks == {order.stage(rank, chunk): rank for rank in range(devices) for chunk in range(chunks)}
        runtime = pipelining._PipelineScheduleRuntime(stages(order), microbatches)
        runtime._prepare_schedule_with_comms(as_torch(order))
        sent = pipelining._add_send_recv(as_torch(order), ranks.__getitem__, count)
        ran = pipelining._simulate_comms_compute(sent, ranks.__getitem__, count)
        computed = set().union(*ours.values())
        for rank in range(devices):
            for lowered in (runtime.pipeline_order_with_comms[rank], ran[rank]):
                assert [action for action in lowered if action in computed] == ours[rank]


@pytest.mark.parametrize(("devices", "chunks", "microbatches"), [(2, 2, 4), (4, 2, 8), (4, 3, 12), (8, 2, 16)])
def test_interleaved_1f1b_is_torchs(devices, chunks, microbatches):
    order = make_order("1f1b_interleaved", devices, chunks, microbatches)
    theirs = pipelining.ScheduleInterleaved1F1B(stages(order), microbatches).pipeline_order
    assert {rank: [a for a in actions if a is not None] for rank, actions in theirs.items()} == as_torch(order)


@pytest.mark.parametrize(("devices", "microbatches"), [(2, 3), (2, 8), (4, 7), (4, 16), (5, 12), (8, 16)])
def test_zb_v_is_torchs(devices, microbatches):
    order = make_order("zb_v", devices, 2, microbatches)
    theirs = pipelining.ScheduleZBVZeroBubble(stages(order), microbatches).pipeline_order
    assert {rank: [a for a in actions if a is not None] for rank, actions in theirs.items()} == as_torch(order)


@pytest.mark.skipif(
    not hasattr(pipelining, "analyze_pipeline_activation_liveness"), reason="torch before 2.15 has no liveness analysis"
)
def test_torchs_liveness_counts_as_many_blocks():
    for schedule, devices, chunks, split in product(SCHEDULES, (1, 2, 3, 4, 8), (1, 2, 3, 4), (True, False)):
        order = make_order(schedule, devices, chunks, 2 * devices + 1, split_backward=split)
        finished = SimpleNamespace(_n_microbatches=order.microbatches, pipeline_order=as_torch(order))
        for rank in range(devices):
            liveness = pipelining.analyze_pipeline_activation_liveness(
                finished, pp_rank=rank, stage_indices=[order.stage(rank, chunk) for chunk in range(chunks)],
                granularity="stage_microbatch",
            )  # fmt: skip
            assert liveness.num_slots == max(live_blocks(order, rank))
