"""What a GPU's link makes of activation offload: whole training steps, and the engine's copies.

The steps are those of a large Llama's layers, whose saved tensors wait in pinned memory, beside PyTorch's own ways to
save memory. How many of the layers can leave at no cost is planned, from what a plain step, its layers' bytes and the
link are measured to be. On a CPU the same runs in little, with simulated streams.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pykern
from bench.harness import Case
from bench.timing import stream_device
from pykern.offload.streamed import StreamedEngine
from pykern.train.model import Block, Shape, causal_attention, rotation

# Graph nodes read ahead: those of most of a layer, in the time of which most of a layer comes back.
PREFETCH = 8
PLANNED_BLOCK = 1 << 26


@dataclass(frozen=True)
class Sizes:
    """Of a stack of layers, and of a block that is copied."""

    shape: Shape
    tokens: int
    block_bytes: int


SIZES = {
    "cuda": Sizes(Shape(8, 4096, 32, 8), 8192, 1 << 28),
    "cpu": Sizes(Shape(4, 64, 4, 2), 128, 1 << 20),
}


class FusedBlock(Block):
    """Of pykern's norms and activation functions, whose outputs need not be saved."""

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attend: Callable) -> Tensor:
        x = x + self.attention(pykern.rms_norm(x, self.attention_norm.weight, 1e-6), angles, attend)
        normal = pykern.rms_norm(x, self.mlp_norm.weight, 1e-6)
        return x + self.mlp.down(pykern.swiglu(self.mlp.gate(normal), self.mlp.up(normal)))


class Stack:
    """Layers in bfloat16, one sequence, and the loss; `block` is how a layer is called."""

    def __init__(self, sizes: Sizes, block_type: type[Block]) -> None:
        torch.manual_seed(0)
        shape = sizes.shape
        self.blocks = nn.ModuleList(block_type(shape) for _ in range(shape.layers)).bfloat16()
        self.x = torch.randn(1, sizes.tokens, shape.width).bfloat16()
        cos, sin = rotation(torch.arange(sizes.tokens)[None], shape.head_size)
        self.angles = cos.float(), sin.float()

    def loss(self, call: Callable = lambda block, *arguments: block(*arguments)) -> Tensor:
        x = self.x
        for layer, block in enumerate(self.blocks):
            x = call(block, x, self.angles, partial(causal_attention, layer))
        return x.float().square().mean()

    def step(self, loss: Callable[[], Tensor] | None = None, context: Callable = contextlib.nullcontext) -> None:
        for parameter in self.blocks.parameters():
            parameter.grad = None
        with context():
            (loss or self.loss)().backward()


# --- pykern -------------------------------------------------------------------------------------------------


class Free(NamedTuple):
    """What leaves at no cost, as planned: `layers` of them, the first ones, with so many bytes; the forward is ahead of
    the copies by `queue_bytes` at most."""

    layers: int
    nbytes: int
    queue_bytes: int


def plan_free(stack: Stack) -> Free:
    layers = len(stack.blocks)
    forward, whole = seconds_of(stack.loss), seconds_of(stack.step)
    backward = max(whole - forward, forward)
    times = forward / layers, backward / 2 / layers, backward / 2 / layers
    offload = offload_of(stack)
    stack.step(context=lambda: offload)
    nbytes = offload.stats()["offloaded_bytes"] // layers
    offload.close()
    link = pykern.measure_bandwidth(stream_device(stack.x.device), [PLANNED_BLOCK])[0]
    plan = pykern.plan(
        "gis", 1, layers, 1, times=times, bytes=nbytes, bandwidth=link.rates, offload="full", shortest=1.0,
        directions="two" if link.directions == 2 else "one", pairs=False,
    )  # fmt: skip
    leaving = len(plan.copies[0])
    behind = max(0, int(leaving * (nbytes - link.rates[0] * times[0])))
    print(
        f"  planned: {leaving} of {layers} layers leave, {nbytes / 1e6:.1f} MB each; forward {times[0] * 1e3:.3f} ms, "
        f"backward {2e3 * times[1]:.3f} ms a layer; out {link.rates[0] / 1e9:.2f} GB/s, back {link.rates[1] / 1e9:.2f}"
    )
    return Free(leaving, max(leaving * nbytes, 1), behind + nbytes)


def seconds_of(call: Callable[[], object]) -> float:
    """The least of three, after one that warms up."""

    def once() -> float:
        begin = time.perf_counter()
        call()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter() - begin

    once()
    return min(once() for _ in range(3))


def offload_of(stack: Stack, **keywords: int) -> pykern.ActivationOffload:
    return pykern.ActivationOffload(
        "pinned", device=stream_device(stack.x.device), parameters=stack.blocks, min_bytes=1 << 12, prefetch=PREFETCH,
        **keywords,
    )  # fmt: skip


# --- PyTorch ------------------------------------------------------------------------------------------------


def save_on_cpu(stack: Stack) -> Callable[[], None]:
    context = partial(torch.autograd.graph.save_on_cpu, pin_memory=stack.x.is_cuda)
    return partial(stack.step, context=context)


def checkpointed(stack: Stack) -> Callable[[], None]:
    return partial(stack.step, partial(stack.loss, partial(checkpoint, use_reentrant=False)))


