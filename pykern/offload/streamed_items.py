"""What the engine for devices with streams keeps account of, and which parts it copies together."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .host_arena import Ends, Slot
from .staging import ALIGNMENT
from .streams import Point, Stream


@dataclass(slots=True, eq=False)
class Item:
    """One block on its way. What it owns tells its state:

                   held  slot  block
        going      yes   yes   -      being copied out
        away       -     yes   -      in the host's memory, and perhaps in the file too
        filed      -     -     -      in the file alone
        back       -     any   yes    copied back, or on the way
        forwarded  yes   any   yes    given back before it was gone

        store ──> going ──settle──> away ──spill, evict──> filed
                   │ ^               │ ^                    │ ^
            forward  drop   bring back drop       bring back  drop      (the block)
                   v │               v │                    v │
                forwarded            back                   back

    A forwarded item that was settled meanwhile goes to `away`. A block whose item has lost its slot to another, and is
    not in the file, is not dropped before the item is released.
    """

    number: int
    nbytes: int
    slot: Slot | None
    home: Stream
    """The stream that computed when it was stored, to which the sources return."""
    generation: int = -1
    """Of the slot, when it became this item's."""
    ends: Ends = field(default_factory=dict)
    """The copies that touch the slot."""
    held: list[tuple[int, Tensor]] = field(default_factory=list)
    """Sources, or staging blocks made of them, and where they begin: until `home` knows the end of their copy."""
    ready: Point | None = None
    """The sources are computed."""
    written: Point | None = None
    """The end of the copy out."""
    block: Tensor | None = None
    block_home: Stream | None = None
    """The stream that the block was allocated in, to which its memory returns."""
    arrived: Point | None = None
    """The end of what makes the block: the copy back, or what forwarded it."""
    users: dict[Stream, None] = field(default_factory=dict)
    """The streams to which the block was handed out."""
    landing: Tensor | None = None
    """The file's buffer, if the copy back comes from there."""
    reservations: int = 0
    file_item: int | None = None
    fetched: bool = False
    """Reserved in the file's engine."""
    goes_to_file: bool = False
    """Once it is away."""
    is_planned: bool = False
    """It is where the plan wants it."""

    def __post_init__(self) -> None:
        if self.slot is not None:
            self.generation = self.slot.generation


def check_parts(parts: Sequence[Tensor], offsets: Sequence[int], nbytes: int) -> None:
    if len(parts) != len(offsets):
        raise ValueError(f"offsets: expected one per part ({len(parts)}), got {len(offsets)}")
    end = 0
    for index, (part, offset) in enumerate(zip(parts, offsets, strict=True)):
        if part.dtype != torch.uint8 or part.dim() != 1 or not part.is_contiguous():
            raise TypeError(
                f"parts[{index}]: expected contiguous uint8 of one dimension, got {part.dtype} {part.shape}"
            )
        if offset < end or offset % ALIGNMENT:
            raise ValueError(f"offsets[{index}]: expected a multiple of {ALIGNMENT} from {end} on, got {offset}")
        end = offset + part.numel()
    if end > nbytes:
        raise ValueError(f"nbytes: expected room for the parts, which end at {end}, got {nbytes}")


def runs_of(
    parts: Sequence[Tensor], offsets: Sequence[int], packed_below: int
) -> list[tuple[int, int, list[tuple[int, Tensor]]]]:
    """Begin and size of what one copy moves, and its parts: small neighbours together, each large part by itself."""
    runs: list[list[tuple[int, Tensor]]] = []
    joins = False
    for offset, part in zip(offsets, parts, strict=True):
        small = part.numel() < packed_below
        if small and joins and offset - (runs[-1][-1][0] + runs[-1][-1][1].numel()) < ALIGNMENT:
            runs[-1].append((offset, part))
        elif part.numel():
            runs.append([(offset, part)])
            joins = small
    return [(run[0][0], run[-1][0] + run[-1][1].numel() - run[0][0], run) for run in runs]
