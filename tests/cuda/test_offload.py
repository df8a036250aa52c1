"""On a GPU only: activations go to pinned memory and come back, and the host waits for nothing."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import pykern
from bench import harness
from bench.offload import cases_gpu
from pykern.offload.bandwidth import measure_bandwidth
from pykern.offload.cuda_device import CudaDevice
from tests.offload.support import assert_bit_equal, gradients, make, mlp
from tests.offload.test_pipeline import Rank, assert_same

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def attention_is_the_same_each_time():
    """The backward of the fused kernels may add up in another order."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


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


@pytest.mark.parametrize("codec", ["float8_e4m3", "int8"])
def test_codes_leave_in_place_of_elements(codec):
    model, x = on_gpu("mlp")
    plain = gradients(model, x)
    offload = pykern.ActivationOffload("pinned", min_bytes=0, keep_last=0, queue_bytes=1, codec=codec)
    first, second = (gradients(model, x, offload) for _ in range(2))
    assert_bit_equal(first, second)
    for coded, exact in zip(first, plain, strict=True):
        assert 0 < (coded - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("model", ["attention", "feedforward"])
def test_a_pipeline_has_the_same_gradients(model, split):
    rank = Rank(model, "pinned", split, place="cuda")
    assert_same(rank)
    counters = rank.offload.counters()
    assert counters["offloads"] == len(rank.offload.plan.copies[0]) == counters["engine"]["reloads"]


def test_memory_of_another_stream_waits_for_its_copy():
    """Saved in one stream, allocated in another, which fills its memory again while the copy out is under way."""
    model, side = mlp(1024, depth=1).cuda(), torch.cuda.Stream()
    value = torch.randn(8192, 1024, device="cuda")

    def step(context):
        with torch.cuda.stream(side):
            x = value.clone()
        torch.cuda.current_stream().wait_stream(side)
        with context:
            loss = model(x).exp().mean()
        del x
        for _ in range(4):
            with torch.cuda.stream(side):
                torch.full_like(value, float("nan"))
        loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = step(torch.enable_grad())
    model.zero_grad()
    offload = pykern.ActivationOffload("pinned", min_bytes=0, keep_last=0, queue_bytes=1)
    assert_bit_equal(step(offload), plain)


def test_a_capture_is_refused_and_harms_nothing():
    model, x = on_gpu("mlp")
    offload = pykern.ActivationOffload("pinned", min_bytes=0, keep_last=0)
    plain = gradients(model, x, offload)
    with pytest.raises(RuntimeError, match="can't be captured in a CUDA graph"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()), offload:
            model(x)
    assert_bit_equal(gradients(model, x, offload), plain)


def test_a_default_device_of_torch_changes_nothing():
    with torch.device("cuda"):
        model, x = make("mlp")
        model, x = model.cuda(), x.cuda()
        plain = gradients(model, x)
        assert_bit_equal(gradients(model, x, pykern.ActivationOffload("pinned", min_bytes=0)), plain)


def test_norms_whose_sums_fill_the_shared_memory():
    """With what the kernel has in static shared memory, more than a block gets unasked."""
    x = torch.randn(64, 6144, device="cuda", requires_grad=True)
    weight, bias = (torch.randn(6144, device="cuda", requires_grad=True) for _ in range(2))
    grad = torch.randn_like(x)
    got = torch.autograd.grad(pykern.layer_norm(x, weight, bias), (x, weight, bias), grad)
    expected = torch.autograd.grad(torch.nn.functional.layer_norm(x, (6144,), weight, bias), (x, weight, bias), grad)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_steps_of_the_bench_have_the_same_gradients():
    sizes = cases_gpu.Sizes(cases_gpu.Shape(2, 256, 4, 2), 512, 1 << 20)
    with torch.device("cuda"):
        stack = cases_gpu.Stack(sizes, cases_gpu.FusedBlock)
        found = {}
        for name, step in cases_gpu.steps(stack, {"checkpoint": cases_gpu.checkpointed}).items():
            step()
            found[name] = [parameter.grad.clone() for parameter in stack.blocks.parameters()]
    for gradients_ in found.values():
        assert_bit_equal(gradients_, found["no offload"])


def test_copies_of_the_bench_are_as_fast_as_the_link():
    cases = [cases_gpu.copies_case(way, 1 << 28) for way in ("out", "back")]
    links = harness.best_links(measure_bandwidth("cuda", [1 << 28]))
    for case in cases:
        ours = harness.time_case(case, torch.device("cuda"), 0.1)[0]
        assert case.bytes / ours.p50 > 0.9 * links[case.link]


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
