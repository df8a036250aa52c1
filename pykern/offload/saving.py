"""What autograd saves: which tensors stay where they are, and which become views of copied byte ranges."""

import sys
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .recipes import SavedRecipe, recipe_of
from .tensors import check_version, counter_of, identities, inner_tensors, with_inner_tensors
from .views import View

REASONS = ("parameter", "small", "last", "capacity", "skipped", "unsupported")
"""Why a saved tensor stays."""


class Kept:
    """A saved tensor that stays in memory."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        # Detached: an output that held its own graph node would never be freed.
        self.tensor = tensor.detach()
        self.version = None if tensor.is_inference() else tensor._version

    def unpack(self) -> Tensor:
        if self.version is not None:
            check_version(self.tensor._version, self.version, self.tensor, self.tensor.size())
        return self.tensor


class Copy(ABC):
    """One byte range of one storage as it was at one version.

    It lives as long as a saved view needs it. Its weak reference keeps the storage's identity from being given to a
    new storage meanwhile, so the identity can serve as a key where an address, which is reused, could not. The address
    tells the storage's generations apart: one that was freed and filled again by hand keeps its identity.
    """

    __slots__ = ("__weakref__", "_address", "_counter", "_storage", "_version", "begin", "dtype", "resident")

    def __init__(
        self,
        resident: Tensor,
        dtype: torch.dtype,
        begin: int,
        storage: torch.UntypedStorage,
        counter: Tensor,
        version: int,
    ) -> None:
        self.resident: Tensor | None = resident
        """The bytes, uint8, while they are in memory; mostly a part of the storage itself."""
        self.dtype = dtype
        """Of the tensor that was saved first."""
        self.begin = begin
        """Where in the storage the range begins."""
        self._storage = StorageWeakRef(storage)
        self._address = storage.data_ptr()
        self._counter = counter
        self._version = version

    def is_current(self, storage: torch.UntypedStorage, version: int) -> bool:
        """Whether the storage still holds what was copied, as far as autograd's version counters tell."""
        return self._version == version == self._counter._version and self._address == storage.data_ptr()

    @abstractmethod
    def data(self) -> Tensor:
        """The bytes, uint8, in memory."""


class Saved:
    """What the graph holds instead of a tensor: a view of a copy."""

    __slots__ = ("__weakref__", "_counter", "_gathered", "_version", "copy", "group", "view")

    def __init__(self, copy: Copy, view: View, counter: Tensor, version: int, gathered: bool) -> None:
        self.copy = copy
        self.view = view
        self._counter = counter
        self._version = version
        self._gathered = gathered
        self.group: object = None
        """With what else it is read, as far as whoever packs keeps account of that."""

    def unpack(self) -> Tensor:
        check_version(self._counter._version, self._version, self._counter, self.view.size)
        data = self.copy.data()
        return self.view.scatter(data) if self._gathered else self.view.restore(data, self.copy.begin)


class Flattened:
    """What the graph holds instead of a tensor subclass: its inner tensors, packed one by one."""

    __slots__ = ("_counter", "_inner", "_version")

    def __init__(self, tensor: Tensor, pack: Callable[[Tensor], object]) -> None:
        self._inner = {name: pack(inner) for name, inner in inner_tensors(tensor)}
        self._counter, self._version = counter_of(tensor), tensor._version

    def unpack(self, unpack: Callable[[object], Tensor]) -> Tensor:
        check_version(self._counter._version, self._version, self._counter, self._counter.size())
        return with_inner_tensors(self._counter, {name: unpack(packed) for name, packed in self._inner.items()})


class Recomputed:
    """What the graph holds instead of a tensor that is made again: how, and which view of what is made."""

    __slots__ = ("_counter", "_recipe", "_version", "_view")

    def __init__(self, tensor: Tensor, recipe: SavedRecipe) -> None:
        self._recipe, self._view = recipe, View.of(tensor)
        self._counter, self._version = counter_of(tensor), tensor._version

    def unpack(self, unpack: Callable[[object], Tensor]) -> Tensor:
        check_version(self._counter._version, self._version, self._counter, self._view.size)
        return self._view.restore(self._recipe.make(unpack), 0)


