"""GradNormLoRP's layer: a frozen weight plus a low-rank product, normalized, with learned magnitudes."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _low_rank_norms(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The norms of the rows of weight + up @ down [out, in] from its parts, in float32 or better.

    |w_i + u_i A|^2 = |w_i|^2 + 2 u_i (A w_i) + u_i (A A^T) u_i: nothing of the weight's size is made.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    squares = torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()
    cross = (weight @ down.mT).to(wide)
    up, down = up.to(wide), down.to(wide)
    return (squares + (up * (2 * cross + up @ (down @ down.mT))).sum(dim=1)).clamp_min(torch.finfo(wide).tiny).sqrt()


class NormalizedLowRankLinear(nn.Module):
    r"""A linear layer whose weight is W = m * (W0 + up @ down) / |W0 + up @ down|, with W0 frozen.

    The norm is taken over each output feature's row or over each input feature's column of W [out, in], and m is one
    magnitude per row or column; the gradient goes through the norm too. W itself is never formed: y = m / norm *
    (x W0^T + (x down^T) up^T), the norms from the factors. m begins at W0's norms and up at zero, so that a fresh
    layer is the one it was made from. GradNormLoRP then steps up and down by AdamW in a two-sided subspace of the
    gradient, P (P^T G Q) Q^T: the optimizer GradNormLoRPAdamW.

    Args:
        weight: W0 [out_features, in_features]; kept as a buffer, not copied.
        rank: of the product.
        norm: "output" (a row of W is one vector, as the paper's released code has it) or "input" (a column).
        bias: [out_features] or None; trained.

    Paper: GradNormLoRP, arXiv 2412.19616. Its released optimizer keeps a full-size copy of the direction, leaves out
    the tangential part of the gradient and sets the magnitudes back at every step; none of that is done here.

    Raises:
        ValueError: a weight that is no matrix, a rank below 1, another norm.
    """

    def __init__(self, weight: Tensor, rank: int, *, norm: str = "output", bias: Tensor | None = None):
        super().__init__()
        if weight.dim() != 2:
            raise ValueError(f"weight: expected [out_features, in_features], got {tuple(weight.shape)}")
        if rank < 1:
            raise ValueError(f"rank: expected at least 1, got {rank}")
        if norm not in ("output", "input"):
            raise ValueError(f'norm: expected "output" or "input", got {norm!r}')
        self.norm, self.rank = norm, rank
        weight = weight.detach()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        options = {"device": weight.device, "dtype": weight.dtype}
        self.up = nn.Parameter(torch.zeros(self.out_features, rank, **options))
        self.down = nn.Parameter(torch.empty(rank, self.in_features, **options))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)
        wide = torch.promote_types(weight.dtype, torch.float32)
        norms = torch.linalg.vector_norm(weight, dim=1 if norm == "output" else 0, dtype=wide)
        self.magnitude = nn.Parameter(norms.to(weight.dtype))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @staticmethod
    def from_linear(linear: nn.Linear, rank: int, *, norm: str = "output") -> "NormalizedLowRankLinear":
        """A layer that computes what `linear` computes, and shares its weight's memory."""
        return NormalizedLowRankLinear(linear.weight, rank, norm=norm, bias=linear.bias)

    def _factors(self) -> Tensor:
        """magnitude / norm, one per row or column of W, in float32 or better."""
        weight, up, down = self.weight, self.up, self.down
        if self.norm == "input":
            weight, up, down = weight.mT, down.mT, up.mT
        norms = _low_rank_norms(weight, up, down)
        return self.magnitude.to(norms.dtype) / norms

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        factors = self._factors()
        if self.norm == "input":
            x = x * factors.to(x.dtype)
        out = F.linear(x, self.weight) + F.linear(F.linear(x, self.down), self.up)
        # Under autocast that is narrower than the parameters.
        if self.norm == "output":
            out = out * factors.to(out.dtype)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """W [out_features, in_features] as one tensor, to be put into a plain layer: no cost at inference."""
        direction = self.weight + self.up @ self.down
        factors = self._factors().to(direction.dtype)
        return direction * (factors.unsqueeze(1) if self.norm == "output" else factors)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, norm={self.norm!r}, "
            f"bias={self.bias is not None}"
        )
