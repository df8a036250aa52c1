"""SLTrain: linear layers whose weight is a low-rank product plus a sparse matrix of fixed support."""

import math

import torch
from torch import Tensor, nn

from .. import _native
from .sparse_ops import sparse_rows_add, sparse_rows_take

BLOCK_ELEMENTS = 1 << 22
"""Elements of the dense weight that exist at once, at most, where a row or a column of it is shorter."""


def _span(size: int, other: int) -> int:
    """How many of `size` rows (or columns) of a weight make a block, if each has `other` elements."""
    return max(1, min(size, max(32, BLOCK_ELEMENTS // max(1, other))))


def _dense_block(up, down, values, row_start, column, scale, rows: slice, columns: slice) -> Tensor:
    """The block of W = scale * up @ down + sparse in the given rows and columns."""
    block = up[rows] @ down[:, columns]
    if scale != 1.0:
        block *= scale
    sparse_rows_add(block, values, row_start, column, first_row=rows.start, first_column=columns.start)
    return block


def _slices(size: int, span: int):
    return (slice(first, min(size, first + span)) for first in range(0, size, span))


class _SparseLowRankLinear(torch.autograd.Function):
    """y = x W^T. W is made anew, a block at a time, in each direction; neither W nor its gradient is ever whole."""

    @staticmethod
    def forward(ctx, x, up, down, values, row_start, column, scale):
        rows, columns = up.shape[0], down.shape[1]
        out = x.new_empty(x.shape[0], rows)
        for part in _slices(rows, _span(rows, columns)):
            weight = _dense_block(up, down, values, row_start, column, scale, part, slice(0, columns))
            torch.mm(x, weight.mT, out=out[:, part])
        ctx.save_for_backward(x, up, down, values, row_start, column)
        ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, up, down, values, row_start, column = ctx.saved_tensors
        scale = ctx.scale
        rows, columns = up.shape[0], down.shape[1]
        grad_x = grad_up = grad_down = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x)
            for part in _slices(columns, _span(columns, rows)):
                weight = _dense_block(up, down, values, row_start, column, scale, slice(0, rows), part)
                torch.mm(grad, weight, out=grad_x[:, part])
        if ctx.needs_input_grad[1]:
            grad_up = (grad.mT @ (x @ down.mT)).mul_(scale)
        if ctx.needs_input_grad[2]:
            grad_down = ((grad @ up).mT @ x).mul_(scale)
        if ctx.needs_input_grad[3]:
            grad_values = torch.zeros_like(values)
            for part in _slices(rows, _span(rows, columns)):
                block = grad[:, part].mT @ x
                sparse_rows_take(block, row_start, column, grad_values, first_row=part.start, first_column=0)
        return grad_x, grad_up, grad_down, grad_values, None, None, None


def sltrain_linear(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    values: Tensor,
    row_start: Tensor,
    column: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> Tensor:
    """x W^T + bias with W = scale * up @ down + sparse, W never whole in memory.

    Blocks of W of some million elements are made, used in one matrix product and dropped, in the forward and again in
    the backward; of W's gradient only the entries of the sparse support are kept, block by block. Saved for the
    backward are x and the parameters alone. Differentiable once, with respect to x, up, down, values and bias.

    Args:
        x: [..., in_features], float32, float64, bfloat16 or float16.
        up: [out_features, rank], of x's dtype as all but the two index tensors.
        down: [rank, in_features].
        values: [entries], the sparse matrix's elements, row by row.
        row_start: int64 [out_features + 1], where each row begins in `values`; first 0, last `entries`.
        column: int32 [entries], ascending within a row.
        bias: [out_features].
        scale: alpha / rank in the paper.

    Returns:
        [..., out_features].

    Paper: SLTrain, arXiv 2406.02214.

    Raises:
        TypeError, ValueError: a dtype or shape that doesn't fit.
        NotImplementedError: tensors on a device whose kernels this build lacks.
    """
    for name, tensor in (("up", up), ("down", down), ("values", values), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{name}: expected {x.dtype} as x has, got {tensor.dtype}")
    if up.dim() != 2 or down.dim() != 2 or up.shape[1] != down.shape[0]:
        raise ValueError(
            f"down: expected [rank, in_features] for up [out_features, rank], got {tuple(down.shape)} for "
            f"{tuple(up.shape)}"
        )
    if x.shape[-1] != down.shape[1]:
        raise ValueError(f"x: expected last size {down.shape[1]} as down has columns, got {x.shape[-1]}")
    if row_start.dtype != torch.int64 or tuple(row_start.shape) != (up.shape[0] + 1,):
        raise ValueError(
            f"row_start: expected int64 [{up.shape[0] + 1}], got {row_start.dtype} {tuple(row_start.shape)}"
        )
    if column.dtype != torch.int32 or column.shape != values.shape or values.dim() != 1:
        raise ValueError(
            f"column: expected int32 {tuple(values.shape)} as values has, got {column.dtype} {tuple(column.shape)}"
        )
    _native.require_kernels(x, "x", "sparse_rows_add", "sparse_rows_take")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, up, down, values = (tensor.to(dtype) for tensor in (x, up, down, values))
        bias = None if bias is None else bias.to(dtype)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        out = _SparseLowRankLinear.apply(rows, up, down, values, row_start, column, float(scale))
        out = out.view(*x.shape[:-1], up.shape[0])
        return out if bias is None else out + bias


class SLTrainLinear(nn.Module):
    """A linear layer with weight W = alpha / rank * up @ down + sparse, where the sparse support is random and fixed.

    The weight has round(density * out_features * in_features) entries, in every row as many or one more than in
    another, at places drawn from `seed`. The state dict holds the places: 4 bytes an entry. `up` begins at zero and
    `down` as Kaiming's, as in LoRA; the values begin uniform in +- 1 / sqrt(in_features), as those of a dense layer do.

    Args:
        in_features, out_features: sizes of the layer.
        rank: of the low-rank part.
        density: share of the weight's elements in the sparse part, 0.01 to 0.03 in the paper.
        alpha: the low-rank part is multiplied by alpha / rank.
        bias: whether there is one.
        seed: of the support.
        device, dtype: of the parameters.

    Paper: SLTrain, arXiv 2406.02214. `refactorize` is the restart of its low-rank part after arXiv 2505.22922.

    Raises:
        ValueError: a rank below 1, a density outside [0, 1] or an alpha of 0 or less.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        density: float = 0.03,
        *,
        alpha: float = 16.0,
        bias: bool = False,
        seed: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank: expected at least 1, got {rank}")
        if not 0 <= density <= 1:
            raise ValueError(f"density: expected a share in [0, 1], got {density}")
        if not alpha > 0:
            raise ValueError(f"alpha: expected a number above 0, got {alpha}")
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.alpha = rank, alpha
        options = {"device": device, "dtype": dtype}
        self.up = nn.Parameter(torch.zeros(out_features, rank, **options))
        self.down = nn.Parameter(torch.empty(rank, in_features, **options))
        row_start, column = random_support(out_features, in_features, density, seed)
        self.register_buffer("row_start", row_start.to(self.up.device))
        self.register_buffer("column", column.to(self.up.device))
        self.values = nn.Parameter(torch.empty(column.numel(), **options))
        self.bias = nn.Parameter(torch.zeros(out_features, **options)) if bias else None
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        limit = 1 / math.sqrt(max(1, in_features))
        nn.init.uniform_(self.values, -limit, limit)

    @staticmethod
    def from_linear(
        linear: nn.Linear, rank: int, density: float = 0.03, *, alpha: float = 16.0, seed: int = 0
    ) -> "SLTrainLinear":
        """The layer nearest to `linear` that this parametrisation reaches in one go.

        The values are the weight's at the support, and the product is the best one of its rank for the rest.
        """
        layer = SLTrainLinear(
            linear.in_features, linear.out_features, rank, density, alpha=alpha, bias=linear.bias is not None,
            seed=seed, device=linear.weight.device, dtype=linear.weight.dtype,
        )  # fmt: skip
        with torch.no_grad():
            weight = linear.weight
            sparse_rows_take(
                weight.contiguous(), layer.row_start, layer.column, layer.values, first_row=0, first_column=0
            )
            rest = weight.clone()
            sparse_rows_add(rest, -layer.values, layer.row_start, layer.column, first_row=0, first_column=0)
            wide = torch.promote_types(rest.dtype, torch.float32)
            left, sizes, right = torch.linalg.svd(rest.to(wide), full_matrices=False)
            root = (sizes[:rank] / layer.scale).sqrt()
            used = root.numel()
            layer.up.zero_()
            layer.down.zero_()
            layer.up[:, :used] = (left[:, :rank] * root).to(weight.dtype)
            layer.down[:used] = (root.unsqueeze(1) * right[:rank]).to(weight.dtype)
            if linear.bias is not None:
                layer.bias.copy_(linear.bias)
        return layer

    @property
    def scale(self) -> float:
        """What the low-rank product is multiplied by."""
        return self.alpha / self.rank

    def dense_weight(self) -> Tensor:
        """W [out_features, in_features] as one tensor, for inspection and export."""
        with torch.no_grad():
            everything = slice(0, self.out_features), slice(0, self.in_features)
            return _dense_block(self.up, self.down, self.values, self.row_start, self.column, self.scale, *everything)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return sltrain_linear(
            x, self.up, self.down, self.values, self.row_start, self.column, self.bias, scale=self.scale
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"entries={self.values.numel()}, bias={self.bias is not None}"
        )


def random_support(rows: int, columns: int, density: float, seed: int) -> tuple[Tensor, Tensor]:
    """row_start int64 [rows + 1] and column int32 [entries]: places without repeats, spread evenly over the rows.

    Drawn on the CPU, so that a seed means the same places everywhere.
    """
    entries = round(density * rows * columns)
    generator = torch.Generator().manual_seed(seed)

    def permutation(size: int) -> Tensor:
        return torch.randperm(size, generator=generator, device="cpu")

    counts = torch.full((rows,), entries // max(1, rows), dtype=torch.int64, device="cpu")
    counts[permutation(rows)[: entries - int(counts.sum())]] += 1
    row_start = torch.zeros(rows + 1, dtype=torch.int64, device="cpu")
    torch.cumsum(counts, 0, out=row_start[1:])
    chosen = [permutation(columns)[:count].sort().values.to(torch.int32) for count in counts.tolist()]
    return row_start, torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.int32, device="cpu")