def compiled(stack: Stack) -> Callable[[], None]:
    return partial(stack.step, torch.compile(stack.loss, dynamic=False))


class CompiledOffload:
    """The compiled path's own offload, of everything that it saves; on streams of its own on a GPU."""

    def __init__(self, stack: Stack) -> None:
        # Options tell this from the other compiled steps of the same code, which would else be taken for it.
        self._loss = torch.compile(stack.loss, dynamic=False, options={"joint_custom_post_pass": marks_all()})
        self._stack, self._settings = stack, {"enable_activation_offloading": True}
        if stack.x.is_cuda:
            streams = "activation_offload_separate_stream", "activation_offload_sink_wait", "activation_reload_prefetch"
            self._settings.update(dict.fromkeys(streams, True))

    def __call__(self) -> None:
        """The first call compiles."""
        from torch._functorch import config

        missing = [name for name in self._settings if not hasattr(config, name)]
        if missing:
            raise NotImplementedError(f"torch {torch.__version__} has no torch._functorch.config.{missing[0]}")
        with config.patch(**self._settings):
            self._stack.step(self._loss)


def marks_all() -> object:
    """A pass of Inductor's that asks for every tensor of a graph to be offloaded, if it is saved."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class MarksAll(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            for node in graph.nodes:
                node.meta["should_offload"] = True

        def uuid(self) -> None:
            """Never from a cache: the mark is no part of what it is looked up by."""

    return MarksAll()


PEERS = {
    "save_on_cpu, pinned": save_on_cpu,
    "checkpoint": checkpointed,
    "torch.compile": compiled,
    "torch.compile, offload": CompiledOffload,
}


def steps(stack: Stack, peers: dict[str, Callable]) -> dict[str, Callable[[], object]]:
    free = plan_free(stack)
    planned = offload_of(stack, capacity=free.nbytes, queue_bytes=free.queue_bytes)
    everything = offload_of(stack)
    return {
        f"pykern, {free.layers} of {len(stack.blocks)} layers": partial(stack.step, context=lambda: planned),
        "pykern, all layers": partial(stack.step, context=lambda: everything),
        "no offload": stack.step,
        **{name: peer(stack) for name, peer in peers.items()},
    }


def step_case(sizes: Sizes, block_type: type[Block], peers: dict[str, Callable]) -> Case:
    shape = sizes.shape
    products = 2 * shape.width * (shape.heads + shape.key_heads) * shape.head_size + 3 * shape.width * shape.inner
    attention = shape.heads * shape.head_size * sizes.tokens
    return Case(
        "offload",
        "step_llama" + ("_fused" if block_type is FusedBlock else ""),
        f"{shape.layers} layers of {shape.width}, {sizes.tokens} tokens, bfloat16",
        lambda: steps(Stack(sizes, block_type), peers),
        # Forward, and twice of it backward; attention's backward makes its scores again.
        flops=shape.layers * sizes.tokens * (6.0 * products + 7.0 * attention),
        dtype="bfloat16",
        is_step=True,
    )


# --- copies -------------------------------------------------------------------------------------------------


def host_memory(nbytes: int) -> Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8, device="cpu", pin_memory=torch.get_default_device().type == "cuda")


def out(engine: StreamedEngine, parts: list[Tensor]) -> Callable[[], None]:
    size = parts[0].numel()
    offsets, nbytes = [size * index for index in range(len(parts))], size * len(parts)

    def move() -> None:
        item = engine.store(parts, offsets, nbytes, slot=0)
        engine.settle(item)
        engine.release(item)

    return move


def back(engine: StreamedEngine, block: Tensor) -> Callable[[], None]:
    item = engine.store([block], [0], block.numel(), slot=0)
    engine.settle(item)

    def move() -> None:
        engine.reserve(item)
        engine.load(item)
        engine.unreserve(item)

    return move


def make_copies(way: str, nbytes: int, parts: int) -> dict[str, Callable[[], object]]:
    block, host = torch.ones(nbytes, dtype=torch.uint8), host_memory(nbytes)
    engine = StreamedEngine(stream_device(block.device), slot_bytes=[nbytes])
    if way == "back":
        return {"pykern": back(engine, block), "copy_": lambda: block.copy_(host, non_blocking=True)}
    pieces, places = block.chunk(parts), host.chunk(parts)

    def copy() -> None:
        for place, piece in zip(places, pieces, strict=True):
            place.copy_(piece, non_blocking=True)

    return {"pykern": out(engine, list(pieces)), "copy_": copy}


def copies_case(way: str, nbytes: int, parts: int = 1) -> Case:
    shape = f"{nbytes >> 20} MiB" + (f" in {parts} parts" if parts > 1 else "")
    return Case("offload", f"copies {way}", shape, partial(make_copies, way, nbytes, parts), bytes=nbytes, link=way)


def cases(device: str, peers: dict[str, Callable] = PEERS) -> list[Case]:
    """Of layers as most have them the peers are beside; those of fused ones tell what recomputing leaves to copy."""
    sizes = SIZES[device]
    return [
        copies_case("out", sizes.block_bytes),
        copies_case("back", sizes.block_bytes),
        copies_case("out", sizes.block_bytes, 256),
        step_case(sizes, FusedBlock, {name: peers[name] for name in peers if "compile" not in name}),
        step_case(sizes, Block, peers),
    ]
