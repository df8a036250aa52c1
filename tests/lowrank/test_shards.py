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
    """Names of layouts, with their placements on a mesh of all processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    count = distributed.get_world_size()
    line = init_device_mesh("cpu", (count,))
    meshes = {"rows": (line, [Shard(0)]), "columns": (line, [Shard(1)]), "replicas": (line, [Replicate()])}
    if count == 4:
        square = init_device_mesh("cpu", (2, 2))
        meshes["replicated rows"] = (square, [Replicate(), Shard(0)])
        meshes["rows twice"] = (square, [Shard(0), Shard(0)])
    return meshes


def placed(tensor, mesh, placements):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if tensor.dim() != 2 and Shard(1) in placements:
        placements = [Replicate()]
    return distribute_tensor(tensor, mesh, placements)


def trained(params, optimizer, place, steps=range(STEPS)):
    for step in steps:
        for param, grad in zip(params, tensors(step + 1), strict=True):
            param.grad = place(grad)
        optimizer.step()


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def on_one_process():
    results = {}
    for layout, (mesh, placements) in layouts().items():
        for case, options in CASES.items():
            # One by one where there are few processes, then all layouts.
            if case not in ("galore", "fira") and (distributed.get_world_size() > 2 or layout == "replicas"):
                continue
            params = [torch.nn.Parameter(placed(tensor, mesh, placements)) for tensor in tensors(0)]
            optimizer = make(params, "std", **options)
            trained(params, optimizer, lambda tensor: placed(tensor, mesh, placements))
            bases = [state["projector"] for state in optimizer.state.values() if "projector" in state]
            results[layout, case] = [whole(param).detach() for param in params], bases
    results["checkpoint"] = checkpoints()
    results["model"] = sharded_model()
    results["traffic"] = traffic()
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
    mesh, placements = layouts()["rows"]

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
    mesh, placements = layouts()["rows"]
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


def refusals():
    from torch.distributed.tensor import Shard

    messages = []
    for shape, placement, side in (((8, 4), 0, "left"), ((4, 8), 1, "full"), ((4, 2, 3), 1, "std")):
        mesh = layouts()["rows"][0]
        param = torch.nn.Parameter(placed(torch.randn(shape), mesh, [Shard(placement)])) if len(shape) == 2 else None
        if param is None:
            from torch.distributed.tensor import distribute_tensor

            param = torch.nn.Parameter(distribute_tensor(torch.randn(shape), mesh, [Shard(1)]))
        optimizer = pykern.LowRankOptimizer([param], rank=2, side=side)
        param.grad = torch.ones_like(param)
        try:
            optimizer.step()
        except (ValueError, NotImplementedError) as error:
            messages.append(str(error))
    return messages


@pytest.fixture(scope="module", params=[2, 4])
def results(request):
    return run_processes(request.param, on_one_process)


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
        (layout, case), (weights, bases) = key, results[0][key]
        side = {"columns": "left", "replicas": "std"}.get(layout, "right")
        expected = alone(case, side)
        if layout == "columns":
            # What is no matrix lies whole in every process, and takes its own side.
            expected[3:] = alone(case, "std")[3:]
        assert_close(weights, expected, 2e-5 if case == "newton-schulz" else 2e-6, key)
        for result in results[1:]:
            assert all(map(torch.equal, weights, result[key][0])) and all(map(torch.equal, bases, result[key][1]))
        compared += 1
    assert compared == (18 if len(results) == 2 else 10)


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


def test_a_step_between_refreshes_sends_nothing_but_the_norms(results):
    basis, gram, largest, norms = 4 * 8 * 3, 4 * 8 * 8, 4, 8 * 3
    for sent in (result["traffic"] for result in results):
        assert sent["none"] == [basis + gram + largest, 0, 0, basis + gram + largest]
        assert sent["fira"] == [basis + gram + largest + norms, norms, norms, basis + gram + largest + norms]


def test_refused_layouts(results):
    left, full, other = results[0]["refused"]
    assert left.startswith('side: expected "std", "reverse_std" or \'right\'') and "'full'" in full
    assert other.startswith("params: expected a DTensor in Shard(0)") and "group without rank" in other
