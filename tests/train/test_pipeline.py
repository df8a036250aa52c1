"""The trainer over several processes: the gradients of one process, the same bits wherever activations wait."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pykern
from pykern.train.config import settle
from pykern.train.data import arithmetic
from pykern.train.pipeline import PipelineTrainer
from pykern.train.trainer import Trainer
from tests.support_distributed import run_processes
from tests.train.support import TINY, TINY_OPTIONS, refusal

PIPELINE = {**TINY, "layers": 4, "prompts": 4, "warmup_prompts": 4, "pipeline": 2, "microbatches": 4}

VARIANTS = {
    "none": {"offload": "none"},
    "half": {},
    "all, to a file": {"offload": "full", "spill_dir": "."},
    "one chunk": {"offload": "1"},
    "grouped": {"schedule": "gis", "offload": "full"},
}


def make(kind: type, **options) -> Trainer:
    config = settle("arithmetic", {**PIPELINE, **options})
    return kind(config, arithmetic(config.shots, config.held_out, config.seed, config.largest))


def weights(trainer: Trainer) -> dict:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def steps(trainer: Trainer) -> list[dict]:
    trainer.supervised_step()
    trainer.end_warmup()
    return [trainer.grpo_step(comparing=step == 0) for step in range(2)]


def tied_steps(trainer: Trainer) -> tuple[list[float], torch.Tensor, dict]:
    losses = [trainer.supervised_step()["loss"] for _ in range(2)]
    trainer.optimizer.zero_grad()
    trainer.supervised_loss(trainer.dataset.take(0, 4))
    return losses, trainer.gradient(), weights(trainer)


def cases() -> dict:
    found = {}
    for name, options in VARIANTS.items():
        trainer = make(PipelineTrainer, **options)
        rows = steps(trainer)
        found[name] = weights(trainer), [row["loss"] for row in rows], rows[0]["reward"]
    # One process with the same weights and the same batch.
    trainer, alone = make(PipelineTrainer), make(Trainer, pipeline=0)
    loss, tokens = trainer.supervised_loss(trainer.dataset.take(0, 4))
    expected, _ = alone.supervised_loss(alone.dataset.take(0, 4))
    found["supervised"] = loss, expected, trainer.gradient(), alone.gradient()
    groups, _ = trainer.collect()
    ours = trainer.update(groups, comparing=True)
    alone.optimizer.zero_grad()
    theirs = alone.update(groups, comparing=True)
    found["policy"] = ours, theirs
    found["after"] = weights(trainer), weights(alone)
    # The embedding as the head: on both ranks, and, in a V, twice on one.
    alone = make(Trainer, pipeline=0, tie_head=True)
    expected = tied_steps(alone)
    for schedule in ("po", "v_half"):
        found["tied", schedule] = tied_steps(make(PipelineTrainer, tie_head=True, schedule=schedule)), expected
    # Interrupted after a step, and continued by others.
    state = trainer.state()
    trainer.grpo_step()
    resumed = make(PipelineTrainer, seed=5)
    resumed.load(state)
    resumed.config = trainer.config
    resumed.grpo_step()
    found["resumed"] = weights(trainer), weights(resumed)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("spill"))
    try:
        return run_processes(2, cases)
    finally:
        os.chdir(before)


def equal(one: dict, other: dict) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_all_ranks_hold_the_same_weights(found):
    for name in VARIANTS:
        assert equal(found[0][name][0], found[1][name][0]), name


def test_where_activations_wait_changes_no_bit(found):
    plain, losses, _ = found[0]["none"]
    for name in ("half", "all, to a file", "one chunk"):
        assert equal(found[0][name][0], plain) and found[0][name][1] == losses, name


def test_gradients_are_those_of_one_process(found):
    for rank in found:
        loss, expected, gradient, exact = rank["supervised"]
        assert loss == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-5 * exact.norm().item())
        ours, theirs = rank["policy"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4)
        torch.testing.assert_close(
            ours["gradient"], theirs["gradient"], rtol=1e-4, atol=1e-5 * theirs["gradient"].norm().item()
        )
        assert ours["policy"].keys() == theirs["policy"].keys()
        assert ours["policy"]["ratio_mean"] == pytest.approx(theirs["policy"]["ratio_mean"], rel=1e-5)


@pytest.mark.parametrize("schedule", ["po", "v_half"])
def test_a_tied_head_has_the_gradients_of_both_its_uses(found, schedule):
    for rank in found:
        (losses, gradient, ours), (expected, exact, theirs) = rank["tied", schedule]
        assert losses == pytest.approx(expected, rel=1e-4)
        torch.testing.assert_close(gradient, exact, rtol=1e-3, atol=1e-4 * exact.norm().item())
        assert ours["head.weight"].equal(ours["embedding.weight"])
        assert all(torch.allclose(ours[name], theirs[name], atol=2e-3) for name in theirs)
    assert equal(found[0]["tied", schedule][0][2], found[1]["tied", schedule][0][2])


def test_a_loaded_state_continues_bit_for_bit(found):
    assert equal(*found[0]["resumed"])


def test_the_command(tmp_path):
    """Started by torchrun, compared with plain PyTorch: one folder, one table."""
    options = [*TINY_OPTIONS, "--layers", "4", "--prompts", "4", "--steps", "2", "--compare", "1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "pykern", "train", *options, "--pipeline", "2", "--offload", "full", "--out", "run"]
    environment = {**os.environ, "PYTHONPATH": str(Path(pykern.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("largest gradient difference") == 1
    difference = float(ended.stdout.split("largest gradient difference")[1].split()[0])
    assert difference < 1e-4
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "metrics.jsonl", "checkpoint.pt", "summary.json", "report.png", "comparison.json"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--layers", "4", "--prompts", "4"],
            "--pipeline 2: expected as many processes, got 1; start them with torchrun",
        ),
        ([], "--layers 2: expected at least 4, one for each of --chunks 2 stages on --pipeline 2 ranks"),
        (["--layers", "4"], "--prompts 3: expected at least one for each of 4 microbatches; lower --microbatches"),
        (["--offload", "memory"], "--offload memory: expected none, half, full or a number of chunks with --pipeline"),
    ],
)
def test_refused(tmp_path, capsys, options, message):
    assert message in refusal([*TINY_OPTIONS, "--pipeline", "2", "--out", tmp_path / "run", *options], capsys)
    assert not (tmp_path / "run").exists()
