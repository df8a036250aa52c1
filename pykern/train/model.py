"""A decoder-only transformer over bytes: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Everything but attention works on single tokens, so one model serves any arrangement of them. How tokens see
one another is a function handed to `forward`, attend(layer, q, k, v) -> output:

- `tree_attention(tree)`: packed tokens [T], each prompt once, by `pykern.prefix_attention`;
- `causal_attention`: padded rows [B, L], prompts repeated, by PyTorch's `scaled_dot_product_attention`;
- `rollout.GroupCache`: one new token per response against cached keys and values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import PrefixTree, prefix_attention
from .data import VOCABULARY

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. `width` is a multiple of `heads`, `heads` one of `key_heads`."""

    layers: int
    width: int
    heads: int
    key_heads: int
    tie_head: bool = False
    vocabulary: int = VOCABULARY

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def inner(self) -> int:
        """SwiGLU's inner width: 8/3 of the model's, rounded up to 32."""
        return -(-self.width * 8 // 3 // 32) * 32


def rotation(positions: Tensor, head_size: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, [..., 1, head_size / 2] in float32 (float64 stays with float64 models)."""
    frequencies = base ** (-torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float64) / head_size)
    angles = (positions.double().unsqueeze(-1) * frequencies).unsqueeze(-2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x[i], x[i + D/2]) of [..., heads, D] by its position's angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.head_size = shape.head_size
        self.query = nn.Linear(shape.width, shape.heads * shape.head_size, bias=False)
        self.key = nn.Linear(shape.width, shape.key_heads * shape.head_size, bias=False)
        self.value = nn.Linear(shape.width, shape.key_heads * shape.head_size, bias=False)
        self.output = nn.Linear(shape.heads * shape.head_size, shape.width, bias=False)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attend: Callable) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (-1, self.head_size)) for project in (self.query, self.key, self.value))
        return self.output(attend(rotate(q, *angles), rotate(k, *angles), v).flatten(-2))


class SwiGLU(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.gate = nn.Linear(shape.width, shape.inner, bias=False)
        self.up = nn.Linear(shape.width, shape.inner, bias=False)
        self.down = nn.Linear(shape.inner, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.width, eps=1e-6)
        self.attention = Attention(shape)
        self.mlp_norm = nn.RMSNorm(shape.width, eps=1e-6)
        self.mlp = SwiGLU(shape)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attend: Callable) -> Tensor:
        x = x + self.attention(self.attention_norm(x), angles, attend)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=1e-6)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        if shape.tie_head:
            self.head.weight = self.embedding.weight

    def head_operands(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states and the head's weight in the type of a product here: an autocast's, or their own."""
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        return hidden.to(dtype), self.head.weight.to(dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Of sixteen-bit operands in float32, as `linear_token_logprobs` has them."""
        hidden, weight = self.head_operands(hidden)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(dtype), weight.to(dtype))

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Final hidden states [..., width] of tokens [...] at their positions [...]. The head is the caller's."""
        cos, sin = rotation(positions, self.shape.head_size)
        working = torch.promote_types(self.norm.weight.dtype, torch.float32)
        angles = cos.to(working), sin.to(working)
        x = self.embedding(tokens)
        for layer, block in enumerate(self.blocks):
            x = block(x, angles, partial(attend, layer))
        return self.norm(x)


def tree_attention(tree: PrefixTree) -> Attend:
    return lambda layer, q, k, v: prefix_attention(q, k, v, tree)


def causal_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
