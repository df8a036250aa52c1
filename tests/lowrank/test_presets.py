"""The rows of PRESETS: each optimizer against the loop that its paper describes, in float64."""

import io
from dataclasses import dataclass, field

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pykern
from pykern.lowrank.bases import basis_of
from pykern.lowrank.matrices import Job
from pykern.lowrank.presets import PRESETS
from pykern.reference import lowrank as reference
from pykern.reference import lowrank_methods as methods

STEPS, GAP, RANK, LR = 7, 3, 5, 0.01
SHAPES = [(24, 16), (16, 24)]


@dataclass
class Case:
    """A preset with options of ours, and the method with options of its own."""

    preset: str
    method: callable
    ours: dict = field(default_factory=dict)
    theirs: dict = field(default_factory=dict)
    every: int | None = GAP

    def __str__(self):
        chosen = "-".join(f"{name}={value}" for name, value in self.ours.items())
        return f"{self.preset}-{chosen}" if chosen else self.preset


CASES = [
    Case("GaLoreAdamW", methods.galore_adamw, {}, {"scale": 0.25}),
    Case("GaLoreAdafactor", methods.galore_adafactor, {}, {"scale": 0.25}),
    Case("GaLoreAdafactor", methods.galore_adafactor, {"momentum": 0.9}, {"scale": 0.25, "momentum": 0.9}),
    Case("FiraAdamW", methods.fira_adamw, {}, {"scale": 1.0}),
    Case("FiraAdamW", methods.fira_adamw, {"scale": 0.5}, {"scale": 0.5}),
    Case("ApolloAdamW", methods.apollo_adamw, {}, {"scale": 1.0}),
    Case("ApolloAdamW", methods.apollo_adamw, {"scale": 4.0, "scale_first": True}, {"scale": 4.0, "scale_first": True}),
    Case("ApolloMini", methods.apollo_adamw, {}, {"scale": 128.0, "per_tensor": True}),
    Case("DCTAdamW", methods.dct_adamw, {}, {}, every=1),
    Case("DCTAdamW", methods.dct_adamw, {"refresh_every": 3, "moments": "rotate"}, {"rotate": True}),
    Case("DCTAdamW", methods.dct_adamw, {"residual": "error_feedback"}, {"feedback": True}, every=1),
    Case("Trion", methods.trion, {}, {}, every=1),
    Case("Trion", methods.trion, {"shape_scale": "none", "feedback_share": 0.1}, {"momentum": 0.9}, every=1),
    Case("LDAdamW", methods.ldadamw, {}, {}, every=None),
    Case("LDAdamW", methods.ldadamw, {"projector_memory": 0.5, "maximize": True}, {"memory": 0.5}, every=None),
    Case(
        "LDAdamW",
        methods.ldadamw,
        {"residual": "none", "feedback_momentum": False, "maximize": True},
        {"feedback": False},
        every=None,
    ),
    Case("Frugal", methods.frugal, {}, {}),
    Case(
        "Frugal", methods.frugal, {"residual": "sgd", "residual_scale": 0.1}, {"residual": "sgd", "residual_scale": 0.1}
    ),
    Case("Frugal", methods.frugal, {"rule": "lion", "residual_scale": 0.5}, {"rule": "lion", "residual_scale": 0.5}),
    Case("Frugal", methods.frugal, {"rule": "momentum", "residual": "none"}, {"rule": "momentum", "residual": "none"}),
    Case("Flora", methods.flora),
    Case("GrassAdamW", methods.grass_adamw, {}, {"scale": 0.25}),
]


