"""DTensor parameters: steps on shards, over gloo, against one process; checkpoints of shards."""

import tempfile

import pytest
import torch
from torch import distributed

import pykern
from tests.support_distributed import run_processes

STEPS, GAP = 7, 3
CASES = {
    "galore": {},
    "fira": {"residual": "fira", "parity": "fira"},
    "apollo tensor": {"residual": "apollo_tensor", "maximize": True},
    "feedback": {"residual": "error_feedback"},
    "sign": {"residual": "sign"},
    "adafactor": {"rule": "adafactor"},
    "newton-schulz": {"rule": "newton_schulz", "residual": "error_feedback"},
    "dct": {"projector": "dct", "moments": "rotate"},
    "svd": {"projector": "svd", "refresh": "staggered"},
    "ldadam": {"projector": "power", "moments": "rotate_variance", "refresh_every": 1, "projector_memory": 0.9,
               "residual": "error_feedback", "feedback_momentum": True},
    "few bits": {"projector_format": "int8", "residual": "error_feedback", "feedback_dtype": "8bit"},
    "injected": {"projector": lambda grad, rank, right: torch.linalg.svd(grad)[2][:rank].mT if right
                 else torch.linalg.svd(grad)[0][:, :rank]},
}  # fmt: skip
# Of the first, shards are uneven; of the second the columns are longer; of the third some shards are empty.
SHAPES = [(13, 8), (10, 24), (3, 6), (6, 2, 3, 3), (5,), (1,)]


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def make(params, side, **options):
    plain = [param for param in params if param.dim() == 1]
    settings = {"rank": 2, "refresh_every": GAP, "weight_decay": 0.1, "side": side, **options}
    groups = [{"params": [param for param in params if param.dim() > 1]}, {"params": plain, "rank": None}]
    return pykern.LowRankOptimizer(groups, 0.01, **settings)


def layouts():
    """Names of layouts, with their placements on a mesh of all four processes and the side that they are projected from
    there, and in one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    return {
        "rows": (line, [Shard(0)], "std", "right"),
        "columns": (line, [Shard(1)], "std", "left"),
        "rows, added up": (line, [Shard(0)], "left", "left"),
        "replicas": (line, [Replicate()], "std", "std"),
        "replicated rows": (square, [Replicate(), Shard(0)], "std", "right"),
        "rows twice": (square, [Shard(0), Shard(0)], "std", "right"),
        "rows after rows": (square, [_StridedShard(0, split_factor=2), Shard(0)], "std", "right"),
        "rows and columns": (square, [Shard(0), Shard(1)], "std", "right"),
        "columns and rows": (square, [Shard(1), Shard(0)], "std", "left"),
    }


def placed(tensor, mesh, placements):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if tensor.dim() != 2 and Shard(1) in placements:
        placements = [Replicate()] * mesh.ndim
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def trained(params, optimizer, place, steps=range(STEPS)):
    for step in steps:
        for param, grad in zip(params, tensors(step + 1), strict=True):
            param.grad = place(grad)
        optimizer.step()


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def on_one_process():
    results = {}
    for layout, (mesh, placements, side, same_as) in layouts().items():
        for case, options in CASES.items():
            if case not in ("galore", "fira") and layout not in ("rows", "columns", "rows and columns"):
                continue
            if layout == "rows and columns" and case == "few bits":
                continue
            params = [torch.nn.Parameter(placed(tensor, mesh, placements)) for tensor in tensors(0)]
            optimizer = make(params, side, **options)
            trained(params, optimizer, lambda tensor: placed(tensor, mesh, placements))
            bases = [value for state in optimizer.state.values() for key, value in state.items() if "projector" in key]
            results[layout, case] = [whole(param).detach() for param in params], bases, same_as
    results["checkpoint"] = checkpoints()
    results["model"] = sharded_model()
    results["traffic"] = traffic()
    results["overflow"] = overflow()
    results["backward"] = in_backward()
    results["refused"] = refusals()
    return results


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 13), torch.nn.Tanh(), torch.nn.Linear(13, 6))


def train_model(net, optimizer, steps, processes):
    """Steps on the mean loss of `processes`' data, clipped to a total norm."""
    for step in steps:
        optimizer.zero_grad()
        for process in processes:
            inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + process))
            (net(inputs).square().mean() * 5 / len(processes)).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()


def sharded(net, mesh):
    from torch.distributed.fsdp import fully_shard

    for layer in (net[0], net[2], net):
        fully_shard(layer, mesh=mesh)
    return net


def optimizer_of(net, side):
    groups = pykern.low_rank_groups(net, rank=3, side=side, refresh_every=GAP)
    return pykern.LowRankOptimizer(groups, 0.01, residual="error_feedback")


