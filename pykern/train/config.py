"""The options of a run, and the one kind of error that is the user's to mend."""

from dataclasses import dataclass, fields

ARITHMETIC = "arithmetic"


class InputError(Exception):
    """Something the user gave that cannot be used. Its text is one line that says what and where."""


@dataclass(frozen=True)
class Config:
    """Every option of a run, settled. It travels in the checkpoint, so a resumed run needs no options."""

    # Data
    data: str = ARITHMETIC
    shots: int = 4
    largest: int = 49
    held_out: int = 200
    # Model
    layers: int = 2
    width: int = 128
    heads: int = 4
    key_heads: int = 2
    tie_head: bool = False
    # Supervised warm-up
    warmup_steps: int = 1500
    warmup_prompts: int = 64
    warmup_learning_rate: float = 3e-3
    warmup_accuracy: float = 0.3
    # GRPO
    steps: int = 200
    prompts: int = 64
    responses: int = 8
    max_response: int = 8
    temperature: float = 1.0
    estimator: str = "grpo"
    loss: str = "grpo"
    updates: int = 1
    # Optimizer
    optimizer: str = "fira"
    rank: int = 64
    refresh_every: int = 50
    learning_rate: float = 1e-3
    clip_norm: float = 1.0
    # Memory
    offload: str = "memory"
    spill_dir: str = ""
    # Pipeline
    pipeline: int = 0
    chunks: int = 2
    microbatches: int = 0
    schedule: str = "po"
    # Run
    evaluate_every: int = 25
    checkpoint_every: int = 100
    compare: int = 0
    device: str = "cpu"
    threads: int = 0
    dtype: str = "float32"
    seed: int = 0


DATA_DEFAULTS = {
    # So small a model gains nothing from a second thread, and on a busy machine loses much by waiting for it.
    "arithmetic": {"compare": 100, "threads": 1},
    "questions": {
        "shots": 0,
        "held_out": 32,
        "warmup_steps": 100,
        "warmup_prompts": 8,
        "warmup_accuracy": 1.0,
        "steps": 100,
        "prompts": 4,
        "max_response": 256,
    },
    "groups": {"shots": 0, "held_out": 0, "warmup_steps": 0, "warmup_accuracy": 1.0, "steps": 100, "prompts": 4},
}
"""What differs from Config's own defaults for each form of data."""


def settle(form: str, given: dict) -> Config:
    """The options given, over the defaults of this form of data, over Config's own. Raises InputError."""
    more = {"offload": "half", "compare": 0} if given.get("pipeline") else {}
    config = Config(**{**DATA_DEFAULTS[form], **more, **given})
    kinds = ("none", "half", "full") if config.pipeline else ("none", "memory", "file", "pinned")
    if config.offload not in kinds and not (config.pipeline and config.offload.isdecimal()):
        counted = " or a number of chunks with --pipeline" if config.pipeline else " without --pipeline"
        raise InputError(f"--offload {config.offload}: expected {', '.join(kinds)}{counted}")
    at_least = {
        "shots": 0, "largest": 0, "held_out": 0, "layers": 1, "width": 1, "heads": 1, "key_heads": 1, "warmup_steps": 0,
        "warmup_prompts": 1, "steps": 0, "prompts": 1, "responses": 1, "max_response": 1, "updates": 1, "rank": 1,
        "refresh_every": 1, "evaluate_every": 0, "checkpoint_every": 0, "compare": 0, "seed": 0, "threads": 0,
        "pipeline": 0, "chunks": 1, "microbatches": 0,
    }  # fmt: skip
    for name, least in at_least.items():
        if getattr(config, name) < least:
            raise InputError(f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(config, name)}")
    for name, most in (("seed", 2**62), ("threads", 2**16)):
        if getattr(config, name) > most:
            raise InputError(f"--{name}: expected at most {most}, got {getattr(config, name)}")
    for name in ("temperature", "learning_rate", "warmup_learning_rate", "clip_norm"):
        if not 0 < getattr(config, name) < float("inf"):
            raise InputError(f"--{name.replace('_', '-')}: expected a positive number, got {getattr(config, name)}")
    if config.width % config.heads or config.width // config.heads % 2:
        raise InputError(f"--width: expected an even multiple of --heads {config.heads}, got {config.width}")
    if config.width // config.heads > 256:
        raise InputError(f"--width: expected at most 256 per head, got {config.width} over {config.heads} heads")
    if config.heads % config.key_heads:
        raise InputError(f"--key-heads: expected a divisor of --heads {config.heads}, got {config.key_heads}")
    return config


def names() -> list[str]:
    return [field.name for field in fields(Config)]
