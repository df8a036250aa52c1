"""The published optimizers: a row of a table each."""

from dataclasses import dataclass, field

from torch import Tensor

from .optimizer import LowRankOptimizer
from .options import ALIASES


@dataclass(frozen=True)
class Preset:
    """One published optimizer.

    Attributes:
        paper: its arXiv number.
        fixed: options that make it what it is; other values are refused.
        defaults: options that it only begins with.
        parity: the packages that it may be in parity with, and the options that it then begins with.
    """

    paper: str
    fixed: dict
    defaults: dict = field(default_factory=dict)
    parity: dict[str, dict] = field(default_factory=dict)


APOLLO = {"apollo_torch": {"projector": "apollo_torch"}}

PRESETS: dict[str, Preset] = {
    "GaLoreAdamW": Preset(
        "2403.03507", {"rule": "adamw", "residual": "none"}, {"scale": 0.25}, {"galore_torch": {"projector": "svd"}}
    ),
    "GaLoreAdamW8bit": Preset(
        "2403.03507",
        {"rule": "adamw", "residual": "none", "state_dtype": "8bit"},
        {"scale": 0.25, "weight_decay": 0.01, "decay": "after"},
    ),
    "QGaLoreAdamW8bit": Preset(
        "2407.08296",
        {"rule": "adamw", "residual": "none", "state_dtype": "8bit", "refresh": "lazy"},
        {"scale": 0.25, "weight_decay": 0.01, "decay": "after", "projector_format": "int4"},
    ),
    "GaLoreAdafactor": Preset("2403.03507", {"rule": "adafactor", "residual": "none"}, {"scale": 0.25}),
    "FiraAdamW": Preset(
        "2410.01623", {"rule": "adamw", "residual": "fira"}, {"scale": 1.0}, {"fira": {"projector": "svd"}}
    ),
    "ApolloAdamW": Preset(
        "2412.05270", {"rule": "adamw", "residual": "apollo_channel"}, {"projector": "random"}, APOLLO
    ),
    "ApolloMini": Preset(
        "2412.05270",
        {"rule": "adamw", "residual": "apollo_tensor"},
        {"projector": "random", "rank": 1, "scale": 128.0},
        APOLLO,
    ),
    "DCTAdamW": Preset("2505.17967", {"rule": "adamw", "projector": "dct"}, {"refresh_every": 1}),
    "Trion": Preset(
        "2505.17967",
        {"rule": "newton_schulz", "projector": "dct", "residual": "error_feedback", "momentum": 0.0},
        {"refresh_every": 1, "feedback_share": 0.05},
    ),
    "LDAdamW": Preset(
        "2410.16103",
        {"rule": "adamw", "projector": "plain_power", "moments": "rotate_variance"},
        {
            "refresh_every": 1,
            "projector_memory": 0.908,
            "residual": "error_feedback",
            "feedback_momentum": True,
            "betas": (0.908, 0.99),
        },
    ),
    "Frugal": Preset("2411.07837", {"moments": "reset"}, {"residual": "sign", "weight_decay": 0.01}),
    "Flora": Preset(
        "2402.03293",
        {"rule": "momentum", "projector": "random", "moments": "rotate", "residual": "none"},
        {"refresh_every": 1000, "momentum": 0.9, "scale": 0.1},
    ),
    "GrassAdamW": Preset(
        "2406.17660", {"rule": "adamw", "projector": "rows", "moments": "reset", "residual": "none"}, {"scale": 0.25}
    ),
    "GradNormLoRPAdamW": Preset("2412.19616", {"rule": "adamw", "side": "full", "residual": "none"}, {"scale": 0.25}),
}


class PresetOptimizer(LowRankOptimizer):
    """A LowRankOptimizer whose options begin with a row of PRESETS, the one with the name of the class."""

    def __init__(self, params, lr: float | Tensor = 1e-3, **keywords):
        self._refuse_others(keywords)
        preset = PRESETS[self._name()]
        begins = {**preset.defaults, **preset.parity.get(keywords.get("parity"), {})}
        super().__init__(params, lr, **{**begins, **keywords, **preset.fixed})

    def add_param_group(self, param_group: dict) -> None:
        """Adds a group; see torch.optim.Optimizer.add_param_group."""
        if isinstance(param_group, dict):
            self._refuse_others({ALIASES.get(option, option): value for option, value in param_group.items()})
            param_group = {**PRESETS[self._name()].parity.get(param_group.get("parity"), {}), **param_group}
        super().add_param_group(param_group)

    @classmethod
    def _name(cls) -> str:
        return next(kind.__name__ for kind in cls.__mro__ if kind.__name__ in PRESETS)

    @classmethod
    def _refuse_others(cls, options: dict) -> None:
        """Raises where options are not those of the preset."""
        name = cls._name()
        preset = PRESETS[name]
        for option, value in preset.fixed.items():
            given = options.get(option, value)
            if isinstance(given, Tensor) or given != value:
                raise ValueError(f"{option}: {name} has {value!r}, got {given!r}; use LowRankOptimizer to choose")
        parity = options.get("parity")
        if parity is not None and parity not in preset.parity:
            choices = " or ".join(repr(choice) for choice in (None, *preset.parity))
            raise ValueError(f"parity: expected {choices} for {name}, got {parity!r}")


