"""What bench.lowrank.pretraining runs: the optimizers of its main table, and what explains their order."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

import pykern
from pykern.train.model import Shape

SHAPE = Shape(layers=8, width=320, heads=8, key_heads=8)
RANK = SHAPE.width // 4
LENGTH = 128
ROWS = 4
STEPS = 400
REFRESHES = 8
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Setting:
    """An optimizer with its options, and the learning rates it is tried at.

    Attributes:
        make: its class.
        rates: of the low-rank weights, or of all where there are none.
        options: of the low-rank group, or of all parameters where `rank` is None.
        rank: of its subspaces; None for an optimizer without them.
        changes: the setting of the main table that this one differs from; "" for those of the table.
        published: perplexity on C4 of a 60M model in the papers' table.
        dtype: of weights and gradients.
    """

    make: type[torch.optim.Optimizer]
    rates: tuple[float, ...]
    options: dict = field(default_factory=dict)
    rank: int | None = RANK
    changes: str = ""
    published: float | None = None
    dtype: torch.dtype = torch.float32


def settings(steps: int) -> dict[str, Setting]:
    """All by name. Where subspaces are refreshed now and then, it happens REFRESHES times."""
    gap = {"refresh_every": max(1, steps // REFRESHES)}
    adamw = Setting(pykern.LowRankAdamW, (5e-4, 1e-3, 2e-3, 4e-3), rank=None, published=34.06)
    galore = Setting(pykern.GaLoreAdamW, (5e-3, 1e-2, 2e-2), {"scale": 0.25, **gap}, published=34.88)
    fira = Setting(pykern.FiraAdamW, (5e-3, 1e-2, 2e-2), {"scale": 0.25, **gap}, published=31.06)
    apollo = Setting(pykern.ApolloAdamW, (2.5e-3, 5e-3, 1e-2), gap, published=31.55)
    dct = Setting(pykern.DCTAdamW, (2e-3, 4e-3, 8e-3))

    def changed(base: str, rates: tuple[float, ...], of: Setting, **fields) -> Setting:
        options = {**of.options, **fields.pop("options", {})}
        return replace(of, rates=rates, changes=base, published=None, options=options, **fields)

    bfloat16 = {"dtype": torch.bfloat16}
    return {
        "AdamW": adamw,
        "GaLore": galore,
        "Fira": fira,
        "APOLLO": apollo,
        "DCT": dct,
        "AdamW without momentum": changed("AdamW", (5e-4, 1e-3), adamw, options={"betas": (0.0, 0.999)}),
        "APOLLO, all channels seen": changed(
            "APOLLO", (2.5e-3, 5e-3), apollo, rank=SHAPE.width, options={"projector": "coordinates"}
        ),
        "APOLLO, singular vectors": changed("APOLLO", (5e-3, 1e-2), apollo, options={"projector": "gram"}),
        "APOLLO without limiter": changed("APOLLO", (5e-3,), apollo, options={"growth_limit": 0.0}),
        "APOLLO, 2 refreshes": changed("APOLLO", (5e-3,), apollo, options={"refresh_every": max(1, steps // 2)}),
        "APOLLO, 40 refreshes": changed("APOLLO", (5e-3,), apollo, options={"refresh_every": max(1, steps // 40)}),
        "APOLLO-Mini": changed(
            "APOLLO", (2.5e-3, 5e-3, 1e-2), apollo, make=pykern.ApolloMini, rank=1, options={"scale_first": True}
        ),
        "DCT, moments rotated": changed("DCT", (4e-3,), dct, options={"moments": "rotate"}),
        # The next is the paper's algorithm; the class begins with the package's flags, which leave both out.
        "DCT, moments rotated, error feedback": changed(
            "DCT", (2e-3, 4e-3), dct, options={"moments": "rotate", "residual": "error_feedback"}
        ),
        "DCT, error feedback": changed("DCT", (4e-3,), dct, options={"residual": "error_feedback"}),
        "DCT, 8 refreshes": changed("DCT", (2e-3, 4e-3), dct, options=gap),
        "DCT, singular vectors each step": changed(
            "DCT", (4e-3,), dct, make=pykern.LowRankAdamW, options={"projector": "gram", "refresh_every": 1}
        ),
        "AdamW, all in bfloat16": changed("AdamW", (1e-3, 2e-3), adamw, make=torch.optim.AdamW, **bfloat16),
        "APOLLO, all in bfloat16": changed("APOLLO", (5e-3,), apollo, options={"state_dtype": "bfloat16"}, **bfloat16),
    }


@dataclass(frozen=True)
class Run:
    """One training: a setting, at a rate, from a seed, for so many steps of so many rows of LENGTH bytes."""

    setting: str
    rate: float
    seed: int = 0
    steps: int = STEPS
    rows: int = ROWS


def larger(steps: int) -> Iterator[Run]:
    """Other batches and lengths, of AdamW and APOLLO."""
    for rows in (1, 16):
        yield from (Run("AdamW", rate, steps=steps, rows=rows) for rate in (5e-4, 1e-3, 2e-3)[rows > 1 :][:2])
        yield from (Run("APOLLO", rate, steps=steps, rows=rows) for rate in (2.5e-3, 5e-3, 1e-2)[rows > 1 :][:2])
    yield Run("AdamW", 1e-3, steps=3 * steps)
    yield Run("APOLLO", 5e-3, steps=3 * steps)
