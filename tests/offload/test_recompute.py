"""Outputs of norms and activation functions that the backward makes again: same gradients, less memory."""

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import pykern

ROWS, WIDTH = 96, 128


class Layer(nn.Module):
    """The middle of a transformer layer; several linear layers share an output, one through a view."""

    def __init__(self, centred: bool) -> None:
        super().__init__()
        self.norm_weight = nn.Parameter(1 + 0.1 * torch.randn(WIDTH))
        self.norm_bias = nn.Parameter(0.1 * torch.randn(WIDTH)) if centred else None
        self.gate, self.up = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_bias is None:
            normal = pykern.rms_norm(x, self.norm_weight)
        else:
            normal = pykern.layer_norm(x, self.norm_weight, self.norm_bias)
        up = self.up(normal.view(2, ROWS // 2, WIDTH)).view(ROWS, 2 * WIDTH)
        middle = pykern.swiglu(self.gate(normal), up)
        return x + pykern.dropout(self.down(middle), 0.2, seed=3)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Layer(False), Layer(True), Layer(False))


def gradients(context, backwards: int = 1) -> list[Tensor]:
    layers = model()
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1), requires_grad=True)
    with context:
        loss = layers(x).square().sum()
    for turn in range(backwards):
        loss.backward(retain_graph=turn + 1 < backwards)
    return [x.grad, *(parameter.grad for parameter in layers.parameters())]


def contexts() -> dict[str, object]:
    return {
        "recompute": pykern.recompute_saved(),
        "memory": pykern.ActivationOffload("memory", min_bytes=1 << 10),
        "file": pykern.ActivationOffload("file", min_bytes=1 << 10, map_allocations=False),
    }


@pytest.mark.parametrize("backwards", [1, 2])
def test_gradients_are_the_same_bit_for_bit(backwards):
    plain = gradients(torch.enable_grad(), backwards)
    for name, context in contexts().items():
        got = gradients(context, backwards)
        assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True)), name


def test_offload_moves_what_recipes_need_and_no_more():
    offload = pykern.ActivationOffload("memory", min_bytes=1 << 10, keep_last=0)
    gradients(offload)
    stats = offload.stats()
    # Of each layer: the norm's output twice, the activation function's once.
    assert stats["recomputed"] == 9
    assert stats["recomputed_bytes"] == 3 * (2 * WIDTH + 2 * WIDTH) * ROWS * 4
    # Of each layer x, gate and up, and the last output; but for the first x, which is a leaf.
    assert stats["peak_slots"] == 3 * 3
    assert stats["peak_slot_bytes"] == (2 * WIDTH + 3 * 4 * WIDTH + WIDTH) * ROWS * 4


def test_outputs_leave_memory():
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    weight = torch.randn(WIDTH, WIDTH, requires_grad=True)
    for context, stays in ((torch.enable_grad(), True), (pykern.recompute_saved(), False)):
        with context:
            normal = pykern.rms_norm(x)
            storage = StorageWeakRef(normal.untyped_storage())
            loss = (normal @ weight).sum()
            del normal
        assert storage.expired() != stays
        loss.backward()


def test_an_output_is_made_once_for_all_that_saved_it():
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    weights = [torch.randn(WIDTH, WIDTH, requires_grad=True) for _ in range(3)]
    calls = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            calls.append(function.name())
            return function(*arguments, **(keywords or {}))

    with pykern.recompute_saved():
        normal = pykern.rms_norm(x)
        loss = sum((normal @ weight).sum() for weight in weights)
    del normal
    with Count():
        loss.backward()
    assert calls.count("pykern::norm") == 1 and calls.count("pykern::norm_backward") == 1


def test_chains_are_followed():
    """An activation function of an activation function's output: both are made again, from the first one's input."""
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    weight = torch.randn(WIDTH, WIDTH, requires_grad=True)
    results = []
    for context in (torch.enable_grad(), pykern.recompute_saved()):
        with context:
            loss = (pykern.gelu(pykern.gelu(x)) @ weight).square().sum()
        results.append(torch.autograd.grad(loss, (x, weight)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("read", [lambda x: x, lambda x: x.data], ids=["itself", "data"])
def test_a_changed_output_is_kept(read):
    """The recipe tells of what was; an addition in place makes the output another tensor, for all that show it."""
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    weight = torch.randn(WIDTH, WIDTH, requires_grad=True)
    results = []
    for context in (torch.enable_grad(), pykern.recompute_saved()):
        with context:
            normal = pykern.rms_norm(x)
            shown = read(normal)
            normal.add_(1)
            loss = (shown @ weight).sum() + normal.sum()
        results.append(torch.autograd.grad(loss, (x, weight)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_changed_input_is_an_error():
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    hidden = x * 1
    with pykern.recompute_saved():
        loss = (pykern.gelu(hidden) @ torch.randn(WIDTH, WIDTH, requires_grad=True)).sum()
    with torch.no_grad():
        hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_weight_that_was_freed_meanwhile_is_an_error():
    x, weight = torch.randn(ROWS, WIDTH), torch.nn.Parameter(torch.ones(WIDTH))
    with pykern.recompute_saved():
        loss = (pykern.rms_norm(x, weight) @ torch.randn(WIDTH, WIDTH, requires_grad=True)).sum()
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="recomputation: expected the inputs of a norm .* in memory"):
        loss.backward()


def test_an_output_does_not_hold_what_made_the_weight():
    weight = torch.ones(WIDTH, requires_grad=True) * 2
    alive = weakref.ref(weight)
    normal = pykern.rms_norm(torch.randn(ROWS, WIDTH), weight).detach()
    del weight
    assert alive() is None and normal.untyped_storage()._pykern_recipe is not None


def test_nothing_is_noted_without_a_graph():
    x = torch.randn(ROWS, WIDTH)
    assert not hasattr(pykern.gelu(x).untyped_storage(), "_pykern_recipe")
    with torch.no_grad():
        assert not hasattr(pykern.gelu(x.requires_grad_()).untyped_storage(), "_pykern_recipe")
