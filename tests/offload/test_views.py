"""Storages are copied once; views of every kind come back over their own bytes."""

import random

import pytest
import torch

import pykern
from pykern.offload.views import ALIGNMENT, View


class Save(torch.autograd.Function):
    """Saves the tensors it is given, and shows what comes back."""

    @staticmethod
    def forward(ctx, x, show, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.show, ctx.count = show, len(tensors)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.show(ctx.saved_tensors)
        return gradient, None, *[None] * ctx.count


def offloaded(*keywords, **named):
    return pykern.ActivationOffload("memory", **{"min_bytes": 0, "keep_last": 0, **named})


def round_trip(offload, *tensors):
    """What autograd gives back for tensors saved by one node, after everything was written."""
    found = []
    x = torch.zeros(1, requires_grad=True)
    with offload:
        y = Save.apply(x, found.extend, *tensors)
    offload.synchronize()
    y.backward()
    return found


def assert_same(back, saved):
    assert back.dtype == saved.dtype
    assert back.shape == saved.shape
    assert back.stride() == saved.stride()
    assert torch.equal(back, saved)


BASE = torch.arange(4096, dtype=torch.float32).view(64, 64)
VIEWS = {
    "whole": lambda x: x,
    "transposed": lambda x: x.t(),
    "permuted": lambda x: x.view(4, 16, 64).permute(2, 0, 1),
    "rows": lambda x: x[8:20],
    "odd_rows": lambda x: x.view(-1)[7:501],
    "columns": lambda x: x[:, :40],
    "narrow_columns": lambda x: x[:, 3:9],
    "steps": lambda x: x[::5, ::3],
    "expanded": lambda x: x[:, :, None].expand(64, 64, 7),
    "expanded_narrow": lambda x: x[:, 5:6].expand(64, 64),
    "scalar": lambda x: x[3, 4],
    "overlapping": lambda x: x.view(-1).unfold(0, 128, 32),
    "half_words": lambda x: x.view(torch.float16),
    "bytes": lambda x: x.view(torch.uint8),
    "complex": lambda x: torch.view_as_complex(x.view(64, 32, 2)),
    "wider": lambda x: x.view(torch.int64),
}


def byte_offset(tensor):
    return tensor.storage_offset() * tensor.element_size()


@pytest.mark.parametrize("name", VIEWS)
def test_view_comes_back(name):
    saved = VIEWS[name](BASE.clone())
    offload = offloaded()
    (back,) = round_trip(offload, saved)
    assert_same(back, saved)
    assert offload.stats()["reloads"] == 1
    # Storages begin at multiples of 64 on a CPU, and of 512 on a GPU.
    assert back.data_ptr() % 64 == saved.data_ptr() % 64
    assert byte_offset(back) % ALIGNMENT == byte_offset(saved) % ALIGNMENT


@pytest.mark.parametrize("name", VIEWS)
def test_view_and_its_storage_share_one_copy(name):
    base = BASE.clone()
    view = VIEWS[name](base)
    offload = offloaded()
    first, second, third = round_trip(offload, base, view, base.t())
    assert_same(first, base)
    assert_same(second, view)
    assert_same(third, base.t())
    assert first.data_ptr() == third.data_ptr()
    assert second.data_ptr() - first.data_ptr() == view.data_ptr() - base.data_ptr()
    stats = offload.stats()
    assert (stats["offloads"], stats["offloaded_bytes"]) == (1, 4096 * 4)
    assert (stats["reloads"], stats["reloaded_bytes"]) == (1, 4096 * 4)
    assert stats["deduplicated"] == 2


def test_packed_projection_is_one_copy():
    packed = torch.randn(16, 3, 4, 8)
    q, k, v = packed.unbind(1)
    offload = offloaded()
    for back, saved in zip(round_trip(offload, q, k, v, q), (q, k, v, q), strict=True):
        assert_same(back, saved)
    stats = offload.stats()
    assert (stats["offloads"], stats["offloaded_bytes"]) == (1, packed.numel() * 4)
    assert (stats["deduplicated"], stats["deduplicated_bytes"]) == (3, packed.numel() * 4)


def test_narrow_views_move_their_own_bytes_only():
    base = torch.randn(100, 100)
    rows, columns = base[10:20], base[:, 10:20]
    offload = offloaded()
    for back, saved in zip(round_trip(offload, rows, columns, rows, columns), (rows, columns) * 2, strict=True):
        assert_same(back, saved)
    stats = offload.stats()
    lead = rows.storage_offset() * 4 % ALIGNMENT
    assert (stats["offloads"], stats["offloaded_bytes"]) == (2, 2 * 4000 + lead)
    assert (stats["deduplicated"], stats["deduplicated_bytes"]) == (2, 8000)


def test_one_tensor_saved_by_many_nodes():
    x = torch.randn(32, 32, requires_grad=True)
    offload = offloaded()
    with offload:
        y = x * 1
        loss = sum((y * factor.sin()).sum() for factor in [y, y.view(-1).view(32, 32), y.t().t()])
    offload.synchronize()
    stats = offload.stats()
    # y itself for the three products and the three sines, and the three sines.
    assert stats["offloads"] == 4
    assert stats["deduplicated"] == 5
    loss.backward()


def test_same_address_in_another_storage_is_another_tensor():
    """Storages made one after the other over the same memory; each is copied."""
    offload = offloaded(debug_delays=0)
    x = torch.zeros(1, requires_grad=True)
    found, values = [], []
    memory = bytearray(256 * 256 * 4)
    with offload:
        for value in range(6):
            tensor = torch.frombuffer(memory, dtype=torch.float32).view(256, 256).fill_(value)
            x = Save.apply(x, found.extend, tensor)
            values.append(value)
            del tensor
            offload.synchronize()
    assert (offload.stats()["offloads"], offload.stats()["deduplicated"]) == (6, 0)
    x.backward()
    assert [back[0, 0].item() for back in found] == values[::-1]
    assert all(torch.equal(back, torch.full_like(back, back[0, 0].item())) for back in found)


def test_small_view_frees_its_large_storage():
    from torch.multiprocessing.reductions import StorageWeakRef

    offload = offloaded(min_bytes=1 << 12)
    found = []
    x = torch.zeros(1, requires_grad=True)
    large = torch.randn(512, 512)
    row, column, storage = large[3, :100].clone(), large[:, 7].clone(), StorageWeakRef(large.untyped_storage())
    with offload:
        y = Save.apply(x, found.extend, large[3, :100], large[:, 7])
    del large
    assert storage.expired()
    y.backward()
    assert torch.equal(found[0], row)
    assert torch.equal(found[1], column)
    assert found[1].stride() == (512,)
    assert offload.stats()["kept"]["small"] == 2


def test_random_views():
    random.seed(3)
    for _ in range(200):
        base = torch.randn(random.choice([64, 500, 4000]))
        sizes, strides = [], []
        for _ in range(random.randint(0, 3)):
            sizes.append(random.randint(1, 6))
            strides.append(random.choice([0, 1, 2, 7, 40]))
        last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        if last >= base.numel():
            continue
        saved = base.as_strided(sizes, strides, random.randint(0, base.numel() - last - 1))
        view = View.of(saved)
        region = view.region(base.numel() * 4)
        if region is None:
            data = view.gather(saved)
            assert data.numel() == view.distinct_bytes() or data.numel() <= base.numel() * 4
            assert_same(view.scatter(data), saved)
        else:
            begin, end = region
            assert begin % ALIGNMENT == 0
            data = base.view(torch.uint8)[begin:end].clone()
            assert_same(view.restore(data, begin), saved)


def test_what_is_made_lies_where_the_bytes_lie():
    base = torch.empty(4096, device="meta")
    for saved in (base[10:3000], base[::100], base[5:6].expand(64), base.view(64, 64).t()):
        view = View.of(saved)
        gathered = view.gather(saved)
        assert gathered.device == view.scatter(gathered).device == saved.device
        restored = view.restore(base.view(torch.uint8), 0)
        assert (restored.device, restored.stride(), restored.storage_offset()) == (
            saved.device, saved.stride(), saved.storage_offset(),
        )  # fmt: skip
