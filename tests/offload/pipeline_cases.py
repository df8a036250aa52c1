"""What the processes of test_schedules.py do: each case trains a pipeline and compares it with plain execution."""

from typing import NamedTuple

import torch
from torch import distributed
from torch.multiprocessing.reductions import StorageWeakRef

import pykern

from .support_pipeline import hasty_plan, loss_of, make_batch, make_pipeline, plain_gradients

STEPS = 2


class Case(NamedTuple):
    schedule: str
    model: str
    chunks: int
    microbatches: int
    offload: str | int | tuple[int, ...] | None = None
    """A tuple: of which chunks all blocks leave by a plan made by hand. None: no offload."""
    storage: str = "memory"
    split: bool | None = None
    group: int | None = None

    def __str__(self) -> str:
        return "-".join("".join(map(str, entry)) if isinstance(entry, tuple) else str(entry) for entry in self)


def make_schedule(case: Case, stages: list):
    keywords = dict(split_backward=case.split, group=case.group)
    if case.offload is None:
        return pykern.SchedulePlanned(case.schedule, stages, case.microbatches, loss_of, **keywords)
    offload, keywords["debug_delays"] = case.offload, 3
    if isinstance(offload, tuple):
        order = pykern.SchedulePlanned(case.schedule, stages, case.microbatches, loss_of, split_backward=case.split,
                                       group=case.group).order  # fmt: skip
        offload = hasty_plan(order, offload)
    return pykern.SchedulePipeOffload(
        stages, case.microbatches, loss_of, schedule=case.schedule, offload=offload, storage=case.storage,
        min_bytes=256, **keywords,
    )  # fmt: skip


def run_step(schedule, stages: list, x, target) -> list:
    """One step; the losses on the rank of the last stage."""
    losses: list = []
    arguments = (x,) if stages[0].is_first else ()
    last = any(stage.is_last for stage in stages)
    keywords = dict(target=target, losses=losses) if last else {}
    schedule.step(*arguments, return_outputs=False, **keywords)
    return [float(loss.detach()) for loss in losses]


def run_case(case: Case) -> dict:
    rank, devices = distributed.get_rank(), distributed.get_world_size()
    count = devices * case.chunks
    stages = make_pipeline(case.model, pykern.stages_of_rank(case.schedule, rank, devices, case.chunks), count)
    schedule = make_schedule(case, stages)
    problems = []
    for step in range(STEPS):
        for stage in stages:
            stage.submod.zero_grad()
        losses = run_step(schedule, stages, *make_batch(case.microbatches, step))
        expected, expected_losses = plain_gradients(case.model, count, case.microbatches, step)
        if losses and losses != expected_losses:
            problems.append(f"step {step}: the losses differ")
        for stage in stages:
            actual = [parameter.grad for parameter in stage.submod.parameters()]
            if not all(torch.equal(*pair) for pair in zip(actual, expected[stage.stage_index], strict=True)):
                problems.append(f"step {step}: a gradient of stage {stage.stage_index} differs")
    counters = None
    if case.offload is not None:
        schedule.offload.synchronize()
        counters = schedule.offload.counters()
    return {"problems": problems, "counters": counters}


def storages_after_release() -> dict[str, int]:
    """How many storages of inputs, of outputs and of what lies between them are there still when blocks come back."""
    case = Case("po", "feedforward", 2, 6, (0,), storage="file")
    rank, devices = distributed.get_rank(), distributed.get_world_size()
    stages = make_pipeline(case.model, pykern.stages_of_rank("po", rank, devices, 2), devices * 2)
    schedule = make_schedule(case, stages)
    alive = {"looked": 0, "input": 0, "inside": 0, "output": 0}
    seen: list[list[tuple[str, StorageWeakRef]]] = []

    def remember(name):
        def hook(module, arguments, output):
            if name == "output":
                seen[-1].append(("input", StorageWeakRef(arguments[0].untyped_storage())))
            seen[-1].append((name, StorageWeakRef(output.untyped_storage())))

        return hook

    submodule = stages[0].submod
    submodule.register_forward_pre_hook(lambda module, arguments: seen.append([]))
    for layer in list(submodule)[:-1]:
        layer.register_forward_hook(remember("inside"))
    submodule.register_forward_hook(remember("output"))
    # The first step also tries out shapes, once more than there are microbatches in some versions of torch.
    run_step(schedule, stages, *make_batch(case.microbatches))
    seen.clear()
    run = schedule.offload._run

    def look(transfer):
        if transfer.kind == "reload":
            for name, storage in seen[transfer.microbatch]:
                # The whole model's input is the caller's.
                if name != "input" or not stages[0].is_first:
                    alive[name] += not storage.expired()
                    alive["looked"] += 1
        run(transfer)

    schedule.offload._run = look
    run_step(schedule, stages, *make_batch(case.microbatches))
    return alive


def evaluation() -> bool:
    """Whether evaluating between two steps gives what the model gives, and leaves the steps as they are."""
    rank, devices = distributed.get_rank(), distributed.get_world_size()
    case = Case("po", "feedforward", 2, 4, (0, 1))
    stages = make_pipeline(case.model, pykern.stages_of_rank("po", rank, devices, 2), devices * 2)
    schedule = make_schedule(case, stages)
    x, target = make_batch(case.microbatches)
    run_step(schedule, stages, x, target)
    first, last = stages[0].is_first, stages[-1].is_last
    output = schedule.eval(*((x,) if first else ()), **(dict(target=target) if last else {}))
    plain = x
    with torch.no_grad():
        from .support_pipeline import make_stage

        for index in range(devices * 2):
            plain = torch.cat([make_stage(case.model, index)(part) for part in plain.chunk(case.microbatches)])
    for stage in stages:
        stage.submod.zero_grad()
    run_step(schedule, stages, x, target)
    expected, _ = plain_gradients(case.model, devices * 2, case.microbatches, 0)
    same = all(
        torch.equal(parameter.grad, gradient)
        for stage in stages
        for parameter, gradient in zip(stage.submod.parameters(), expected[stage.stage_index], strict=True)
    )
    return same and (not last or torch.equal(output, plain))


def refusals() -> list[str]:
    """What the schedules say of arguments that have no meaning; they refuse them without a message to other ranks."""
    rank, devices = distributed.get_rank(), distributed.get_world_size()
    stages = make_pipeline("feedforward", pykern.stages_of_rank("gis", rank, devices, 2), devices * 2)
    other = pykern.SchedulePlanned("gis", stages, 5, loss_of).order
    said = []
    for attempt in (
        lambda: pykern.ScheduleGIS([], 4),
        lambda: pykern.SchedulePlanned("gpipe", stages, 4),
        lambda: pykern.SchedulePlanned("zb_v", stages, 4),
        lambda: pykern.ScheduleGIS(stages[::-1], 4),
        lambda: pykern.SchedulePipeOffload(stages, 4, loss_of, offload=hasty_plan(other, [0])),
        lambda: pykern.SchedulePipeOffload(stages, 4, loss_of, storage="disk"),
    ):
        try:
            attempt()
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
    return said


def run_cases(cases: list[Case]) -> dict[str, object]:
    results: dict[str, object] = {str(case): run_case(case) for case in cases}
    results["storages"] = storages_after_release()
    results["evaluation"] = evaluation()
    results["refusals"] = refusals()
    return results
