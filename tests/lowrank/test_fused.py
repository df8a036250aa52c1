"""The fused step of LowRankOptimizer is its parts one by one."""

import pytest
import torch

from pykern.lowrank import ops, stepping
from pykern.lowrank.optimizer import LowRankOptimizer

SHAPES = [(40, 24), (24, 40), (33, 33), (6, 4, 3, 3)]
SETTINGS = [
    {"residual": "none"},
    {"residual": "none", "maximize": True, "decay": "after"},
    {"residual": "fira"},
    {"residual": "fira", "parity": "fira"},
    {"residual": "fira", "growth_limit": 0.0, "scale": 0.5},
    {"residual": "apollo_channel", "scale": 3.0},
    {"residual": "apollo_channel", "scale": 3.0, "scale_first": True, "maximize": True},
    {"residual": "apollo_tensor", "scale": 128.0, "parity": "apollo_torch"},
    {"residual": "apollo_tensor", "side": "reverse_std"},
]


def trained(parts: bool, monkeypatch, dtype, settings, amp=False):
    """Parameters and states after some steps, three of them refreshes."""
    generator = torch.Generator().manual_seed(0)

    def normal(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    params = [torch.nn.Parameter(normal(shape)) for shape in SHAPES]
    optimizer = LowRankOptimizer(params, 0.01, **{"rank": 4, "refresh_every": 2, "weight_decay": 0.1, **settings})
    if amp:
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    with monkeypatch.context() as patch:
        if parts:
            patch.setattr(stepping, "is_fused", lambda job, bases: False)
        for _ in range(5):
            for param in params:
                param.grad = normal(param.shape) * (1024 if amp else 1)
            optimizer.step()
    return params, [optimizer.state[param] for param in params]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype, amp", [(torch.float32, True), (torch.float64, False)], ids=["float32, amp", "float64"])
def test_fused_step_is_its_parts(device, monkeypatch, dtype, settings, amp):
    fused, fused_states = trained(False, monkeypatch, dtype, settings, amp)
    parts, parts_states = trained(True, monkeypatch, dtype, settings, amp)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    for a, b in zip(fused, parts, strict=True):
        torch.testing.assert_close(a, b, **close)
    for a, b in zip(fused_states, parts_states, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], **close)


@pytest.mark.parametrize(
    "settings, fused",
    [
        ({}, True),
        ({"residual": "apollo_tensor"}, True),
        ({"rule": "lion"}, False),
        ({"residual": "sign"}, False),
        ({"state_dtype": "bfloat16"}, False),
        ({"side": "full"}, False),
    ],
    ids=str,
)
def test_which_groups_are_fused(monkeypatch, settings, fused):
    calls = []
    for name in ("low_rank_adamw_step", "low_rank_apply"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, _op=op, _name=name, **k: (calls.append(_name), _op(*a, **k))[1])
    param = torch.nn.Parameter(torch.randn(12, 8))
    param.grad = torch.randn(12, 8)
    LowRankOptimizer([param], 0.01, rank=4, **settings).step()
    assert calls == (["low_rank_adamw_step"] if fused else ["low_rank_apply"])


def test_a_group_is_one_call(monkeypatch):
    calls = []
    op = ops.low_rank_adamw_step
    monkeypatch.setattr(ops, "low_rank_adamw_step", lambda *a, **k: (calls.append(len(a[0])), op(*a, **k))[1])
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    for param in params:
        param.grad = torch.randn_like(param)
    LowRankOptimizer(params, 0.01, rank=4).step()
    assert calls == [len(SHAPES)]
