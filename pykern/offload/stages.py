"""What a stage of torch.distributed.pipelining holds for the backward, over the versions of torch.

Until 2.14 a stage holds inputs and outputs in `fwd_cache`, and owns one receive buffer for each microbatch from the
first step on. Since 2.15 `_forward_chunk_states` holds them, outputs may be replaced by their places in the graph, and
buffers are made when they are needed.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, distributed
from torch.autograd.graph import GradientEdge
from torch.distributed.pipelining.stage import _PipelineStageBase
from torch.nn.parallel import DistributedDataParallel

from .tensors import placeholder


class _WithoutMemory(torch.autograd.Function):
    """A tensor's place in the graph, its size and dtype, but one element of memory."""

    @staticmethod
    def forward(context, tensor: Tensor) -> Tensor:
        context.set_materialize_grads(False)
        return placeholder(tensor)

    @staticmethod
    def backward(context, gradient: Tensor | None) -> Tensor | None:
        return gradient


def _without_memory(output: object) -> object:
    return _WithoutMemory.apply(output) if isinstance(output, Tensor) and output.requires_grad else output


def _has_states(stage: _PipelineStageBase) -> bool:
    return hasattr(stage, "_forward_chunk_states")


@functools.cache
def splits_functions() -> bool:
    """Whether a backward of the weights can begin at a torch.autograd.Function, such as those of pykern's ops. Torch
    2.11 looks there for what only nodes of its own have."""
    leaf = torch.zeros(1, requires_grad=True)
    node = (_WithoutMemory.apply(leaf) + 0).grad_fn.next_functions[0][0]
    try:
        torch.autograd.grad([GradientEdge(node, 0)], [leaf], [torch.ones(1)])
    except RuntimeError:
        return False
    return True


def received_inputs(stage: _PipelineStageBase, microbatch: int) -> list[Tensor]:
    """What was received for the microbatch's forward, before it."""
    return [
        info.buffer for info in stage.args_recv_info.get(microbatch, ()) if getattr(info, "source", None) is not None
    ]


def held_inputs(stage: _PipelineStageBase, microbatch: int) -> list[Tensor]:
    """The received inputs, as the stage holds them after the microbatch's forward."""
    if _has_states(stage):
        values = stage._forward_chunk_states[microbatch].input_values
    else:
        values = stage.fwd_cache[microbatch][1]
    count = len(stage.args_recv_info[microbatch])
    return [value for value in values[:count] if isinstance(value, Tensor)]


def drop_outputs(stage: _PipelineStageBase, microbatch: int) -> None:
    """Lets a microbatch's outputs go, up to what the backward begins with. To be called once they are on their way.

    Those of the last stage stay, which the loss and the caller have, and those that DistributedDataParallel or a
    builder of weight gradients looks at.
    """
    if stage.is_last or stage.dw_builder is not None or isinstance(stage.submod, DistributedDataParallel):
        return
    if _has_states(stage):
        state = stage._forward_chunk_states.get(microbatch)
        if state is not None:
            state.live_outputs = [
                None if has_edge else _without_memory(output)
                for output, has_edge in zip(state.live_outputs, state.releasable, strict=True)
            ]
    elif microbatch in stage.fwd_cache:
        outputs, inputs = stage.fwd_cache[microbatch]
        stage.fwd_cache[microbatch] = tuple(map(_without_memory, outputs)), inputs


@contextlib.contextmanager
def without_messages_to_itself(stage: _PipelineStageBase) -> Iterator[None]:
    """While torch 2.11 connects ranks by messages between neighbours: also those of one rank, which gloo refuses."""
    connect = getattr(stage, "_get_init_p2p_neighbors_ops", None)
    if connect is None:
        yield
        return
    stage._get_init_p2p_neighbors_ops = lambda: [op for op in connect() if op.peer != distributed.get_rank()]
    try:
        yield
    finally:
        del stage._get_init_p2p_neighbors_ops


