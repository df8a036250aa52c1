"""Tensors that are made again in the backward instead of being kept or moved."""

import threading
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .handing import hand_over, stream_of
from .tensors import counter_of

_ATTRIBUTE = "_pykern_recipe"


class Recipe:
    """How the tensor that fills one storage follows from others: `function(*inputs)`, the same bit for bit each time.

    It hangs on the tensor's storage, which keeps its Python object, and so lives exactly as long; views of the tensor
    find it too. The inputs must be tensors that the graph keeps anyway, since it keeps them alive.
    """

    __slots__ = ("__weakref__", "_counters", "_saved", "_versions", "function", "inputs")

    def __init__(self, made: Tensor, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        self.function = function
        # Detached, so that an output that outlives its graph doesn't hold the graph before it. Leaves have none, and
        # must be known as parameters.
        self.inputs = tuple(tensor if tensor.is_leaf else tensor.detach() for tensor in inputs)
        self._counters = (counter_of(made), *self.inputs)
        self._versions = tuple(tensor._version for tensor in self._counters)
        self._saved: weakref.ref[SavedRecipe] | None = None

    def is_current(self, tensor: Tensor) -> bool:
        """Whether what was made, which `tensor` views, and the inputs are as they were, and still in memory."""
        # `tensor` may have a counter of its own, as what `.data` gives has.
        now = tuple(counter._version for counter in self._counters)
        same = now == self._versions and tensor._version == self._versions[0]
        # FSDP frees a module's gathered weights after its forward and gathers them for its own backward: too late for
        # that of a module after it, which saves the output.
        return same and all(map(_has_memory, self.inputs))

    def saved(self, pack: Callable[[Tensor], object]) -> "SavedRecipe":
        """What graphs hold instead of the tensor; the same object for all that save it at once."""
        saved = None if self._saved is None else self._saved()
        if saved is None:
            saved = SavedRecipe(self.function, [pack(tensor) for tensor in self.inputs])
            self._saved = weakref.ref(saved)
        return saved


class SavedRecipe:
    """A recipe whose inputs have been packed. Once made, the tensor stays until the last that saved it has let go."""

    __slots__ = ("__weakref__", "_function", "_inputs", "_lock", "_made", "_stream")

    def __init__(self, function: Callable[..., Tensor], inputs: list) -> None:
        self._function, self._inputs = function, inputs
        self._made: Tensor | None = None
        self._stream: object = None
        self._lock = threading.Lock()

    def make(self, unpack: Callable[[object], Tensor]) -> Tensor:
        with self._lock:
            if self._made is None:
                inputs = [unpack(packed) for packed in self._inputs]
                if not all(map(_has_memory, inputs)):
                    raise RuntimeError(
                        "recomputation: expected the inputs of a norm or activation function in memory, got a weight "
                        "that was freed after the forward, as by FSDP; gather it before the backward of what reads the "
                        "output, or shard both as one module"
                    )
                with torch.no_grad():
                    self._made = self._function(*inputs)
                self._stream = stream_of(self._made)
            return hand_over(self._made, self._stream)


def _has_memory(tensor: Tensor) -> bool:
    return tensor.numel() == 0 or tensor.untyped_storage().nbytes() > 0


def attach(made: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Notes that `made`, contiguous and alone in its storage, is `function(*inputs)`, with no gradient recorded.

    Nothing is noted where no graph will save it.
    """
    if torch.compiler.is_compiling() or not made.requires_grad or made.numel() == 0:
        return
    setattr(made.untyped_storage(), _ATTRIBUTE, Recipe(made, function, inputs))


def recipe_of(tensor: Tensor) -> Recipe | None:
    """The recipe of what a plain tensor views, unless it or an input has been written to, or an input freed, since."""
    recipe = getattr(tensor.untyped_storage(), _ATTRIBUTE, None)
    return recipe if recipe is not None and recipe.is_current(tensor) else None


def forget(tensor: Tensor) -> None:
    """From here on a plain tensor, and all that view it, are kept as what they are."""
    if tensor.layout is torch.strided:
        vars(tensor.untyped_storage()).pop(_ATTRIBUTE, None)
