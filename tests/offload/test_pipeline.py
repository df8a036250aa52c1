"""A plan's blocks, without a pipeline: one process plays a rank, and the gradients that it receives are made up."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import pykern
from pykern.offload import block_store
from pykern.offload.hunting import HuntingDevice
from pykern.offload.planning.orders import make_order
from pykern.offload.simulated import SimulatedDevice

from .support_pipeline import WIDTH, hasty_plan, make_stage

MICROBATCHES = 5


class Rank:
    """The stages of rank 0 of two; what it would receive is drawn at random, the same each time."""

    def __init__(self, model="attention", storage="memory", split=True, chunks=(0, 1), place="cpu", **keywords):
        self.order = make_order("gis", 2, 2, MICROBATCHES, split_backward=split)
        self.place = place
        self.stages = [make_stage(model, 0).to(place), make_stage(model, 2).to(place)]
        self.inputs, self.outputs = {}, {}
        self.keywords = keywords
        self.offload = pykern.PipelineOffload(
            hasty_plan(self.order, chunks), 0, storage=storage, min_bytes=256, debug_delays=5,
            parameters=[p for stage in self.stages for p in stage.parameters()], **keywords,
        )  # fmt: skip

    def draw(self, chunk, microbatch, what):
        generator = torch.Generator().manual_seed(100 * chunk + 10 * microbatch + what)
        # A length for each microbatch: blocks of a chunk need not look alike.
        return torch.randn(2, 3 + microbatch, WIDTH, generator=generator).to(self.place)

    def forward(self, chunk, microbatch, context):
        x = self.draw(chunk, microbatch, 0).requires_grad_()
        with context([x]):
            self.outputs[chunk, microbatch] = self.stages[chunk](x)
        self.inputs[chunk, microbatch] = x

    def backward(self, kind, chunk, microbatch):
        output, x = self.outputs[chunk, microbatch], self.inputs[chunk, microbatch]
        gradient, weights = self.draw(chunk, microbatch, 1), list(self.stages[chunk].parameters())
        wanted = {"B": [x, *weights], "I": [x], "W": weights}[kind]
        gradients = torch.autograd.grad(output, wanted, gradient, retain_graph=kind == "I")
        for tensor, value in zip(wanted, gradients, strict=True):
            tensor.grad = value if tensor.grad is None else tensor.grad + value
        if kind != "I":
            del self.outputs[chunk, microbatch]

    def step(self, offload, stop=None):
        """Gradients of the weights and of the inputs."""
        for stage in self.stages:
            stage.zero_grad()
        self.inputs.clear()
        if offload:
            self.offload.begin_step()
        for number, (kind, chunk, microbatch) in enumerate(self.order.ranks[0]):
            if number == stop:
                raise KeyboardInterrupt
            if kind == "F":
                context = torch.enable_grad if not offload else None
                self.forward(
                    chunk, microbatch,
                    (lambda received: context()) if context else
                    (lambda received: self.offload.forward(chunk, microbatch, received=received)),
                )  # fmt: skip
            elif offload:
                with self.offload.backward(kind, chunk, microbatch):
                    self.backward(kind, chunk, microbatch)
            else:
                self.backward(kind, chunk, microbatch)
        if offload:
            self.offload.end_step()
        parameters = [p.grad for stage in self.stages for p in stage.parameters()]
        return [*parameters, *(x.grad for x in self.inputs.values())]


def assert_same(rank, offloaded=None):
    offloaded = offloaded or rank.step(True)
    for actual, expected in zip(offloaded, rank.step(False), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("model", "split", "storage"),
    [("attention", True, "file"), ("attention", False, "memory"), ("feedforward", True, "memory")],
)
def test_gradients_are_the_same(model, split, storage):
    rank = Rank(model, storage, split)
    for _ in range(2):
        assert_same(rank)
    rank.offload.synchronize()
    counters = rank.offload.counters()
    assert counters["offloads"] == 2 * len(rank.offload.plan.copies[0]) > 0
    assert counters["peak_blocks"] == counters["planned_peak_blocks"]
    # Every block was freed: what is needed once more would have to be there.
    assert counters["engine"]["slots"] == 0


@pytest.mark.parametrize("seed", range(6))
def test_on_a_device_with_streams(seed):
    """Races would be errors there; every block is in its slot or, by turns, in none."""
    rank = Rank("attention", "pinned", chunks=(0, 1), device=HuntingDevice(seed, directions=1 + seed % 2, lags=False))
    rank.offload.set_plan(rank.offload.plan, sizes_known=False)
    for _ in range(2):
        assert_same(rank)
    counters = rank.offload.counters()
    assert counters["offloads"] == 2 * len(rank.offload.plan.copies[0]) and counters["stayed"] == 0


def with_tiers(plan, sizes):
    """Every other block goes on to the file; slots that no two blocks share."""
    copies, transfers, slots = [], [], {"host": [], "file": []}
    for number, copy in enumerate(plan.copies[0]):
        tier = ("host", "file")[number % 2]
        copies.append(copy._replace(tier=tier, slot=len(slots[tier])))
        slots[tier].append(sizes[copy.chunk])
    tiers = {(copy.chunk, copy.microbatch): copy.tier for copy in copies}
    for transfer in plan.transfers[0]:
        kinds = (transfer.kind,)
        if tiers[transfer.chunk, transfer.microbatch] == "file":
            kinds = {"release": ("release", "spill"), "reload": ("fetch", "reload")}.get(transfer.kind, kinds)
        transfers += [transfer._replace(kind=kind) for kind in kinds]
    return replace(
        plan, copies=(tuple(copies), ()), transfers=(tuple(transfers), ()), slot_bytes=(tuple(slots["host"]), ()),
        file_slot_bytes=(tuple(slots["file"]), ()), staging_bytes=(2 * max(sizes), 0),
    )  # fmt: skip


@pytest.mark.parametrize("storage", ["memory", "file", "pinned"])
def test_two_tiers_and_planned_slots(storage, tmp_path):
    device = SimulatedDevice() if storage == "pinned" else None
    rank = Rank("attention", storage, path=tmp_path, device=device)
    rank.offload.set_plan(rank.offload.plan, sizes_known=False)
    rank.step(True)
    sizes = [size for _, size in sorted(rank.offload.counters()["block_bytes"].items())]
    rank.offload.set_plan(with_tiers(rank.offload.plan, sizes))
    for _ in range(2):
        assert_same(rank)
    counters = rank.offload.counters()
    assert counters["offloads"] == 2 * len(rank.offload.plan.copies[0]) and counters["stayed"] == 0
    assert counters["peak_blocks"] == counters["planned_peak_blocks"]


def test_inputs_come_and_go():
    rank = Rank(chunks=(0,))
    run, seen = rank.offload._run, []

    def look(transfer):
        run(transfer)
        x = rank.inputs[transfer.chunk, transfer.microbatch]
        seen.append((transfer.kind, x.untyped_storage().nbytes(), tuple(x.shape)))

    rank.offload._run = look
    rank.step(True)
    released = [(nbytes, shape) for kind, nbytes, shape in seen if kind == "release"]
    assert len(released) > 0
    assert all(nbytes == 4 and shape[0] == 2 and shape[2] == WIDTH for nbytes, shape in released)
    kept = [x for (chunk, _), x in rank.inputs.items() if chunk == 1]
    assert all(x.untyped_storage().nbytes() == 4 for x in kept), "freed with their block, too"


def test_what_others_hold_stays():
    rank = Rank("feedforward", chunks=(0,))
    batch = torch.randn(2, 6, WIDTH)

    class Looking(nn.Module):
        def forward(self, x):
            return (x @ batch.transpose(1, 2)).tanh() @ batch

    rank.stages[0] = Looking()
    offload = rank.offload
    offload.begin_step()
    x = torch.randn(2, 6, WIDTH, requires_grad=True)
    with offload.forward(0, 0, received=[x], given=[batch]):
        output = rank.stages[0](x)
    assert offload.counters()["kept"]["skipped"] == 2
    assert output.requires_grad
    # The result of tanh, and the input, which nothing saved.
    assert offload.counters()["block_bytes"] == {0: 512 + 1536}


def test_actions_against_the_plan_are_refused():
    offload = Rank().offload
    offload.begin_step()
    with pytest.raises(RuntimeError, match=re.escape("action 0 of rank 0 is Action(kind='F', chunk=0, microbatch=0)")):
        with offload.forward(1, 0):
            pass
    with pytest.raises(RuntimeError, match="the step ended after 0 of the plan's"):
        offload.end_step()


def test_a_closed_one_is_refused_until_it_has_a_plan_again():
    rank = Rank()
    rank.offload.close()
    with pytest.raises(RuntimeError, match="PipelineOffload: closed, so nothing can be offloaded; set a plan"):
        rank.step(True)
    rank.offload.set_plan(rank.offload.plan)
    assert_same(rank)


def test_what_a_stage_of_the_same_rank_made_is_not_made_again():
    """Its input may be away by the time that the next stage saves it."""
    order = make_order("gis", 1, 2, 6, group=3, split_backward=False)
    line = torch.nn.Parameter(torch.rand(WIDTH) + 0.5)
    weight = torch.nn.Parameter(torch.randn(WIDTH, WIDTH))
    stages = (lambda x: pykern.rms_norm(x, line)), (lambda x: x @ weight)

    def gradients(offload):
        inputs, outputs = {}, {}
        line.grad = weight.grad = None
        for kind, chunk, microbatch in order.ranks[0]:
            if kind == "F":
                x = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(microbatch))
                x = (outputs[0, microbatch].detach() if chunk else x).requires_grad_()
                with offload.forward(chunk, microbatch, received=[x]) if offload else torch.enable_grad():
                    outputs[chunk, microbatch] = stages[chunk](x)
                inputs[chunk, microbatch] = x
            else:
                with offload.backward(kind, chunk, microbatch) if offload else torch.enable_grad():
                    gradient = torch.ones(16, WIDTH) if chunk else inputs[1, microbatch].grad
                    outputs[chunk, microbatch].backward(gradient)
        return line.grad, weight.grad

    expected = gradients(None)
    offload = pykern.PipelineOffload(hasty_plan(order, (0, 1)), 0, min_bytes=256, parameters=[line, weight])
    offload.begin_step()
    assert all(map(torch.equal, gradients(offload), expected))
    offload.end_step()
    assert offload.counters()["offloads"] > 0


def test_a_plan_that_could_not_be_opened_is_not_followed(monkeypatch):
    def without_room(*arguments, **keywords):
        raise OSError("no room")

    rank = Rank()
    before = rank.offload.plan
    with monkeypatch.context() as patched:
        patched.setattr(block_store, "Engine", without_room)
        with pytest.raises(OSError, match="no room"):
            rank.offload.set_plan(hasty_plan(rank.order, (0,)))
    assert rank.offload.plan is before
    with pytest.raises(RuntimeError, match="PipelineOffload: closed, so nothing can be offloaded; set a plan"):
        rank.step(True)
    rank.offload.set_plan(before)
    assert_same(rank)


@pytest.mark.parametrize("stop", [3, 9, 14])
def test_a_step_that_was_broken_off_leaves_nothing(stop):
    rank = Rank()
    with pytest.raises(KeyboardInterrupt):
        rank.step(True, stop=stop)
    assert_same(rank)
    rank.offload.synchronize()
    assert rank.offload.counters()["engine"]["slots"] == 0


def test_what_is_needed_after_the_end_is_an_error():
    rank = Rank()
    backward = rank.backward

    def keep_graph(kind, chunk, microbatch):
        if (kind, chunk, microbatch) == ("W", 0, 0):
            rank.late = rank.outputs[0, 0]
        backward("I" if kind == "W" else kind, chunk, microbatch)

    rank.backward = keep_graph
    rank.step(True)
    with pytest.raises(
        RuntimeError, match="the block of chunk 0, microbatch 0 was needed after its last backward action"
    ):
        torch.autograd.grad(rank.late.sum(), list(rank.stages[0].parameters()))


def test_a_change_in_place_is_autograds_error():
    rank = Rank("feedforward", chunks=(0,))
    forward = rank.stages[0].forward

    def change(x):
        y = forward(x)
        y.detach().add_(1)
        return y

    rank.stages[0].forward = change
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rank.step(True)


def test_without_room_blocks_stay_and_the_caller_is_told_once():
    rank = Rank()
    rank.offload._store.engine.store = lambda *arguments, **keywords: -1
    with pytest.warns(RuntimeWarning, match="blocks that can't be moved stay in memory") as told:
        offloaded = rank.step(True)
    assert len(told) == 1
    assert_same(rank, offloaded)
    assert rank.offload.counters()["stayed"] == len(rank.offload.plan.copies[0])


def test_times_and_sizes_are_measured():
    rank = Rank(split=True)
    rank.step(True)
    assert rank.offload.counters()["seconds"] == {}
    rank.offload.measuring = True
    rank.step(True)
    counters = rank.offload.counters()
    assert set(counters["seconds"]) == {(kind, chunk) for kind in "FIW" for chunk in (0, 1)}
    assert all(seconds > 0 for seconds in counters["seconds"].values())
    # The longest microbatch.
    assert counters["block_bytes"][0] > 2 * (3 + MICROBATCHES - 1) * WIDTH * 4 * 10
    out, back = rank.offload.measure_bandwidth()
    assert out > 0 and back > 0


REFUSED = [
    (dict(storage="disk"), ValueError, "storage: expected 'memory', 'file' or 'pinned', got 'disk'"),
    (dict(path="/no/such/folder"), FileNotFoundError, "path: expected an existing folder"),
    (dict(device="cuda:0"), ValueError, "device: only storage='pinned' has one"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_refused(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)) as raised:
        Rank(**arguments)
    assert "\n" not in str(raised.value)


def test_a_rank_that_the_plan_lacks_is_refused():
    plan = hasty_plan(make_order("gis", 2, 2, MICROBATCHES), [0])
    with pytest.raises(ValueError, match="rank: the plan has ranks 0 to 1, got 2"):
        pykern.PipelineOffload(plan, 2)


def test_importing_pykern_leaves_torch_distributed_alone():
    assert "ScheduleGIS" not in pykern.__all__ and pykern.ScheduleGIS.__name__ == "ScheduleGIS"
    with pytest.raises(AttributeError, match="module 'pykern' has no attribute 'ScheduleGPipe'"):
        pykern.ScheduleGPipe  # noqa: B018
