"""A small Llama pre-trained on bytes with AdamW and the low-rank optimizers: held-out loss, curves, state.

    python -m bench.lowrank.pretraining FILE.jsonl [--steps 400] [--json FILE] [--plot FILE]

The text is the file's bytes; its last twentieth is held out. Every run of a seed has the same weights, batches, warm-up
over a tenth of the steps and cosine decay to a tenth of the rate, as the papers' recipe has them; each optimizer is run
at the learning rates of its setting (bench.lowrank.pretraining_settings), and its best run is repeated with other
seeds. The other settings change one thing of one of these optimizers, to tell what makes the difference. The record
is written after every run, and a second call goes on where the first one stopped; `--only` and `--seeds` choose, and
`--threads 0` trains nothing and writes tables and plot of what is there.
"""

import argparse
import json
import math
import statistics
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import pykern
from bench import harness
from bench.lowrank import gradients
from bench.lowrank.pretraining_settings import (
    LENGTH,
    RANK,
    ROWS,
    SEEDS,
    SHAPE,
    STEPS,
    Run,
    Setting,
    larger,
    settings,
)
from pykern.train.model import Transformer, causal_attention

WARM_UP = 0.1
LAST_RATE = 0.1
MEAN_OF = 5


def batches(text: Tensor, steps: int, rows: int = ROWS, seed: int = 0):
    """The same batches for every run of a seed: `rows` windows of LENGTH + 1 bytes at random places."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(LENGTH + 1)
    for _ in range(steps):
        starts = torch.randint(len(text) - LENGTH - 1, (rows,), generator=generator)
        yield text[starts.unsqueeze(1) + offsets].long()


def loss_of(model: Transformer, rows: Tensor) -> Tensor:
    """Mean cross entropy of the next byte, in nats."""
    tokens, targets = rows[:, :-1], rows[:, 1:]
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    logits = model.logits(model(tokens, positions, causal_attention))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def held_out_loss(model: Transformer, text: Tensor, count: int = 16) -> float:
    """The same windows in all runs."""
    return sum(loss_of(model, rows).item() for rows in batches(text, count, seed=1)) / count


def factor(step: int, steps: int) -> float:
    """The learning rate's factor at a step: linear warm-up, then a cosine down to LAST_RATE."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * progress)) / 2


def optimizer_of(setting: Setting, model: Transformer, rate: float, seed: int) -> torch.optim.Optimizer:
    if setting.rank is None:
        return setting.make(model.parameters(), rate, weight_decay=0.0, **setting.options)
    groups = pykern.low_rank_groups(model, rank=setting.rank, targets=r"blocks\..*", **setting.options)
    # What is outside the subspace has AdamW's rate: the papers' recipes name one for the low-rank weights only.
    groups[-1]["lr"] = 1e-3
    return setting.make(groups, rate, seed=seed)


