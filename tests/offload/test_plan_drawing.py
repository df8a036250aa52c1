"""A plan's table and picture say what is in the plan."""

import io
from collections import Counter
from dataclasses import replace

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from pykern.offload.planning.drawing import draw, figure, memory_over_time
from pykern.offload.planning.planner import plan
from pykern.offload.planning.simulation import live_blocks
from pykern.offload.planning.table import format_bytes, format_seconds, table
from pykern.offload.planning.types import Plan

MIB = 1 << 20


def make(schedule: str = "po_h", *counts: int, **options) -> Plan:
    options = {"times": (0.01, 0.01, 0.01), "bytes": 40 * MIB, "bandwidth": 80 * MIB / 0.024} | options
    return plan(schedule, *counts or (4, 2, 8), **options)


def texts(plan: Plan, inches: float | None = None) -> Counter[str]:
    axes = figure(plan, inches).axes[0]
    return Counter(text.get_text() for text in (*axes.texts, *axes.get_legend().get_texts()))


def test_sizes_and_times():
    sizes = {0: "0 B", 999: "999 B", 1000: "0.98 KiB", 1536: "1.50 KiB", 20 * MIB: "20.0 MiB", 300 << 30: "300 GiB",
             1023 * MIB: "1.00 GiB", 5 << 50: "5120 TiB"}  # fmt: skip
    assert {size: format_bytes(size) for size in sizes} == sizes
    times = {0.0: "0 s", 1e-17: "0 s", 2.5e-6: "2.5 µs", 0.0125: "12.5 ms", 1.0: "1 s", 1234.56: "1235 s"}
    assert {seconds: format_seconds(seconds) for seconds in times} == times


def test_table():
    made = make()
    lines = table(made).splitlines()
    most = max(made.peak_blocks)
    # Sixteen blocks, each three times ten milliseconds of computation, on every rank.
    idle = f"{1 - 0.48 / made.seconds:.1%}"
    assert lines[0] == (
        f"po: 4 devices, 2 chunks, 8 microbatches; {format_seconds(made.seconds)}, at most {idle} idle; "
        f"at most {most} blocks, {format_bytes(most * 40 * MIB)} per device"
    )
    titles = [title.strip() for title in lines[2].split("  ") if title.strip()]
    assert titles == ["rank", "peak blocks", "no copies", "peak bytes", "no copies", "moved", "host bytes",
                      "file bytes", "stalls", "bubble"]  # fmt: skip
    for rank in range(4):
        cells = [cell.strip() for cell in lines[3 + rank].split("  ") if cell.strip()]
        blocks, alone = made.peak_blocks[rank], max(live_blocks(made.order, rank))
        assert cells == [
            str(rank), str(blocks), str(alone), format_bytes(40 * MIB * blocks), format_bytes(40 * MIB * alone), "8/16",
            format_bytes(made.host_bytes[rank]), "0 B", format_seconds(made.stall_seconds[rank]), idle,
        ]  # fmt: skip
    assert lines[7:] == ["", *made.notes]
    assert table(replace(made, notes=())).splitlines()[-1].startswith(" " * 3 + "3 ")


@pytest.mark.parametrize("schedule", ["po_h", "po_f", "gis", "1f1b", "zb_v"])
@pytest.mark.parametrize("options", [{}, {"directions": "two"}, {"host_budget": 100 * MIB, "file_bandwidth": 2e9}])
def test_memory_over_time(schedule, options):
    made = make(schedule, 4, 1 if schedule == "1f1b" else 2, 8, offload="full", **options)
    for rank in range(4):
        for copies in (True, False):
            curve = memory_over_time(made, rank, copies)
            assert all(before[0] < after[0] for before, after in zip(curve[:-1], curve[1:-1], strict=False))
            assert curve[-1] == (made.seconds, 0) and min(size for _, size in curve) == 0
        assert max(size for _, size in memory_over_time(made, rank)) <= made.peak_bytes[rank]
        assert max(size for _, size in memory_over_time(made, rank, copies=False)) == 40 * MIB * max(
            live_blocks(made.order, rank)
        )


def test_picture_shows_every_action_and_copy():
    made = make()
    shown = texts(made)
    expected = Counter(str(action.microbatch) for actions in made.order.ranks for action in actions)
    expected.update(str(copy.microbatch) for copies in made.copies for copy in copies for _ in ("out", "back"))
    assert {text: shown[text] for text in expected} == expected
    for rank in range(4):
        size = format_bytes(made.peak_bytes[rank])
        assert shown[f"rank {rank}"] == 1
        assert shown[f"{made.peak_blocks[rank]} of {max(live_blocks(made.order, rank))} blocks\n{size}"] >= 1
    assert shown["out"] == shown["back"] == shown["memory"] == 4
    legend = {"forward", "backward of the input", "backward of the weights", "copy out", "copy back", "without copies"}
    assert legend <= set(shown)
    without = texts(make("1f1b", 3, 1, 5))
    assert without["backward"] == 1 and without["out"] == without["copy out"] == 0
    spilled = make("po_f", host_budget=100 * MIB, file_bandwidth=20e9)
    assert any(copy.tier == "file" for copies in spilled.copies for copy in copies)
    assert texts(spilled)["on to the file, and from it"] == 1
    # A glance at the whole: no numbers where they wouldn't fit.
    assert not {"5", "6", "7"} & set(texts(made, inches=1.0))
    reading = [figure(made, inches).texts[1].get_text() for inches in (None, 1.0)]
    assert reading == ["numbers: microbatches, from 0; shades: from chunk 0, light, to chunk 1, dark",
                       "shades: from chunk 0, light, to chunk 1, dark"]  # fmt: skip


def test_png():
    pixels = {}
    for name, made, inches in [
        ("small", make(), None),
        ("large", make("po_h", 4, 4, 12), None),
        ("narrow", make("po_h", 4, 4, 12), 6.0),
        ("no time", make("gis", 2, 2, 2, times=(0.0, 0.0, 0.0)), None),
    ]:
        file = io.BytesIO()
        draw(made, file, inches)
        file.seek(0)
        image = imread(file)
        pixels[name] = image.shape[1]
        assert image[..., :3].std() > 0.01
    assert pixels["narrow"] < pixels["small"] < pixels["large"] < 4500


@pytest.mark.parametrize("inches", [4.0, None])
def test_title_and_legend_fit(inches):
    made = make("po_f", host_budget=100 * MIB, file_bandwidth=20e9)
    drawn = figure(made, inches)
    FigureCanvasAgg(drawn).draw()
    legend = drawn.axes[0].get_legend().get_window_extent()
    title, reading = (text.get_window_extent() for text in drawn.texts)
    assert max(legend.x1, title.x1, reading.x1) <= drawn.bbox.x1
    assert (
        drawn.axes[0].bbox.y1 < legend.y0 < legend.y1 < reading.y0 < reading.y1 < title.y0 < title.y1 <= drawn.bbox.y1
    )