def sharded_model():
    """A model under fully_shard, and its optimizer through torch.distributed.checkpoint in the midst of training."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as states

    mesh = layouts()["rows"][0]
    net = sharded(model(), mesh)
    optimizer = optimizer_of(net, "std")
    mine = [distributed.get_rank()]
    train_model(net, optimizer, range(4), mine)
    folder = [tempfile.mkdtemp()] if distributed.get_rank() == 0 else [None]
    distributed.broadcast_object_list(folder)
    weights, kept = states.get_state_dict(net, optimizer)
    checkpoint.save({"model": weights, "optimizer": kept}, checkpoint_id=folder[0])
    full = states.get_optimizer_state_dict(net, optimizer, options=states.StateDictOptions(full_state_dict=True))

    torch.manual_seed(5)
    other = sharded(torch.nn.Sequential(torch.nn.Linear(8, 13), torch.nn.Tanh(), torch.nn.Linear(13, 6)), mesh)
    resumed = optimizer_of(other, "std")
    weights, kept = states.get_state_dict(other, resumed)
    loaded = {"model": weights, "optimizer": kept}
    checkpoint.load(loaded, checkpoint_id=folder[0])
    states.set_state_dict(other, resumed, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    for one, two in ((net, optimizer), (other, resumed)):
        train_model(one, two, range(4, 8), mine)
    same = all(
        torch.equal(one.to_local(), two.to_local())
        for one, two in zip(net.parameters(), other.parameters(), strict=True)
    )
    return [whole(param).detach() for param in net.parameters()], same, full


def checkpoints():
    """State dictionaries of shards, loaded into shards and into whole parameters."""
    mesh, placements, *_ = layouts()["rows"]

    def place(tensor):
        return placed(tensor, mesh, placements)

    options = {"residual": "error_feedback", "state_dtype": "8bit"}
    params = [torch.nn.Parameter(place(tensor)) for tensor in tensors(0)]
    optimizer = make(params, "std", **options)
    trained(params, optimizer, place, range(4))
    others = [torch.nn.Parameter(param.detach().clone()) for param in params]
    resumed = make(others, "std", **options)
    resumed.load_state_dict(optimizer.state_dict())
    trained(params, optimizer, place, range(4, STEPS))
    trained(others, resumed, place, range(4, STEPS))
    same = all(torch.equal(one.to_local(), two.to_local()) for one, two in zip(params, others, strict=True))

    params = [torch.nn.Parameter(place(tensor)) for tensor in tensors(0)]
    optimizer = make(params, "std")
    trained(params, optimizer, place, range(4))
    alone = [torch.nn.Parameter(whole(param).detach().clone()) for param in params]
    gathered = make(alone, "right")
    state = optimizer.state_dict()
    state["param_groups"] = [{**group, "side": "right"} for group in state["param_groups"]]
    gathered.load_state_dict(state)
    back = [torch.nn.Parameter(place(param.detach().clone())) for param in alone]
    spread = make(back, "std")
    spread.load_state_dict(gathered.state_dict())
    trained(alone, gathered, lambda tensor: tensor, range(4, STEPS))
    trained(back, spread, place, range(4, STEPS))
    return same, [param.detach() for param in alone], [whole(param).detach() for param in back]


def traffic():
    """Bytes that each step gives to collectives, of a 40 x 8 weight in shards of its rows."""
    mesh, placements, *_ = layouts()["rows"]
    param = torch.nn.Parameter(placed(torch.randn(40, 8), mesh, placements))
    results = {}
    for residual in ("none", "fira"):
        optimizer = pykern.LowRankOptimizer([param], rank=3, refresh_every=GAP, residual=residual)
        sent = []
        reduce, spread = distributed.all_reduce, distributed.broadcast

        def counting(collective):
            def counted(tensor, *arguments, **keywords):
                sent[-1] += tensor.numel() * tensor.element_size()
                return collective(tensor, *arguments, **keywords)

            return counted

        distributed.all_reduce, distributed.broadcast = counting(reduce), counting(spread)
        for step in range(4):
            param.grad = placed(torch.randn(40, 8, generator=torch.Generator().manual_seed(step)), mesh, placements)
            sent.append(0)
            optimizer.step()
        distributed.all_reduce, distributed.broadcast = reduce, spread
        results[residual] = sent
    return results


def overflow():
    """Steps done, weights and bases when a gradient overflows in the last shard at first."""
    mesh, placements, *_ = layouts()["rows"]
    param = torch.nn.Parameter(placed(tensors(0)[0], mesh, placements))
    optimizer = make([param], "std")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    bases = []
    for step in range(3):
        grad = tensors(max(step, 1))[0] * scaler.get_scale()
        if step == 0:
            grad[-1, 0] = float("inf")
        param.grad = placed(grad, mesh, placements)
        scaler.step(optimizer)
        scaler.update()
        bases.append(optimizer.state[param]["projector"].clone())
    return int(optimizer.state[param]["step"]), whole(param).detach(), bases[0].any().item()


def in_backward():
    """A model under fully_shard with a step in every backward pass."""
    net = sharded(model(), layouts()["rows"][0])
    pykern.step_in_backward(net, lambda params: pykern.FiraAdamW(params, 0.01, rank=3, refresh_every=GAP), max_norm=0.5)
    for step in range(4):
        inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + distributed.get_rank()))
        (net(inputs).square().mean() * 5).backward()
    return [whole(param).detach() for param in net.parameters()]


def refusals():
    """The messages of layouts and sides that don't go together."""
    from torch.distributed.tensor import distribute_tensor

    messages = []
    few_bits = {"residual": "error_feedback", "feedback_dtype": "8bit"}
    cases = (((4, 8), "columns", {"side": "full"}), ((4, 4, 3), "columns", {}), ((8, 4), "rows and columns", few_bits),
             ((8, 4), "rows", {"process_group": distributed.group.WORLD}))  # fmt: skip
    for shape, layout, options in cases:
        mesh, placements, *_ = layouts()[layout]
        param = torch.nn.Parameter(distribute_tensor(torch.randn(shape), mesh, placements, src_data_rank=None))
        optimizer = pykern.LowRankOptimizer([param], rank=2, **options)
        param.grad = torch.ones_like(param)
        try:
            optimizer.step()
        except (ValueError, NotImplementedError) as error:
            messages.append(str(error))
    return messages


