"""Models and runs that the offload tests share."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent
STORAGES = ("memory", "file")


class TransformerBlock(nn.Module):
    """Packed projection, so q, k and v are views of one storage, and a SwiGLU whose halves are, too."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.packed, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate_up, self.down = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        packed = self.packed(self.norm_attention(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(attended.transpose(1, 2).reshape(batch, length, width))
        gate, up = self.gate_up(self.norm_mlp(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Views(nn.Module):
    """Saves views of every kind: narrow, strided, expanded, transposed, of another dtype's size."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(48, 48))

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        first, *rest = y.split(8, dim=1)
        narrow = first.exp() * rest[0].sigmoid()
        strided = (y[::7, ::5] ** 3).sum()
        rows = y[3:5].exp() * y[4:6]
        column = (y[:, :1].expand(-1, 48) * y.t().contiguous().t()).tanh()
        windows = y.unfold(1, 12, 6)
        overlap = (windows * windows.sin()).sum()
        pairs = torch.view_as_complex(y.view(-1, 24, 2))
        magnitude = (pairs * pairs.conj()).real.sum()
        return narrow.sum() + strided + rows.sum() + column.sum() + overlap + magnitude


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TransformerBlock() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def mlp(width: int = 64, depth: int = 5) -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(depth)))


def make(name: str) -> tuple[nn.Module, Tensor]:
    """A model and its input, the same for the same name."""
    torch.manual_seed(7)
    if name == "mlp":
        return mlp(), torch.randn(96, 64)
    if name == "bfloat16":
        return mlp().bfloat16(), torch.randn(96, 64).bfloat16()
    if name == "float64":
        return mlp().double(), torch.randn(33, 64).double()
    if name == "transformer":
        return nn.Sequential(TransformerBlock(), TransformerBlock()), torch.randn(2, 24, 64)
    if name == "checkpoint":
        return Checkpointed(), torch.randn(2, 24, 64)
    if name == "convolution":
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3)]
        return nn.Sequential(*layers), torch.randn(2, 3, 20, 20)
    if name == "recurrent":
        return nn.ModuleList([nn.LSTM(16, 16, num_layers=2)]), torch.randn(12, 4, 16)
    if name == "dropout":
        return nn.Sequential(mlp(), nn.Dropout(0.3), mlp()), torch.randn(96, 64)
    if name == "views":
        return Views(), torch.randn(40, 48)
    raise ValueError(name)


MODELS = ("mlp", "bfloat16", "float64", "transformer", "checkpoint", "convolution", "recurrent", "dropout", "views")


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    y = model[0](x)[0] if isinstance(model, nn.ModuleList) else model(x)
    return y.double().square().mean()


def gradients(model: nn.Module, x: Tensor, context=None, loss: Callable = loss_of) -> list[Tensor]:
    """Gradients of the model's parameters after one forward and backward inside of `context`."""
    torch.manual_seed(11)
    model.zero_grad()
    with context or nullcontext():
        loss(model, x).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def assert_bit_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected) > 0
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert one is not None, f"gradient {index} is missing"
        assert torch.equal(one, other), f"gradient {index} differs"


def bytes_of(size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)


def in_a_process(code: str) -> str:
    """Runs the code with the tests importable; what it prints."""
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def descriptors(folder: Path) -> list[str]:
    """Open descriptors of deleted files in the folder."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if target.startswith(f"{folder}/"):
            found.append(f"/proc/self/fd/{name}")
    return found


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes beyond this size fail, in every file of the process."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
