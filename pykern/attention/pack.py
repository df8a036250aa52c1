"""Packing prompts and responses for training: token ids, tree, and the rows that predict each response token."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .host import host_vector, inverse_of_rows
from .rows import gather_rows
from .tree import PrefixTree


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Prompts and responses as one row of tokens. T packed tokens, N response tokens, R responses.

    token_ids: int64 [T]. tree: the PrefixTree of the T tokens.
    predictor_rows: int64 [N], the packed row whose hidden state predicts each response token; the last prompt row
        predicts the first token of every response. targets: int64 [N], the response tokens, response after response.
    cu_seqlens: int32 [R + 1]; response r owns `targets[cu_seqlens[r] : cu_seqlens[r + 1]]`.
    group_ids: int64 [R], the index of each response's prompt.
    predictor_order, predictor_offsets: int64 [N] and [T + 1], the inverse of `predictor_rows`: packed row t predicts
        the targets `predictor_order[predictor_offsets[t] : predictor_offsets[t + 1]]`.
    """

    token_ids: Tensor
    tree: PrefixTree
    predictor_rows: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    group_ids: Tensor
    predictor_order: Tensor
    predictor_offsets: Tensor

    def gather(self, hidden: Tensor) -> Tensor:
        """[N, C]: the row of `hidden` [T, C] that predicts each response token; see `gather_rows`."""
        return gather_rows(hidden, self.predictor_rows, order=self.predictor_order, offsets=self.predictor_offsets)

    @torch.inference_mode(False)
    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on `device`."""
        return PackedBatch(
            self.token_ids.to(device),
            self.tree.to(device),
            self.predictor_rows.to(device),
            self.targets.to(device),
            self.cu_seqlens.to(device),
            self.group_ids.to(device),
            self.predictor_order.to(device),
            self.predictor_offsets.to(device),
        )


# What is made in inference mode could never be saved for a backward.
@torch.inference_mode(False)
def pack(
    prompts: Sequence[Sequence[int] | Tensor],
    responses: Sequence[Sequence[Sequence[int] | Tensor]],
    *,
    merge: bool = False,
) -> PackedBatch:
    """Packs each prompt once, followed by all its responses.

    prompts: P token sequences. responses: P lists of token sequences; lists and responses may be empty.
    merge: also store once what different prompts, or responses, have in common at their beginning (such as
        few-shot examples, or a response sampled twice). Results are those of the unmerged batch.

    Raises ValueError for an empty prompt with a response that has tokens: no row could predict the first of them.
    """
    if len(prompts) != len(responses):
        raise ValueError(
            f"responses: expected a list for each of the {len(prompts)} prompts, got {len(responses)} lists"
        )
    heads = [host_vector(prompt, f"prompts[{index}]") for index, prompt in enumerate(prompts)]
    tails = [
        [host_vector(response, f"responses[{index}][{number}]") for number, response in enumerate(group)]
        for index, group in enumerate(responses)
    ]
    for index, (head, group) in enumerate(zip(heads, tails, strict=True)):
        if not len(head) and any(len(tail) for tail in group):
            raise ValueError(
                f"prompts[{index}]: expected at least one token, got none; the first response token needs a row "
                "that predicts it, such as a begin-of-sequence token"
            )

    flat = [tail for group in tails for tail in group]
    group_sizes = np.asarray([len(group) for group in tails], dtype=np.int64)
    prompt_lens = np.asarray([len(head) for head in heads], dtype=np.int64)
    lengths = np.asarray([len(tail) for tail in flat], dtype=np.int64)
    group_ids = np.repeat(np.arange(len(heads)), group_sizes)
    targets = np.concatenate(flat) if flat else np.zeros(0, dtype=np.int64)
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    step = np.arange(len(targets)) - np.repeat(cu_seqlens[:-1], lengths)

    if merge:
        # A prompt without responses stays in the batch, as a sequence behind those of the responses.
        alone = [head for head, group in zip(heads, tails, strict=True) if not group]
        sequences = [np.concatenate([heads[group], tail]) for group, tail in zip(group_ids, flat, strict=True)]
        tree, token_ids = PrefixTree.from_sequences(sequences + alone)
        begins = tree.cu_seqlens.numpy()[:-1].astype(np.int64)[: len(flat)]
        at = np.repeat(begins + prompt_lens[group_ids] - 1, lengths) + step
        predictor_rows = tree.sequence_rows.numpy()[at]
    else:
        tree = PrefixTree.from_groups(prompt_lens.tolist(), [[len(tail) for tail in group] for group in tails])
        pieces = [piece for head, group in zip(heads, tails, strict=True) for piece in (head, *group)]
        token_ids = torch.from_numpy(np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64))
        # Rows before a response: all prompts up to its own, and all earlier responses.
        prompt_stops = np.cumsum(prompt_lens)[group_ids] if len(flat) else group_ids
        begins = prompt_stops + cu_seqlens[:-1]
        responses_before_group = np.concatenate([[0], np.cumsum(group_sizes)])[:-1][group_ids]
        last_prompt_row = prompt_stops + cu_seqlens[responses_before_group] - 1
        predictor_rows = np.where(step == 0, np.repeat(last_prompt_row, lengths), np.repeat(begins, lengths) + step - 1)

    rows = predictor_rows.astype(np.int64)
    return PackedBatch(
        token_ids,
        tree,
        torch.from_numpy(rows),
        torch.from_numpy(targets),
        torch.from_numpy(cu_seqlens.astype(np.int32)),
        torch.from_numpy(group_ids.astype(np.int64)),
        *map(torch.from_numpy, inverse_of_rows(rows, tree.num_tokens)),
    )


__all__ = ["PackedBatch", "pack"]
