"""Files that are whole or absent: written beside their place, then moved into it."""

import itertools
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

from .config import InputError

METRICS, CHECKPOINT, REPORT, COMPARISON, SUMMARY = (
    "metrics.jsonl", "checkpoint.pt", "report.png", "comparison.json", "summary.json"
)  # fmt: skip
FORMAT = 2


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Whoever looks at `path` sees the old file or the new one, also after a crash or a full disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    write_atomically(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


def save_checkpoint(folder: Path, state: dict) -> None:
    """`state`: plain values and tensors only, so that it loads with weights_only=True."""

    def write(file: BinaryIO) -> None:
        try:
            torch.save({"format": FORMAT, **state}, file)
        except RuntimeError as error:
            # What torch's archive says when it is closed after a write that failed hides why that did.
            raise error.__context__ if isinstance(error.__context__, OSError) else error

    write_atomically(folder / CHECKPOINT, write)


def load_checkpoint(folder: Path) -> dict:
    path = folder / CHECKPOINT
    if not path.is_file():
        raise InputError(f"--resume {folder}: there is no {CHECKPOINT} in it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the broken bytes lead it to
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"--resume {folder}: {CHECKPOINT} cannot be read: {reason[0]}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"--resume {folder}: {CHECKPOINT} is not of a run of this version of pykern")
    return state


class Rows:
    """The rows of a process that writes none: those before it began are another's to know."""

    def __init__(self, lines: int):
        self.rows: list[dict] = [{} for _ in range(lines)]

    def append(self, row: dict) -> None:
        self.rows.append(row)

    def close(self) -> None:
        pass


class MetricsFile(Rows):
    """One JSON object a line, each written before the next step begins."""

    def __init__(self, folder: Path, lines: int):
        """Continues behind the first `lines` lines; what a run wrote after its last checkpoint is dropped."""
        path = folder / METRICS
        kept = path.read_bytes().splitlines()[:lines] if lines else []
        if len(kept) < lines:
            raise InputError(
                f"--resume {folder}: {METRICS} has {len(kept)} lines, the checkpoint was made after {lines}"
            )
        try:
            self.rows = [json.loads(line) for line in kept]
        except ValueError as error:
            raise InputError(f"--resume {folder}: {METRICS} has a line that is not JSON: {error}") from error
        write_atomically(path, lambda file: file.write(b"".join(line + b"\n" for line in kept)))
        self._file = path.open("a", encoding="utf-8")

    def append(self, row: dict) -> None:
        super().append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def new_folder(name: str) -> Path:
    """Makes runs/NAME-1, -2, ...: the first that is not there yet, another for each run of several begun at once."""
    for number in itertools.count(1):
        folder = Path("runs") / f"{name}-{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
