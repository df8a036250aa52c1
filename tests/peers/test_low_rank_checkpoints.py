"""Training that begins with galore_torch or fira and goes on with pykern from their checkpoint."""

import pytest
import torch
from fira import FiraAdamW as PeerFiraAdamW
from galore_torch import GaLoreAdamW as PeerGaLoreAdamW

import pykern
from pykern.integrations.low_rank_checkpoints import convert_optimizer_state

SHAPES = [(96, 40), (40, 96), (33, 33), (50,)]
PEERS = {"galore": (PeerGaLoreAdamW, pykern.GaLoreAdamW), "fira": (PeerFiraAdamW, pykern.FiraAdamW)}


def gradients(step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) * (1 + step) for shape in SHAPES]


def groups(params, kind, side, rank):
    scale = {"alpha": 0.5} if kind == "fira" else {"scale": 0.25}
    low_rank = {"rank": rank, "update_proj_gap": 3, "proj_type": side, **scale}
    return [{"params": params[:3], **low_rank}, {"params": params[3:]}]


def parameters():
    generator = torch.Generator().manual_seed(7)
    return [torch.nn.Parameter(0.1 * torch.randn(shape, generator=generator)) for shape in SHAPES]


def train(optimizer, params, steps):
    for step in steps:
        for param, grad in zip(params, gradients(step), strict=True):
            param.grad = grad
        optimizer.step()


def peer(params, kind, side, rank):
    settings = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.98), "no_deprecation_warning": True}
    return PEERS[kind][0](groups(params, kind, side, rank), **settings)


# Of square low-rank gradients fira takes the norms along the other axis, so there rank 33 is left out.
@pytest.mark.parametrize("before", [3, 4])
@pytest.mark.parametrize("kind, rank", [("galore", 8), ("galore", 33), ("fira", 8), ("fira", 30)])
@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right"])
def test_training_goes_on_with_the_packages_numbers(tmp_path, kind, side, rank, before):
    params = parameters()
    theirs = peer(params, kind, side, rank)
    train(theirs, params, range(before))
    torch.save({"weights": [param.detach() for param in params], "optimizer": theirs.state_dict()}, tmp_path / "saved")
    saved = torch.load(tmp_path / "saved", weights_only=False)
    others = [torch.nn.Parameter(weight) for weight in saved["weights"]]
    ours = PEERS[kind][1]([{"params": others[:3], "rank": 1}, {"params": others[3:]}], lr=9.0)
    converted = convert_optimizer_state(saved["optimizer"])
    torch.save(converted, tmp_path / "converted")
    ours.load_state_dict(torch.load(tmp_path / "converted", weights_only=True))
    for step in range(before, before + 5):
        train(theirs, params, [step])
        train(ours, others, [step])
        for one, other in zip(params, others, strict=True):
            assert (one - other).abs().max() <= 1e-6, (step, tuple(one.shape))


def test_both_sides_at_once():
    param, other = (torch.nn.Parameter(torch.ones(12, 9)) for _ in range(2))
    group = {"rank": 4, "update_proj_gap": 3, "scale": 0.25, "proj_type": "full"}
    theirs = PeerGaLoreAdamW([{"params": [param], **group}], lr=0.01, no_deprecation_warning=True)
    ours = pykern.GaLoreAdamW([other], lr=9.0)
    for step in range(5):
        param.grad = torch.randn(12, 9, generator=torch.Generator().manual_seed(step))
        if step == 1:
            ours.load_state_dict(convert_optimizer_state(theirs.state_dict()))
            other.data.copy_(param.detach())
        theirs.step()
        # The packages choose both bases by one decomposition, pykern each by its own; until then they agree.
        if 1 <= step < 3:
            other.grad = param.grad.clone()
            ours.step()
            assert (param - other).abs().max() <= 1e-6


def test_refused_states():
    params = parameters()
    optimizer = peer(params, "galore", "std", 8)
    train(optimizer, params, range(1))
    state_dict = optimizer.state_dict()
    state_dict["param_groups"][0]["correct_bias"] = False
    with pytest.raises(ValueError, match="correct_bias=True"):
        convert_optimizer_state(state_dict)
    sgd = torch.optim.SGD(params, 0.1, momentum=0.9)
    train(sgd, params, range(1))
    with pytest.raises(ValueError, match="of parameter 0, got .*momentum_buffer"):
        convert_optimizer_state(sgd.state_dict())
