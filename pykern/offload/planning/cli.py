"""`python -m pykern plan`: a schedule's order, copies and memory, as a table, a picture, and JSON."""

import argparse
import io
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from .cost import layer_bytes, layer_flops
from .drawing import draw
from .orders import MOST_BLOCKS
from .planner import plan
from .table import table
from .types import Plan, Times

DESCRIPTION = """Plans a training step of a pipeline with activation offload, and prints what each rank will need.

A block is what one chunk saves for the backward of one microbatch. Times are in seconds, or with a unit (ms, us);
sizes in bytes, or with a unit (KB, MiB, GB, ...). Without --times, --bytes, --bandwidth and --k every computation
takes a second and a block is one byte, so that bytes count blocks.

schedules:
  1f1b, 1f1b_interleaved   a forward and a backward in turn; with one chunk per rank, and with several
  gis, gis_h               chunks in turn by groups of as many microbatches as there are ranks, and of half as many
  po, po_h, po_f           PipeOffload: chunks spread evenly over time; none of them offloaded, half, and all
  zb_v, v_half, v_min      two chunks in a V; the memory of 1f1b and no bubble, half of it, and a third

examples:
  python -m pykern plan po_h --devices 8 --chunks 4 --microbatches 32 --k 0.8 --png plan.png
  python -m pykern plan gis --devices 4 --chunks 2 --microbatches 16 --times 11ms,12ms,9ms --bytes 350MiB \\
      --bandwidth 20GB --directions two --budget 2GiB
  python -m pykern plan po_f --devices 8 --chunks 5 --microbatches 64 --layer 16384,5120,40,8 --flops 220T \\
      --bandwidth 15GB

What cannot be had is replaced by the nearest that can, told below the table. Exit status: 0 at the end; 2 for an
input without a meaning, with one line that says why."""

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
NUMBER = re.compile(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-zµ/]*)\s*", re.IGNORECASE)


