"""A small Llama pre-trained on bytes with AdamW and the low-rank optimizers: held-out loss, curves, state.

    python -m bench.lowrank.pretraining FILE.jsonl [--steps 400] [--json FILE] [--plot FILE]

The text is the file's bytes; its last twentieth is held out. Every run has the same weights, batches, warm-up over a
tenth of the steps and cosine decay to a tenth of the rate, as the papers' recipe has them; each optimizer is run at the
learning rates of its row, and its best run is the one reported. The record is written after every run, and a
second call goes on where the first one stopped.
"""

import argparse
import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import pykern
from bench import harness
from pykern.train.model import Shape, Transformer, causal_attention

SHAPE = Shape(layers=8, width=320, heads=8, key_heads=8)
RANK = SHAPE.width // 4
LENGTH = 128
ROWS = 4
WARM_UP = 0.1
LAST_RATE = 0.1
REFRESHES = 8


@dataclass(frozen=True)
class Contestant:
    """An optimizer, the learning rates it is tried at, and its perplexity on C4 of a 60M model in the papers' table."""

    make: type[torch.optim.Optimizer]
    rates: tuple[float, ...]
    published: float | None
    options: dict


def contestants(steps: int) -> dict[str, Contestant]:
    gap = {"refresh_every": max(1, steps // REFRESHES)}
    return {
        "AdamW": Contestant(pykern.LowRankAdamW, (5e-4, 1e-3, 2e-3), 34.06, {"rank": None}),
        "GaLore": Contestant(pykern.GaLoreAdamW, (5e-3, 1e-2, 2e-2), 34.88, {"scale": 0.25, **gap}),
        "Fira": Contestant(pykern.FiraAdamW, (5e-3, 1e-2, 2e-2), 31.06, {"scale": 0.25, **gap}),
        "APOLLO": Contestant(pykern.ApolloAdamW, (2.5e-3, 5e-3, 1e-2), 31.55, dict(gap)),
        "DCT": Contestant(pykern.DCTAdamW, (1e-3, 2e-3, 4e-3), None, {}),
    }


def batches(text: Tensor, steps: int, seed: int = 0):
    """The same batches for every run: `ROWS` windows of LENGTH + 1 bytes at random places."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(LENGTH + 1)
    for _ in range(steps):
        starts = torch.randint(len(text) - LENGTH - 1, (ROWS,), generator=generator)
        yield text[starts.unsqueeze(1) + offsets].long()


def loss_of(model: Transformer, rows: Tensor) -> Tensor:
    """Mean cross entropy of the next byte, in nats."""
    tokens, targets = rows[:, :-1], rows[:, 1:]
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    logits = model.logits(model(tokens, positions, causal_attention))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def held_out_loss(model: Transformer, text: Tensor, count: int = 16) -> float:
    return sum(loss_of(model, rows).item() for rows in batches(text, count, seed=1)) / count


def factor(step: int, steps: int) -> float:
    """The learning rate's factor at a step: linear warm-up, then a cosine down to LAST_RATE."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * progress)) / 2


def train(name: str, contestant: Contestant, rate: float, text: Tensor, steps: int) -> dict:
    """One run: held-out losses by step, bytes of the optimizer's state."""
    torch.manual_seed(0)
    model = Transformer(SHAPE)
    if contestant.options.get("rank", RANK) is None:
        groups = [{"params": list(model.parameters())}]
    else:
        groups = pykern.low_rank_groups(model, rank=RANK, targets=r"blocks\..*", **contestant.options)
    if name != "AdamW":
        # What is outside the subspace has AdamW's rate: the papers' recipes name one for the low-rank weights only.
        groups[-1]["lr"] = 1e-3
    optimizer = contestant.make(groups, rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(factor, steps=steps))
    cut = len(text) * 19 // 20
    curve = []
    for step, rows in enumerate(tqdm(batches(text[:cut], steps), total=steps, desc=f"{name} {rate:g}")):
        loss = loss_of(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, steps // 10) == 0:
            curve.append((step + 1, held_out_loss(model, text[cut:])))
    tensors = (value for state in optimizer.state.values() for value in state.values())
    state_bytes = sum(value.numel() * value.element_size() for value in tensors)
    return {"optimizer": name, "rate": rate, "curve": curve, "loss": curve[-1][1],
            "state_bytes": state_bytes}  # fmt: skip


def best_runs(runs: list[dict]) -> list[dict]:
    """The run of the lowest final loss of every optimizer, in the order of the first runs."""
    names = dict.fromkeys(run["optimizer"] for run in runs)
    of = {name: [run for run in runs if run["optimizer"] == name] for name in names}
    return [min(of[name], key=lambda run: run["loss"] if math.isfinite(run["loss"]) else math.inf) for name in names]


def table(runs: list[dict], steps: int, weights: int) -> str:
    best = best_runs(runs)
    published = {name: contestant.published for name, contestant in contestants(steps).items()}
    lines = [
        f"{weights / 1e6:.1f}M weights, rank {RANK}, {steps} steps of {ROWS * LENGTH} bytes; held out, nats per byte.",
        "",
        "| optimizer | held-out loss | at rate | other rates tried | state, MB | C4 at 60M, published |",
        "| --- | ---: | ---: | --- | ---: | ---: |",
    ]
    for run in best:
        others = [other for other in runs if other["optimizer"] == run["optimizer"] and other is not run]
        tried = "; ".join(f"{other['rate']:g}: {other['loss']:.4f}" for other in others)
        known = published.get(run["optimizer"])
        lines.append(
            f"| {run['optimizer']} | {run['loss']:.4f} | {run['rate']:g} | {tried} | {run['state_bytes'] / 1e6:.1f} | "
            f"{known or ''} |"
        )
    return "\n".join(lines)


def plot(runs: list[dict], file: Path) -> None:
    """The held-out loss of every optimizer's best run against steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for run in best_runs(runs):
        axes.plot(*zip(*run["curve"]), label=f"{run['optimizer']}, rate {run['rate']:g}: {run['loss']:.3f}")
    axes.set(xlabel="step", ylabel="held-out loss, nats per byte", yscale="log")
    axes.grid(color="#e5e7eb", which="both")
    axes.legend(frameon=False)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, metavar="FILE", help="any file; its bytes are the text")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these optimizers alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the record; runs that stand in it are not repeated")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="the curves as a PNG")
    arguments = parser.parse_args()
    text = torch.frombuffer(bytearray(arguments.text.read_bytes()), dtype=torch.uint8)
    weights = sum(param.numel() for param in Transformer(SHAPE).parameters())
    runs = []
    if arguments.json and arguments.json.exists():
        before = json.loads(arguments.json.read_text())
        runs = before["runs"] if before["steps"] == arguments.steps else []
    for name, contestant in contestants(arguments.steps).items():
        for rate in contestant.rates:
            if (arguments.only and name not in arguments.only) or any(
                (run["optimizer"], run["rate"]) == (name, rate) for run in runs
            ):
                continue
            runs.append(train(name, contestant, rate, text, arguments.steps))
            if arguments.json:
                record = {"environment": harness.environment(torch.device("cpu")), "steps": arguments.steps,
                          "table": table(runs, arguments.steps, weights), "runs": runs}  # fmt: skip
                harness.write(record, arguments.json)
    print(table(runs, arguments.steps, weights))
    if arguments.plot:
        plot(runs, arguments.plot)


if __name__ == "__main__":
    main()
