"""A plan as lines of text."""

from collections.abc import Sequence

from .simulation import bubbles, live_blocks
from .types import Plan


def format_bytes(size: float) -> str:
    """Three digits and a unit: 0 B, 512 B, 1.50 KiB, 20.0 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 999.5 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.{2 if size < 9.995 else 1 if size < 99.95 else 0}f} {unit}"


def time_unit(seconds: float) -> tuple[float, str]:
    """What to multiply seconds with to print times of about this length, and the unit that this gives."""
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1 or seconds < 1e-9:
            return factor, unit
    return 1e6, "µs"


def format_seconds(seconds: float) -> str:
    """Four digits and a unit; less than a nanosecond is rounding."""
    factor, unit = time_unit(seconds)
    return f"{seconds * factor if seconds >= 1e-9 else 0.0:.4g} {unit}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def headline(plan: Plan) -> str:
    """Schedule, sizes, and what to expect of the whole, in one line."""
    order = plan.order
    counts = ((order.devices, "device"), (order.chunks, "chunk"), (order.microbatches, "microbatch"))
    ending = {"device": "s", "chunk": "s", "microbatch": "es"}
    sizes = ", ".join(f"{count} {name}{ending[name] * (count != 1)}" for count, name in counts)
    idle = max(bubbles(order, plan.spans), default=0.0)
    share = idle / plan.seconds if plan.seconds else 0.0
    return (
        f"{order.schedule}: {sizes}; {format_seconds(plan.seconds)}, at most {share:.1%} idle; "
        f"at most {max(plan.peak_blocks, default=0)} blocks, {format_bytes(max(plan.peak_bytes, default=0))} per device"
    )


def table(plan: Plan) -> str:
    """What each rank needs: blocks and bytes on the device at the peak, as planned and with nothing moved; blocks that
    leave it, of all; bytes on the host and in the file; seconds that actions wait for copies; share of time without an
    action."""
    order = plan.order
    titles = "rank|peak blocks|no copies|peak bytes|no copies|moved|host bytes|file bytes|stalls|bubble"
    rows = [tuple(titles.split("|"))]
    staging = plan.staging_bytes or (0,) * order.devices
    for rank, idle in enumerate(bubbles(order, plan.spans)):
        whole = max(live_blocks(order, rank), default=0)
        whole_bytes = max(live_blocks(order, rank, block_sizes=plan.block_bytes), default=0)
        rows.append((
            str(rank), str(plan.peak_blocks[rank]), str(whole), format_bytes(plan.peak_bytes[rank]),
            format_bytes(whole_bytes), f"{len(plan.copies[rank])}/{order.chunks * order.microbatches}",
            format_bytes(plan.host_bytes[rank] + staging[rank]), format_bytes(plan.file_bytes[rank]),
            format_seconds(plan.stall_seconds[rank]), f"{idle / plan.seconds if plan.seconds else 0.0:.1%}",
        ))  # fmt: skip
    return "\n".join([headline(plan), "", *_aligned(rows), *([""] if plan.notes else []), *plan.notes])
