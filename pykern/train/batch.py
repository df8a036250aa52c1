"""What one GRPO update reads: groups of responses behind a shared prefix, packed as a prefix tree."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import PrefixTree


@dataclass
class Groups:
    """Token lists of a batch. Response r of prompt p is responses[p][r]; flat tensors run in that order.

    advantages: [responses]; old_logprobs: [response tokens].
    """

    shared: list[int]
    prompts: list[list[int]]
    responses: list[list[list[int]]]
    advantages: Tensor | None = None
    old_logprobs: Tensor | None = None

    def flat(self) -> list[tuple[list[int], list[int]]]:
        """(prompt, response) pairs."""
        return [(prompt, response) for prompt, group in zip(self.prompts, self.responses) for response in group]


@dataclass
class Packed:
    """Groups as one row of tokens [T] under a prefix tree.

    predictor_rows: the row whose hidden state predicts each response token: the prompt's last row for the
    first of each response, the row before for the others. targets: those tokens. cu_seqlens: [responses + 1].
    """

    tokens: Tensor
    tree: PrefixTree
    predictor_rows: Tensor
    targets: Tensor
    cu_seqlens: Tensor

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


def pack_shared(groups: Groups, device: torch.device) -> Packed:
    """`pykern.pack` with one more level: shared prefix, then prompts, then responses, each token once.

    The last token of a response predicts nothing, so it is not encoded.
    """
    tokens, lengths, parents = list(groups.shared), [len(groups.shared)], [-1]
    predictors: list[int] = []
    targets: list[int] = []
    ends = [0]
    for prompt, group in zip(groups.prompts, groups.responses):
        prompt_node = len(lengths)
        tokens += prompt
        lengths.append(len(prompt))
        parents.append(0)
        last_of_prompt = len(tokens) - 1
        for response in group:
            first = len(tokens)
            tokens += response[:-1]
            lengths.append(len(response) - 1)
            parents.append(prompt_node)
            predictors += [last_of_prompt, *range(first, len(tokens))]
            targets += response
            ends.append(len(targets))

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    tree = PrefixTree.from_parents(lengths, parents).to(device)
    return Packed(tensor(tokens), tree, tensor(predictors), tensor(targets), tensor(ends))
