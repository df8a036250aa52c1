"""ActivationOffload around a model that FSDP2 shards: gathered parameters come and go, and must not be moved."""

import contextlib

import pytest
import torch
from torch import nn

import pykern
from tests.support_distributed import run_processes

WIDTH, ROWS = 192, 160


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(WIDTH))
        self.gate, self.up = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normal = pykern.rms_norm(x, self.norm)
        return x + self.down(pykern.swiglu(self.gate(normal), self.up(normal)))


def train(sharded: bool, reshard: bool, offload: pykern.ActivationOffload | None) -> tuple[list[torch.Tensor], dict]:
    """Two accumulated microbatches, then a step, twice: the gradients before each step, whole."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.manual_seed(0)
    model = nn.Sequential(*(Layer() for _ in range(3)))
    if sharded:
        for layer in model:
            fully_shard(layer, reshard_after_forward=reshard)
        fully_shard(model, reshard_after_forward=reshard)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for step in range(2):
        for microbatch in range(2):
            x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(2 * step + microbatch))
            if offload is None:
                loss = model(x).square().mean()
            else:
                with offload:
                    loss = model(x).square().mean()
            loss.backward()
        for parameter in model.parameters():
            gradient = parameter.grad
            found.append(gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone())
        optimizer.step()
        optimizer.zero_grad()
    return found, {} if offload is None else offload.stats()


class NormLast(nn.Module):
    """Hands a norm's output on to another module, which saves it when the norm's weight has been freed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return pykern.rms_norm(self.linear(x), self.norm)


def gradients_across_modules(context: contextlib.AbstractContextManager) -> list[torch.Tensor]:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(*(NormLast() for _ in range(3)))
    for part in model:
        fully_shard(part, reshard_after_forward=True)
    fully_shard(model)
    with context:
        loss = model(torch.randn(ROWS, WIDTH)).square().mean()
    loss.backward()
    return [parameter.grad.full_tensor() for parameter in model.parameters()]


def cases() -> dict:
    found = {"alone": (train(False, False, None)[0], {})}
    for reshard in (True, False):
        found["plain", reshard] = train(True, reshard, None)
        for storage in ("memory", "file"):
            offload = pykern.ActivationOffload(storage, min_bytes=1 << 12, keep_last=0, debug_delays=3)
            found[storage, reshard] = train(True, reshard, offload)
    offload = pykern.ActivationOffload("memory", min_bytes=1 << 12, keep_last=0)
    found["memory", "alone"] = train(False, False, offload)
    contexts = contextlib.nullcontext(), pykern.recompute_saved(), pykern.ActivationOffload("memory", min_bytes=0)
    found["across"] = [gradients_across_modules(context) for context in contexts]
    return found


@pytest.fixture(scope="module")
def results() -> list[dict]:
    return run_processes(2, cases)


def test_gradients_are_those_of_plain_sharding(results):
    for found in results:
        alone = found["alone"][0]
        expected = found["memory", "alone"][1]
        for reshard in (True, False):
            plain = found["plain", reshard][0]
            for ours, theirs in zip(plain, alone, strict=True):
                torch.testing.assert_close(ours, theirs)
            for storage in ("memory", "file"):
                gradients, stats = found[storage, reshard]
                assert all(torch.equal(a, b) for a, b in zip(gradients, plain, strict=True))
                # As many activations leave as without shards: no gathered parameter among them.
                assert stats["peak_slots"] == expected["peak_slots"]
                assert stats["recomputed"] == expected["recomputed"]


def test_what_a_norm_hands_on_to_another_module_is_not_made_from_a_freed_weight(results):
    for found in results:
        expected, recomputed, offloaded = found["across"]
        assert all(map(torch.equal, recomputed, expected))
        assert all(map(torch.equal, offloaded, expected))
