"""What is refused, and the line that says so."""

import re

import pytest
import torch

import pykern

REFUSED = [
    (dict(storage="disk"), ValueError, "storage: expected 'memory', 'file', 'memory+file' or 'pinned', got 'disk'"),
    (dict(storage="pinned", device="cpu"), ValueError, "device: expected a CUDA device for storage='pinned', got cpu"),
    (dict(device="cuda"), ValueError, "device: only storage='pinned' has one, got storage='memory'"),
    (dict(storage="pinned", debug_delays=1), ValueError, "debug_delays: storage='pinned' has none"),
    (dict(min_bytes=-1), ValueError, "min_bytes: expected at least 0, got -1"),
    (dict(min_bytes=1.5), TypeError, "min_bytes: expected an integer, got float"),
    (dict(keep_last=-2), ValueError, "keep_last: expected at least 0, got -2"),
    (dict(keep_last=True), TypeError, "keep_last: expected an integer, got bool"),
    (dict(prefetch="1"), TypeError, "prefetch: expected an integer, got str"),
    (dict(threads=0), ValueError, "threads: expected at least 1, got 0"),
    (dict(queue_bytes=0), ValueError, "queue_bytes: expected at least 1, got 0"),
    (dict(capacity=0), ValueError, "capacity: expected at least 1, got 0"),
    (dict(capacity=1e9), TypeError, "capacity: expected an integer, got float"),
    (dict(path="."), ValueError, "path: storage='memory' has no folder"),
    (dict(storage="file", path="/no/such/folder"), FileNotFoundError, "path: expected an existing folder"),
    (dict(storage="file", path=__file__), FileNotFoundError, "path: expected an existing folder"),
    (dict(skip=3), TypeError, "skip: expected a function of a tensor, got int"),
    (dict(parameters=3), TypeError, "parameters: expected a module or a list of tensors, got int"),
    (dict(parameters=torch.ones(3)), TypeError, "parameters: expected a module or a list of tensors, got Tensor"),
    (dict(parameters=["weight"]), TypeError, "parameters: expected tensors, got str"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_refused(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)) as raised:
        pykern.ActivationOffload(**arguments)
    assert "\n" not in str(raised.value)


def test_pinned_memory_needs_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="storage: 'pinned' needs a CUDA device, and torch finds none; use 'memory'"):
        pykern.ActivationOffload("pinned")


@pytest.mark.parametrize(
    "tensor", [torch.zeros(4), torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)[::2]]
)
def test_raw_store_takes_bytes_only(tensor):
    offload = pykern.ActivationOffload()
    with pytest.raises(RuntimeError, match="parts: "):
        offload._engine.store([tensor], [0], 100)


@pytest.mark.parametrize(
    ("offsets", "nbytes", "message"),
    [
        ([0], 100, "offsets: expected one per part (2), got 1"),
        ([0, 60], 99, "offsets: part 1 of 40 bytes at 60 does not fit into a block of 99"),
        ([-1, 60], 100, "offsets: part 0 of 60 bytes at -1 does not fit"),
        ([30, 0], 100, "offsets: the parts at 0 and 30 overlap"),
        ([0, 60], -1, "nbytes: expected at least 0, got -1"),
    ],
)
def test_raw_store_checks_the_layout(offsets, nbytes, message):
    offload = pykern.ActivationOffload()
    parts = [torch.zeros(60, dtype=torch.uint8), torch.zeros(40, dtype=torch.uint8)]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        offload._engine.store(parts, offsets, nbytes)


def test_a_folder_in_memory_is_told(tmp_path, monkeypatch):
    from pykern.offload import engine

    monkeypatch.setattr(engine, "_description", lambda handle: "file, in memory")
    with pytest.warns(UserWarning, match="lies in memory"):
        pykern.ActivationOffload("file", path=tmp_path, capacity=4096)


def test_defaults_work():
    offload = pykern.ActivationOffload()
    x = torch.randn(512, 512, requires_grad=True)
    with offload:
        loss = x.exp().sin().cos().sum()
    offload.synchronize()
    loss.backward()
    assert offload.stats()["medium"] == "memory"
    # The results of exp and sin; the later one stays.
    assert (offload.stats()["offloads"], offload.stats()["kept"]["last"]) == (1, 1)
