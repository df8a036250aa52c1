"""What waits for what on a device with streams: all that keeps copies from touching bytes that others use."""

from .host_arena import Slot
from .streamed_items import Item
from .streams import Point, Stream, StreamDevice


class Ordering:
    """Called before each thing that the engine has the device or the host do with memory. By events alone."""

    def __init__(self, device: StreamDevice) -> None:
        self._device = device
        self._next_point = 0

    def point(self, stream: Stream) -> Point:
        """Where the stream is now."""
        self._next_point += 1
        return Point(stream, self._next_point, self._device.record(stream))

    def copy_out(self, item: Item) -> None:
        """After the work that makes the sources, and the copies that still touch the slot."""
        stream = self._device.out_stream
        self._device.wait(stream, item.ready.event)
        for end in item.slot.ends.values():
            if end.stream != stream:
                self._device.wait(stream, end.event)

    def drop_sources(self, item: Item) -> None:
        """After the copy that reads them."""
        self._device.wait(item.home, item.written.event, measured=True)

    def copy_in(self, item: Item, allocated: Point) -> None:
        """After whatever used the block's memory before, and the copy out."""
        stream = self._device.back_stream
        self._device.wait(stream, allocated.event)
        if item.written.stream != stream:
            self._device.wait(stream, item.written.event)

    def use(self, item: Item, stream: Stream) -> None:
        """After what makes the block."""
        self._device.wait(stream, item.arrived.event, measured=item.arrived.stream == self._device.back_stream)

    def drop_block(self, item: Item) -> None:
        """After what makes it, and all that was put into the streams that it was handed out to."""
        home = item.block_home
        if home not in item.users:
            self._device.wait(home, item.arrived.event)
        for stream in item.users:
            if stream != home:
                self._device.wait(home, self.point(stream).event)

    def host_read(self, item: Item) -> None:
        """After the copy into the slot."""
        self._device.synchronize(item.written.event)

    def host_write(self, slot: Slot) -> None:
        """After the copies that still touch the slot."""
        for end in slot.ends.values():
            self._device.synchronize(end.event)
