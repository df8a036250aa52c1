"""What subspaces see of the gradients of a training: their energy, and how soon a choice is out of date."""

import statistics

import torch
from torch import Tensor

from pykern.lowrank import dct
from pykern.lowrank.projectors import PROJECTORS, Choice

WORDS = {
    "consecutive": "cosine between the gradients of two consecutive steps",
    "gram": "energy in the leading singular vectors",
    "gram before": "energy in those that the step before had",
    "dct": "energy in the chosen vectors of the cosine transform",
    "dct before": "energy in those that the step before chose",
    "dct kept": "vectors of the cosine transform that the step before chose too",
    "random": "energy in a random subspace",
}


def _energy(vectors: Tensor, matrix: Tensor) -> float:
    return ((vectors.mT @ matrix).square().sum() / matrix.square().sum()).item()


@torch.no_grad()
def seen(gradients: list[Tensor], before: list[Tensor], rank: int) -> dict[str, float]:
    """The means over matrices of what WORDS names, as shares of one.

    Args:
        gradients: [rows, columns] each.
        before: those of the step before.
        rank: of the subspaces, which compress the smaller axis.
    """
    found = {name: [] for name in WORDS}
    for index, pair in enumerate(zip(gradients, before, strict=True)):
        now, then = (matrix.mT if matrix.shape[0] >= matrix.shape[1] else matrix for matrix in pair)
        found["consecutive"].append(torch.cosine_similarity(now.flatten(), then.flatten(), dim=0).item())
        bases = {name: [PROJECTORS[name].choose(Choice(matrix, rank, seed=index)) for matrix in (now, then)]
                 for name in ("gram", "dct", "random_orthonormal")}  # fmt: skip
        chosen, chosen_before = bases["dct"]
        cosines = [dct.vectors(indices, now.shape[0], now.dtype) for indices in bases["dct"]]
        found["gram"].append(_energy(bases["gram"][0], now))
        found["gram before"].append(_energy(bases["gram"][1], now))
        found["dct"].append(_energy(cosines[0], now))
        found["dct before"].append(_energy(cosines[1], now))
        found["dct kept"].append(torch.isin(chosen, chosen_before).double().mean().item())
        found["random"].append(_energy(bases["random_orthonormal"][0], now))
    return {name: statistics.fmean(values) for name, values in found.items()}
