"""`python -m pykern train`: whole small runs, refusals, resume, Ctrl-C, comparison."""

import json
import os
import signal
import struct
import sys
import time
from dataclasses import replace

import pytest
import torch

from pykern.train import cli
from pykern.train.cli import main
from pykern.train.compare import PlainPyTorch
from pykern.train.config import InputError, settle
from pykern.train.files import load_checkpoint, new_folder, save_checkpoint, write_atomically
from pykern.train.report import draw

from .support import TINY_OPTIONS, command, groups, metrics, questions, refusal, tiny_trainer, write_rows

FILES = {"metrics.jsonl", "checkpoint.pt", "summary.json", "report.png"}


def train(folder, *options) -> int:
    return main([*TINY_OPTIONS, "--out", str(folder), *map(str, options)])


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Whole runs


def test_a_run_leaves_its_files_and_a_table(tmp_path, capsys):
    assert train(tmp_path / "run") == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
    printed = capsys.readouterr().out
    assert "held-out greedy accuracy" in printed and "GRPO" in printed
    assert printed.rstrip().endswith(f"report: {tmp_path / 'run' / 'report.png'}")
    rows = metrics(tmp_path / "run")
    assert [row["phase"] for row in rows] == ["warmup"] * 4 + ["grpo"] * 4
    assert [row["step"] for row in rows] == [1, 2, 3, 4] * 2
    assert [("accuracy" in row) for row in rows[4:]] == [False, True, False, True]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["accuracy_before"] is not None and summary["accuracy_after"] is not None


def test_the_report_is_a_picture(tmp_path):
    train(tmp_path / "run")
    content = (tmp_path / "run" / "report.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", content[16:24])
    assert width >= 1000 and height >= 600


@pytest.mark.parametrize(
    "option", [[], ["--optimizer", "galore", "--offload", "file"], ["--dtype", "bfloat16"], ["--dtype", "mixed"]]
)
def test_equal_seeds_give_equal_runs_bit_for_bit(tmp_path, option):
    for name in ("one", "two"):
        assert train(tmp_path / name, *option) == 0
    assert metrics(tmp_path / "one") == metrics(tmp_path / "two")
    one, two = (load_checkpoint(tmp_path / name)["trainer"]["model"] for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_seeds_differ(tmp_path):
    for seed in (0, 1):
        train(tmp_path / str(seed), "--seed", seed)
    assert metrics(tmp_path / "0") != metrics(tmp_path / "1")


def test_where_activations_wait_changes_no_bit(tmp_path):
    for place in ("none", "memory", "file"):
        assert train(tmp_path / place, "--offload", place, "--width", "128", "--warmup-prompts", "64") == 0
    assert metrics(tmp_path / "none") == metrics(tmp_path / "memory") == metrics(tmp_path / "file")


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "cispo", "gspo"])
def test_losses_run(tmp_path, loss):
    assert train(tmp_path / "run", "--loss", loss, "--warmup-steps", 1, "--steps", 1, "--updates", 2) == 0


@pytest.mark.parametrize("estimator", sorted(cli.ESTIMATORS))
def test_estimators_run(estimator):
    row = tiny_trainer(estimator=estimator).grpo_step()
    assert row["gradient_norm"] == row["gradient_norm"]


def test_questions_are_sampled_and_checked(tmp_path):
    path = write_rows(tmp_path / "q.jsonl", questions(12))
    assert train(tmp_path / "run", "--data", path, "--warmup-steps", 2, "--steps", 2, "--held-out", 3) == 0
    rows = metrics(tmp_path / "run")
    assert len(rows) == 4 and all(0 <= row["reward"] <= 1 for row in rows[2:])


def test_given_groups_are_learned_from(tmp_path):
    path = write_rows(tmp_path / "g.jsonl", groups(6))
    assert train(tmp_path / "run", "--data", path, "--warmup-steps", 0, "--held-out", 0, "--updates", 3) == 0
    rows = metrics(tmp_path / "run")
    assert [row["phase"] for row in rows] == ["grpo"] * 4
    assert rows[0]["gradient_norm"] > 0