@pytest.fixture(scope="module")
def results():
    return run_processes(4, on_one_process)


def alone(case, side):
    params = [torch.nn.Parameter(tensor) for tensor in tensors(0)]
    optimizer = make(params, side, **CASES[case])
    trained(params, optimizer, lambda tensor: tensor)
    return [param.detach() for param in params]


def assert_close(ours, theirs, tolerance=2e-6, case=()):
    for shape, one, other in zip(SHAPES, ours, theirs, strict=False):
        torch.testing.assert_close(
            one, other, rtol=tolerance, atol=tolerance, msg=lambda text: f"{case} {shape} {text}"
        )


def test_shards_step_as_one_process(results):
    compared = 0
    for key in (key for key in results[0] if isinstance(key, tuple)):
        (layout, case), (weights, bases, side) = key, results[0][key]
        expected = alone(case, side)
        if "columns" in layout:
            # What is no matrix lies whole in every process, and takes its own side.
            expected[3:] = alone(case, "std")[3:]
        assert_close(weights, expected, 2e-5 if case == "newton-schulz" else 2e-6, key)
        for result in results[1:]:
            assert all(map(torch.equal, weights, result[key][0])) and all(map(torch.equal, bases, result[key][1]))
        compared += 1
    assert compared == 3 * len(CASES) - 1 + 6 * 2


def test_checkpoints_of_shards(results):
    for same, gathered, spread in (result["checkpoint"] for result in results):
        assert same
        assert_close(gathered, alone("galore", "right"))
        assert_close(spread, gathered)


def test_a_model_under_fully_shard_and_a_distributed_checkpoint(results):
    net = model()
    optimizer = optimizer_of(net, "right")
    train_model(net, optimizer, range(8), range(len(results)))
    for weights, same, _ in (result["model"] for result in results):
        assert same
        assert_close(weights, [param.detach() for param in net.parameters()], 1e-5)
    state = results[0]["model"][2]["state"]["0.weight"]
    assert state["exp_avg"].shape == (3, 13) and state["projector"].shape == (8, 3)


def test_an_overflow_in_one_shard_skips_the_step_in_all(results):
    param = torch.nn.Parameter(tensors(0)[0])
    optimizer = make([param], "right")
    for step in (1, 2):
        param.grad = tensors(step)[0]
        optimizer.step()
    for steps, weight, chosen in (result["overflow"] for result in results):
        assert steps == 2 and not chosen
        torch.testing.assert_close(weight, param.detach(), rtol=2e-6, atol=2e-6)


def test_steps_in_the_backward_pass_of_a_sharded_model(results):
    net = model()
    pykern.step_in_backward(
        net, lambda params: pykern.FiraAdamW(params, 0.01, rank=3, refresh_every=GAP, side="right"), max_norm=0.5
    )
    for step in range(4):
        inputs = torch.cat(
            [
                torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + process))
                for process in range(len(results))
            ]
        )
        (net(inputs).square().mean() * 5).backward()
    for weights in (result["backward"] for result in results):
        assert_close(weights, [param.detach() for param in net.parameters()], 1e-5)


def test_a_step_between_refreshes_sends_nothing_but_the_norms(results):
    basis, gram, largest, norms = 4 * 8 * 3, 4 * 8 * 8, 4, 8 * 3
    for sent in (result["traffic"] for result in results):
        assert sent["none"] == [basis + gram + largest, 0, 0, basis + gram + largest]
        assert sent["fira"] == [basis + gram + largest + norms, norms, norms, basis + gram + largest + norms]


def test_refused_layouts(results):
    full, other, few_bits, group = results[0]["refused"]
    assert group.startswith("process_group: expected parameters that each process holds whole")
    assert full.startswith('side: "full" needs all of a weight in every process') and '"left", "right"' in full
    assert few_bits.startswith('feedback_dtype: expected "weight"')
    assert other.startswith("params: expected a DTensor in Shard(0)") and "group without rank" in other
