"""group_advantages with groups that are split across processes: bit for bit what one process makes of all rows."""

import pytest
import torch
from torch import distributed

import pykern
from pykern.policy.gather import GatheredRows
from tests.policy.advantages_cases import ESTIMATORS, by_row, extras, sample
from tests.support_distributed import run_processes


def batch(name: str, rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """The whole batch, the same on every rank, with rewards that are not finite and groups on every rank."""
    torch.manual_seed(seed)
    rewards, ids = sample(rows, torch.float64 if seed % 2 else torch.float32, name)
    if rows:
        rewards[torch.rand(rows) < 0.1] = float("nan")
    if name in ("gdpo", "bnpo_decomposed"):
        rewards = torch.stack([rewards, rewards.roll(1), torch.rand(rows).to(rewards.dtype)], dim=1)
    return rewards, ids, extras(name, rows, rewards.dtype)


def answers(rows: int) -> torch.Tensor:
    """Several in a group: the entropy of their shares changes with every row that is counted."""
    return torch.arange(rows) // 2 % 3


# Rows of each rank, by their number, and max_rows.
def splits(ranks: int) -> list[tuple[list[int], int | None]]:
    return [
        ([48 // ranks] * ranks, None),
        ([5 + 7 * rank for rank in range(ranks)], 40),
        ([0] * (ranks - 1) + [13], 13),
        ([9] * ranks, 30),
        ([0] * ranks, 2),
    ]


def on_one_rank() -> list:
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    results = []
    for case, (counts, max_rows) in enumerate(splits(ranks)):
        begin = sum(counts[:rank])
        mine = torch.arange(begin, begin + counts[rank])
        for name in ESTIMATORS:
            rewards, ids, keywords = batch(name, sum(counts), case)
            keywords = by_row(keywords, mine)
            if name == "copo_global":
                keywords["answer_ids"] = answers(len(ids))[mine]
            results.append(
                pykern.group_advantages(
                    rewards[mine], ids[mine], estimator=name, filter="equal", preset="verl" if case else None,
                    process_group=distributed.group.WORLD, max_rows=max_rows, return_keep=True, return_metrics=True,
                    **({"lengths": torch.ones(len(mine), dtype=torch.int64)} if name == "gdpo" else {}), **keywords,
                )
            )  # fmt: skip
    return results


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_bit_equal_to_one_process(ranks):
    by_rank = run_processes(ranks, on_one_rank)
    index = 0
    for case, (counts, _) in enumerate(splits(ranks)):
        for name in ESTIMATORS:
            rewards, ids, keywords = batch(name, sum(counts), case)
            if name == "copo_global":
                keywords["answer_ids"] = answers(len(ids))
            if name == "gdpo":
                keywords["lengths"] = torch.ones(len(ids), dtype=torch.int64)
            want, want_keep, want_metrics = pykern.group_advantages(
                rewards, ids, estimator=name, filter="equal", preset="verl" if case else None, return_keep=True,
                return_metrics=True, **keywords,
            )  # fmt: skip
            got = [results[index] for results in by_rank]
            assert [len(advantages) for advantages, _, _ in got] == counts
            assert torch.equal(torch.cat([advantages for advantages, _, _ in got]), want), (name, case)
            assert torch.equal(torch.cat([keep for _, keep, _ in got]), want_keep), (name, case)
            for _, _, metrics in got:
                assert metrics == want_metrics, (name, case, metrics, want_metrics)
            if sum(counts) > 13:
                assert torch.count_nonzero(want) > 0
            index += 1


def refused() -> str:
    rewards, ids = torch.ones(5), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match="max_rows: expected at least this rank's 5 rows, got 4") as raised:
        pykern.group_advantages(rewards, ids, process_group=distributed.group.WORLD, max_rows=4)
    gathered = GatheredRows(5, distributed.group.WORLD, None)
    whole = gathered.gather([torch.arange(5.0), None, ids])
    assert torch.equal(whole[0], torch.arange(5.0)) and whole[1] is None and torch.equal(whole[2], ids)
    alone = GatheredRows(1, distributed.group.WORLD, None).gather([torch.ones(1), ids[:1], ids[:1]])
    assert torch.equal(alone[0], torch.ones(1)) and torch.equal(alone[1], ids[:1])
    return str(raised.value)


def test_too_many_rows_are_refused():
    assert "max_rows" in run_processes(1, refused)[0]
