"""Gradients are those of plain autograd, bit for bit."""

import pytest
import torch

import pykern
from pykern.reference.offload import activation_offload

from .support import MODELS, STORAGES, assert_bit_equal, gradients, make


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", MODELS)
def test_every_model(name, storage):
    model, x = make(name)
    plain = gradients(model, x)
    offload = pykern.ActivationOffload(storage, min_bytes=0)
    for _ in range(3):
        assert_bit_equal(gradients(model, x, offload), plain)
    assert offload.stats()["offloads"] + offload.stats()["forwards"] > 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", ["transformer", "views", "checkpoint"])
def test_under_random_delays_and_poison(name, storage, seed):
    model, x = make(name)
    plain = gradients(model, x)
    offload = pykern.ActivationOffload(
        storage, min_bytes=0, keep_last=seed % 2, prefetch=seed, threads=1 + seed, queue_bytes=1 << (12 + 2 * seed),
        debug_delays=seed,
    )  # fmt: skip
    for _ in range(2):
        assert_bit_equal(gradients(model, x, offload), plain)


@pytest.mark.parametrize("name", ["transformer", "views", "convolution"])
def test_when_everything_really_went_through_the_storage(name):
    model, x = make(name)
    plain = gradients(model, x)
    # Batch norm saves its running statistics and then writes to them, which no version counter tells; the backward
    # does not read them.
    offload = pykern.ActivationOffload("file", min_bytes=0, keep_last=0, debug_delays=1, parameters=model.buffers())
    torch.manual_seed(11)
    model.zero_grad()
    with offload:
        loss = model(x).double().square().mean()
    offload.synchronize()
    loss.backward()
    assert_bit_equal([parameter.grad for parameter in model.parameters()], plain)
    assert offload.stats()["forwards"] == 0
    assert offload.stats()["reloads"] > 0


@pytest.mark.parametrize("name", ["mlp", "transformer", "views"])
def test_the_reference_means_the_same(name):
    model, x = make(name)
    assert_bit_equal(gradients(model, x, activation_offload()), gradients(model, x))


@pytest.mark.parametrize("keep_last", [0, 1, 5, 1000])
@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_any_keep_last_and_prefetch(keep_last, prefetch):
    model, x = make("transformer")
    plain = gradients(model, x)
    offload = pykern.ActivationOffload("memory", min_bytes=0, keep_last=keep_last, prefetch=prefetch)
    for _ in range(2):
        assert_bit_equal(gradients(model, x, offload), plain)
    assert (offload.stats()["offloads"] + offload.stats()["forwards"] == 0) == (keep_last == 1000)


def test_compiled_model():
    model, x = make("transformer")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    plain = gradients(model, x)
    torch._dynamo.reset()
    offload = pykern.ActivationOffload("file", min_bytes=0, parameters=model)
    torch.manual_seed(11)
    for _ in range(2):
        model.zero_grad()
        with offload:
            loss = compiled(x).double().square().mean()
        loss.backward()
        for parameter, expected in zip(model.parameters(), plain, strict=True):
            torch.testing.assert_close(parameter.grad, expected)
    assert offload.stats()["offloads"] + offload.stats()["forwards"] > 0


def test_inside_of_a_compiled_function():
    """A graph break; and the hooks, which autograd calls in what is compiled, are not."""
    model, x = make("mlp")
    plain = gradients(model, x)
    torch._dynamo.reset()
    offload = pykern.ActivationOffload("memory", min_bytes=0, keep_last=0)

    @torch.compile(backend="aot_eager")
    def loss(model, x):
        with offload:
            return model(x).double().square().mean()

    for actual, expected in zip(gradients(model, x, loss=loss), plain, strict=True):
        torch.testing.assert_close(actual, expected)
    assert offload.stats()["offloads"] + offload.stats()["forwards"] > 0


def test_training_goes_the_same_way():
    def train(context):
        model, x = make("mlp")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(5):
            gradients(model, x, context)
            optimizer.step()
        return [parameter.detach().clone() for parameter in model.parameters()]

    assert_bit_equal(train(pykern.ActivationOffload("file", min_bytes=0)), train(None))
