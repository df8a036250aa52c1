"""What packing takes on the host: token lists to a trie, to targets, to micro-batches, beside plain Python."""

import random
from collections.abc import Callable

import torch

import pykern
from bench.harness import Case


def rollouts(prompts: int, prompt: int, responses: int, response: int) -> list[list[int]]:
    """Groups of responses that part at their first token, in no order."""
    generator = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [generator.randrange(150_000) for _ in range(count)]

    heads = [tokens(prompt) for _ in range(prompts)]
    sequences = [head + tokens(response) for head in heads for _ in range(responses)]
    generator.shuffle(sequences)
    return sequences


def conversation(turns: int, turn: int, branches: int) -> list[list[int]]:
    """One rollout of many turns; after each, attempts that end there."""
    generator = random.Random(0)
    history: list[int] = []
    sequences = []
    for _ in range(turns):
        history = history + [generator.randrange(150_000) for _ in range(turn)]
        sequences += [history + [generator.randrange(150_000)] for _ in range(branches)]
    return sequences


def pack_token_by_token(sequences: list[list[int]]) -> tuple[list[int], ...]:
    """A trie of dictionaries: tokens, subtree_end, position, and every sequence's rows."""
    root: dict[int, dict] = {}
    for sequence in sequences:
        node = root
        for token in sequence:
            node = node.setdefault(token, {})
    tokens, ends, positions = [], [], []
    rows: dict[int, int] = {}
    waiting = [(iter(root.items()), -1)]
    while waiting:
        children, row = waiting[-1]
        token, child = next(children, (None, None))
        if child is None:
            waiting.pop()
            if row >= 0:
                ends[row] = len(tokens)
            continue
        rows[id(child)] = len(tokens)
        waiting.append((iter(child.items()), len(tokens)))
        tokens.append(token)
        ends.append(0)
        positions.append(len(waiting) - 2)
    sequence_rows = []
    for sequence in sequences:
        node = root
        for token in sequence:
            node = node[token]
            sequence_rows.append(rows[id(node)])
    return tokens, ends, positions, sequence_rows


def host_cases(shape: str, sequences: list[list[int]], max_tokens: int) -> list[Case]:
    tensors = [torch.tensor(sequence, device="cpu") for sequence in sequences]
    total = sum(map(len, sequences))
    shape = f"{shape}, {total} tokens in {len(sequences)} sequences"

    def make_packed() -> dict[str, Callable[[], object]]:
        return {
            "pykern": lambda: pykern.pack_sequences(sequences),
            "pykern, from tensors": lambda: pykern.pack_sequences(tensors),
            "pykern, tree alone": lambda: pykern.PrefixTree.from_sequences(sequences),
            "token by token": lambda: pack_token_by_token(sequences),
        }

    def make_filled() -> dict[str, Callable[[], object]]:
        return {
            "pykern": lambda: pykern.fill_microbatches(sequences, max_tokens=max_tokens),
            "pykern, from tensors": lambda: pykern.fill_microbatches(tensors, max_tokens=max_tokens),
            "pykern, plan alone": lambda: pykern.plan_microbatches(sequences, max_tokens=max_tokens),
        }

    return [
        Case("attention", "pack_sequences", shape, make_packed),
        Case("attention", "fill_microbatches", f"{shape}, cap={max_tokens}", make_filled),
    ]


def cases(device: str) -> list[Case]:
    # All of it is work of the host, which a GPU's clock does not see.
    if device != "cpu":
        return []
    return [
        *host_cases("64 x P=32 G=16 R=32", rollouts(64, 32, 16, 32), 8192),
        *host_cases("1024 x P=32 G=1 R=32", rollouts(1024, 32, 1, 32), 8192),
        *host_cases("64 x P=256 G=16 R=64", rollouts(64, 256, 16, 64), 16384),
        *host_cases("64 turns of 64, 16 ends each", conversation(64, 64, 16), 16384),
    ]
