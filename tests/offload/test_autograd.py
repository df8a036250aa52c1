"""The ways in which autograd may use saved tensors."""

import gc
import threading

import pytest
import torch

import pykern

from .support import STORAGES, assert_bit_equal, gradients, loss_of, make


@pytest.fixture(params=STORAGES)
def offload(request):
    return pykern.ActivationOffload(request.param, min_bytes=0, keep_last=0, debug_delays=5)


def test_retained_graph(offload):
    model, x = make("transformer")
    plain = gradients(model, x)
    with offload:
        loss = loss_of(model, x)
    for retain in (True, True, False):
        assert_bit_equal(list(torch.autograd.grad(loss, list(model.parameters()), retain_graph=retain)), plain)
    del loss
    offload.synchronize()
    assert offload.stats()["slots"] == 0


def test_inputs_and_weights_in_two_passes(offload):
    """Split backward, as pipeline schedules do it: every saved tensor is unpacked in both passes."""
    model, x = make("transformer")
    x.requires_grad_()
    weights = list(model.parameters())
    expected = torch.autograd.grad(loss_of(model, x), [x, *weights])
    with offload:
        loss = loss_of(model, x)
    of_input = torch.autograd.grad(loss, [x], retain_graph=True)
    of_weights = torch.autograd.grad(loss, weights)
    assert_bit_equal([*of_input, *of_weights], list(expected))


def test_double_backward(offload):
    def penalty(context):
        model, x = make("mlp")
        x.requires_grad_()
        with context:
            (gradient,) = torch.autograd.grad(loss_of(model, x), x, create_graph=True)
            gradient.square().sum().backward()
        return [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]

    assert_bit_equal(penalty(offload), penalty(torch.enable_grad()))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_microbatches_in_flight(offload, order):
    model, x = make("mlp")
    batches = [x, x.flip(0) + 1, x * 0.5]
    model.zero_grad()
    for index in order:
        loss_of(model, batches[index]).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with offload:
        losses = [loss_of(model, batch) for batch in batches]
    for index in order:
        losses[index].backward()
    assert_bit_equal([p.grad for p in model.parameters()], plain)
    del losses
    offload.synchronize()
    assert offload.stats()["slots"] == 0


def test_backward_of_a_part(offload):
    model, x = make("mlp")
    with offload:
        hidden = model[:3](x)
        loss = model[3:](hidden).square().mean()
    last = list(model[3:].parameters())
    assert_bit_equal(list(torch.autograd.grad(loss, last)), list(torch.autograd.grad(model(x).square().mean(), last)))
    del loss, hidden
    offload.synchronize()
    assert offload.stats()["slots"] == 0


def test_exception_in_forward(offload):
    model, x = make("mlp")
    plain = gradients(model, x)

    def fail(model, x):
        loss_of(model, x)
        raise KeyError("stop")

    for _ in range(2):
        with pytest.raises(KeyError):
            gradients(model, x, offload, loss=fail)
        gc.collect()
        offload.synchronize()
        assert offload.stats()["slots"] == 0
        assert_bit_equal(gradients(model, x, offload), plain)


def test_exception_in_backward(offload):
    model, x = make("mlp")
    plain = gradients(model, x)
    hook = model[2][0].weight.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError) as raised:
        gradients(model, x, offload)
    hook.remove()
    assert_bit_equal(gradients(model, x, offload), plain)
    del raised
    gc.collect()
    offload.synchronize()
    assert offload.stats()["slots"] == 0


def test_hooks_end_with_the_context(offload):
    model, x = make("mlp")
    with offload:
        pass
    gradients(model, x)
    assert offload.stats()["offloads"] == 0 == sum(offload.stats()["kept"].values())


def test_a_closed_one_is_refused(offload):
    offload.close()
    with pytest.raises(RuntimeError, match="ActivationOffload: closed, so nothing can be offloaded; make another"):
        with offload:
            pass


def test_what_is_kept_is_counted_from_any_moment():
    offload = pykern.ActivationOffload(min_bytes=0, keep_last=1)
    model, x = make("mlp")
    with offload:
        one = loss_of(model, x)
    offload.reset_stats()
    assert offload.stats()["kept"]["last"] == 1
    with offload:
        other = loss_of(model, x)
    assert offload.stats()["kept"]["last"] == 1
    (one + other).backward()


def test_no_grad_saves_nothing(offload):
    model, x = make("mlp")
    with offload, torch.no_grad():
        model(x)
    assert sum(offload.stats()["kept"].values()) == 0


def test_nested_contexts_use_the_inner_one(offload):
    inner = pykern.ActivationOffload("memory", min_bytes=0, keep_last=0)
    model, x = make("mlp")
    plain = gradients(model, x)
    with offload:
        assert_bit_equal(gradients(model, x, inner), plain)
    inner.synchronize()
    assert inner.stats()["offloads"] + inner.stats()["forwards"] > 0
    assert offload.stats()["offloads"] == 0


def test_same_context_entered_twice(offload):
    model, x = make("mlp")
    plain = gradients(model, x)
    with offload:
        assert_bit_equal(gradients(model, x, offload), plain)
        assert_bit_equal(gradients(model, x), plain)


def test_checkpoint_inputs_are_offloaded(offload):
    model, x = make("checkpoint")
    with offload:
        loss = loss_of(model, x)
    offload.synchronize()
    # The inputs of both checkpoints, and what the loss saves: its two exponents are numbers.
    assert offload.stats()["offloads"] == 3
    loss.backward()


