"""`python -m pykern train`: options, checks, and one line for each mistake."""

import argparse
import errno
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch

from .. import ESTIMATORS
from . import data
from .config import ARITHMETIC, Config, InputError, settle
from .device import GPU_DEFAULTS, choose, resolve
from .files import METRICS, load_checkpoint
from .pipeline import SCHEDULES, check_pipeline, is_main_process, process_group
from .plain import PLAIN_LOSSES
from .precision import DTYPES

DESCRIPTION = """GRPO training of a small byte-level language model on pykern's ops.

--data arithmetic   generated sums behind a few worked ones; a supervised warm-up, then GRPO
--data FILE.jsonl   rows with question and answer (responses are sampled and checked), or with prompt, responses
                    and rewards (given groups, one update per batch)

Writes metrics.jsonl, checkpoint.pt, summary.json, report.png, and comparison.json where updates were compared.
Exit status: 0 at the end; 2 for an input that cannot be used, with one line that says why; 130 after
Ctrl-C, which ends the step in progress and writes a checkpoint that --resume continues bit for bit."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return value


def parser() -> argparse.ArgumentParser:
    top = _Parser(prog="python -m pykern train", description=DESCRIPTION,
                  formatter_class=argparse.RawDescriptionHelpFormatter,
                  argument_default=argparse.SUPPRESS)  # fmt: skip
    default = Config()

    def option(group, name: str, text: str, **keywords) -> None:
        value = getattr(default, name.lstrip("-").replace("-", "_"))
        kind = {int: int, float: _number, str: str}[type(value)]
        group.add_argument(name, type=kind, help=f"{text} ({value})" if value != "" else text, **keywords)

    group = top.add_argument_group("data")
    option(group, "--data", "arithmetic, or a JSON-lines file", metavar="arithmetic|FILE")
    option(group, "--shots", "worked examples in front of every prompt, the shared prefix", metavar="N")
    option(group, "--largest", "arithmetic: the largest number to add", metavar="N")
    option(group, "--held-out", "examples kept from training, to measure accuracy", metavar="N")
    group = top.add_argument_group("GRPO")
    option(group, "--steps", "GRPO steps", metavar="N")
    option(group, "--prompts", "prompts per step", metavar="N")
    option(group, "--responses", "responses sampled per prompt", metavar="N")
    option(group, "--max-response", "longest response, in tokens (bytes)", metavar="N")
    option(group, "--temperature", "of sampling and of the log-probabilities", metavar="T")
    option(group, "--estimator", "advantages", choices=sorted(ESTIMATORS))
    option(group, "--loss", "policy loss", choices=sorted(PLAIN_LOSSES))
    option(group, "--updates", "optimizer steps per batch", metavar="N")
    group = top.add_argument_group("optimizer")
    option(group, "--optimizer", "of the blocks' matrices; the rest gets AdamW", choices=["galore", "fira", "adamw"])
    option(group, "--rank", "of the projected gradient", metavar="N")
    option(group, "--refresh-every", "steps between two projections", metavar="N")
    option(group, "--learning-rate", "of GRPO", metavar="RATE")
    option(group, "--clip-norm", "largest norm of the gradient", metavar="NORM")
    group = top.add_argument_group("supervised warm-up")
    option(group, "--warmup-steps", "at most", metavar="N")
    option(group, "--warmup-accuracy", "greedy accuracy on training prompts that ends it", metavar="SHARE")
    option(group, "--warmup-prompts", "worked examples per step", metavar="N")
    option(group, "--warmup-learning-rate", "of the warm-up", metavar="RATE")
    group = top.add_argument_group("model")
    for name, text in (("--layers", "blocks"), ("--width", "of the hidden states"), ("--heads", "query heads")):
        option(group, name, text, metavar="N")
    option(group, "--key-heads", "key and value heads, a divisor of the query heads", metavar="N")
    group.add_argument("--tie-head", action="store_true", help="use the embedding as the output head")
    group = top.add_argument_group("pipeline", "started with torchrun --nproc-per-node N -m pykern train --pipeline N")
    option(group, "--pipeline", "ranks over which the blocks are cut; 0: one process", metavar="N")
    option(group, "--chunks", "stages per rank", metavar="N")
    option(group, "--microbatches", "of a step; 0: two per rank", metavar="N")
    option(group, "--schedule", "order of forwards and backwards", choices=SCHEDULES)
    group = top.add_argument_group("run")
    group.add_argument("--compare", type=int, nargs="?", const=1, metavar="EVERY",
                       help="run the same update in plain PyTorch beside every (EVERYth) step; 0: never "
                       "(every 100th for arithmetic, else never)")  # fmt: skip
    option(
        group,
        "--offload",
        "where activations wait for the backward: none, memory or file, on a GPU none or pinned; with --pipeline, how "
        "many of a rank's chunks leave: none, half, full or a number, half by default",
        metavar="WHERE|HOW",
    )
    option(
        group,
        "--spill-dir",
        "folder of the spill file of --offload file (the system's temporary folder); with --pipeline, activations "
        "leave to a file there",
        metavar="DIR",
    )
    group.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], help="auto: a GPU where pykern can use it, else the CPU (auto)"
    )
    option(group, "--threads", "of the processor; 0: as many as PyTorch chooses (1 for arithmetic)", metavar="N")
    option(group, "--dtype", "of weights and activations; mixed: float32 weights, bfloat16 products "
           "(what a GPU takes by default)", choices=list(DTYPES))  # fmt: skip
    option(group, "--seed", "of weights, split, order and sampling", metavar="N")
    option(group, "--evaluate-every", "steps between held-out accuracies; 0: at the ends only", metavar="N")
    option(group, "--checkpoint-every", "steps between checkpoints; 0: at the end only", metavar="N")
    group.add_argument("--out", type=Path, metavar="DIR", help="new folder of the results (runs/DATA-1, -2, ...)")
    group.add_argument("--resume", type=Path, metavar="DIR",
                       help="continue the run in DIR with its own options; --steps may extend it")  # fmt: skip
    return top


def prepare(arguments: list[str]) -> tuple[Config, data.Dataset, Path | None, dict | None]:
    """Checks all that can be checked before a file is touched: what a Run is made of. Raises InputError."""
    given = vars(parser().parse_args(arguments))
    out, resume = given.pop("out", None), given.pop("resume", None)
    if resume is not None:
        if out is not None or set(given) - {"steps"}:
            other = "--out" if out is not None else f"--{sorted(set(given) - {'steps'})[0].replace('_', '-')}"
            raise InputError(f"--resume continues with the run's own options; only --steps may be given, got {other}")
        state = load_checkpoint(resume)
        try:
            config = replace(Config(**state["config"]), **given)
        except (KeyError, TypeError) as error:
            raise InputError(f"--resume {resume}: its checkpoint is of another version of pykern ({error})") from error
        out = resume
    else:
        state = config = None
        device = given.pop("device", "auto")
        if choose(device) == "cuda":
            given = {**GPU_DEFAULTS, **({"offload": "half"} if given.get("pipeline") else {}), **given}

    name = config.data if config else given.get("data", ARITHMETIC)
    if name == ARITHMETIC:
        config = config or settle("arithmetic", given)
        dataset = data.arithmetic(config.shots, config.held_out, config.seed, config.largest)
    else:
        rows = data.read_rows(name)
        config = config or settle(data.form_of(name, rows), given)
        dataset = data.file(name, rows, config.shots, config.held_out, config.seed)
    if state is not None and state["data"] != dataset.digest():
        raise InputError(
            f"--resume {resume}: {name} is not as it was when the run began; restore it, or begin another run"
        )
    if config.estimator == "remax" and dataset.form == "groups":
        raise InputError(
            "--estimator remax: needs the policy's greedy response to each prompt, which given groups lack"
        )
    check_pipeline(config)
    config = replace(config, device=resolve(config, config.device if resume else device))
    if config.warmup_steps and not all(example.solution for example in dataset.training):
        raise InputError(f"--warmup-steps {config.warmup_steps}: needs an 'answer' in every row; use --warmup-steps 0")
    if out is not None and resume is None and (out / METRICS).exists():
        raise InputError(f"--out {out}: already holds a run; continue it with --resume {out}, or name another folder")
    if out is not None and out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file, expected a folder")
    return config, dataset, out, state


def main(arguments: list[str]) -> int:
    threads, run = torch.get_num_threads(), None
    try:
        config, *rest = prepare(arguments)
        from .run import Run

        with process_group(config):
            run = Run(config, *rest)
            return run.execute()
    except ModuleNotFoundError as error:
        if error.name not in ("tqdm", "matplotlib"):
            raise
        return _end(f"needs {error.name}, which is not installed; pip install tqdm matplotlib")
    except InputError as error:
        return _end(str(error))
    except NotImplementedError as error:
        return _end(str(error))
    except OSError as error:
        reason = "no space left" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        return _end(f"{error.filename}: {reason}" if error.filename else str(error) or reason)
    except KeyboardInterrupt:
        if run is None:
            return _end("stopped before the first step", 130)
        return _end(f"stopped at once; {run.way_on()}", 130)
    finally:
        torch.set_num_threads(threads)


def _end(message: str, status: int = 2) -> int:
    """Prints one line, in one process, and returns the exit status."""
    if is_main_process():
        print(f"pykern train: {' '.join(message.split())}", file=sys.stderr)
    return status
