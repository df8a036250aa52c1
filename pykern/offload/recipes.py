"""Tensors that are made again in the backward instead of being kept or moved."""

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_ATTRIBUTE = "_pykern_recipe"


class Recipe:
    """How the tensor that fills one storage follows from others: `function(*inputs)`, the same bit for bit each time.

    It hangs on the tensor's storage, which keeps its Python object, and so lives exactly as long; views of the tensor
    find it too. The inputs must be tensors that the graph keeps anyway, since it keeps them alive.
    """

    __slots__ = ("function", "inputs", "input_versions", "version", "_saved", "__weakref__")

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor], version: int) -> None:
        self.function = function
        # Detached, or a recipe would hold the graph that holds it.
        self.inputs = tuple(tensor.detach() for tensor in inputs)
        self.input_versions = tuple(tensor._version for tensor in inputs)
        self.version = version
        self._saved: weakref.ref[SavedRecipe] | None = None

    def saved(self, pack: Callable[[Tensor], object], unpack: Callable[[object], Tensor]) -> "SavedRecipe":
        """What a graph holds instead of the tensor; the same object for all that save it at once."""
        saved = None if self._saved is None else self._saved()
        if saved is None:
            saved = SavedRecipe(self.function, [pack(tensor) for tensor in self.inputs], unpack)
            self._saved = weakref.ref(saved)
        return saved


class SavedRecipe:
    """A recipe whose inputs have been packed."""

    __slots__ = ("_function", "_inputs", "_made", "_unpack", "__weakref__")

    def __init__(self, function: Callable[..., Tensor], inputs: list, unpack: Callable[[object], Tensor]) -> None:
        self._function, self._inputs, self._unpack = function, inputs, unpack
        self._made: weakref.ref[Tensor] | None = None

    def make(self) -> Tensor:
        """The whole tensor. Those who ask while somebody still uses it share it."""
        made = None if self._made is None else self._made()
        if made is None:
            with torch.no_grad():
                made = self._function(*map(self._unpack, self._inputs))
            self._made = weakref.ref(made)
        return made


def attach(made: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Notes that `made`, contiguous and alone in its storage, is `function(*inputs)`, with no gradient recorded.

    Nothing is noted where no graph will save it.
    """
    if torch.compiler.is_compiling() or not made.requires_grad or made.numel() == 0:
        return
    setattr(made.untyped_storage(), _ATTRIBUTE, Recipe(function, inputs, made._version))


def recipe_of(tensor: Tensor) -> Recipe | None:
    """The recipe of what a plain tensor views, unless it or an input has been written to since."""
    recipe = getattr(tensor.untyped_storage(), _ATTRIBUTE, None)
    if recipe is None or recipe.version != tensor._version:
        return None
    current = tuple(tensor._version for tensor in recipe.inputs)
    return recipe if current == recipe.input_versions else None