class GaLoreAdamW(PresetOptimizer):
    """GaLore: AdamW in the subspace, nothing outside it (arXiv 2403.03507).

    W = W - lr * scale * P Adam(P^T G), with the moments kept when P changes. Begins with scale 0.25 and a refresh
    every 200 steps. The paper trains with lr 0.01 and these; for fine-tuning it takes scale 2 to 4, rank 4 to 8 and
    lr 1e-5 to 3e-5. P comes of the Gram matrix: the same subspace as that of the package's singular value
    decomposition, without its time. `parity="galore_torch"` takes the package's decomposition, epsilon and
    order of decay. Takes LowRankOptimizer's other keywords.
    """


class GaLoreAdamW8bit(PresetOptimizer):
    """GaLoreAdamW with block-wise 8-bit moments (arXiv 2403.03507, 2110.02861).

    Begins with scale 0.25, weight decay 0.01 and that after the update, as galore_torch has it. Blocks lie along a row
    of the moments, 256 each, so that no block mixes two basis vectors; the package's lie flat, and it keeps moments
    of less than 4096 elements in float32 and rounds the low-rank step to the weight's dtype before it goes up.
    Takes LowRankOptimizer's other keywords.
    """


class QGaLoreAdamW8bit(PresetOptimizer):
    """Q-GaLore: 8-bit moments, a 4-bit projector, and refreshes that grow rare (arXiv 2407.08296).

    Begins as GaLoreAdamW8bit does, with projector_format "int4"; "int8" and "dense" may be chosen. Where a basis keeps
    its first vector the gap between refreshes doubles. Weights in 8 bits are those of Int8Linear layers, which
    `int8_linears` puts into a model; they are rounded stochastically. The package keeps a 4-bit code in a byte, and a
    group of its codes has an integer zero point; here two codes share a byte, and a group begins at its smallest value.
    Takes LowRankOptimizer's other keywords.
    """


class GaLoreAdafactor(PresetOptimizer):
    """GaLore over Adafactor (arXiv 2403.03507, 1804.04235): second moments are a row and a column of means.

    Begins with scale 0.25 and no momentum; `momentum` averages the scaled updates, as the package's beta1 does. The
    learning rate is the given one: the package's with scale_parameter and relative_step off, as Transformers calls it.
    Parameters outside a subspace get AdamW, not Adafactor. Takes LowRankOptimizer's other keywords.
    """


class FiraAdamW(PresetOptimizer):
    """Fira: AdamW in the subspace, the residual scaled like it and limited (arXiv 2410.01623).

    W = W - lr * (scale P N + S) with N = Adam(R), R = P^T G, and S = (G - P R) |N_j| / |R_j| per channel j, whose norm
    grows by `growth_limit` (1.01) a step at most. Begins with scale 1. `parity="fira"` takes the package's
    decomposition, epsilon, order of decay and (G - scale P R). Takes LowRankOptimizer's other keywords.
    """


class ApolloAdamW(PresetOptimizer):
    """APOLLO: the gradient with its channels scaled as AdamW scales a random projection of them (arXiv 2412.05270).

    W = W - lr * sqrt(scale) * limited(G_j |N_j| / |R_j|) per channel j, N = Adam(R), R = P^T G with a random P that
    has variance 1 / rank. The norm grows by `growth_limit` (1.01) a step at most; 0 turns that off (disable_nl), and
    `scale_first` puts the root of scale before it (scale_front). Begins with scale 1 and a refresh every 200 steps;
    the paper takes rank a quarter of the smaller dimension and lr 0.01. `parity="apollo_torch"` takes the package's
    draws (those of the CPU), epsilon and order of decay. Takes LowRankOptimizer's other keywords.
    """


class ApolloMini(PresetOptimizer):
    """APOLLO-Mini: one factor for the whole gradient, from a projection to rank 1 (arXiv 2412.05270).

    As ApolloAdamW with |N| / |R| of the whole matrix. Begins with rank 1 and scale 128.
    Takes LowRankOptimizer's other keywords.
    """


