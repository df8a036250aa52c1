"""A plan as a picture: for every rank its computations, its copies out and back, and its memory over time."""

import math
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from os import PathLike
from statistics import median
from textwrap import wrap
from typing import TYPE_CHECKING, BinaryIO

from .simulation import live_blocks
from .table import format_bytes, headline, time_unit
from .types import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# By chunk: start, end, microbatch.
Cells = dict[int, list[tuple[float, float, int]]]

# From the first chunk to the last; white numbers are readable on the darker half.
SHADES = {
    "F": ("#a9cbee", "#1f5fa8"),
    "B": ("#f6c78f", "#b85c00"),
    "I": ("#f6c78f", "#b85c00"),
    "W": ("#b2dcae", "#2c7a34"),
    "out": ("#d3bfe8", "#6a3d9a"),
    "back": ("#f2b5cf", "#b8306f"),
}
NAMES = {
    "F": "forward",
    "B": "backward",
    "I": "backward of the input",
    "W": "backward of the weights",
    "out": "copy out",
    "back": "copy back",
}
IN_FILE = "/////"
INK, MUTED, IDLE, MEMORY = "#111827", "#6b7280", "#f3f4f6", "#64748b"

# Heights of a rank's rows, in inches.
COMPUTE, COPIES, CURVE, GAP = 0.30, 0.13, 0.42, 0.16
CELL = 0.19
# Of the title and the legend, in inches; letters on average.
TITLE_LINE, TITLE_LETTER, LEGEND_LINE, LEGEND_LETTER = 0.2, 0.09, 0.18, 0.065
# Wider than this, a schedule is looked at as a whole, without the numbers.
WIDEST = 30.0
# Beyond it, viewers give up.
LARGEST_PIXELS = 16_000


def _shade(kind: str, chunk: int, chunks: int) -> tuple[float, float, float]:
    light, dark = ([int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)] for color in SHADES[kind])
    depth = chunk / (chunks - 1) if chunks > 1 else 0.35
    return tuple(a + (b - a) * depth for a, b in zip(light, dark, strict=True))


def memory_over_time(plan: Plan, rank: int, copies: bool = True) -> list[tuple[float, int]]:
    """(seconds, bytes) wherever the bytes that a rank's blocks take on the device change; `copies=False`: without any.

    A block that leaves gives its memory back when the rank comes to its release and the copy has ended. One that comes
    back takes memory from the start of its copy, or from that of the action its reload precedes.
    """
    actions, spans, order = plan.order.ranks[rank], plan.spans[rank], plan.order
    sizes = [plan.block_bytes[order.stage(rank, chunk)] for chunk in range(order.chunks)]
    changes: dict[float, int] = defaultdict(int)
    for action, (start, end) in zip(actions, spans, strict=True):
        if action.kind == "F":
            changes[start] += sizes[action.chunk]
        elif action.kind != "I":
            changes[end] -= sizes[action.chunk]
    if copies:
        copy_of = {(copy.chunk, copy.microbatch): copy for copy in plan.copies[rank]}
        for kind, chunk, microbatch, before in plan.transfers[rank]:
            at = spans[before][0] if before < len(spans) else spans[-1][1]
            copy = copy_of.get((chunk, microbatch))
            if kind == "release":
                arrived = spans[before - 1][1] if before else 0.0
                changes[at if copy is None else min(at, max(arrived, copy.out_end))] -= sizes[chunk]
            elif kind == "reload":
                changes[at if copy is None else min(at, copy.back_start)] += sizes[chunk]
    total, curve = 0, [(0.0, 0)]
    for at in sorted(changes):
        total += changes[at]
        # Ends that start something elsewhere come as different sums of the same times.
        if at - curve[-1][0] <= 1e-9 * plan.seconds:
            at = curve.pop()[0]
        curve.append((at, total))
    return [*curve, (plan.seconds, total)]


