"""Random programs for an engine on the hunting device: what a pipeline's schedule does to blocks, drawn by a seed."""

import random

from pykern.offload.hunting import HuntingDevice
from pykern.offload.streamed import StreamedEngine


class Block:
    """What one (chunk, microbatch) saves: parts, each with a byte value of its own; an item, if it was stored."""

    def __init__(self, key, parts, offsets, sizes, values):
        self.key, self.parts, self.offsets, self.sizes, self.values = key, parts, offsets, sizes, values
        self.nbytes = offsets[-1] + sizes[-1]
        self.item = -1
        self.reservations = self.uses = 0


class Program:
    """Stores the blocks of a few chunks and microbatches, brings them back, and computes with them."""

    def __init__(
        self, seed, engine_class=StreamedEngine, device_class=HuntingDevice, directions=None, blocks=12, file=None
    ):
        self.random = random.Random(seed)
        self.device = device_class(seed, directions=directions or self.random.choice((1, 2)))
        self.slots = [self.random.choice((1024, 2048, 4096)) for _ in range(self.random.randint(2, 6))]
        self.names_slots = self.random.random() < 0.4
        if self.names_slots or self.random.random() < 0.5:
            arena = {"slot_bytes": self.slots}
        else:
            arena = {"capacity": 4096 * self.random.randint(2, 12), "growth": 8192}
        self.engine = engine_class(
            self.device,
            queue_bytes=self.random.choice((None, 0, 1500, 5000)),
            packed_below=self.random.choice((0, 256, 1 << 20)),
            file=file,
            **arena,
        )
        chunks = self.random.choice((1, 2, 3))
        self.todo = [(chunk, microbatch) for microbatch in range(blocks // chunks) for chunk in range(chunks)]
        self.live = []
        self.gone = []
        self.stored = 0

    def run(self):
        most = self.random.randint(1, 7)
        while self.todo or self.live:
            if self.todo and len(self.live) < most and (not self.live or self.random.random() < 0.5):
                self.forward(self.todo.pop(0))
            else:
                self.random.choice((self.backward, self.prefetch, self.settle, self.change_stream, self.use_gone))()
        self.engine.close()
        self.device.finish()
        return self.stored

    def forward(self, key):
        sizes = [self.random.choice((1, 64, 255, 256, 300, 700)) for _ in range(self.random.choice((1, 1, 2, 4)))]
        parts, offsets, end = [], [], 0
        shares = self.random.random() < 0.3
        storage = self.device.lend(sum(sizes)) if shares else None
        begin = 0
        for size in sizes:
            parts.append(storage[begin : begin + size] if shares else self.device.lend(size))
            offsets.append(end)
            begin += size
            end = -(-(end + size) // 256) * 256 + self.random.choice((0, 0, 256))
        if self.random.random() < 0.2:
            self.change_stream()
        values = [self.random.randrange(128) for _ in sizes]
        block = Block(key, parts, offsets, sizes, values)
        self.device.launch(f"forward {key}", writes=list(zip(parts, values)))
        slot = self.random.randrange(len(self.slots)) if self.names_slots else -1
        block.home = self.device.current
        tier = self.random.choice((None, "host", self.engine.tiers[-1]))
        try:
            block.item = self.engine.store(parts, offsets, block.nbytes, slot=slot, tier=tier)
        except RuntimeError as error:
            assert "neither reserved nor released" in str(error)
        if block.item >= 0:
            self.stored += 1
            block.parts = None
            if self.random.random() < 0.3:
                self.engine.settle(block.item)
            if "file" in self.engine.tiers and self.random.random() < 0.3:
                self.engine.spill(block.item)
        self.live.append(block)

    def settle(self):
        block = self.some()
        if block is not None:
            self.engine.settle(block.item)

    def prefetch(self):
        block = self.some()
        if block is not None:
            if block.reservations and self.random.random() < 0.3:
                self.engine.unreserve(block.item)
                block.reservations -= 1
            else:
                self.engine.reserve(block.item)
                block.reservations += 1

    def some(self):
        stored = [block for block in self.live if block.item >= 0]
        return self.random.choice(stored) if stored else None

    def backward(self):
        """The backward of the input; later, that of the weights, after which the block is gone."""
        if not self.live:
            return
        block = self.live[-1] if self.random.random() < 0.6 else self.random.choice(self.live)
        name = f"{('input', 'weight')[block.uses]} backward {block.key}"
        if block.item < 0:
            self.device.launch(name, reads=list(zip(block.parts, block.values)))
        else:
            data = self.engine.load(block.item)
            assert data.numel() == block.nbytes
            parts = [data[o : o + s] for o, s in zip(block.offsets, block.sizes)]
            self.device.launch(name, reads=list(zip(parts, block.values)))
        block.uses += 1
        if block.uses == 2:
            self.live.remove(block)
            if block.item >= 0:
                self.engine.release(block.item)
                self.gone.append(block.item)
            else:
                self.device.wait(block.home, self.device.record(self.device.current))
                for part in block.parts:
                    self.device.free(part, block.home)

    def use_gone(self):
        """A released item stays released, however often it is, and never becomes another."""
        if not self.gone:
            return
        item = self.random.choice(self.gone)
        try:
            self.engine.load(item)
        except RuntimeError as error:
            assert "released before its use" in str(error)
        else:
            raise AssertionError(f"item {item} was released, and is handed out again")
        self.engine.release(item)

    def change_stream(self):
        old, new = self.device.streams[:2]
        if self.device.current is new:
            old, new = new, old
        self.device.wait(new, self.device.record(old))
        self.device.current = new
