"""A whole run: folder, progress bar, metrics, checkpoints, report."""

import signal
import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from . import summary
from .compare import PlainPyTorch
from .config import Config
from .data import Dataset
from .device import describe
from .files import (
    COMPARISON,
    REPORT,
    SUMMARY,
    MetricsFile,
    Rows,
    new_folder,
    save_checkpoint,
    write_atomically,
    write_json,
)
from .making import use_threads
from .pipeline import PipelineTrainer, is_main_process
from .report import draw
from .trainer import Trainer

# Steps. Once a small model finds the rule its accuracy leaps, and GRPO is to have something left to teach.
WARMUP_PROBE_EVERY = 10


class Stop:
    """Whether Ctrl-C asked to end after the step in progress. A second one ends at once, with the last checkpoint."""

    def __init__(self):
        self.asked = False

    def __bool__(self) -> bool:
        return self.asked

    @contextmanager
    def on_interrupt(self):
        before = signal.signal(signal.SIGINT, self._handle)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, before)

    def _handle(self, number: int, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        tqdm.write("stopping after this step (again: stop at once)", file=sys.stderr)


class Run:
    """One folder of results, a new one if None is given. `state` continues the run that a checkpoint holds."""

    def __init__(self, config: Config, dataset: Dataset, folder: Path | None, state: dict | None = None):
        self.config, self.dataset, self._data = config, dataset, dataset.digest()
        use_threads(config)
        self.trainer = PipelineTrainer(config, dataset) if config.pipeline else Trainer(config, dataset)
        self.is_main = is_main_process()
        self.accuracy_before: float | None = None
        lines = 0
        if state is not None:
            self.trainer.load(state["trainer"])
            self.accuracy_before, lines = state["accuracy_before"], state["lines"]
        if self.is_main:
            folder = folder or new_folder(Path(config.data).stem)
            folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.metrics = MetricsFile(folder, lines) if self.is_main else Rows(lines)
        self._saved_lines = lines if state is not None else -1
        self._plain: PlainPyTorch | None = None

    def way_on(self) -> str:
        """How to continue what has been stopped."""
        if self._saved_lines < 0:
            return "it has no checkpoint yet, so begin anew"
        return f"continue with: python -m pykern train --resume {self.folder}"

    def save(self) -> None:
        if len(self.metrics.rows) == self._saved_lines:
            return
        state = {
            "config": asdict(self.config),
            "data": self._data,
            "trainer": self.trainer.state(),
            "accuracy_before": self.accuracy_before,
            "lines": len(self.metrics.rows),
        }
        if self.is_main:
            save_checkpoint(self.folder, state)
        self._saved_lines = len(self.metrics.rows)

    def execute(self) -> int:
        """Runs to the end, or to Ctrl-C; then writes checkpoint and report. The exit status."""
        if self.is_main:
            print(describe(self.config), file=sys.stderr)
        with Stop().on_interrupt() as stop:
            try:
                self._warm_up(stop)
                self._reinforce(stop)
            finally:
                if self._plain:
                    self._plain.close()
                self.metrics.close()
            self.save()
        self._report(stop)
        return 130 if stop else 0

    def _warm_up(self, stop: Stop) -> None:
        trainer, config = self.trainer, self.config
        if trainer.warming_up:
            with tqdm(
                total=config.warmup_steps, initial=trainer.warmup_steps, desc="warm-up", unit="step",
                dynamic_ncols=True, disable=not self.is_main,
            ) as bar:  # fmt: skip
                while trainer.warming_up and not self._stopping(stop):
                    row = trainer.supervised_step()
                    done = trainer.warmup_steps == config.warmup_steps
                    probing = config.warmup_accuracy < 1  # No target, no probe: sampled answers to questions are slow.
                    if probing and (trainer.warmup_steps % WARMUP_PROBE_EVERY == 0 or done):
                        row["accuracy"] = trainer.accuracy(trainer.warmup_probe())
                        done |= row["accuracy"] >= config.warmup_accuracy
                    bar.update()
                    bar.set_postfix(loss=f"{row['loss']:.3f}", **_shown(row, "accuracy"))
                    if done:
                        trainer.end_warmup()
                    self._step_ended(row, trainer.warmup_steps)
        if self.accuracy_before is None and self.dataset.held_out and not self._stopping(stop):
            self.accuracy_before = trainer.accuracy(self.dataset.held_out)
            if self.is_main:
                tqdm.write(f"held-out greedy accuracy before GRPO: {self.accuracy_before:.3f}")

    def _reinforce(self, stop: Stop) -> None:
        trainer, config = self.trainer, self.config
        if self._stopping(stop) or trainer.step >= config.steps:
            return
        with tqdm(
            total=config.steps, initial=trainer.step, desc="GRPO", unit="step", dynamic_ncols=True,
            disable=not self.is_main,
        ) as bar:  # fmt: skip
            while trainer.step < config.steps and not self._stopping(stop):
                comparing = bool(config.compare) and trainer.step % config.compare == 0
                if comparing and self._plain is None and self.is_main:
                    self._plain = PlainPyTorch(config)
                row = trainer.grpo_step(self._plain if comparing else None, comparing)
                if self.dataset.held_out and config.evaluate_every and trainer.step % config.evaluate_every == 0:
                    row["accuracy"] = trainer.accuracy(self.dataset.held_out)
                bar.update()
                bar.set_postfix(reward=f"{row['reward']:.3f}", **_shown(row, "accuracy"))
                self._step_ended(row, trainer.step)

    def _stopping(self, stop: Stop) -> bool:
        """All processes of a run end after the same step, whichever of them was interrupted."""
        stop.asked = self.trainer.agree(stop.asked)
        return stop.asked

    def _step_ended(self, row: dict, step: int) -> None:
        self.metrics.append(row)
        if self.config.checkpoint_every and step % self.config.checkpoint_every == 0:
            self.save()

    def _report(self, stop: Stop) -> None:
        rows = self.metrics.rows
        after = None
        if self.dataset.held_out and not self.trainer.warming_up:
            last = rows[-1] if rows else {}
            after = last.get("accuracy") if last.get("phase") == "grpo" else None
            if self.trainer.agree(after is None):
                after = self.trainer.accuracy(self.dataset.held_out)
        if not self.is_main:
            return
        found = summary.summarize(self.config, rows, self.accuracy_before, after)
        write_json(self.folder / SUMMARY, found)
        if found["compare"]:
            write_json(self.folder / COMPARISON, summary.comparison_record(found, rows))
        picture = self.folder / REPORT
        given = self.dataset.form == "groups"
        write_atomically(picture, lambda file: draw(file, self.config, rows, self.accuracy_before, after, given))
        print(summary.table(found))
        if stop:
            print(f"stopped early; {self.way_on()}")
        print(f"report: {picture}")


def _shown(row: dict, name: str) -> dict:
    return {name: f"{row[name]:.3f}"} if name in row else {}