class _Picture:
    """One axes in inches to the right of the first start, and below the first rank's top."""

    def __init__(self, plan: Plan, axes: "Axes", inches: float) -> None:
        self.plan, self.axes = plan, axes
        self.scale = inches / plan.seconds if plan.seconds else 0.0
        # All numbers are as large as the longest may be, and missing where that doesn't fit.
        self.digits = len(str(plan.order.microbatches - 1))
        self.numbered = False

    def cells(self, kind: str, cells: Cells, top: float, height: float, hatch: str | None = None) -> None:
        """Boxes of a row, with the microbatch's number where it fits."""
        for chunk, boxes in cells.items():
            color = _shade(kind, chunk, self.plan.order.chunks)
            bars = [(start * self.scale, (end - start) * self.scale) for start, end, _ in boxes]
            line = min(0.5, 72 * 0.1 * min(width for _, width in bars))
            self.axes.broken_barh(
                bars, (top, height), facecolors=[color], edgecolors="white", linewidths=line, hatch=hatch
            )
            ink = "white" if 0.3 * color[0] + 0.6 * color[1] + 0.1 * color[2] < 0.55 else INK
            for (left, width), (_, _, microbatch) in zip(bars, boxes, strict=True):
                size = min(8.5, 72 * 0.72 * height, 72 * 0.72 * width / (0.6 * self.digits))
                if size >= 3.5:
                    self.numbered = True
                    self.axes.text(
                        left + width / 2, top + height / 2, str(microbatch), size=size, color=ink, ha="center",
                        va="center_baseline",
                    )  # fmt: skip

    def label(self, text: str, at: float, small: bool = False) -> None:
        self.axes.text(-0.08, at, text, size=6 if small else 9, color=MUTED if small else INK, ha="right", va="center")


def _copies(plan: Plan, rank: int, kind: str, tier: str) -> Cells:
    cells = defaultdict(list)
    for copy in plan.copies[rank]:
        start, end = (copy.out_start, copy.out_end) if kind == "out" else (copy.back_start, copy.back_end)
        if copy.tier == tier and end > start:
            cells[copy.chunk].append((start, end, copy.microbatch))
    return cells


def _computations(plan: Plan, rank: int) -> Iterator[tuple[str, Cells]]:
    for kind in ("F", "B", "I", "W"):
        cells = defaultdict(list)
        for action, (start, end) in zip(plan.order.ranks[rank], plan.spans[rank], strict=True):
            if action.kind == kind and end > start:
                cells[action.chunk].append((start, end, action.microbatch))
        yield kind, cells


def _curve(picture: _Picture, rank: int, bottom: float, most: int) -> None:
    plan, axes = picture.plan, picture.axes

    def steps(curve: list[tuple[float, int]]) -> tuple[list[float], list[float]]:
        points = [(curve[0][0], curve[0][1])]
        for (_, before), (at, after) in pairwise(curve):
            points += [(at, before), (at, after)]
        return [at * picture.scale for at, _ in points], [bottom - CURVE * size / most for _, size in points]

    at, height = steps(memory_over_time(plan, rank))
    axes.fill_between(at, height, bottom, color=MEMORY, alpha=0.35, linewidth=0)
    axes.plot(at, height, color=MEMORY, linewidth=0.9)
    if any(plan.copies):
        axes.plot(
            *steps(memory_over_time(plan, rank, copies=False)), color=MEMORY, linewidth=0.8, linestyle=(0, (2, 2))
        )
    axes.plot([0, plan.seconds * picture.scale], [bottom, bottom], color=MUTED, linewidth=0.5)
    whole = max(live_blocks(plan.order, rank), default=0)
    blocks = f"{plan.peak_blocks[rank]} of {whole}" if any(plan.copies) else str(whole)
    axes.text(
        plan.seconds * picture.scale + 0.08, bottom - CURVE / 2,
        f"{blocks} block{'s' * (whole != 1)}\n{format_bytes(plan.peak_bytes[rank])}",
        size=7, color=INK, va="center", linespacing=1.1,
    )  # fmt: skip


