"""What the backward makes again in one stream of a GPU, and uses in another."""

import pytest
import torch

import pykern
from pykern.offload import coding, handing, recipes
from pykern.offload.coding import Coding


class Stream:
    def __init__(self, name):
        self.name, self.waits = name, []

    def wait_stream(self, other):
        self.waits.append(other.name)


@pytest.fixture
def streams(monkeypatch):
    """Two, of which `current[0]` computes, for tensors of the CPU; and the streams that their memory waits for."""
    first, second = Stream("first"), Stream("second")
    current, recorded = [first], []
    for module in (handing, coding, recipes):
        monkeypatch.setattr(module, "stream_of", lambda tensor: current[0])
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: recorded.append(stream.name))
    return first, second, current, recorded


def test_what_was_decoded_is_waited_for(streams):
    first, second, current, recorded = streams
    data = torch.randn(1024).view(torch.uint8)
    leaves = Coding.of(data, torch.float32, "int8")
    block = leaves.encode(data)
    made = leaves.decode(block)
    assert leaves.decode(block).data_ptr() == made.data_ptr() and not first.waits
    current[0] = second
    assert torch.equal(leaves.decode(block), made)
    assert (first.waits, second.waits, recorded) == ([], ["first"], ["second"])


def test_what_was_recomputed_is_waited_for(streams):
    first, second, current, recorded = streams
    x, weight = torch.randn(64, 64, requires_grad=True), torch.ones(64, requires_grad=True)
    with pykern.recompute_saved():
        normal = pykern.rms_norm(x * 1, weight)
        one, other = normal.exp(), normal.square()
    del normal
    other.sum().backward(retain_graph=True)
    current[0] = second
    other.sum().backward()
    del one
    assert (first.waits, second.waits, recorded) == ([], ["first"], ["second"])
