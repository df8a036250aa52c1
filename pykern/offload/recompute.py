"""Recomputation without offload."""

import torch
from torch import Tensor

from .recipes import recipe_of
from .saving import Kept, Packed, Recomputed, saved_tensors_hooks, unpacked


def recompute_saved() -> torch.autograd.graph.saved_tensors_hooks:
    """A context around a forward in which outputs of pykern's norms and activation functions are not kept.

    What reads such an output usually saves it: a linear layer after a norm, or after an activation function. Here the
    graph holds the output's recipe instead, and the backward makes it again, bit for bit, from the tensors that the
    norm or activation function saved itself. In a Llama layer that is 2 of 4 tensors around the norms and 1 of 3 in the
    middle of the MLP; the price is one more forward of these ops. ActivationOffload does the same by itself.

        with pykern.recompute_saved():
            loss = model(batch)
        loss.backward()

    An output that was written to, or whose inputs were, is kept; so is one whose weight has been freed since, as FSDP
    frees a module's after its forward. Made again once, a tensor stays until all nodes that saved it have run; under
    `retain_graph` until the graph goes. Paper: PipeOffload, arXiv 2503.01328, appendix C.
    """

    def pack(tensor: Tensor) -> Packed:
        plain = type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_inference()
        recipe = recipe_of(tensor) if plain else None
        return Kept(tensor) if recipe is None else Recomputed(tensor, recipe.saved(pack))

    def unpack(packed: Packed) -> Tensor:
        return unpacked(packed, unpack)

    return saved_tensors_hooks(pack, unpack)