class DCTAdamW(PresetOptimizer):
    """DCT-AdamW: AdamW on the columns of a cosine transform that see most of the gradient (arXiv 2505.17967).

    P is `rank` columns of the orthogonal DCT-II, those of the largest absolute sums, chosen anew each step. A column
    that is chosen again keeps its place in P and with it its moments, a new one takes those of the place; the package
    orders all columns anew, so that moments mix. Choose `moments="rotate"` to begin new columns with none (the
    package's rotate_subspace), `residual="error_feedback"` to add what P misses to the next gradient (use_ef): the
    paper's algorithm has both. With `refresh_every` above 1 the package refreshes one step earlier than here, where
    steps 1, k + 1, 2k + 1 do; and its "matmul" setting selects from the inverse transform.
    Takes LowRankOptimizer's other keywords.
    """


class Trion(PresetOptimizer):
    """Trion: Newton-Schulz on the part of the momentum that a cosine transform sees best (arXiv 2505.17967).

    M = M + G, b = P^T M, M = M - feedback_share P b, and W = W - lr P X with X = NewtonSchulz(b) times `shape_scale`
    of the weight. Begins with feedback_share 0.05, which is 1 - mu for the momentum mu = 0.95 of the paper, and P of
    DCT-II columns chosen each step. The momentum lives in the state `error`, of the weight's size and dtype.
    Parameters outside a subspace get AdamW. Takes LowRankOptimizer's other keywords.
    """


class LDAdamW(PresetOptimizer):
    """LDAdam: a subspace a step, moments moved into it, and all that is lost fed back (arXiv 2410.16103).

    P is one warm power step on memory P' m / (1 - beta1^t) + (1 - memory) A, where P' is the basis before and A the
    gradient plus the error; m becomes P^T P' m, and v the second moment of that by v's variance. The error takes
    A - P P^T A and beta1 / (1 - beta1) (P' m - P P^T P' m). Begins with betas (0.908, 0.99), `projector_memory` 0.908
    and error feedback; `residual="none", feedback_momentum=False` goes without. The package keeps the error in the
    gradients, so its zero_grad does nothing, and begins with a singular value decomposition; here the error is a state
    of the weight's size and dtype, and the first basis a randomized range finder's.
    Takes LowRankOptimizer's other keywords.
    """


class Frugal(PresetOptimizer):
    """FRUGAL: a rule with state in the subspace, the sign of the gradient outside it (arXiv 2411.07837).

    W = W - lr * (P N + residual_scale sign(G - P P^T G)); a refresh resets the moments and the count of steps. Begins
    with AdamW inside, weight decay 0.01 and a refresh every 200 steps. `rule` may be "lion" or "momentum", `residual`
    "sgd" or "none", `projector` "random_orthonormal", "coordinates" or any other; the paper takes rank a quarter of
    the dimension. Takes LowRankOptimizer's other keywords.
    """


class Flora(PresetOptimizer):
    """Flora: momentum compressed by a random projection that changes now and then (arXiv 2402.03293).

    M = momentum M + P^T G, W = W - lr * scale P M, with a random P of variance 1 / rank; every 1000 steps (kappa) M
    goes up by the old P and down by the new one. Begins with momentum 0.9, and scale 0.1, which makes the momentum
    an average. This is the paper's rule. The package compresses Adafactor's update instead, with second moments of
    the whole gradient, and adds the newest update uncompressed. Takes LowRankOptimizer's other keywords.
    """


class GrassAdamW(PresetOptimizer):
    """Grass: AdamW on the rows of the gradient with the largest norms (arXiv 2406.17660).

    GaLore with P a choice of rows of the identity; a refresh resets the moments. Begins with scale 0.25 (the paper
    tunes it) and a refresh every 200 steps. A step has no products: without weight decay it reads and writes
    what was picked, a small part of the memory where that is rows of the weight (it has more columns than rows, or
    side="left"), and most of it where that is columns. Takes LowRankOptimizer's other keywords.
    """


class GradNormLoRPAdamW(PresetOptimizer):
    """GradNormLoRP: AdamW in a subspace of both axes of the gradient (arXiv 2412.19616).

    W = W - lr * scale * P Adam(P^T G Q) Q^T. Begins with scale 0.25 and a refresh every 200 steps. The paper steps the
    factors of a normalized layer by it: see NormalizedLowRankLinear. The released optimizer projects one side only.
    Takes LowRankOptimizer's other keywords.
    """
