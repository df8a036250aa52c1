"""report.png: what a run did, on one page."""

from statistics import median
from typing import BinaryIO

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from .config import Config

OURS, THEIRS, ACCENT, MUTED = "#0b6e8f", "#c2703d", "#3a7d44", "#6b7280"
MIB = 1 << 20

STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "xtick.color": "#374151",
    "ytick.color": "#374151",
}


def smoothed(values: list[float], span: int) -> list[float]:
    """Means of the last `span` values up to each."""
    return [sum(values[max(0, at + 1 - span) : at + 1]) / min(at + 1, span) for at in range(len(values))]


def draw(
    file: BinaryIO, config: Config, rows: list[dict], before: float | None, after: float | None, given: bool = False
) -> None:
    """Writes a PNG: reward and accuracy; loss of the warm-up or of GRPO; time and memory of an update against plain.

    before, after: held-out accuracy. given: the responses were not sampled in this run.
    """
    grpo = [row for row in rows if row["phase"] == "grpo"]
    warmup = [row for row in rows if row["phase"] == "warmup"]
    compared = [row for row in grpo if "compare" in row]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 6.4), dpi=150, layout="constrained")
        (reward, learning), (seconds, memory) = figure.subplots(2, 2)
        _reward(reward, grpo, before, after, given)
        _learning(learning, warmup, grpo)
        _against_plain(seconds, grpo, compared, "Time of an update", "seconds", lambda row: row["seconds"]["update"],
                       lambda row: row["compare"]["seconds"])  # fmt: skip
        unit = "MiB resident" if config.device == "cpu" else "MiB allocated"
        _against_plain(memory, grpo, compared, "Peak memory of an update", unit,
                       lambda row: row["memory"]["peak"] / MIB,
                       lambda row: row["compare"]["memory"]["peak"] / MIB)  # fmt: skip
        figure.suptitle(
            f"GRPO on {config.data.rsplit('/', 1)[-1]}: "
            f"{config.layers} layers of width {config.width}, {config.loss} loss, "
            f"{config.optimizer} rank {config.rank}, {config.dtype}, seed {config.seed}",
            fontsize=10, color="#374151", x=0.01, ha="left", parse_math=False,
        )  # fmt: skip
        figure.savefig(file, format="png")


def _empty(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=MUTED)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)


def _reward(axes: Axes, grpo: list[dict], before: float | None, after: float | None, given: bool) -> None:
    axes.set_title("Mean reward of the given responses" if given else "Reward and held-out accuracy")
    if not grpo:
        return _empty(axes, "no GRPO step yet")
    steps = [row["step"] for row in grpo]
    rewards = [row["reward"] for row in grpo]
    sampled = "the file's responses in each batch" if given else "reward of sampled responses"
    if len(grpo) > 30:
        axes.plot(steps, rewards, color=OURS, alpha=0.25, linewidth=1)
        axes.plot(steps, smoothed(rewards, 10), color=OURS, linewidth=1.8, label=f"{sampled}, mean of 10 steps")
    else:
        axes.plot(steps, rewards, color=OURS, linewidth=1.6, marker="o", markersize=4, label=sampled)
    points = [(row["step"], row["accuracy"]) for row in grpo if "accuracy" in row]
    points = ([(0, before)] if before is not None else []) + [point for point in points if point[0] < steps[-1]]
    points += [(steps[-1], after)] if after is not None else []
    if points:
        axes.plot(
            *zip(*points), color=ACCENT, marker="o", markersize=4, linewidth=1.2, label="held-out accuracy, greedy"
        )
        for (step, value), offset in ((points[0], (5, 12)), (points[-1], (-5, 12))):
            axes.annotate(f"{value:.2f}", (step, value), xytext=offset, textcoords="offset points", color=ACCENT,
                          ha="center",
                          fontweight="bold")  # fmt: skip
    low = min(0.0, min(rewards))
    axes.set_ylim(low, max(1.05, max(rewards) * 1.05))
    axes.set_xlabel("GRPO step")
    axes.legend(loc="lower right")


def _learning(axes: Axes, warmup: list[dict], grpo: list[dict]) -> None:
    if warmup:
        axes.set_title("Supervised warm-up")
        axes.plot([row["step"] for row in warmup], [row["loss"] for row in warmup], color=MUTED, linewidth=1)
        axes.set_ylabel("cross-entropy, nats per token", color=MUTED)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("supervised step")
        points = [(row["step"], row["accuracy"]) for row in warmup if "accuracy" in row]
        if points:
            right = axes.twinx()
            right.plot(*zip(*points), color=ACCENT, marker="o", markersize=3, linewidth=1.2)
            right.set_ylabel("greedy accuracy on training prompts", color=ACCENT)
            right.set_ylim(0, 1)
            right.grid(False)
        return
    axes.set_title("Gradient norm before clipping")
    if not grpo:
        return _empty(axes, "no step yet")
    axes.plot([row["step"] for row in grpo], [row["gradient_norm"] for row in grpo], color=OURS, linewidth=1.4)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("GRPO step")


def _against_plain(axes: Axes, grpo: list[dict], compared: list[dict], title: str, unit: str, ours, theirs) -> None:
    axes.set_title(title)
    if not grpo:
        return _empty(axes, "no GRPO step yet")
    axes.plot([row["step"] for row in grpo], [ours(row) for row in grpo], color=OURS, linewidth=1.4,
              marker="o" if len(grpo) <= 30 else None, markersize=4, label="pykern")  # fmt: skip
    axes.set_ylabel(unit)
    axes.set_xlabel("GRPO step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if compared:
        axes.plot([row["step"] for row in compared], [theirs(row) for row in compared], color=THEIRS, marker="s",
                  markersize=5, linewidth=1.4, linestyle="-" if len(compared) == len(grpo) else ":",
                  label="plain PyTorch, same batches")  # fmt: skip
        ratio = median(theirs(row) / ours(row) for row in compared)
        axes.set_title(f"{title}: plain / pykern = {ratio:.1f}")
        axes.legend(loc="center right")
        values = [ours(row) for row in grpo] + [theirs(row) for row in compared]
        if max(values) > 10 * min(values):
            axes.set_yscale("log")
            axes.set_ylim(min(values) / 1.5, max(values) * 1.5)
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(0, max(values) * 1.15)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    else:
        axes.set_ylim(bottom=0)
