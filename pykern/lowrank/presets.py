"""The published optimizers: a row of a table each."""

from dataclasses import dataclass, field

from torch import Tensor

from .optimizer import LowRankOptimizer


@dataclass(frozen=True)
class Preset:
    """One published optimizer.

    Attributes:
        paper: its arXiv number.
        fixed: options that make it what it is; other values are refused.
        defaults: options that it only begins with.
        parity: the one package that it may be in parity with.
    """

    paper: str
    fixed: dict
    defaults: dict = field(default_factory=dict)
    parity: str | None = None


PRESETS: dict[str, Preset] = {
    "GaLoreAdamW": Preset("2403.03507", {"rule": "adamw", "residual": "none"}, {"scale": 0.25}, "galore_torch"),
    "FiraAdamW": Preset("2410.01623", {"rule": "adamw", "residual": "fira"}, {"scale": 1.0}, "fira"),
}


class PresetOptimizer(LowRankOptimizer):
    """A LowRankOptimizer whose options begin with a row of PRESETS, the one with the name of the class."""

    def __init__(self, params, lr: float | Tensor = 1e-3, **keywords):
        name = next(kind.__name__ for kind in type(self).__mro__ if kind.__name__ in PRESETS)
        preset = PRESETS[name]
        for option, value in preset.fixed.items():
            if keywords.get(option, value) != value:
                raise ValueError(
                    f"{option}: {name} has {value!r}, got {keywords[option]!r}; use LowRankOptimizer to choose"
                )
        if keywords.get("parity") not in (None, preset.parity):
            raise ValueError(f"parity: expected None or {preset.parity!r} for {name}, got {keywords['parity']!r}")
        super().__init__(params, lr, **{**preset.defaults, **keywords, **preset.fixed})


class GaLoreAdamW(PresetOptimizer):
    """GaLore: AdamW in the subspace, nothing outside it; scale 0.25. Takes LowRankOptimizer's other keywords."""


class FiraAdamW(PresetOptimizer):
    """Fira: AdamW in the subspace, the residual scaled like it and limited. Takes LowRankOptimizer's other keywords."""
