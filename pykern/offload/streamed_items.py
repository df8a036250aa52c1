"""What the engine for devices with streams keeps account of, and which parts it copies together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .host_arena import Ends, Slot
from .staging import ALIGNMENT
from .streams import Point, Stream


class Item:
    """One block on its way. What it owns tells its state:

        held  slot  block
        yes   yes   -      being copied out; the sources, or staging blocks made of them, are held until the stream
                           that made them knows the end of the copy
        -     yes   -      in the host's memory, and perhaps in the file too
        -     -     -      in the file
        -     yes   yes    copied back, or on the way; `arrived` is the end of the copy
        yes   yes   yes    forwarded: given back before it was gone
        -     -     yes    copied back, and its slot is another's: the block stays until the item is released

    home: the stream that computed when it was stored. block_home: the one that the block was allocated in, to which
    its memory returns. users: the streams to which the block was handed out. ends: the copies that touch the slot.
    """

    __slots__ = (
        "arrived", "block", "block_home", "ends", "fetched", "file_item", "generation", "goes_to_file", "held",
        "home", "is_planned", "landing", "nbytes", "number", "ready", "reservations", "slot", "users", "written",
    )  # fmt: skip

    def __init__(self, number: int, nbytes: int, slot: Slot | None, home: Stream) -> None:
        self.number, self.nbytes, self.home = number, nbytes, home
        self.slot = slot
        self.generation = -1 if slot is None else slot.generation
        self.ends: Ends = {}
        self.held: list[tuple[int, Tensor]] = []
        self.ready: Point | None = None
        self.written: Point | None = None
        self.block: Tensor | None = None
        self.block_home: Stream | None = None
        self.arrived: Point | None = None
        self.landing: Tensor | None = None
        self.users: dict[Stream, None] = {}
        self.reservations = 0
        self.file_item: int | None = None
        self.fetched = self.goes_to_file = self.is_planned = False


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