Packed = Kept | Saved | Flattened | Recomputed


def unpacked(packed: Packed, unpack: Callable[[Packed], Tensor]) -> Tensor:
    """The tensor again; `unpack` brings back what it is made of."""
    return packed.unpack(unpack) if isinstance(packed, Flattened | Recomputed) else packed.unpack()


def saved_tensors_hooks(
    pack: Callable[[Tensor], Packed], unpack: Callable[[Packed], Tensor]
) -> torch.autograd.graph.saved_tensors_hooks:
    """Autograd's. Where functions are compiled, the hooks are not: torch.compile would look into them."""
    if "torch._dynamo" in sys.modules:
        pack, unpack = torch._dynamo.disable(pack), torch._dynamo.disable(unpack)
    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def is_on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


class Packing:
    """Packs what autograd saves, one copy for each byte range of a storage, however many tensors show it.

    `accepts` tells whether a tensor is where copies can be made from. With `lossy`, views of different dtypes share no
    copy, since what is lost depends on the dtype. `made` is called with each new copy and whether it is smaller than
    `min_bytes` (it then stays), `handed_out` with each view of a copy, in the order in which they are saved.
    """

    def __init__(
        self,
        owner: str,
        *,
        min_bytes: int,
        parameters: torch.nn.Module | Iterable[Tensor] = (),
        skip: Callable[[Tensor], bool] | None = None,
        accepts: Callable[[Tensor], bool] = is_on_cpu,
        lossy: bool = False,
        copy_type: type[Copy] = Copy,
        made: Callable[[Copy, bool], None],
        handed_out: Callable[[Saved], None] = lambda saved: None,
    ) -> None:
        self._owner = owner
        self._min_bytes = min_bytes
        self._skip = skip
        self._parameters = list_of_tensors(parameters)
        self._accepts = accepts
        self._lossy = lossy
        self._copy_type = copy_type
        self._made = made
        self._handed_out = handed_out
        self._resident_storages = self._given = self._leaves = frozenset()
        self._copies: weakref.WeakValueDictionary[tuple, Copy] = weakref.WeakValueDictionary()
        # Reentrant: a garbage collection inside a guarded block may run any code.
        self.lock = threading.RLock()
        self.reset_counters()

    def find_parameters(self) -> None:
        """To be called before each forward: assigning to `.data` gives a parameter another storage."""
        self._resident_storages = frozenset(identities(self._parameters()))

    def begin(self, leaves: Iterable[Tensor] = (), given: Iterable[Tensor] = ()) -> None:
        """From here on no copy that was made before serves what is saved.

        Leaves that require gradients are parameters, except for `leaves`. Whatever shows a storage of `given` stays,
        since others hold it.
        """
        self._copies = weakref.WeakValueDictionary()
        self._leaves, self._given = frozenset(identities(leaves)), frozenset(identities(given))

    def reset_counters(self) -> None:
        self.deduplicated = self.deduplicated_bytes = 0
        self.kept = dict.fromkeys(REASONS, 0)
        self.kept_bytes = dict.fromkeys(REASONS, 0)
        self.recomputed = self.recomputed_bytes = 0

    def count_kept(self, reason: str, bytes_: int, count: int = 1) -> None:
        self.kept[reason] += count
        self.kept_bytes[reason] += bytes_

    def pack(self, tensor: Tensor) -> Packed:
        """What the graph is to hold instead of the tensor."""
        if hasattr(tensor, "trigger_wait"):
            # What a collective still writes; autograd saves it before the operation that waits for it.
            tensor = tensor.trigger_wait()
        reason = self._reason_to_keep(tensor)
        if reason is not None:
            with self.lock:
                self.count_kept(reason, tensor.numel() * tensor.element_size())
            return Kept(tensor)
        if is_traceable_wrapper_subclass(tensor):
            return Flattened(tensor, self.pack)
        recipe = recipe_of(tensor)
        if recipe is not None:
            with self.lock:
                self.recomputed += 1
                self.recomputed_bytes += View.of(tensor).distinct_bytes()
                return Recomputed(tensor, recipe.saved(self.pack))
        with self.lock:
            view, version = View.of(tensor), tensor._version
            storage = tensor.untyped_storage()
            storage_bytes = storage.nbytes()
            identity = storage._cdata, tensor.dtype if self._lossy else None

            region: tuple[int, int] | None = (0, storage_bytes)
            copy = self._current((identity, region), storage, version)
            if copy is None:
                region = view.region(storage_bytes)
                key = (identity, view if region is None else region)
                copy = self._current(key, storage, version)
            counter = counter_of(tensor)
            if copy is not None:
                self.deduplicated += 1
                self.deduplicated_bytes += view.distinct_bytes()
            else:
                if region is None:
                    begin, data = 0, view.gather(tensor)
                else:
                    begin, end = region
                    data = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, begin, (end - begin,))
                small = data.numel() < self._min_bytes
                if small:
                    self.count_kept("small", data.numel())
                    if region is not None:
                        data = data.clone()
                copy = self._copies[key] = self._copy_type(data, tensor.dtype, begin, storage, counter, version)
                self._made(copy, small)
            saved = Saved(copy, view, counter, version, region is None)
            self._handed_out(saved)
            return saved

    def _current(self, key: tuple, storage: torch.UntypedStorage, version: int) -> Copy | None:
        copy = self._copies.get(key)
        return copy if copy is not None and copy.is_current(storage, version) else None

    def _reason_to_keep(self, tensor: Tensor) -> str | None:
        if isinstance(tensor, torch.nn.Parameter):
            return "parameter"
        subclass = type(tensor) is not Tensor
        if (
            (subclass and not is_traceable_wrapper_subclass(tensor))
            or tensor.layout is not torch.strided
            or tensor.is_quantized
            or tensor.is_conj()
            or tensor.is_neg()
            or tensor.is_inference()
        ):
            return "unsupported"
        if not self._accepts(tensor):
            if tensor.device.type == "cuda" and self._accepts is is_on_cpu:
                raise NotImplementedError(
                    f"{self._owner}: got a saved tensor on {tensor.device}; pass storage='pinned' to offload from there"
                )
            return "unsupported"
        source = tensor if tensor._base is None else tensor._base
        if isinstance(source, torch.nn.Parameter):
            return "parameter"
        if source.is_leaf and source.requires_grad and self._leaves.isdisjoint(identities([source])):
            return "parameter"
        if tensor.numel() == 0:
            return "small"
        if not subclass:
            storage = tensor.untyped_storage()
            if storage.nbytes() < self._min_bytes:
                return "small"
            if storage._cdata in self._resident_storages:
                return "parameter"
            if storage._cdata in self._given:
                return "skipped"
        if self._skip is not None and self._skip(tensor):
            return "skipped"
        return None


def list_of_tensors(parameters: torch.nn.Module | Iterable[Tensor]) -> Callable[[], list[Tensor]]:
    """A function that tells the tensors given now; it keeps neither the module nor the tensors alive."""
    if isinstance(parameters, torch.nn.Module):
        module = weakref.ref(parameters)

        def of_module() -> list[Tensor]:
            return [] if module() is None else [*module().parameters(), *module().buffers()]

        return of_module
    if not isinstance(parameters, Iterable) or isinstance(parameters, Tensor):
        raise TypeError(f"parameters: expected a module or a list of tensors, got {type(parameters).__name__}")
    references = []
    for tensor in parameters:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"parameters: expected tensors, got {type(tensor).__name__}")
        references.append(weakref.ref(tensor))
    return lambda: [tensor for tensor in (reference() for reference in references) if tensor is not None]
