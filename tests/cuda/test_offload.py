"""On a GPU only: activations go to pinned memory and come back, and the host waits for nothing."""

import pytest
import torch

import pykern
from pykern.offload.bandwidth import measure_bandwidth
from pykern.offload.cuda_device import CudaDevice
from tests.offload.support import assert_bit_equal, gradients, make, mlp

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_gpu(name):
    model, x = make(name)
    return model.cuda(), x.cuda()


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("name", ["mlp", "bfloat16", "transformer", "checkpoint", "dropout"])
def test_gradients_are_the_same(name, directions):
    model, x = on_gpu(name)
    plain = gradients(model, x)
    for queue_bytes in (1, 1 << 30):
        device = CudaDevice(directions=directions)
        offload = pykern.ActivationOffload("pinned", device=device, min_bytes=0, keep_last=0, queue_bytes=queue_bytes)
        for _ in range(5):
            assert_bit_equal(gradients(model, x, offload), plain)
        assert offload.stats()["offloads"] > 0


def test_through_a_file(tmp_path):
    model, x = on_gpu("transformer")
    plain = gradients(model, x)
    offload = pykern.ActivationOffload("pinned", min_bytes=0, capacity=1 << 17, queue_bytes=1, path=tmp_path)
    for _ in range(3):
        assert_bit_equal(gradients(model, x, offload), plain)
    assert offload.stats()["spills"] > 0


def test_the_host_waits_for_nothing():
    model, x = mlp(512).cuda(), torch.randn(4096, 512, device="cuda")
    offload = pykern.ActivationOffload("pinned", min_bytes=0, queue_bytes=1)

    def step():
        with offload:
            loss = model(x).square().mean()
        loss.backward()

    for _ in range(2):
        step()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert offload.stats()["reloads"] > 0


def test_memory_is_free_meanwhile():
    model, x = mlp(1024, depth=12).cuda(), torch.randn(8192, 1024, device="cuda")

    def peak(context):
        gradients(model, x, context)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        gradients(model, x, context)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - base

    plain = peak(None)
    assert peak(pykern.ActivationOffload("pinned", queue_bytes=64 << 20)) < 0.6 * plain


def test_registered_memory_is_as_fast_as_pinned():
    measured = {one.memory: one for one in measure_bandwidth("cuda", [1 << 28])}
    registered, pinned = measured["registered"], measured["pinned"]
    assert registered.out > 0.95 * pinned.out
    assert registered.back > 0.95 * pinned.back
