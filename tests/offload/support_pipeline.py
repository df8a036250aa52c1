"""Pipelines in several processes, beside the same model in one: what the tests of schedules share."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.nn import functional as F

from pykern.offload.planning.simulation import live_blocks, simulate
from pykern.offload.planning.types import Copy, Order, Plan, Times, Transfer

WIDTH = 32


class SeededDropout(nn.Module):
    """Drops the same elements whoever runs it: the input's bits are the seed."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta:
            return x
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(x.detach().reshape(-1)[:1].view(torch.int32)))
            return F.dropout(x, 0.2)


class Feedforward(nn.Sequential):
    """Ends in tanh, so that its output is also what it saves."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, 3 * WIDTH), nn.GELU(), nn.Linear(3 * WIDTH, WIDTH), nn.Tanh())


class Attention(nn.Module):
    """Norm, attention on views of one packed projection, dropout, and a gated product of halves of one tensor."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.packed, self.output = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gate_up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = SeededDropout()

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        packed = self.packed(self.norm_attention(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.dropout(self.output(attended))
        gate, up = self.gate_up(self.norm_mlp(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


MODELS = {"feedforward": Feedforward, "attention": Attention}


def make_stage(model: str, index: int) -> nn.Module:
    torch.manual_seed(100 + index)
    return MODELS[model]()


def make_batch(microbatches: int, step: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(7 + step)
    return torch.randn(2 * microbatches, 6, WIDTH), torch.randn(2 * microbatches, 6, WIDTH)


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def plain_gradients(
    model: str, stages: int, microbatches: int, step: int = 0
) -> tuple[list[list[Tensor]], list[float]]:
    """By stage, the gradients of a step, one microbatch after the other; and its losses."""
    modules = [make_stage(model, index) for index in range(stages)]
    x, target = make_batch(microbatches, step)
    losses = []
    for one, other in zip(x.chunk(microbatches), target.chunk(microbatches), strict=True):
        for module in modules:
            one = module(one)
        loss = loss_of(one, other)
        loss.backward()
        losses.append(float(loss.detach()))
    for module in modules:
        for parameter in module.parameters():
            parameter.grad.div_(microbatches)
    return [[parameter.grad for parameter in module.parameters()] for module in modules], losses


def make_pipeline(model: str, indices: list[int], stages: int) -> list[PipelineStage]:
    return [PipelineStage(make_stage(model, index), index, stages, torch.device("cpu")) for index in indices]


def hasty_plan(order: Order, chunks: Iterable[int]) -> Plan:
    """Blocks of the chunks leave right after their forward, and come back two actions before their backward."""
    times = Times(*[(1.0,) * (order.devices * order.chunks)] * 3)
    chunks = set(chunks)
    transfers, copies, peaks = [], [], []
    for rank, actions in enumerate(order.ranks):
        found, rank_copies = [], []
        place = {action: number for number, action in enumerate(actions)}
        for number, (kind, chunk, microbatch) in enumerate(actions):
            if kind != "F" or chunk not in chunks:
                continue
            back = place.get(("B", chunk, microbatch), place.get(("I", chunk, microbatch)))
            if back <= number + 4:
                continue
            found += [
                (number + 1, 0, Transfer("offload", chunk, microbatch, number + 1)),
                (number + 2, 1, Transfer("release", chunk, microbatch, number + 2)),
                (back - 1, 2, Transfer("reload", chunk, microbatch, back - 1)),
            ]
            rank_copies.append(Copy(chunk, microbatch, 0.0, 0.0, 0.0, 0.0, len(rank_copies)))
        transfers.append(tuple(transfer for _, _, transfer in sorted(found)))
        copies.append(tuple(rank_copies))
        peaks.append(max(live_blocks(order, rank, transfers[-1])))
    nothing = (0,) * order.devices
    return Plan(
        order, times, (0,) * (order.devices * order.chunks), simulate(order, times), tuple(copies), tuple(transfers),
        ((),) * order.devices, tuple(peaks), nothing, (0.0,) * order.devices, nothing, (),
    )  # fmt: skip
