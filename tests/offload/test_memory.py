"""Memory is really given up."""

import weakref

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import pykern
from bench.offload import peak_memory

from .support import STORAGES, loss_of, make


@pytest.mark.parametrize("storage", STORAGES)
def test_saved_storages_die_in_the_forward(storage):
    offload = pykern.ActivationOffload(storage, min_bytes=0, keep_last=1)
    x = torch.randn(32, 32, requires_grad=True)
    storages = []
    with offload:
        y = x
        for _ in range(6):
            y = y.exp().sin()
            storages.append(StorageWeakRef(y.untyped_storage()))
    offload.synchronize()
    assert [reference.expired() for reference in storages] == [True] * 5 + [False]
    y.sum().backward()


def test_restored_buffers_die_with_their_use():
    """At most the tensors of this node and of the one read ahead are back at any time."""
    offload = pykern.ActivationOffload("memory", min_bytes=0, keep_last=0, prefetch=1)
    alive = weakref.WeakSet()
    most = 0

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = x * 2
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx, gradient):
            nonlocal most
            (saved,) = ctx.saved_tensors
            alive.add(saved)
            most = max(most, len(alive))
            return gradient * 2

    y = torch.ones(1000, requires_grad=True)
    with offload:
        for _ in range(10):
            y = Watch.apply(y)
    offload.synchronize()
    y.sum().backward()
    assert most <= 2
    assert offload.stats()["reloads"] == 10


def test_graph_of_a_dead_model_frees_everything():
    offload = pykern.ActivationOffload("memory", min_bytes=0, keep_last=0, parameters=(made := make("mlp"))[0])
    model, x = made
    reference = weakref.ref(model)
    with offload:
        loss = loss_of(model, x)
    del model, made, loss
    offload.synchronize()
    assert reference() is None
    assert offload.stats()["slots"] == 0


def test_peak_resident_memory_is_lower():
    """The bench line: bit-equal gradients at less than 70 % of plain PyTorch's peak (20 % where this was written)."""
    plain, spilled = peak_memory.measure("mlp", (peak_memory.MAPPED, peak_memory.FILE), steps=1)
    assert spilled["gradients_equal"]
    assert spilled["stats"]["offloads"] > 0
    assert spilled["peak_bytes"] < 0.7 * plain["peak_bytes"]
