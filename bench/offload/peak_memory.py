"""Peak resident memory of training steps with and without activation offload.

    python -m bench.offload.peak_memory [--model mlp|transformer] [--json FILE]

Each measurement is a process of its own, since the peak is a property of a process. Resident memory is that of the
process alone: the page cache, if a file system can't do direct I/O, does not count. "mapped" stands for the setting of
the C library's allocator that pykern makes by itself: without it, the heap keeps much of what is freed.
"""

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

from bench.processes import peak_bytes, run_alone, write

MODELS = ("mlp", "transformer")
PLAIN, MAPPED, CHECKPOINT, FILE = "plain PyTorch", "plain, mapped", "checkpoint, mapped", "pykern, file"
PROVIDERS = (PLAIN, MAPPED, CHECKPOINT, FILE)


def layers(name: str):
    """The model's layers, and its input."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    if name == "mlp":
        return [nn.Sequential(nn.Linear(256, 256), nn.GELU()) for _ in range(24)], torch.randn(8192, 256)
    settings = dict(dropout=0.0, batch_first=True, norm_first=True)
    return [nn.TransformerEncoderLayer(256, 4, 1024, **settings) for _ in range(8)], torch.randn(4, 512, 256)


def build(name: str) -> tuple[Callable, list]:
    """A function that returns the loss, and the parameters."""
    from torch import nn

    stack, data = layers(name)
    model = nn.Sequential(*stack)
    return lambda: model(data).square().mean(), list(model.parameters())


def checkpointed(name: str) -> Callable:
    """The loss of a like model whose layers are recomputed in the backward."""
    from torch.utils.checkpoint import checkpoint

    stack, data = layers(name)

    def loss():
        x = data
        for layer in stack:
            x = checkpoint(layer, x, use_reentrant=False)
        return x.square().mean()

    loss.parameters = [parameter for layer in stack for parameter in layer.parameters()]
    return loss


def digest(parameters: Iterable) -> str:
    """Of their gradients."""
    found = hashlib.sha256()
    for parameter in parameters:
        found.update(parameter.grad.numpy().tobytes())
    return found.hexdigest()


def run(model: str, provider: str, path: str | None, steps: int) -> dict:
    """Training steps in this process: peak memory beyond what model and libraries took before, gradients' hash."""
    import pykern

    if provider == CHECKPOINT:
        loss = checkpointed(model)
        parameters = loss.parameters
    else:
        loss, parameters = build(model)
    offload = pykern.ActivationOffload("file", path=path) if provider == FILE else None
    before = peak_bytes()
    seconds = []
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = None
        begin = time.perf_counter()
        with offload or nullcontext():
            loss().backward()
        seconds.append(time.perf_counter() - begin)
    return {
        "provider": provider,
        "peak_bytes": peak_bytes() - before,
        "seconds": statistics.median(seconds[1:] or seconds),
        "gradients": digest(parameters),
        "stats": offload.stats() if offload else None,
    }


def measure(model: str, providers: tuple[str, ...] = PROVIDERS, path: str | None = None, steps: int = 5) -> list[dict]:
    """One process per provider, compared with the first."""
    found = []
    for provider in providers:
        options = {"model": model, "one": provider, "steps": steps, "path": path}
        mmap_threshold = 1 << 18 if provider in (MAPPED, CHECKPOINT) else None
        result = run_alone("bench.offload.peak_memory", options, mmap_threshold)
        first = found[0] if found else result
        found.append(
            {
                "model": model,
                **result,
                "peak_over_plain": result["peak_bytes"] / first["peak_bytes"],
                "time_over_plain": result["seconds"] / first["seconds"],
                "gradients_equal": result["gradients"] == first["gradients"],
            }
        )
    return found


def line(result: dict) -> str:
    equal = "gradients bit-equal" if result["gradients_equal"] else "GRADIENTS DIFFER"
    return (
        f"offload/peak_memory[{result['model']}]  {result['provider']:<18} {result['peak_bytes'] / 1e6:8.1f} MB  "
        f"{100 * result['peak_over_plain']:5.1f}% of plain  {result['time_over_plain']:5.2f}x time  {equal}"
    )


def table(results: list[dict]) -> str:
    """For README.md."""
    rows = ["| model | provider | peak MB | of plain | time over plain | gradients |"]
    rows.append("| --- | --- | ---: | ---: | ---: | --- |")
    for result in results:
        equal = "bit-equal" if result["gradients_equal"] else "differ"
        rows.append(
            f"| {result['model']} | {result['provider']} | {result['peak_bytes'] / 1e6:.0f} | "
            f"{100 * result['peak_over_plain']:.0f} % | {result['time_over_plain']:.2f} | {equal} |"
        )
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.offload.peak_memory", description=__doc__)
    parser.add_argument("--model", choices=MODELS, action="append", help="both by default")
    parser.add_argument("--path", help="folder of the spill file")
    parser.add_argument("--steps", type=int, default=5, help="training steps per process")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    parser.add_argument("--one", choices=PROVIDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(options.model[0], options.one, options.path, options.steps)))
        return 0
    results = []
    for model in options.model or MODELS:
        for result in measure(model, path=options.path, steps=options.steps):
            print(line(result), flush=True)
            results.append(result)
    write(results, table(results), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