def test_an_update_raises_the_better_response(tmp_path):
    trainer = tiny_trainer(warmup_steps=0, learning_rate=3e-3)
    batch, _ = trainer.collect()
    batch.advantages = torch.linspace(-1, 1, len(batch.advantages))
    before = batch.old_logprobs
    for _ in range(3):
        trainer.update(batch)
    from pykern.train.batch import pack_groups

    after = trainer.logprobs(pack_groups(batch, trainer.device), 1.0).detach()
    lengths = torch.tensor([len(response) for _, response in batch.flat()])
    assert ((after - before) * batch.advantages.repeat_interleave(lengths)).sum() > 0


def test_a_report_on_a_file_of_any_name(tmp_path):
    draw(tmp_path / "report.png", replace(settle("groups", {}), data="cost_in_$b_$.jsonl"), [], None, None)
    assert (tmp_path / "report.png").stat().st_size > 0


def test_new_runs_get_new_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(TINY_OPTIONS) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["arithmetic-1", "arithmetic-2"]


def test_runs_begun_at_once_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [new_folder("sums").name for _ in range(3)] == ["sums-1", "sums-2", "sums-3"]


@pytest.mark.parametrize("package", ["tqdm", "matplotlib"])
def test_a_missing_package_is_told(tmp_path, monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    for module in ("run", "report"):
        monkeypatch.delitem(sys.modules, f"pykern.train.{module}", raising=False)
    line = refusal([*TINY_OPTIONS, "--out", tmp_path / "run"], capsys)
    assert line == f"pykern train: needs {package}, which is not installed; pip install tqdm matplotlib"
    assert not (tmp_path / "run").exists()


# Resume


@pytest.mark.parametrize("stop", [1, 3])
def test_resume_continues_bit_for_bit(tmp_path, stop):
    assert train(tmp_path / "straight", "--steps", 6) == 0
    assert train(tmp_path / "halted", "--steps", stop) == 0
    assert main(["--resume", str(tmp_path / "halted"), "--steps", "6"]) == 0
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "halted")
    straight, halted = (load_checkpoint(tmp_path / name)["trainer"] for name in ("straight", "halted"))
    assert all(torch.equal(straight["model"][name], halted["model"][name]) for name in straight["model"])
    for key, moments in straight["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(halted["optimizer"]["state"][key][name]))


def test_resume_drops_what_was_written_after_the_checkpoint(tmp_path):
    assert train(tmp_path / "straight", "--steps", 5) == 0
    assert train(tmp_path / "halted", "--steps", 3) == 0
    with (tmp_path / "halted" / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "grpo", "step": 4}\n{"phase": "gr')
    assert main(["--resume", str(tmp_path / "halted"), "--steps", "5"]) == 0
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "halted")


@pytest.mark.parametrize(
    ("kept", "message"), [(7, "has 7 lines, the checkpoint was made after 8"), (7.5, "a line that is not JSON")]
)
def test_resume_behind_lost_metrics_is_refused(tmp_path, capsys, kept, message):
    train(tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    whole = int(kept)
    path.write_bytes(b"".join(lines[:whole]) + (lines[whole][:9] if kept > whole else b""))
    before = contents(tmp_path / "run")
    assert message in refusal(["--resume", tmp_path / "run", "--steps", 9], capsys)
    assert contents(tmp_path / "run") == before


def test_resume_refuses_other_options(tmp_path, capsys):
    train(tmp_path / "run")
    before = contents(tmp_path / "run")
    assert "only --steps may be given, got --seed" in refusal(["--resume", tmp_path / "run", "--seed", 2], capsys)
    assert "got --out" in refusal(["--resume", tmp_path / "run", "--out", tmp_path / "x"], capsys)
    assert contents(tmp_path / "run") == before


def test_resume_without_a_checkpoint_is_refused(tmp_path, capsys):
    assert "there is no checkpoint.pt" in refusal(["--resume", tmp_path], capsys)


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 cut short"])
def test_resume_from_a_broken_checkpoint_is_refused(tmp_path, capsys, content):
    (tmp_path / "checkpoint.pt").write_bytes(content)
    assert "checkpoint.pt cannot be read" in refusal(["--resume", tmp_path], capsys)
    assert (tmp_path / "checkpoint.pt").read_bytes() == content


def test_resume_from_another_file_is_refused(tmp_path, capsys):
    torch.save({"weights": torch.zeros(1)}, tmp_path / "checkpoint.pt")
    assert "not of a run of this version" in refusal(["--resume", tmp_path], capsys)


# Ctrl-C


@pytest.mark.parametrize("phase", ["warmup", "grpo"])
def test_ctrl_c_ends_with_a_checkpoint_that_continues(tmp_path, phase):
    run = tmp_path / "run"
    options = ["--warmup-steps", 100_000] if phase == "warmup" else ["--steps", 100_000]
    process = command([*TINY_OPTIONS, "--out", run, *options, "--warmup-accuracy", 2, "--checkpoint-every", 0])
    deadline = time.monotonic() + 60
    while phase not in ((run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert f"--resume {run}" in printed
    rows, state = metrics(run), load_checkpoint(run)
    assert state["lines"] == len(rows)
    counter = {"warmup": "warmup_steps", "grpo": "step"}[phase]
    assert state["trainer"][counter] == rows[-1]["step"]
    if phase == "grpo":
        assert main(["--resume", str(run), "--steps", str(rows[-1]["step"] + 1)]) == 0
        assert len(metrics(run)) == len(rows) + 1


@pytest.mark.parametrize("steps", [0, 1])
def test_stopped_at_once_it_says_how_to_go_on(tmp_path, monkeypatch, capsys, steps):
    from pykern.train.run import Run

    def interrupted(run):
        if steps:
            run.trainer.supervised_step()
            run.metrics.append({})
            run.save()
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "execute", interrupted)
    assert train(tmp_path / "run") == 130
    way_on = f"continue with: python -m pykern train --resume {tmp_path / 'run'}" if steps else "it has no checkpoint"
    assert f"stopped at once; {way_on}" in capsys.readouterr().err


def test_ctrl_c_passes_over_the_plain_process():
    """It reaches that process too, at first while it still imports PyTorch."""
    trainer = tiny_trainer(compare=1)
    groups, _ = trainer.collect()
    plain = PlainPyTorch(trainer.config)
    try:
        os.kill(plain._process.pid, signal.SIGINT)
        assert plain.update(trainer.model, groups)["tokens"] > 0
    finally:
        plain.close()
    assert plain._process.exitcode is not None


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "absent.jsonl"], "--data absent.jsonl: No such file"),
        (["--steps", "-1"], "--steps: expected at least 0, got -1"),
        (["--steps", "x"], "argument --steps: invalid int value: 'x'"),
        (["--temperature", "0"], "--temperature: expected a positive number"),
        (["--learning-rate", "nan"], "argument --learning-rate: expected a finite number"),
        (["--heads", "3"], "--width: expected an even multiple of --heads 3"),
        (["--key-heads", "3"], "--key-heads: expected a divisor of --heads 4, got 3"),
        (["--loss", "none"], "argument --loss: invalid choice"),
        (["--optimizer", "sgd"], "argument --optimizer: invalid choice"),
        (["--seed", str(2**64)], "--seed: expected at most"),
        (["--threads", str(2**64)], "--threads: expected at most"),
        (["--unknown"], "unrecognized arguments: --unknown"),
        (["--held-out", "1000"], "--shots and --held-out: expected fewer than"),
    ],
)
def test_options_that_cannot_be_used_are_refused(tmp_path, capsys, options, message):
    assert message in refusal([*TINY_OPTIONS, "--out", tmp_path / "run", *options], capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that this machine has")
def test_cuda_without_a_device_is_refused(tmp_path, capsys):
    line = refusal(["--device", "cuda", "--out", tmp_path / "run"], capsys)
    assert line.startswith("pykern train: --device cuda: ") and line.endswith("; use --device cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{broken", "g.jsonl:3: not JSON"),
        ({**groups(1)[0], "prompt": ""}, "g.jsonl:3: 'prompt' is empty"),
        ({**groups(1)[0], "rewards": [1.0, float("nan"), 0.0]}, "g.jsonl:3: reward 1: expected a finite number"),
        ({**groups(1)[0], "rewards": [1.0]}, "g.jsonl:3: 3 responses but 1 rewards"),
    ],
)
def test_a_broken_row_is_refused_and_touches_nothing(tmp_path, capsys, row, message):
    path = write_rows(tmp_path / "g.jsonl", [*groups(2), row])
    assert message in refusal(["--data", path, "--out", tmp_path / "run"], capsys)
    assert not (tmp_path / "run").exists()