def train(run: Run, text: Tensor) -> dict:
    """Held-out losses by step, training losses MEAN_OF steps each, bytes of the optimizer's state; of AdamW also what
    subspaces see of the gradients.
    """
    setting = settings(run.steps)[run.setting]
    torch.manual_seed(run.seed)
    model = Transformer(SHAPE).to(setting.dtype)
    optimizer = optimizer_of(setting, model, run.rate, run.seed)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(factor, steps=run.steps))
    blocks = [param for param in model.blocks.parameters() if param.dim() == 2]
    cut = len(text) * 19 // 20
    curve, losses, seen, before, tenth = [], [], [], [], max(1, run.steps // 10)
    title = f"{run.setting}, rate {run.rate:g}, seed {run.seed}, {run.steps} x {run.rows} rows"
    for step, rows in enumerate(tqdm(batches(text[:cut], run.steps, run.rows, run.seed), title, total=run.steps)):
        loss = loss_of(model, rows)
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if run.setting == "AdamW" and before and (step + 1) % tenth == 0:
            seen.append((step + 1, gradients.seen([param.grad for param in blocks], before, RANK)))
        before = [param.grad for param in blocks]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % tenth == 0:
            curve.append((step + 1, held_out_loss(model, text[cut:])))
    tensors = (value for state in optimizer.state.values() for value in state.values())
    state_bytes = sum(value.numel() * value.element_size() for value in tensors)
    means = [round(statistics.fmean(losses[first : first + MEAN_OF]), 4) for first in range(0, run.steps, MEAN_OF)]
    return {**asdict(run), "curve": curve, "loss": curve[-1][1], "state_bytes": state_bytes, "training": means,
            **({"gradients": seen} if seen else {})}  # fmt: skip


def plan(records: list[dict], steps: int, seeds: int):
    """All runs in the order of their worth; which rate is best is asked of the records as they are by then."""
    everything = settings(steps)
    table = [name for name, setting in everything.items() if not setting.changes]
    yield from (Run(name, rate, steps=steps) for name in table for rate in everything[name].rates)
    for seed in SEEDS[1:seeds]:
        for name in table:
            if of(records, setting=name, seed=0, steps=steps, rows=ROWS):
                yield Run(name, best(records, name, steps)["rate"], seed, steps)
    yield from (Run(name, rate, steps=steps) for name in everything if name not in table
                for rate in everything[name].rates)  # fmt: skip
    yield from larger(steps)


def of(records: list[dict], **fields) -> list[dict]:
    return [record for record in records if all(record[name] == value for name, value in fields.items())]


def best(records: list[dict], name: str, steps: int, rows: int = ROWS) -> dict:
    """The first seed's run of the lowest final loss."""
    runs = of(records, setting=name, seed=0, steps=steps, rows=rows)
    return min(runs, key=lambda run: run["loss"] if math.isfinite(run["loss"]) else math.inf)


def others(records: list[dict], chosen: dict) -> str:
    fields = {name: chosen[name] for name in ("setting", "seed", "steps", "rows")}
    return "; ".join(f"{run['rate']:g}: {run['loss']:.4f}" for run in of(records, **fields) if run is not chosen)


def spread(values: list[float]) -> str:
    """Mean and standard deviation of a value, or nothing where there is one only."""
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""


def main_table(records: list[dict], steps: int) -> list[str]:
    table = {name: setting for name, setting in settings(steps).items() if not setting.changes}
    chosen = {name: best(records, name, steps) for name in table if of(records, setting=name, steps=steps, rows=ROWS)}
    losses = {
        name: {again["seed"]: again["loss"] for again in of(records, setting=name, rate=run["rate"], steps=steps,
                                                           rows=ROWS)}
        for name, run in chosen.items()
    }  # fmt: skip
    lines = [
        "| optimizer | rate | held-out loss | mean over seeds | minus AdamW's, seed by seed | other rates, first seed "
        "| state, MB | C4 at 60M, published |",
        "| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    for name, run in chosen.items():
        pairs = [loss - losses["AdamW"][seed] for seed, loss in losses[name].items() if seed in losses["AdamW"]]
        lines.append(
            f"| {name} | {run['rate']:g} | {run['loss']:.4f} | {spread(list(losses[name].values()))} | "
            f"{'' if name == 'AdamW' else '; '.join(f'{pair:+.4f}' for pair in pairs)} | {others(records, run)} | "
            f"{run['state_bytes'] / 1e6:.1f} | {table[name].published or ''} |"
        )
    return lines


def changes_table(records: list[dict], steps: int) -> list[str]:
    """One thing changed, first seed: the loss, and that of the unchanged optimizer subtracted."""
    lines = ["| changed | rate | held-out loss | minus unchanged | other rates |", "| --- | ---: | ---: | ---: | --- |"]
    for name, setting in settings(steps).items():
        pair = (name, setting.changes)
        if not all(of(records, setting=one, steps=steps, rows=ROWS) for one in pair):
            continue
        run, base = best(records, name, steps), best(records, setting.changes, steps)
        lines.append(
            f"| {name} | {run['rate']:g} | {run['loss']:.4f} | {run['loss'] - base['loss']:+.4f} | "
            f"{others(records, run)} |"
        )
    return lines


def sizes_table(records: list[dict]) -> list[str]:
    """AdamW and APOLLO by batch and length, first seed, each at its best rate there."""
    lines = [
        "| bytes a step | steps | AdamW | at rate | APOLLO | at rate | APOLLO minus AdamW |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for rows, steps in sorted({(record["rows"], record["steps"]) for record in records}):
        if not all(of(records, setting=name, rows=rows, steps=steps) for name in ("AdamW", "APOLLO")):
            continue
        adamw, apollo = (best(records, name, steps, rows) for name in ("AdamW", "APOLLO"))
        lines.append(
            f"| {rows * LENGTH} | {steps} | {adamw['loss']:.4f} | {adamw['rate']:g} | {apollo['loss']:.4f} | "
            f"{apollo['rate']:g} | {apollo['loss'] - adamw['loss']:+.4f} |"
        )
    return lines


def gradients_table(records: list[dict], steps: int) -> list[str]:
    """What subspaces see of the gradients of AdamW's best run, first of the seeds that measured it."""
    rate = best(records, "AdamW", steps)["rate"]
    runs = [run for run in of(records, setting="AdamW", rate=rate, steps=steps, rows=ROWS) if "gradients" in run]
    if not runs:
        return []
    seen = runs[0]["gradients"][::3]
    lines = [
        "",
        f"What a subspace of rank {RANK} sees of AdamW's gradients, mean over the blocks' matrices, at step:",
        "",
        "| | " + " | ".join(str(step) for step, _ in seen) + " |",
        "| --- |" + " ---: |" * len(seen),
    ]
    for name, words in gradients.WORDS.items():
        lines.append(f"| {words} | " + " | ".join(f"{values[name]:.3f}" for _, values in seen) + " |")
    return lines


def table(records: list[dict], steps: int) -> str:
    weights = sum(param.numel() for param in Transformer(SHAPE).parameters())
    return "\n".join([
        f"{weights / 1e6:.1f}M weights, rank {RANK}, {steps} steps of {ROWS * LENGTH} bytes; held out, nats per byte, "
        "of the first seed; mean ± standard deviation where there are more.",
        "",
        *main_table(records, steps),
        "",
        "What the order comes from: one thing of an optimizer changed, first seed.",
        "",
        *changes_table(records, steps),
        "",
        "The same by batch and by length, first seed.",
        "",
        *sizes_table(records),
        *gradients_table(records, steps),
    ])  # fmt: skip


def plot(records: list[dict], steps: int, file: Path) -> None:
    """The held-out loss of every optimizer's best rate against steps: the mean over seeds, and their range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for name, setting in settings(steps).items():
        if setting.changes or not of(records, setting=name, steps=steps, rows=ROWS):
            continue
        rate = best(records, name, steps)["rate"]
        curves = [run["curve"] for run in of(records, setting=name, rate=rate, steps=steps, rows=ROWS)]
        at = [step for step, _ in curves[0]]
        losses = list(zip(*([loss for _, loss in curve] for curve in curves)))
        mean = [statistics.fmean(values) for values in losses]
        (line,) = axes.plot(at, mean, label=f"{name}, rate {rate:g}: {mean[-1]:.3f}")
        axes.fill_between(at, list(map(min, losses)), list(map(max, losses)), color=line.get_color(), alpha=0.2)
    axes.set(xlabel="step", ylabel="held-out loss, nats per byte", yscale="log")
    axes.grid(color="#e5e7eb", which="both")
    axes.legend(frameon=False)
    figure.savefig(file)


def save(record: dict, steps: int, file: Path | None) -> None:
    if file is not None:
        harness.write({**record, "table": table(record["runs"], steps)}, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, metavar="FILE", help="any file; its bytes are the text")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these settings alone")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="of the main table's best runs")
    parser.add_argument("--threads", type=int, help="PyTorch's; 0 to train nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the record; runs that stand in it are not repeated")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="the curves as a PNG")
    arguments = parser.parse_args()
    text = torch.frombuffer(bytearray(arguments.text.read_bytes()), dtype=torch.uint8)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    record = {"environment": harness.environment(torch.device("cpu")), "table": "", "runs": []}
    if arguments.json and arguments.json.exists():
        before = json.loads(arguments.json.read_text())
        record["runs"] = before["runs"]
        if arguments.threads == 0:
            record["environment"] = before["environment"]
    records = record["runs"]
    for run in plan(records, arguments.steps, arguments.seeds) if arguments.threads != 0 else ():
        if of(records, **asdict(run)) or (arguments.only and run.setting not in arguments.only):
            continue
        records.append(train(run, text))
        save(record, arguments.steps, arguments.json)
    save(record, arguments.steps, arguments.json)
    print(table(records, arguments.steps))
    if arguments.plot:
        plot(records, arguments.steps, arguments.plot)


if __name__ == "__main__":
    main()
