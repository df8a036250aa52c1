"""Tensor subclasses: the plain tensors that they are made of are moved."""

import pytest
import torch
from torch import distributed
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.two_tensor import TwoTensor

import pykern

from .support import STORAGES


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def loss_of(x, weight):
    y = (x @ weight).exp()
    return (y * y.sin()).sum()


def make_offload(storage, **arguments):
    return pykern.ActivationOffload(storage, min_bytes=0, keep_last=0, debug_delays=3, **arguments)


@pytest.mark.parametrize("storage", STORAGES)
def test_two_tensors(storage):
    def gradient(offload):
        torch.manual_seed(3)
        weight = TwoTensor(torch.randn(24, 24), torch.randn(24, 24)).requires_grad_()
        x = TwoTensor(torch.randn(16, 24), torch.randn(16, 24))
        with offload:
            loss = loss_of(x, weight)
        loss.backward()
        return weight.grad

    offload = make_offload(storage)
    actual, expected = gradient(offload), gradient(torch.enable_grad())
    assert type(actual) is TwoTensor
    assert torch.equal(actual.a, expected.a) and torch.equal(actual.b, expected.b)
    offload.synchronize()
    stats = offload.stats()
    # The input, and the results of exp and sin, each of two tensors.
    assert stats["offloads"] + stats["forwards"] >= 6 and stats["slots"] == 0


@pytest.mark.parametrize("storage", STORAGES)
def test_distributed_tensors(storage, mesh):
    def gradient(offload):
        torch.manual_seed(3)
        weight = torch.nn.Parameter(distribute_tensor(torch.randn(24, 24), mesh, [Shard(1)]))
        x = distribute_tensor(torch.randn(16, 24), mesh, [Shard(0)])
        with offload:
            loss = loss_of(x, weight)
        loss.full_tensor().backward()
        return weight.grad

    offload = make_offload(storage)
    actual, expected = gradient(offload), gradient(torch.enable_grad())
    assert type(actual) is DTensor and torch.equal(actual.full_tensor(), expected.full_tensor())
    offload.synchronize()
    assert offload.stats()["offloads"] + offload.stats()["forwards"] >= 3
    assert offload.stats()["kept"]["unsupported"] == 0


def test_storages_of_a_sharded_parameter_stay(mesh):
    weight = torch.nn.Parameter(distribute_tensor(torch.randn(24, 24), mesh, [Shard(1)]))
    offload = make_offload("memory", parameters=[weight])
    x = torch.randn(16, 24, requires_grad=True)
    with offload:
        loss = (x * 1 @ weight.detach().to_local()).sum()
    loss.backward()
    offload.synchronize()
    assert (offload.stats()["kept"]["parameter"], offload.stats()["offloads"]) == (1, 0)


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_a_collective_writes_is_copied_after_its_end(wrapped, mesh):
    weight = torch.randn(16, 24, requires_grad=True)
    group = mesh.get_group().group_name
    summed = AsyncCollectiveTensor(torch.ops._c10d_functional.all_reduce(torch.randn(16, 24), "sum", group))
    asked = []
    offload = make_offload("memory", skip=lambda tensor: asked.append(type(tensor)))
    with offload:
        if wrapped:
            whole = DTensor.from_local(weight, mesh, [Shard(0)]) * DTensor.from_local(summed, mesh, [Shard(0)])
            loss = whole.to_local().sum()
        else:
            loss = (weight * summed).sum()
    offload.synchronize()
    loss.backward()
    assert torch.equal(weight.grad, summed + 0)
    assert offload.stats()["offloads"] == 1
    # Waiting is what makes it plain.
    assert torch.Tensor in asked and AsyncCollectiveTensor not in asked


def test_in_place_change_of_a_subclass_is_autograds_error():
    weight = TwoTensor(torch.randn(8, 8), torch.randn(8, 8)).requires_grad_()
    with make_offload("memory"):
        y = weight.exp()
        loss = (y * 2).sum()
        y.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
