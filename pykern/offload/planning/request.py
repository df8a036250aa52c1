"""What `plan` was asked for, checked and brought to one form."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from .types import Order, Times


@dataclass(frozen=True)
class Request:
    """Tuples have one entry per rank, but `times` and `sizes` one per stage."""

    order: Order
    times: Times
    sizes: tuple[int, ...]
    rates: tuple[float, float]
    """Bytes per second out and back."""
    both_directions: bool
    file_rate: float | None
    groups: tuple[tuple[int, ...], ...]
    """Ranks that share a switch, and ranks alone."""
    offload: tuple[int, ...]
    """How many chunks may leave."""
    budget: tuple[int, ...] | None
    host_budget: tuple[int, ...] | None
    insist: bool
    """Computation waits for copies, rather than blocks stay."""
    slack: float
    shortest: float
    """Blocks that a device misses for less than so many round trips stay: they would hardly lower the peak."""
    lone_speedup: float
    """How much faster copies out are while no rank of the group copies back."""
    group: int | None

    def sizes_of(self, rank: int) -> list[int]:
        """Of its chunks."""
        return [self.sizes[self.order.stage(rank, chunk)] for chunk in range(self.order.chunks)]


def read_request(order: Order, arguments: Mapping[str, object]) -> Request:
    """Raises TypeError or ValueError for arguments of `plan` that have no meaning."""
    _one_of("directions", arguments["directions"], ("one", "two"))
    _one_of("stall", arguments["stall"], ("avoid", "allow"))
    budget, host_budget = (_per_rank(name, arguments[name], order) for name in ("budget", "host_budget"))
    file_rate = arguments["file_bandwidth"]
    if file_rate is not None:
        file_rate = _number("file_bandwidth", file_rate, "bytes per second")
    both_directions = arguments["directions"] == "two"
    chunks = _offload(order, arguments["schedule"], arguments["offload"], budget is not None)
    return Request(
        order=order,
        times=_times(order, arguments["times"]),
        sizes=_sizes(order, arguments["bytes"]),
        rates=_rates(arguments["bandwidth"]),
        both_directions=both_directions,
        file_rate=file_rate,
        groups=_groups(order, False if both_directions else arguments["pairs"]),
        offload=chunks,
        budget=budget,
        host_budget=host_budget,
        insist=arguments["stall"] == "allow" and budget is None,
        slack=_number("slack", arguments["slack"], "a part of the step's time", least=0.0),
        shortest=_number("shortest", arguments["shortest"], "a number of round trips", least=0.0),
        lone_speedup=_number("lone_speedup", arguments["lone_speedup"], "1 for no speedup", least=1.0),
        group=arguments["group"],
    )


def _is_sequence(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _one_of(name: str, value: object, names: Sequence[str]) -> None:
    if value not in names:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, names))}, got {value!r}")


def _number(name: str, value: object, what: str, least: float | None = None) -> float:
    """Positive, or at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}; pass {what}")
    if not math.isfinite(value) or (value <= 0 if least is None else value < least):
        bound = "above 0" if least is None else f"of at least {least:g}"
        raise ValueError(f"{name}: expected a finite number {bound}, got {value!r}; pass {what}")
    # What is beyond these has no meaning, and could not be added up.
    if value and not 1e-30 <= value <= 1e30:
        raise ValueError(f"{name}: expected a number between 1e-30 and 1e30, got {value!r}; pass {what}")
    return float(value)


def _whole(name: str, value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}; pass {what}")
    if value < 0:
        raise ValueError(f"{name}: expected at least 0, got {value}; pass {what}")
    if value >= 1 << 63:
        raise ValueError(f"{name}: expected less than 2**63, got {value}; pass {what}")
    return int(value)


def _per_stage(name: str, value: Sequence, order: Order) -> Sequence:
    stages = order.devices * order.chunks
    if len(value) != stages:
        raise ValueError(
            f"{name}: expected one value, or one for each of devices * chunks = {order.devices} * {order.chunks} = "
            f"{stages} stages, got {len(value)}"
        )
    return value


def _times(order: Order, value: object) -> Times:
    transfer = 0.0
    if isinstance(value, Times):
        transfer = _number("times.transfer", value.transfer, "seconds", least=0.0)
        value = value.forward, value.backward_input, value.backward_weight
    if not _is_sequence(value) or len(value) != 3:
        raise TypeError(
            f"times: expected Times, or the three of forward, backward of the input and backward of the weights, "
            f"got {value!r}"
        )
    entries = []
    for name, entry in zip(("forward", "backward_input", "backward_weight"), value, strict=True):
        name = f"times: {name}"
        if not _is_sequence(entry):
            entry = [entry] * (order.devices * order.chunks)
        entries.append(
            tuple(_number(name, seconds, "seconds", least=0.0) for seconds in _per_stage(name, entry, order))
        )
    return Times(*entries, transfer)


def _sizes(order: Order, value: object) -> tuple[int, ...]:
    if not _is_sequence(value):
        value = [value] * (order.devices * order.chunks)
    return tuple(_whole("bytes", size, "bytes per block") for size in _per_stage("bytes", value, order))


def _rates(value: object) -> tuple[float, float]:
    if not _is_sequence(value):
        value = (value, value)
    if len(value) != 2:
        raise ValueError(f"bandwidth: expected a number, or a pair of out and back, got {len(value)} entries")
    return tuple(_number("bandwidth", rate, "bytes per second") for rate in value)


def _per_rank(name: str, value: object, order: Order) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not _is_sequence(value):
        value = [value] * order.devices
    if len(value) != order.devices:
        raise ValueError(f"{name}: expected one value, or one for each of {order.devices} ranks, got {len(value)}")
    return tuple(_whole(name, entry, "bytes per rank") for entry in value)


def _offload(order: Order, schedule: str, value: object, has_budget: bool) -> tuple[int, ...]:
    half, full = -(-order.chunks // 2), order.chunks
    if isinstance(value, str):
        _one_of("offload", value, ("none", "half", "full"))
        # The schedules that are named after it; and a budget chooses among all.
        none = {"po_h": half, "po_f": full}.get(schedule, full if has_budget else 0)
        value = {"none": none, "half": half, "full": full}[value]
    what = "'none', 'half', 'full', or how many chunks leave"
    entries = value if _is_sequence(value) else [value] * order.devices
    if len(entries) != order.devices:
        raise ValueError(f"offload: expected one value, or one for each of {order.devices} ranks, got {len(entries)}")
    counts = tuple(_whole("offload", entry, what) for entry in entries)
    if max(counts) > full:
        raise ValueError(f"offload: expected at most the {full} chunks of a rank, got {max(counts)}; pass {what}")
    return counts


def _groups(order: Order, pairs: object) -> tuple[tuple[int, ...], ...]:
    if pairs is True:
        return tuple(tuple(range(first, min(first + 2, order.devices))) for first in range(0, order.devices, 2))
    groups = []
    for pair in pairs or ():
        if not _is_sequence(pair) or len(pair) != 2:
            raise ValueError(f"pairs: expected a bool, or pairs of ranks, got {pair!r} among them")
        groups.append(tuple(_whole("pairs", rank, "ranks") for rank in pair))
    ranks = [rank for pair in groups for rank in pair]
    if len(set(ranks)) < len(ranks) or any(rank >= order.devices for rank in ranks):
        raise ValueError(f"pairs: expected each of the ranks 0 to {order.devices - 1} once at most, got {groups}")
    return (*groups, *((rank,) for rank in range(order.devices) if rank not in ranks))