def gradient(shape, step, dtype=torch.float64):
    """Random, and larger from step to step, so that limits on growth act."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=dtype) * (1 + step)


def basis_in_use(optimizer, param):
    group = optimizer.param_groups[0]
    return basis_of(group).dense(Job.of(param, 0, group, optimizer.state[param]), optimizer.state[param]).clone()


def assert_chosen(projector, basis, matrix, previous):
    """The projector looked at `matrix`, the one that the method looks at."""
    if projector == "gram":
        leading = reference.leading_vectors(matrix, basis.shape[1], right=False)
        torch.testing.assert_close(basis @ basis.mT, leading @ leading.mT, rtol=0, atol=1e-9)
    elif projector == "plain_power" and previous is not None:
        moved = torch.linalg.qr(matrix @ (matrix.mT @ previous))[0]
        torch.testing.assert_close(basis @ basis.mT, moved @ moved.mT, rtol=0, atol=1e-9)
    elif projector == "dct":
        size = len(basis)
        places = torch.arange(size, dtype=torch.float64)
        cosines = torch.cos(torch.pi * torch.outer(places + 0.5, places) / size) * (2 / size) ** 0.5
        cosines[:, 0] *= 0.5**0.5
        best = (cosines.mT @ matrix).abs().sum(dim=1).topk(basis.shape[1]).values
        torch.testing.assert_close((basis.mT @ matrix).abs().sum(dim=1).sort(descending=True).values, best)
    elif projector == "rows":
        best = matrix.norm(dim=1).topk(basis.shape[1]).values
        torch.testing.assert_close((basis.mT @ matrix).norm(dim=1).sort(descending=True).values, best)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_seven_steps_are_those_of_the_paper(case, shape):
    assert_steps_of_the_paper(case, shape, "cpu")


@pytest.mark.parametrize("case", {case.preset: case for case in CASES}.values(), ids=str)
def test_devices(device, case):
    assert_steps_of_the_paper(case, SHAPES[1], device)


def assert_steps_of_the_paper(case, shape, device):
    start = torch.randn(shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    param, right = torch.nn.Parameter(start.to(device, copy=True)), shape[0] >= shape[1]
    ours = {"rank": RANK, "weight_decay": 0.1, "refresh_every": case.every or 1, **case.ours}
    if case.preset == "ApolloMini":
        ours.pop("rank")
    optimizer = getattr(pykern, case.preset)([param], LR, **ours)
    projector = optimizer.param_groups[0]["projector"]
    theirs = dict(case.theirs) if case.every is None else {"every": case.every, **case.theirs}
    if case.preset == "Trion" and case.ours.get("shape_scale") != "none":
        theirs["scale"] = max(1.0, shape[0] / shape[1]) ** 0.5
    weight, state = (start.mT if right else start), {}
    chosen = []

    for step in range(STEPS):
        param.grad = gradient(shape, step).to(device)
        optimizer.step()

        def choose(matrix):
            basis = basis_in_use(optimizer, param).cpu()
            assert_chosen(projector, basis, matrix, chosen[-1] if chosen else None)
            chosen.append(basis)
            return basis

        seen = gradient(shape, step).mT if right else gradient(shape, step)
        seen = -seen if case.ours.get("maximize") else seen
        weight = case.method(weight, seen, state, choose, LR, decay=0.1, **theirs)
        torch.testing.assert_close(param.detach().cpu(), weight.mT if right else weight, rtol=1e-9, atol=1e-9)
    assert len(chosen) == (STEPS if case.every in (None, 1) else 3)


@pytest.mark.parametrize("shape", [(40, 20), (20, 300)], ids=str)
def test_eight_bit_moments_are_stored_between_steps(shape):
    """In float32, where moments are quantized; a code that rounding moves to its neighbour is allowed for."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(99))
    param, right = torch.nn.Parameter(start.clone()), shape[0] >= shape[1]
    optimizer = pykern.GaLoreAdamW8bit([param], LR, rank=RANK, refresh_every=GAP)
    assert optimizer.param_groups[0]["weight_decay"] == 0.01

    def stored(moment, signed):
        return reference.dequantize(*reference.quantize(moment, signed), signed)

    def run(stored):
        weight, state = (start.mT if right else start), {}
        for grad, basis in steps:
            seen = grad.mT if right else grad
            weight = methods.galore_adamw(
                weight, seen, state, lambda _, basis=basis: basis, LR,
                every=GAP, scale=0.25, decay=0.01, decay_after=True, stored=stored,
            )  # fmt: skip
        return weight.mT if right else weight

    steps = []
    for step in range(STEPS):
        param.grad = gradient(shape, step, torch.float32)
        optimizer.step()
        steps.append((param.grad, basis_in_use(optimizer, param)))
    assert optimizer.state[param]["exp_avg"].dtype == torch.uint8
    expected, exact = run(stored), run(None)
    moved = (expected - start).norm()
    assert (param.detach() - expected).norm() < 1e-3 * moved
    assert (exact - expected).norm() > 3e-3 * moved