def test_an_earlier_run_is_left_as_it_was(tmp_path, capsys):
    train(tmp_path / "run")
    before = contents(tmp_path / "run")
    assert "already holds a run; continue it with --resume" in refusal(
        [*TINY_OPTIONS, "--out", tmp_path / "run"], capsys
    )
    assert contents(tmp_path / "run") == before


def test_resuming_on_data_that_broke_leaves_the_run_as_it_was(tmp_path, capsys):
    path = write_rows(tmp_path / "g.jsonl", groups(6))
    assert train(tmp_path / "run", "--data", path, "--warmup-steps", 0, "--held-out", 0) == 0
    before = contents(tmp_path / "run")
    write_rows(path, [*groups(6), "{"])
    assert "g.jsonl:7: not JSON" in refusal(["--resume", tmp_path / "run", "--steps", 9], capsys)
    assert contents(tmp_path / "run") == before


def test_resuming_on_other_data_leaves_the_run_as_it_was(tmp_path, capsys):
    path = write_rows(tmp_path / "g.jsonl", groups(6))
    assert train(tmp_path / "run", "--data", path, "--warmup-steps", 0, "--held-out", 0) == 0
    before = contents(tmp_path / "run")
    write_rows(path, groups(7))
    assert "g.jsonl is not as it was when the run began" in refusal(["--resume", tmp_path / "run"], capsys)
    assert contents(tmp_path / "run") == before


