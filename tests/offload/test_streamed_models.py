"""Real models, and pipelines, on the engine for devices with streams."""

import gc
import time

import pytest
import torch

import pykern
from pykern.offload.hunting import HuntingDevice
from pykern.offload.simulated import SimulatedDevice
from pykern.offload.ordering import Ordering

from .support import MODELS, assert_bit_equal, bytes_of, gradients, loss_of, make
from .test_pipeline import Rank, assert_same
from .test_streamed import Failing


@pytest.mark.parametrize("name", MODELS)
def test_every_model_on_the_simulated_device(name):
    model, x = make(name)
    plain = gradients(model, x)
    offload = pykern.ActivationOffload("pinned", device=SimulatedDevice(), min_bytes=0)
    for _ in range(2):
        assert_bit_equal(gradients(model, x, offload), plain)
    stats = offload.stats()
    assert stats["offloads"] > 0
    assert stats["reloads"] + stats["forwards"] > 0
    gc.collect()
    assert offload.stats()["slots"] == 0


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_free_of_races(name):
    model, x = make(name)
    plain = gradients(model, x)
    reloads = 0
    for seed in range(3):
        device = HuntingDevice(seed, directions=1 + seed % 2, lags=False)
        offload = pykern.ActivationOffload(
            "pinned", device=device, min_bytes=0, keep_last=seed % 2, prefetch=seed, queue_bytes=1 << (11 + 3 * seed)
        )
        assert_bit_equal(gradients(model, x, offload), plain)
        reloads += offload.stats()["reloads"]
    assert reloads > 0


def test_a_model_through_both_tiers(tmp_path):
    model, x = make("transformer")
    plain = gradients(model, x)
    offload = pykern.ActivationOffload(
        "pinned", device=SimulatedDevice(), min_bytes=0, capacity=1 << 16, queue_bytes=1, path=tmp_path
    )
    for _ in range(2):
        assert_bit_equal(gradients(model, x, offload), plain)
    assert offload._engine._file.counters()["reloads"] > 0
    assert offload.stats()["kept"]["capacity"] == 0


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("model", ["attention", "feedforward"])
def test_a_pipeline_is_free_of_races(model, split):
    """Blocks of many parts, in planned slots, unpacked twice where the backward is split."""
    for seed in range(3):
        device = HuntingDevice(seed, directions=1 + seed % 2, lags=False)
        rank = Rank(model, "pinned", split, device=device)
        assert_same(rank)
        counters = rank.offload.counters()
        assert counters["offloads"] == len(rank.offload.plan.copies[0]) == counters["engine"]["reloads"]
        assert counters["stayed"] == counters["engine"]["slots"] == 0


def test_every_stream_that_uses_a_block_of_a_pipeline_waits_for_it(monkeypatch):
    """As do two that compute at once in one stage: here, the backwards of the inputs and of the weights."""
    device, users = HuntingDevice(0, lags=False), {}

    class InTwoStreams(Rank):
        def backward(self, kind, *place):
            device.current = device.second if kind == "W" else device.streams[0]
            super().backward(kind, *place)
            device.current = device.streams[0]

    use = Ordering.use

    def note(ordering, item, stream):
        users.setdefault(item.number, set()).add(stream.name)
        use(ordering, item, stream)

    monkeypatch.setattr(Ordering, "use", note)
    rank = InTwoStreams("feedforward", "pinned", True, device=device)
    assert_same(rank)
    assert len(users) == len(rank.offload.plan.copies[0])
    assert all(names == {"compute", "second compute"} for names in users.values())


def test_a_graph_that_is_kept_is_brought_back_again():
    model, x = make("transformer")
    plain = gradients(model, x)
    offload = pykern.ActivationOffload("pinned", device=SimulatedDevice(), min_bytes=0, queue_bytes=1)
    torch.manual_seed(11)
    with offload:
        loss = loss_of(model, x)
    for _ in range(2):
        model.zero_grad()
        loss.backward(retain_graph=True)
        assert_bit_equal([parameter.grad for parameter in model.parameters()], plain)


def test_a_failing_link_is_told_once_and_gradients_stay():
    model, x = make("mlp")
    plain = gradients(model, x)
    offload = pykern.ActivationOffload("pinned", device=Failing(3, times=4), min_bytes=0, keep_last=0)
    with pytest.warns(
        RuntimeWarning, match="copying out of the simulated device failed: the link is down; activations"
    ):
        assert_bit_equal(gradients(model, x, offload), plain)
    assert offload.stats()["kept"]["capacity"] == 4


def test_the_simulated_device_takes_its_time():
    device = SimulatedDevice(bandwidth=1e6, latency=0.01, directions=2)
    host = device.allocate_host(20_000)
    begin = time.perf_counter()
    device.copy(device.out_stream, host[:10_000], bytes_of(10_000))
    device.copy(device.back_stream, bytes_of(10_000), host[10_000:])
    for stream in (device.out_stream, device.back_stream):
        device.synchronize(device.record(stream))
    assert 0.019 < time.perf_counter() - begin < 0.037
    assert torch.equal(host[:10_000], bytes_of(10_000))