@pytest.mark.parametrize("name", PRESETS)
def test_least_squares(name):
    """Every preset lowers a loss whose gradient is of full rank."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 16, generator=generator)
    targets = inputs @ torch.randn(16, 24, generator=generator)
    param = torch.nn.Parameter(torch.zeros(24, 16))
    scale = PRESETS[name].defaults.get("scale", 1.0)
    lr = 0.5 if name == "Flora" else 0.03 / scale**0.5 if name.startswith("Apollo") else 0.03 / scale
    every = {} if PRESETS[name].defaults.get("refresh_every") == 1 else {"refresh_every": 10}
    rank = {} if "rank" in PRESETS[name].defaults else {"rank": 8}
    optimizer = getattr(pykern, name)([param], lr, weight_decay=0.0, **rank, **every)
    losses = []
    for _ in range(100):
        loss = (inputs @ param.mT - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def make(name, dtype=torch.float32, **options):
    """A parameter and its optimizer, with a refresh every other step."""
    param = torch.nn.Parameter(torch.ones(24, 16, dtype=dtype))
    rank = {} if "rank" in PRESETS[name].defaults else {"rank": 4}
    return param, getattr(pykern, name)([param], 0.01, refresh_every=2, **rank, **options)


def steps(param, optimizer, first, last, factor=1.0):
    for step in range(first, last):
        param.grad = factor * gradient((24, 16), step, param.dtype)
        optimizer.step()


@pytest.mark.parametrize("name", PRESETS)
def test_skipped_steps_and_scaled_gradients(name):
    """What a GradScaler has skipped leaves no trace, at a refresh neither; a scale goes out of the gradient."""
    plain, scaled = make(name, torch.float64), make(name, torch.float64)
    steps(*plain, 0, 5)
    param, optimizer = scaled
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    for step in range(5):
        steps(param, optimizer, step, step + 1, 8.0)
        before = [value.clone() for value in (param.detach(), *optimizer.state[param].values())]
        optimizer.found_inf.fill_(1)
        steps(param, optimizer, step, step + 1, float("nan") if step % 2 else float("inf"))
        optimizer.found_inf.fill_(0)
        for value, unchanged in zip((param.detach(), *optimizer.state[param].values()), before, strict=True):
            assert torch.equal(value, unchanged)
    torch.testing.assert_close(param, plain[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PRESETS)
def test_maximize_is_the_negative_gradient(name):
    up, down = make(name, torch.float64, maximize=True), make(name, torch.float64)
    steps(*up, 0, 5)
    steps(*down, 0, 5, -1.0)
    torch.testing.assert_close(up[0], down[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PRESETS)
def test_resumes_bit_for_bit(name):
    """From a file that holds tensors only, in the midst of a period."""
    whole = make(name)
    steps(*whole, 0, 6)
    before, after = make(name), make(name)
    steps(*before, 0, 3)
    file = io.BytesIO()
    torch.save([before[0].detach(), before[1].state_dict()], file)
    file.seek(0)
    weight, state = torch.load(file, weights_only=True)
    with torch.no_grad():
        after[0].copy_(weight)
    after[1].load_state_dict(state)
    steps(*after, 3, 6)
    assert torch.equal(after[0], whole[0])


def test_frugal_takes_no_signs_of_roundings():
    """The whole gradient lies in the subspace: what is outside it has no sign."""
    for shape in [(24, 4), (4, 24)]:
        weights = []
        for residual in ("sign", "none"):
            weights.append(torch.nn.Parameter(torch.zeros(shape)))
            other = torch.nn.Parameter(torch.zeros(24, 16))
            optimizer = pykern.Frugal([other, weights[-1]], LR, rank=8, residual=residual)
            for step in range(2):
                for param in (weights[-1], other):
                    param.grad = gradient(param.shape, step, param.dtype)
                optimizer.step()
        torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)
        assert weights[0].any()


@pytest.mark.parametrize("residual", ["apollo_channel", "fira"])
def test_measured_residuals_make_nothing_of_the_weights_size(residual):
    """By the parts of a step, and with a basis that is not orthonormal."""
    param = torch.nn.Parameter(torch.randn(64, 80))
    options = {"residual": residual, "projector": "random", "state_dtype": "8bit"}
    optimizer = pykern.LowRankAdamW([param], LR, rank=4, **options)
    made = []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
            result = operator(*arguments, **(keywords or {}))
            if isinstance(result, torch.Tensor) and not result.is_meta and result.data_ptr() not in given:
                made.append((operator, result.numel()))
            return result

    for step in range(2):
        param.grad = gradient(param.shape, step, param.dtype)
        given = (param.data_ptr(), param.grad.data_ptr())
        with Recorded():
            optimizer.step()
    assert made and not [operator for operator, count in made if count >= param.numel()]


def test_parity_of_a_group_begins_with_the_packages_options():
    groups = [{"params": [torch.nn.Parameter(torch.ones(8, 8))], "rank": 4, "parity": "galore_torch"}]
    assert pykern.GaLoreAdamW(groups).param_groups[0]["projector"] == "svd"
    assert pykern.GaLoreAdamW([{**groups[0], "projector": "power"}]).param_groups[0]["projector"] == "power"


def test_presets_have_classes():
    for name, preset in PRESETS.items():
        kind = getattr(pykern, name)
        assert preset.paper in kind.__doc__
        assert set(preset.fixed).isdisjoint(preset.defaults)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: pykern.Trion(p, rank=4, momentum=0.9), "momentum: Trion has 0.0, got 0.9; use LowRankOptimizer"),
        (lambda p: pykern.DCTAdamW(p, rank=4, projector=torch.eye(4)), "projector: DCTAdamW has 'dct', got tensor"),
        (lambda p: pykern.Flora(p, rank=4, parity="fira"), "parity: expected None for Flora, got 'fira'"),
        (lambda p: pykern.ApolloMini(p, parity="fira"), "parity: expected None or 'apollo_torch' for ApolloMini"),
        (
            lambda p: pykern.GaLoreAdafactor(p, rank=4, state_dtype="8bit"),
            r"state_dtype: expected one of \('float32',\) with rule='adafactor', got '8bit'",
        ),
        (lambda p: pykern.GaLoreAdafactor(p, rank=4, momentum=1.0), r"momentum: expected None or a number in \[0, 1\)"),
        (lambda p: pykern.FiraAdamW(p, rank=4, side="full"), 'side: "full" has no channels to scale'),
        (
            lambda p: pykern.LDAdamW(p, rank=4, state_dtype="8bit"),
            "projector_memory, feedback_momentum: expected rule .* got 'adamw', '8bit', 'std'",
        ),
        (lambda p: pykern.LDAdamW(p, rank=4, projector_memory=2.0), r"projector_memory: expected a number in \[0, 1\]"),
        (lambda p: pykern.Trion(p, rank=4, shape_scale="muon"), "shape_scale: expected one of .*'original'"),
    ],
)
def test_refused_options(make, message):
    with pytest.raises(ValueError, match=message):
        make([torch.nn.Parameter(torch.ones(8, 8))])