def test_a_file_as_folder_is_refused(tmp_path, capsys):
    (tmp_path / "run").write_text("mine")
    assert "is a file, expected a folder" in refusal([*TINY_OPTIONS, "--out", tmp_path / "run"], capsys)
    assert (tmp_path / "run").read_text() == "mine"


def test_a_spill_folder_that_is_absent_is_refused(tmp_path, capsys):
    options = ["--offload", "file", "--spill-dir", tmp_path / "absent", "--out", tmp_path / "run"]
    assert "absent" in refusal([*TINY_OPTIONS, *options], capsys)
    assert not (tmp_path / "run").exists()


def test_no_space_for_the_spill_file_is_refused(tmp_path, capsys):
    resource = pytest.importorskip("resource")
    train(tmp_path / "run")
    before = contents(tmp_path / "run")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        line = refusal(
            [*TINY_OPTIONS, "--offload", "file", "--spill-dir", tmp_path, "--out", tmp_path / "other"], capsys
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "spill" in line.lower() or "file" in line.lower()
    assert not (tmp_path / "other").exists()
    assert contents(tmp_path / "run") == before


def test_remax_on_given_groups_is_refused(tmp_path, capsys):
    path = write_rows(tmp_path / "g.jsonl", groups(6))
    assert "--estimator remax: needs the policy's greedy response" in refusal(
        ["--data", path, "--estimator", "remax"], capsys
    )


def test_warming_up_without_answers_is_refused(tmp_path, capsys):
    rows = groups(6)
    del rows[2]["answer"]
    path = write_rows(tmp_path / "g.jsonl", rows)
    line = refusal(["--data", path, "--warmup-steps", 1], capsys)
    assert "--warmup-steps 1: needs an 'answer' in every row; use --warmup-steps 0" in line


def test_settled_options_have_the_defaults_of_their_form():
    assert settle("groups", {}).warmup_steps == 0
    assert settle("groups", {"shots": 8}).shots == 8
    with pytest.raises(InputError, match="--rank: expected at least 1, got 0"):
        settle("arithmetic", {"rank": 0})


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(file):
        file.write(b"new")
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        write_atomically(path, fail)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_full_disk_is_told_and_leaves_the_old_checkpoint(tmp_path):
    resource = pytest.importorskip("resource")
    save_checkpoint(tmp_path, {"weights": torch.ones(3)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(tmp_path, {"weights": torch.ones(1 << 16)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert load_checkpoint(tmp_path)["weights"].tolist() == [1, 1, 1] and os.listdir(tmp_path) == ["checkpoint.pt"]


# Comparison


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    path = write_rows(folder / "g.jsonl", groups(8))
    options = ["--data", path, "--shots", 3, "--warmup-steps", 0, "--held-out", 0, "--steps", 5, "--offload", "none"]
    process = command([*TINY_OPTIONS, "--out", folder / "run", *options, "--compare"])
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return folder / "run", printed


def test_compared_updates_agree(compared):
    rows = metrics(compared[0])
    assert len(rows) == 5
    for row in rows:
        other = row["compare"]
        assert other["loss_difference_over_terms"] < 1e-5
        assert other["gradient_difference"] < 1e-4
        assert other["token_ratio"] > 2


def test_a_comparison_is_recorded_and_printed(compared):
    folder, printed = compared
    record = json.loads((folder / "comparison.json").read_text())
    assert len(record["steps"]) == 5 and record["summary"]["updates"] == 5
    for step in record["steps"]:
        for side in ("pykern", "plain"):
            assert step[side]["seconds"] > 0 and step[side]["memory"]["peak"] > 10 << 20 and step[side]["tokens"] > 0
    assert record["table"].count("\n|") == 6 and "scaled_dot_product_attention" in record["table"]
    for text in (
        "plain PyTorch",
        "tokens processed",
        "peak memory",
        "largest loss difference",
        "largest gradient difference",
    ):
        assert text in printed


def test_comparing_changes_no_bit_of_the_run(compared, tmp_path):
    folder, _ = compared
    data = folder.parent / "g.jsonl"
    options = ["--data", data, "--shots", 3, "--warmup-steps", 0, "--held-out", 0, "--steps", 5, "--offload", "none"]
    process = command([*TINY_OPTIONS, "--out", tmp_path / "alone", *options])
    assert process.wait(timeout=60) == 0
    with_plain = metrics(folder)
    for row in with_plain:
        row.pop("compare")
    assert metrics(tmp_path / "alone") == with_plain


@pytest.mark.parametrize("optimizer", ["galore", "fira", "adamw"])
def test_the_plain_step_follows_the_same_rule(optimizer):
    from pykern.train.making import make_model, make_optimizer
    from pykern.train.plain import plain_optimizer

    config = tiny_trainer(optimizer=optimizer).config
    models = [make_model(config, torch.device("cpu")).double() for _ in range(2)]
    ours = make_optimizer(config, models[0], 1e-2)
    theirs = plain_optimizer(make_optimizer(config, models[1], 1e-2), models[1])
    for _ in range(5):
        for pair in zip(*(model.parameters() for model in models)):
            gradient = torch.randn_like(pair[0])
            for parameter in pair:
                parameter.grad = gradient.clone()
        ours.step()
        theirs.step()
        # Later subspaces of a moment's signs are the implementation's own; keep one.
        for group in theirs.param_groups:
            group["refresh_every"] = 10**9
        for group in ours.param_groups:
            group["refresh_every"] = 10**9
        for state in ours.state.values():
            if "next_refresh" in state:
                state["next_refresh"].fill_(10**9)
    for one, two in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)