class InputError(ValueError):
    """An input that cannot be used; one line says why."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def _quantity(text: str, what: str, unit: Callable[[str], float]) -> float:
    match = NUMBER.fullmatch(text)
    try:
        value = float(match[1]) * unit(match[2]) if match else math.nan
    except (ValueError, KeyError):
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
    return value


def _prefix(unit: str) -> float:
    return UNITS[unit.lower().removesuffix("/s").removesuffix("b")]


def _rate(text: str) -> float:
    return _quantity(text, "a rate per second, such as 20GB", _prefix)


def _size(text: str) -> int:
    return round(_quantity(text, "bytes, such as 350MiB", _prefix))


def _time(text: str) -> float:
    return _quantity(text, "seconds, such as 11ms", lambda unit: SECONDS[unit.lower()])


def _times(text: str) -> tuple[float, ...]:
    parts = tuple(map(_time, text.split(",")))
    if len(parts) != 3:
        raise argparse.ArgumentTypeError(f"expected forward, input's and weights' backward, got {text!r}")
    return parts


def _rates(text: str) -> tuple[float, ...]:
    parts = tuple(map(_rate, text.split(",")))
    if len(parts) > 2:
        raise argparse.ArgumentTypeError(f"expected one rate, or one out and one back, got {text!r}")
    return parts * (3 - len(parts))


def _layer(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) not in (2, 4) or not all(part.strip().isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"expected S,H or S,H,Q,K, such as 4096,5120,40,8, got {text!r}")
    return tuple(map(int, parts))


def _offload(text: str) -> str | int | tuple[int, ...]:
    if text in ("none", "half", "full"):
        return text
    try:
        counts = tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected half, full, or a number of chunks, got {text!r}") from None
    return counts if len(counts) > 1 else counts[0]


def parser() -> argparse.ArgumentParser:
    top = _Parser(prog="python -m pykern plan", description=DESCRIPTION,
                  formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    top.add_argument("schedule", metavar="SCHEDULE", help="one of those above")

    def option(name: str, text: str, **keywords) -> None:
        group.add_argument(name, help=text, **keywords)

    group = top.add_argument_group("schedule")
    option("--devices", "ranks of the pipeline", type=int, required=True, metavar="N")
    option("--chunks", "stages per rank (1 for 1f1b, else 2)", type=int, metavar="N")
    option("--microbatches", "microbatches per step", type=int, required=True, metavar="N")
    text = "gis: microbatches that pass one chunk before the next; po: that lie between two chunks"
    option("--group", f"{text} (gis: --devices, else half of them)", type=int, metavar="N")
    text = "a backward's halves, of the input and of the weights, apart or at once (as published)"
    option("--backward", text, choices=["split", "whole"])

    group = top.add_argument_group("model")
    text = "times of a stage's forward, backward of the input, and backward of the weights (1,1,1)"
    option("--times", text, type=_times, metavar="F,I,W")
    text = "times and bytes of unequal stages: a line F,I,W or F,I,W,BYTES for each, # begins a comment"
    option("--stages", text, type=Path, metavar="FILE")
    text = ("instead of times and bytes, transformer layers: sequence length, hidden size; with grouped queries also "
            "heads of queries and of keys")  # fmt: skip
    option("--layer", text, type=_layer, metavar="S,H[,Q,K]")
    option("--batch", "with --layer: sequences per microbatch (1)", type=int, metavar="N")
    option("--layers", "with --layer: layers per stage (1)", type=int, metavar="N")
    option("--flops", "with --layer: operations per second that a device reaches", type=_rate, metavar="RATE")
    option("--transfer", "time of a result's way from one rank to the next (0)", type=_time, default=0.0,
           metavar="TIME")  # fmt: skip
    option("--bytes", "size of a block (1)", type=_size, metavar="SIZE")

    group = top.add_argument_group("offload")
    text = "bytes per second of a rank's copies, or of those out and of those back"
    option("--bandwidth", text, type=_rates, metavar="RATE[,RATE]")
    text = "instead: time of the largest block's copies, out and back, over the longest stage's F+I+W (1)"
    option("--k", text, type=float, metavar="K")
    text = "how many chunks leave, the first of each rank; or one number per rank (none; po_h half, po_f full)"
    option("--offload", text, type=_offload, default="none", metavar="none|half|full|N[,N...]")
    text = "device memory for blocks, per rank: no more leave than it takes to keep within it"
    option("--budget", text, type=_size, metavar="SIZE")
    option("--host-budget", "host memory for blocks, per rank; what has no room stays, or goes to a file", type=_size,
           metavar="SIZE")  # fmt: skip
    text = "bytes per second of a rank's file, where blocks beyond --host-budget go (no file)"
    option("--file-bandwidth", text, type=_rate, metavar="RATE")
    text = "copies out and back in turn, ranks in pairs at a switch, or both at once (one)"
    option("--directions", text, choices=["one", "two"], default="one")
    option("--no-pairs", "with one direction: every rank has a link of its own", dest="pairs", action="store_false")
    text = "avoid: blocks stay that cannot be back in time; allow: computation waits (avoid)"
    option("--stall", text, choices=["avoid", "allow"], default="avoid")
    text = "with --stall avoid: by which part copies may lengthen the step (0.02)"
    option("--slack", text, type=float, default=0.02, metavar="PART")
    text = "blocks stay that a device would miss for less than so many times their copies, out and back (3)"
    option("--shortest", text, type=float, default=3.0, metavar="N")

    group = top.add_argument_group("output")
    option("--png", "draws computations, copies and memory of each rank (needs matplotlib)", type=Path, metavar="FILE")
    text = "width of the picture's time axis; 6 for a page (as the microbatches' numbers need, up to 30)"
    option("--png-inches", text, type=float, metavar="N")
    option("--json", "writes the whole plan: each rank's actions, copies, transfers and memory", type=Path,
           metavar="FILE")  # fmt: skip
    return top


def _read_stages(path: Path) -> tuple[tuple[tuple[float, ...], ...], tuple[int, ...] | None]:
    """The three times of every stage, and its bytes if the file has them."""
    times, sizes = [], []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"--stages {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--stages {path}: expected text, one line F,I,W or F,I,W,BYTES per stage") from error
    for number, line in enumerate(lines, start=1):
        parts = line.partition("#")[0].split(",")
        if parts == [""] or not "".join(parts).strip():
            continue
        try:
            if len(parts) not in (3, 4):
                raise argparse.ArgumentTypeError(f"expected F,I,W or F,I,W,BYTES, got {line.strip()!r}")
            times.append(tuple(map(_time, parts[:3])))
            sizes += map(_size, parts[3:])
        except argparse.ArgumentTypeError as error:
            raise InputError(f"--stages {path}, line {number}: {error}") from error
    if not times:
        raise InputError(f"--stages {path}: has no lines F,I,W")
    if sizes and len(sizes) != len(times):
        raise InputError(f"--stages {path}: bytes on {len(sizes)} of {len(times)} lines, expected all or none")
    return tuple(zip(*times, strict=True)), tuple(sizes) or None


def _model(given: argparse.Namespace, stages: int) -> tuple[tuple[tuple[float, ...], ...], tuple[int, ...]]:
    """Of every stage its three times, and the bytes of its blocks."""
    sources = [name for name in ("times", "stages", "layer") if getattr(given, name) is not None]
    if len(sources) > 1:
        raise InputError(f"--{sources[0]}: --{sources[1]} has times, too; give one of them")
    for name in ("batch", "layers", "flops"):
        value = getattr(given, name)
        if value is not None and given.layer is None:
            raise InputError(f"--{name}: goes with --layer; give that, too")
        if value is not None and value <= 0:
            raise InputError(f"--{name}: expected more than 0, got {value:g}")
    times, sizes = given.times or (1.0, 1.0, 1.0), None
    if given.stages is not None:
        times, sizes = _read_stages(given.stages)
        if sizes is not None and given.bytes is not None:
            raise InputError("--bytes: --stages has bytes, too; give one of them")
    else:
        if given.layer is not None:
            if given.flops is None:
                raise InputError("--layer: needs --flops, the operations per second that a device reaches")
            sequence, hidden, *heads = given.layer
            batch, layers = given.batch or 1, given.layers or 1
            times = tuple(layers * flops / given.flops for flops in layer_flops(batch, sequence, hidden))
            sizes = (round(layers * layer_bytes(batch, sequence, hidden, *heads)),) * stages
        times = tuple((value,) * stages for value in times)
    if given.bytes is not None or sizes is None:
        sizes = (1 if given.bytes is None else given.bytes,) * stages
    return times, sizes


def make_plan(arguments: list[str]) -> tuple[Plan, argparse.Namespace]:
    """Raises TypeError or ValueError for what has no meaning."""
    given = parser().parse_args(arguments)
    chunks = given.chunks if given.chunks is not None else 1 if given.schedule == "1f1b" else 2
    stages = given.devices * chunks
    # More than there may be would not fit into memory; `plan` refuses them.
    times, sizes = _model(given, stages if 0 < stages <= MOST_BLOCKS else 0)
    bandwidth = given.bandwidth
    if bandwidth is not None and given.k is not None:
        raise InputError("--k: --bandwidth says how long copies take, too; give one of them")
    if bandwidth is None:
        k = 1.0 if given.k is None else given.k
        if not 1e-9 <= k <= 1e9:
            raise InputError(f"--k: expected a number between 1e-9 and 1e9, got {k:g}")
        longest = max(map(sum, zip(*times, strict=True)), default=0.0)
        bandwidth = 2 * max(sizes, default=0) / (k * longest) if longest and any(sizes) else 1.0
    made = plan(
        given.schedule, given.devices, chunks, given.microbatches, times=Times(*times, given.transfer), bytes=sizes,
        bandwidth=bandwidth, offload=given.offload, budget=given.budget, host_budget=given.host_budget,
        file_bandwidth=given.file_bandwidth, directions=given.directions, pairs=given.pairs, group=given.group,
        split_backward=None if given.backward is None else given.backward == "split", stall=given.stall,
        slack=given.slack, shortest=given.shortest,
    )  # fmt: skip
    return made, given


def as_json(made: Plan) -> str:
    """Everything of a plan but its request; what it has one of per rank, by rank."""
    order = made.order
    ranks = [
        {"actions": [[*action, *span] for action, span in zip(actions, made.spans[rank], strict=True)],
         "copies": [copy._asdict() for copy in made.copies[rank]]}
        | {name: getattr(made, name)[rank] for name in
           ("transfers", "slot_bytes", "file_slot_bytes", "peak_blocks", "peak_bytes", "host_bytes", "staging_bytes",
            "file_bytes", "stall_seconds")}
        for rank, actions in enumerate(order.ranks)
    ]  # fmt: skip
    content = {name: getattr(order, name) for name in ("schedule", "devices", "chunks", "microbatches", "placement")}
    content |= {name: getattr(made, name) for name in
                ("seconds", "seconds_alone", "both_directions", "block_bytes", "notes")}  # fmt: skip
    return json.dumps({**content, "times": vars(made.times), "ranks": ranks})


def _write(option: str, path: Path, content: bytes) -> None:
    """All of it or nothing."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{option} {path}: {error.strerror}") from error


def main(arguments: list[str]) -> int:
    try:
        made, given = make_plan(arguments)
        if given.png is not None:
            if given.png_inches is not None and not 1 <= given.png_inches <= 200:
                raise InputError(f"--png-inches: expected 1 to 200, got {given.png_inches:g}")
            picture = io.BytesIO()
            draw(made, picture, given.png_inches)
            _write("--png", given.png, picture.getvalue())
        if given.json is not None:
            _write("--json", given.json, as_json(made).encode())
    except (ValueError, TypeError, ArithmeticError, ImportError) as error:
        print(f"pykern plan: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(table(made))
    return 0