def test_offload_inside_of_a_checkpoint(offload):
    model, x = make("mlp")
    plain = gradients(model, x)

    def inner(x):
        with offload:
            return model(x)

    def loss(model, x):
        return torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False).double().square().mean()

    assert_bit_equal(gradients(model, x, loss=loss), plain)


def in_place_after_save(x):
    y = x.exp()
    y.add_(1)
    return y.sum()


def in_place_on_a_view_after_save(x):
    y = x.exp()
    y[:2].mul_(0)
    return y.sum()


def in_place_on_a_parameter(x):
    weight = torch.nn.Parameter(torch.ones(4, 4))
    loss = (x @ weight).sum()
    with torch.no_grad():
        weight.add_(1)
    return loss


def in_place_between_two_saves(x):
    y = x * 1
    first = y.sin()
    with torch.no_grad():
        y.detach().add_(1)
    return (first + y.cos()).sum()


IN_PLACE = [in_place_after_save, in_place_on_a_view_after_save, in_place_on_a_parameter, in_place_between_two_saves]


@pytest.mark.parametrize("function", IN_PLACE)
@pytest.mark.parametrize("keep_last", [0, 100])
@pytest.mark.parametrize("min_bytes", [0, 1 << 20])
def test_in_place_change_is_autograds_error(function, keep_last, min_bytes):
    def run(context):
        x = torch.ones(4, 4, requires_grad=True)
        with context:
            loss = function(x)
        with pytest.raises(RuntimeError, match="has been modified by an inplace operation") as raised:
            loss.backward()
        return str(raised.value)

    plain = run(torch.enable_grad())
    ours = run(pykern.ActivationOffload(min_bytes=min_bytes, keep_last=keep_last))
    assert plain.split("expected version")[1].split(";")[0].split(".")[0] in ours


def test_saved_after_an_in_place_change(offload):
    """The same storage at two versions is two copies: the later is right, the earlier an error."""
    factor = torch.randn(8, 8, requires_grad=True)
    data = torch.randn(8, 8)
    with offload:
        first = (factor * data).sum()
        data.mul_(3)
        second = (factor * data).sum()
    offload.synchronize()
    assert_bit_equal(list(torch.autograd.grad(second, factor)), [data])
    assert (offload.stats()["offloads"], offload.stats()["deduplicated"]) == (2, 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.backward()


def test_second_backward_without_retain_is_autograds_error(offload):
    model, x = make("mlp")
    with offload:
        loss = loss_of(model, x)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_custom_function_inputs_and_outputs(offload):
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            out = a * b
            ctx.save_for_backward(a, b, out, None)
            return out

        @staticmethod
        def backward(ctx, gradient):
            a, b, out, nothing = ctx.saved_tensors
            assert nothing is None
            return gradient * b + 0 * out, gradient * a

    x = torch.randn(6, 6, requires_grad=True)

    def run():
        return torch.autograd.grad(Product.apply(x.sin(), x.cos()).sum(), x)

    plain = run()
    with offload:
        assert_bit_equal(list(run()), list(plain))


def test_outputs_do_not_keep_their_graph_alive(offload):
    x = torch.randn(64, 64, requires_grad=True)
    gc.disable()
    try:
        with offload:
            y = x.exp()
        assert offload.stats()["slots"] == 1
        del y
        offload.synchronize()
        assert offload.stats()["slots"] == 0
    finally:
        gc.enable()


def test_many_threads(offload):
    model, x = make("mlp")
    parameters = list(model.parameters())
    batches = [x + index for index in range(4)]
    expected = [torch.autograd.grad(loss_of(model, batch), parameters) for batch in batches]
    results: list = [None] * 4

    def work(index):
        for _ in range(3):
            with offload:
                loss = loss_of(model, batches[index])
            results[index] = torch.autograd.grad(loss, parameters)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for result, gradient in zip(results, expected, strict=True):
        assert_bit_equal(list(result), list(gradient))
    gc.collect()
    offload.synchronize()
    assert offload.stats()["slots"] == 0


def test_backward_in_another_thread(offload):
    model, x = make("transformer")
    plain = gradients(model, x)
    model.zero_grad()
    with offload:
        loss = loss_of(model, x)
    worker = threading.Thread(target=loss.backward)
    worker.start()
    worker.join()
    assert_bit_equal([p.grad for p in model.parameters()], plain)


@pytest.mark.parametrize("kind", ["subclass", "sparse", "meta", "conjugate", "negative"])
def test_tensors_kept_as_they_are(kind):
    class Marked(torch.Tensor):
        pass

    saved = {
        "subclass": lambda: torch.randn(4, 4).as_subclass(Marked),
        "sparse": lambda: torch.eye(4).to_sparse(),
        "meta": lambda: torch.empty(4, 4, device="meta"),
        "conjugate": lambda: torch.randn(4, 4, dtype=torch.complex64).conj(),
        "negative": lambda: torch.randn(4, 4, dtype=torch.complex64).conj().imag,
    }[kind]()
    found = []

    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, other):
            ctx.save_for_backward(other)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            found.extend(ctx.saved_tensors)
            return gradient, None

    offload = pykern.ActivationOffload(min_bytes=0)
    x = torch.randn(2, requires_grad=True)
    with offload:
        Keep.apply(x, saved).sum().backward()
    (back,) = found
    assert type(back) is type(saved)
    assert (back.layout, back.device, back.dtype) == (saved.layout, saved.device, saved.dtype)
    assert (back.is_conj(), back.is_neg()) == (saved.is_conj(), saved.is_neg())
    if kind != "meta":
        assert torch.equal(back.to_dense(), saved.to_dense())
    assert offload.stats()["kept"]["unsupported"] == 1