def _legend(plan: Plan) -> list[tuple[object, str]]:
    """Its symbols, and what they stand for."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    chunks = plan.order.chunks
    present = {action.kind for actions in plan.order.ranks for action in actions}
    kinds = [kind for kind in ("F", "B", "I", "W") if kind in present] + ["out", "back"] * any(plan.copies)
    # Two patches: the first chunk's shade and the last one's.
    entries = [(tuple(Patch(color=_shade(kind, chunk, chunks)) for chunk in sorted({0, chunks - 1})), NAMES[kind])
               for kind in kinds]  # fmt: skip
    if any(copy.tier == "file" for copies in plan.copies for copy in copies):
        light = _shade("out", 0, chunks)
        entries.append((Patch(facecolor=light, edgecolor="white", hatch=IN_FILE), "on to the file, and from it"))
    entries.append((Patch(color=MEMORY, alpha=0.35), "memory of the blocks"))
    if any(plan.copies):
        entries.append((Line2D([], [], color=MEMORY, linewidth=0.8, linestyle=(0, (2, 2))), "without copies"))
    return entries


def draw(plan: Plan, file: BinaryIO | str | PathLike, inches: float | None = None) -> None:
    """Writes a PNG: one row per rank with its computations, below it its copies, and its memory over time.

    `inches`: the width of the time axis; None: as wide as the microbatches' numbers need, up to 30. Needs matplotlib:
    ImportError with what to do where there is none.
    """
    figure(plan, inches).savefig(file, format="png")


def figure(plan: Plan, inches: float | None = None) -> "Figure":
    """What `draw` writes."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.legend_handler import HandlerTuple
    except ImportError:
        raise ImportError("png: drawing a plan needs matplotlib; pip install matplotlib") from None

    order = plan.order
    lengths = [end - start for spans in plan.spans for start, end in spans if end > start]
    cells = plan.seconds / median(lengths) if lengths else 0.0
    width = inches or min(max(CELL * cells, 9.5), WIDEST)
    copying = any(plan.copies)
    pitch = COMPUTE + (2 * COPIES + 0.05) * copying + 0.06 + CURVE + GAP
    height = order.devices * pitch - GAP
    left, right, below = 0.8, 1.1, 0.5
    title = wrap(headline(plan), int((width + right) / TITLE_LETTER))
    entries = _legend(plan)
    rows = math.ceil(sum(0.45 + LEGEND_LETTER * len(name) for _, name in entries) / (width + right))
    above = 0.45 + TITLE_LINE * len(title) + LEGEND_LINE * rows
    size = (width + left + right, height + above + below)
    drawn = Figure(figsize=size, dpi=min(130.0, LARGEST_PIXELS / max(size)))
    axes = drawn.add_axes((left / size[0], below / size[1], width / size[0], height / size[1]))
    axes.set(xlim=(0, width), ylim=(height, 0))
    picture = _Picture(plan, axes, width)
    most = max((amount for rank in range(order.devices) for _, amount in memory_over_time(plan, rank, copies=False)),
               default=0) or 1  # fmt: skip
    for rank in range(order.devices):
        top = rank * pitch
        axes.broken_barh([(0, width)], (top, COMPUTE), facecolors=IDLE)
        for kind, boxes in _computations(plan, rank):
            picture.cells(kind, boxes, top, COMPUTE)
        picture.label(f"rank {rank}", top + COMPUTE / 2)
        top += COMPUTE
        for kind in ("out", "back") * copying:
            top += 0.025
            picture.cells(kind, _copies(plan, rank, kind, "host"), top, COPIES)
            picture.cells(kind, _copies(plan, rank, kind, "file"), top, COPIES, hatch=IN_FILE)
            picture.label(kind, top + COPIES / 2, small=True)
            top += COPIES
        _curve(picture, rank, top + 0.06 + CURVE, most)
        picture.label("memory", top + 0.06 + CURVE / 2, small=True)
    _axis(plan, axes, width)
    axes.legend(
        *zip(*entries, strict=True), handler_map={tuple: HandlerTuple(ndivide=None, pad=0)}, loc="lower left",
        bbox_to_anchor=(0.0, 1 + 0.12 / height), ncols=math.ceil(len(entries) / rows), frameon=False, fontsize=8,
        handlelength=1.8, columnspacing=1.2, borderaxespad=0.0, borderpad=0.0,
    )  # fmt: skip
    at = {"x": left / size[0], "ha": "left", "va": "top"}
    drawn.text(y=1 - 0.10 / size[1], s="\n".join(title), size=10.5, weight="bold", color=INK, **at)
    reading = ["numbers: microbatches, from 0"] * picture.numbered
    if order.chunks > 1:
        reading.append(f"shades: from chunk 0, light, to chunk {order.chunks - 1}, dark")
    drawn.text(y=1 - (0.14 + TITLE_LINE * len(title)) / size[1], s="; ".join(reading), size=8, color=MUTED, **at)
    return drawn


def _axis(plan: Plan, axes: "Axes", width: float) -> None:
    from matplotlib.ticker import MaxNLocator

    factor, unit = time_unit(plan.seconds)
    length = plan.seconds * factor
    ticks = [tick for tick in MaxNLocator(min(40, int(width))).tick_values(0, length) if tick <= length]
    axes.set_xticks([tick * width / length if length else 0.0 for tick in ticks], [f"{tick:g}" for tick in ticks])
    axes.set_xlabel(f"time ({unit})", labelpad=1, size=8, color=MUTED)
    axes.set_yticks([])
    axes.tick_params(axis="x", labelsize=8, color=MUTED, labelcolor=MUTED)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
