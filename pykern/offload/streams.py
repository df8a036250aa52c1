"""What a device with streams offers to the engine that copies on it."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

Stream = Hashable
"""A queue of work on a device: what is put into it runs in that order, later than the call that put it there."""

Event = object
"""A point in a stream, after what was in the stream when the event was recorded."""


class Point(NamedTuple):
    """An event, with its stream, and a number by which the events of one stream can be told in order."""

    stream: Stream
    number: int
    event: Event


class StreamDevice(Protocol):
    """A device whose work lies in streams: one or more that compute, and those that copy.

    Nothing here waits for the device but `synchronize`. Two accesses to the same bytes are in order if they
    lie in one stream, or if an event after the first is waited for in the stream of the second, or by the host before
    the second is put into its stream. Everything else is a race.

    name: as torch writes it, for messages. out_stream, back_stream: where copies to and from the host's memory run;
    the same stream if the two directions take turns.
    """

    name: str
    out_stream: Stream
    back_stream: Stream

    def accepts(self, tensor: Tensor) -> bool:
        """Whether the tensor lies in this device's memory."""

    def is_capturing(self) -> bool:
        """Whether the stream that computes now records its work in a graph, to be done later, any number of times."""

    def compute_stream(self) -> Stream:
        """The stream that computes at this moment. It changes from call to call: ask, and keep no answer."""

    def record(self, stream: Stream) -> Event: ...

    def wait(self, stream: Stream, event: Event, measured: bool = False) -> None:
        """What comes next in `stream` runs after `event`. measured: the time it waits counts as stalled."""

    def is_complete(self, event: Event) -> bool:
        """Whether the device has come to `event`, as the host knows from now on."""

    def synchronize(self, event: Event) -> None:
        """The host waits for `event`."""

    def stall_seconds(self) -> float:
        """How long measured waits took so far, as far as they have ended."""

    def allocate(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] of device memory, usable in the stream that computes now; starts at a multiple of 64 bytes."""

    def free(self, block: Tensor, stream: Stream) -> None:
        """The engine lets go of `block` at this point of `stream`; whoever else holds its storage keeps it.

        A tensor of the model's may have been allocated in another stream, which then gets the memory no earlier.
        """

    def copy(self, stream: Stream, target: Tensor, source: Tensor) -> None:
        """Puts one copy between device and host memory into `stream`. Both uint8, one dimension, of one size."""

    def pack(self, parts: Sequence[Tensor], offsets: Sequence[int], block: Tensor) -> None:
        """Copies parts into a block in the stream that computes now; offsets are multiples of 256."""

    def allocate_host(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] of the host's memory that copies run at full speed on, starting at a page. MemoryError."""

    def free_host(self, memory: Tensor) -> None:
        """Gives back what `allocate_host` returned; no copy on it is under way."""

    def touch_host(self, memory: Tensor, writes: bool) -> None:
        """The host itself reads or writes these bytes now."""

    def forget_host(self, memory: Tensor) -> None:
        """What these bytes of the host's memory hold will not be read again before they are written."""


__all__ = ["Event", "Point", "Stream", "StreamDevice"]