class _Made(NamedTuple):
    """What a receive buffer is made from."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @staticmethod
    def of(buffer: Tensor) -> "_Made":
        return _Made(buffer.size(), buffer.stride(), buffer.dtype, buffer.device, buffer.requires_grad)

    def make(self) -> Tensor:
        buffer = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)
        return buffer.requires_grad_(self.requires_grad)


class ReceiveBuffers:
    """Gives a stage its receive buffers when it needs them, where torch makes all of them at once."""

    def __init__(self, stage: _PipelineStageBase) -> None:
        self._stage = stage
        self._made: weakref.WeakKeyDictionary[object, _Made] = weakref.WeakKeyDictionary()

    def empty(self) -> None:
        """Takes the memory of all buffers, after the stage has made them."""
        if _has_states(self._stage):
            return
        for infos in (*self._stage.args_recv_info.values(), *self._stage.grad_recv_info.values()):
            for info in infos:
                if isinstance(getattr(info, "buffer", None), Tensor) and info not in self._made:
                    self._made[info] = _Made.of(info.buffer)
                    self._take(info)

    def fill(self, infos: tuple) -> None:
        """Before something is received there."""
        for info in infos:
            if info in self._made:
                info.buffer = self._made[info].make()

    def take(self, infos: Iterable) -> None:
        """After the last use."""
        for info in infos:
            if info in self._made:
                self._take(info)

    def take_wrapped(self, infos: Iterable, inputs: Iterable[Tensor]) -> None:
        """Those over which the stage made its inputs: a DTensor holds the memory, as a view of its own."""
        self.take([info for info, tensor in zip(infos, inputs, strict=True) if tensor is not info.buffer])

    def _take(self, info) -> None:
        # Not None: between steps torch sets the gradients of all buffers to None.
        info.buffer = placeholder(info.buffer).requires_grad_(self._made[info].requires_grad)


class Watched:
    """While it is entered, a stage's forwards and backwards run inside of what the callbacks return, and its receive
    buffers come and go.

    forward(stage, microbatch, received, given) and backward(stage, kind, microbatch) return context managers; that of
    a forward gives a list of the received inputs, which the stage corrects to those that it holds.
    """

    _METHODS = (
        "forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk", "get_fwd_recv_ops", "get_bwd_recv_ops",
        "set_local_bwd_input",
    )  # fmt: skip

    def __init__(
        self, stage: _PipelineStageBase, buffers: ReceiveBuffers, forward: Callable, backward: Callable
    ) -> None:
        self._stage, self._buffers, self._forward, self._backward = stage, buffers, forward, backward
        self._before: dict[str, Callable] = {}
        self._originals: dict[str, Callable] = {}

    def __enter__(self) -> None:
        # On the object, not its class: other stages, and this one outside of our steps, are torch's own.
        self._before = {name: vars(self._stage)[name] for name in self._METHODS if name in vars(self._stage)}
        self._originals = {name: getattr(self._stage, name) for name in self._METHODS}
        for name in self._METHODS:
            setattr(self._stage, name, getattr(self, f"_{name}"))

    def __exit__(self, *exception: object) -> None:
        for name in self._METHODS:
            delattr(self._stage, name)
        vars(self._stage).update(self._before)

    def _forward_one_chunk(self, fwd_chunk_id, args, kwargs=None, save_forward_output=True):
        stage = self._stage
        given = [*(args if stage.is_first else ()), *(kwargs or {}).values()]
        given = [value for value in given if isinstance(value, Tensor)]
        with self._forward(stage, fwd_chunk_id, received_inputs(stage, fwd_chunk_id), given) as held:
            output = self._originals["forward_one_chunk"](fwd_chunk_id, args, kwargs, save_forward_output)
            if held:
                held[:] = held_inputs(stage, fwd_chunk_id)
                self._buffers.take_wrapped(stage.args_recv_info[fwd_chunk_id], held)
        if not stage.has_backward:
            self._buffers.take(stage.args_recv_info.get(fwd_chunk_id, ()))
        return output

    def _backward_one_chunk(self, bwd_chunk_id, loss=None, full_backward=True, last_backward=False):
        with self._backward(self._stage, "B" if full_backward else "I", bwd_chunk_id):
            self._originals["backward_one_chunk"](bwd_chunk_id, loss, full_backward, last_backward)
        self._buffers.take(self._stage.grad_recv_info.get(bwd_chunk_id, ()))
        if full_backward:
            self._buffers.take(self._stage.args_recv_info.get(bwd_chunk_id, ()))

    def _backward_weight_one_chunk(self, bwd_chunk_id, last_backward=False):
        with self._backward(self._stage, "W", bwd_chunk_id):
            self._originals["backward_weight_one_chunk"](bwd_chunk_id, last_backward)
        self._buffers.take(self._stage.args_recv_info.get(bwd_chunk_id, ()))

    def _get_fwd_recv_ops(self, fwd_chunk_id):
        self._buffers.fill(self._stage.args_recv_info[fwd_chunk_id])
        return self._originals["get_fwd_recv_ops"](fwd_chunk_id)

    def _get_bwd_recv_ops(self, bwd_chunk_id):
        self._buffers.fill(self._stage.grad_recv_info.get(bwd_chunk_id, ()))
        return self._originals["get_bwd_recv_ops"](bwd_chunk_id)

    def _set_local_bwd_input(self, next_stage_bwd_outputs, mb_index):
        if any(gradient is None for gradient in next_stage_bwd_outputs):
            # It writes zeros there.
            self._buffers.fill(self._stage.grad_recv_info[mb_index])
        return self._originals["set_local_bwd_input"](next_stage_bwd_outputs, mb_index)
