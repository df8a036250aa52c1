"""A small model on small data, and ways to run the command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pykern
from pykern.train.cli import main
from pykern.train.config import settle
from pykern.train.data import arithmetic
from pykern.train.trainer import Trainer

TINY = {
    "layers": 2, "width": 32, "heads": 4, "key_heads": 2, "rank": 8, "refresh_every": 3, "largest": 9, "held_out": 8,
    "shots": 2, "warmup_steps": 4, "warmup_prompts": 4, "steps": 4, "prompts": 3, "responses": 4, "max_response": 4,
    "evaluate_every": 2, "checkpoint_every": 2, "compare": 0,
}  # fmt: skip

TINY_OPTIONS = ["--device", "cpu"] + [
    part for name, value in TINY.items() for part in (f"--{name.replace('_', '-')}", str(value))
]  # fmt: skip


def tiny_trainer(**changes) -> Trainer:
    config = settle("arithmetic", {**TINY, **changes})
    return Trainer(config, arithmetic(config.shots, config.held_out, config.seed, config.largest))


def refusal(arguments: list[str], capsys) -> str:
    """The one line on stderr of a call that must end with status 2."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def questions(count: int) -> list[dict]:
    return [
        {"question": f"What is {n} and {n}?", "answer": f"{n} and {n} are {2 * n}.\n#### {2 * n}"} for n in range(count)
    ]


def groups(count: int) -> list[dict]:
    return [
        {
            "prompt": f"What is {n} and {n}?",
            "answer": f"It is {2 * n}\nA: {2 * n}",
            "responses": [f"A: {2 * n}", f"I think {n}\nA: {n}", "x" * n],
            "rewards": [1.0, 0.0, 0.5 * (n % 2)],
        }
        for n in range(1, count + 1)
    ]


def metrics(folder: Path) -> list[dict]:
    """Rows of metrics.jsonl without what the clock and the operating system decide."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("seconds", None), row.pop("memory", None), row.pop("offload", None)
    return rows


def command(arguments: list, **keywords) -> subprocess.Popen:
    """`python -m pykern train` in a process of its own."""
    root = Path(pykern.__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "pykern", "train", *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **keywords,
    )  # fmt: skip
