"""Pipelines whose stages are parallel in themselves: sharded by FSDP2, averaged by DDP, made of DTensors."""

import inspect
from typing import NamedTuple

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel

import pykern

from ..support_distributed import run_processes
from .support_pipeline import WIDTH, hasty_plan, loss_of, make_batch, make_stage, plain_gradients

RANKS, CHUNKS, MICROBATCHES, STEPS = 2, 2, 4, 2


class Case(NamedTuple):
    kind: str
    schedule: str
    split: bool
    offload: bool


CASES = [
    Case("sharded", "gis", False, True),
    Case("sharded", "gis", True, False),
    Case("sharded", "po", True, True),
    Case("sharded", "zb_v", True, True),
    Case("averaged", "gis", False, True),
    Case("tensors", "gis", False, False),
    Case("tensors", "gis", False, True),
    Case("tensors", "po", True, True),
    Case("tensors", "zb_v", True, True),
]
# Torch 2.11 hands no DTensors from stage to stage.
HANDS_TENSORS = "get_mesh" in inspect.signature(PipelineStage).parameters
CASES = [case for case in CASES if HANDS_TENSORS or case.kind != "tensors"]


def make_pipeline_stage(kind: str, index: int, mesh: DeviceMesh) -> PipelineStage:
    module, keywords = make_stage("feedforward", index), {}
    if kind == "sharded":
        # Every linear layer lets its weights go after the forward, and the split backward must find them again.
        for part in module:
            if isinstance(part, nn.Linear):
                fully_shard(part, mesh=mesh["inner"], reshard_after_forward=True)
        fully_shard(module, mesh=mesh["inner"])
    elif kind == "averaged":
        module = DistributedDataParallel(module, process_group=mesh["inner"].get_group())
        x = torch.zeros(1, 6, WIDTH, requires_grad=True)
        keywords = {"input_args": x if index else x.detach(), "output_args": x}
    else:
        module = distribute_module(module, mesh["inner"])
        keywords = {"get_mesh": lambda *names: mesh["inner"]}
    group = mesh["outer"].get_group()
    return PipelineStage(module, index, RANKS * CHUNKS, torch.device("cpu"), group=group, **keywords)


def share(kind: str, batch: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """What one rank has of a batch: one row of each microbatch, or the half of all rows."""
    if kind == "tensors":
        return distribute_tensor(batch, mesh["inner"], [Shard(1)])
    return batch[mesh["inner"].get_local_rank() :: 2].contiguous()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def watch(schedule, stage: PipelineStage) -> dict[str, list[bool]]:
    """Whether storages of the stage's inputs and outputs are there still when its blocks come back, in one step."""
    storages, alive, run = [], {"input": [], "output": []}, schedule.offload._run

    def remember(module, arguments, output):
        tensors = {"input": arguments[0], "output": output}
        storages.append({name: StorageWeakRef(x.to_local().untyped_storage()) for name, x in tensors.items()})

    def look(transfer):
        if transfer.kind == "reload" and transfer.chunk == 0:
            for name, storage in storages[transfer.microbatch].items():
                alive[name].append(not storage.expired())
        run(transfer)

    schedule.offload._run = look
    stage.submod.register_forward_hook(remember)
    return alive


def run_case(case: Case, mesh: DeviceMesh) -> dict:
    kind, name, split, offload = case
    indices = pykern.stages_of_rank(name, mesh["outer"].get_local_rank(), RANKS, CHUNKS)
    stages = [make_pipeline_stage(kind, index, mesh) for index in indices]
    schedule = pykern.SchedulePlanned(name, stages, MICROBATCHES, loss_of, split_backward=split)
    alive = {}
    if offload:
        schedule = pykern.SchedulePipeOffload(
            stages, MICROBATCHES, loss_of, schedule=name, offload=hasty_plan(schedule.order, range(CHUNKS)),
            split_backward=split, min_bytes=256, debug_delays=3,
        )  # fmt: skip
    gradients = {}
    for step in range(STEPS):
        # The first step also tries out shapes.
        if offload and kind == "tensors" and step == STEPS - 1:
            alive = watch(schedule, stages[0])
        x, target = (share(kind, part, mesh) for part in make_batch(MICROBATCHES, step))
        for stage in stages:
            stage.submod.zero_grad()
        last = {"target": target} if any(stage.is_last for stage in stages) else {}
        schedule.step(*((x,) if stages[0].is_first else ()), return_outputs=False, **last)
        for stage in stages:
            gradients[step, stage.stage_index] = [whole(p.grad) for p in stage.submod.parameters()]
    counters = None
    if offload:
        schedule.offload.synchronize()
        counters = schedule.offload.counters()
    return {"gradients": gradients, "counters": counters, "alive": alive, "is_first": stages[0].is_first}


def cases() -> dict[Case, dict]:
    mesh = init_device_mesh("cpu", (RANKS, distributed.get_world_size() // RANKS), mesh_dim_names=("outer", "inner"))
    found: dict = {case: run_case(case, mesh) for case in CASES}
    stages = [make_pipeline_stage("averaged", mesh["outer"].get_local_rank() + RANKS * c, mesh) for c in range(CHUNKS)]
    try:
        pykern.ScheduleGIS(stages, MICROBATCHES, loss_of)
    except ValueError as error:
        found["refused"] = str(error)
    return found


@pytest.fixture(scope="module")
def results():
    return run_processes(2 * RANKS, cases)


@pytest.fixture(scope="module")
def expected():
    return [plain_gradients("feedforward", RANKS * CHUNKS, MICROBATCHES, step)[0] for step in range(STEPS)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_gradients_are_those_of_one_process(case, results, expected):
    for rank, found in enumerate(results):
        # The bits of the same parallel stages without offload, which other ranks may have.
        kin = [other for other in CASES if other.kind == case.kind and not other.offload]
        plain = {place: g for one in results for other in kin[:1] for place, g in one[other]["gradients"].items()}
        for (step, stage), gradients in found[case]["gradients"].items():
            for number, (actual, exact) in enumerate(zip(gradients, expected[step][stage], strict=True)):
                torch.testing.assert_close(actual, exact, msg=lambda text: f"rank {rank}, stage {stage}: {text}")
                assert not plain or torch.equal(actual, plain[step, stage][number])


@pytest.mark.parametrize("case", [case for case in CASES if case.offload], ids=lambda case: "-".join(map(str, case)))
def test_blocks_leave_as_planned(case, results):
    for found in results:
        counters = found[case]["counters"]
        assert counters["peak_blocks"] == counters["planned_peak_blocks"]
        assert counters["offloads"] > 0 and counters["stayed"] == 0 and counters["engine"]["slots"] == 0
        assert counters["kept"]["unsupported"] == 0


@pytest.mark.skipif(not HANDS_TENSORS, reason="this torch hands no DTensors from stage to stage")
def test_distributed_inputs_and_outputs_leave_with_their_block(results):
    for found in results:
        result = found[Case("tensors", "po", True, True)]
        assert len(result["alive"]["output"]) > 0
        assert not any(result["alive"]["output"])
        # The whole model's input is the caller's.
        assert all(result["alive"]["input"]) if result["is_first"] else not any(result["alive"]["input"])


def test_a_split_backward_of_averaged_stages_is_refused(results):
    for found in results:
        assert found["refused"].startswith("split_backward: DistributedDataParallel averages gradients in whole")
