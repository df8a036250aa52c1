"""What a schedule with the least group costs where stages don't take what it was made for, three equal times."""

from .group_orders import least_group
from .orders import make_order
from .simulation import live_blocks, simulate
from .types import Order, Times


def smallest_group(devices: int, times: Times, split_backward: bool = True) -> int:
    """The smallest group that keeps a pipeline of these stages filled, at most `devices`.

    A group has to keep its slowest stage busy for as long as a microbatch needs to pass one chunk on all ranks:
    group * max(forward + backward) >= max over chunks (sum of the forwards, sum of the backwards, of the input alone
    if split).
    """
    wholes = map(sum, zip(times.forward, times.backward_input, times.backward_weight, strict=True))
    slowest = max(wholes, default=0.0)
    backward = times.backward_input
    if not split_backward:
        backward = tuple(a + b for a, b in zip(times.backward_input, times.backward_weight, strict=True))
    passing = max(
        (
            sum(values[first : first + devices])
            for values in (times.forward, backward)
            for first in range(0, len(values), devices)
        ),
        default=0.0,
    )
    group = least_group(devices)
    while group < devices and group * slowest < passing * (1 - 1e-9):
        group += 1
    return group


def advise_group(order: Order, times: Times) -> tuple[str, ...]:
    """A sentence if an order of PO or GIS-H with the least group would run faster with a larger one."""
    if order.schedule not in ("po", "gis_h"):
        return ()
    split = all(action.kind != "B" for action in order.ranks[0])
    group = smallest_group(order.devices, times, split)
    if group == least_group(order.devices):
        return ()
    other = make_order(order.schedule, order.devices, order.chunks, order.microbatches, group=group,
                       split_backward=split)  # fmt: skip
    seconds, faster = (max(spans[-1][1] for spans in simulate(each, times)) for each in (order, other))
    if faster > 0.99 * seconds:
        return ()
    more = max(max(live_blocks(other, rank)) - max(live_blocks(order, rank)) for rank in range(order.devices))
    return (
        f"without copies, group={group} would take {1 - faster / seconds:.1%} less time with these stages, for up to "
        f"{more} more block{'s' * (more != 1)} per device",
    )
