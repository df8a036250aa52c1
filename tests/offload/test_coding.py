"""Activations that leave as codes: what comes back is the codec's, whatever the time at which it was asked for."""

import pytest
import torch
from torch import Tensor, nn

import pykern
from pykern.offload.planning.orders import make_order
from pykern.reference import offload as reference

CODECS = ["float8_e4m3", "int8"]
ROWS, WIDTH = 60, 130


def coded(tensor: Tensor, codec: str) -> Tensor:
    return reference.decode(*reference.encode(tensor, codec), codec, tensor.dtype).view(tensor.shape)


@pytest.mark.parametrize("delays", [None, 0, 1, 2])
@pytest.mark.parametrize("storage", ["memory", "file"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("codec", CODECS)
def test_gradients_are_those_of_decoded_tensors(codec, dtype, storage, delays):
    """Of a product, each factor's gradient is the other factor as it came back. `delays`: before and after it left."""
    a, b = (torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True) for _ in range(2))
    offload = pykern.ActivationOffload(
        storage, min_bytes=1 << 10, keep_last=0, codec=codec, map_allocations=False, debug_delays=delays
    )
    with offload:
        x, y = a * 2, b.T.contiguous().T * 3
        loss = (x * y).float().sum()
    grad_a, grad_b = torch.autograd.grad(loss, (a, b))
    assert torch.equal(grad_a, 2 * coded(y.detach().T, codec).T)
    assert torch.equal(grad_b, 3 * coded(x.detach(), codec))


def test_fewer_bytes_leave_and_the_error_is_the_codecs():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(3)))
    x = torch.randn(400, WIDTH)

    def gradients(codec: str | None) -> tuple[Tensor, int]:
        model.zero_grad()
        offload = pykern.ActivationOffload("memory", min_bytes=1 << 10, keep_last=0, codec=codec)
        with offload:
            loss = model(x).square().mean()
        loss.backward()
        flat = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        return flat, offload.stats()["peak_slot_bytes"]

    exact, all_bytes = gradients(None)
    for codec, bound in (("float8_e4m3", 0.05), ("int8", 0.02)):
        got, fewer = gradients(codec)
        assert torch.equal(got, gradients(codec)[0])
        assert 0 < (got - exact).norm() < bound * exact.norm()
        # One byte and a share of a scale in place of four bytes.
        assert 0.25 < fewer / all_bytes < 0.27


def test_what_has_no_codes_is_exact():
    index = torch.randint(0, 1000, (5000,))
    table = torch.randn(1000, 3, requires_grad=True)
    results = []
    for codec in (None, "int8"):
        offload = pykern.ActivationOffload("memory", min_bytes=1 << 10, keep_last=0, codec=codec)
        with offload:
            loss = table[index].sum()
        results.append(torch.autograd.grad(loss, table)[0])
        assert offload.stats()["peak_slots"] > 0
    assert torch.equal(*results)


def test_views_come_back_on_one_buffer():
    a = torch.randn(ROWS, 2 * WIDTH, requires_grad=True)
    offload = pykern.ActivationOffload("memory", min_bytes=1 << 10, keep_last=0, codec="int8")
    with offload:
        both = a * 1
        loss = (both[:, :WIDTH] * both[:, WIDTH:]).sum()
    saved = loss.grad_fn.next_functions[0][0]
    one, other = saved._saved_self, saved._saved_other
    assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    decoded = coded(both.detach(), "int8")
    assert torch.equal(one, decoded[:, :WIDTH]) and torch.equal(other, decoded[:, WIDTH:])


def test_a_view_of_another_dtype_is_not_decoded():
    """The bits of a tensor whose elements are coded: codes of elements say nothing of bits."""
    found = []

    class WithBits(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, bits):
            ctx.save_for_backward(bits)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            found.extend(ctx.saved_tensors)
            return gradient, None

    a = torch.randn(ROWS, WIDTH, requires_grad=True)
    with pykern.ActivationOffload("memory", min_bytes=1 << 10, keep_last=0, codec="int8"):
        x = a * 1
        loss = WithBits.apply(x.exp() + x.sin(), x.detach().view(torch.int32)).sum()
    (gradient,) = torch.autograd.grad(loss, a)
    assert torch.equal(found[0].view(torch.float32), x)
    assert not torch.equal(gradient, x.exp() + x.cos())


@pytest.mark.parametrize("codec", CODECS)
def test_blocks_of_a_pipeline(codec):
    """Of one rank: what left comes back decoded, twice where the backward is split."""
    plan = pykern.plan("po", 1, 2, 4, times=(1.0, 1.0, 1.0), bytes=1 << 15, bandwidth=1e6, offload="full")
    assert plan.order.ranks == make_order("po", 1, 2, 4).ranks
    moved = {(copy.chunk, copy.microbatch) for copy in plan.copies[0]}
    assert moved
    offload = pykern.PipelineOffload(plan, 0, min_bytes=1 << 10, codec=codec, sizes_known=False)
    offload.begin_step()
    waiting, weights = {}, {}
    for kind, chunk, microbatch in plan.order.ranks[0]:
        place = chunk, microbatch
        if kind == "F":
            a, b = (torch.randn(ROWS, WIDTH, requires_grad=True) for _ in range(2))
            with offload.forward(chunk, microbatch):
                x, y = a * 2, b * 3
                loss = (x * y).sum()
            waiting[place] = loss, a, b, x.detach(), y.detach()
            del x, y
            continue
        loss, a, b, x, y = waiting[place]
        with offload.backward(kind, chunk, microbatch):
            (of_a,) = torch.autograd.grad(loss, a, retain_graph=kind == "I")
        expected = 2 * (coded(y, codec) if place in moved else y)
        assert torch.equal(of_a, expected)
        weights[place] = of_a
    offload.end_step()
    assert len(weights) == 8 and offload.counters()["offloads"] == len(moved)


def test_an_unknown_codec_is_refused():
    with pytest.raises(ValueError, match="codec: expected None or one of none, float8_e4m3, int8, got 'fp8'"):
        pykern.ActivationOffload(codec="fp8")
