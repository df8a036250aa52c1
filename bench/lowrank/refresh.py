"""What a new subspace costs and how much of the gradient it captures, projector by projector.

    python -m bench.lowrank.refresh --json bench/results/DEVICE/lowrank_refresh.json

Times every projector and the thin decomposition in turn, in one process, on the same float32 matrices with singular
values (1 + i)^-tail, and relates each round's times to the decomposition's of the same round. Energies are relative to
the most that a basis of this rank can capture; that of the basis in use, from which "power" starts, is "stale".
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from bench import harness
from bench.lowrank.cases_refresh import DECOMPOSITION, drifted_basis, gradient, providers, vectors

SHAPES = ((1024, 2736, 256), (2048, 2048, 512))
TAILS = (0.5, 1.0)
PREFIX = "pykern "
# Those whose basis depends on the gradient, and one that doesn't; the record has all.
SHOWN = (
    "stale",
    *(PREFIX + name for name in ("gram", "power", "plain_power", "randomized", "dct", "rows", "random_orthonormal")),
)


def record(rows: int, columns: int, rank: int, tail: float, rounds: int) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    grad = gradient(rows, columns, tail)
    torch.manual_seed(1)
    calls = providers(grad, rank)
    torch.manual_seed(1)
    stale = drifted_basis(grad, rank)
    best = (1.0 + torch.arange(rank, dtype=torch.float64)).pow(-2 * tail).sum().item()

    def energy(basis: torch.Tensor) -> float:
        return (basis.mT @ grad).double().square().sum().item() / best

    seconds: dict[str, list[float]] = {name: [] for name in calls}
    energies = {"stale": energy(stale)}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            chosen = call()
            seconds[name].append(time.perf_counter() - begin)
            if name not in energies:
                basis = chosen if name == DECOMPOSITION else vectors(name.removeprefix(PREFIX), chosen, rows)
                # Of draws that are not orthonormal, the energy in the subspace that they span.
                energies[name] = energy(torch.linalg.qr(basis)[0])
    results = {"stale": {"energy": energies["stale"]}}
    for name, times in seconds.items():
        ratio = statistics.median(theirs / ours for theirs, ours in zip(seconds[DECOMPOSITION], times, strict=True))
        results[name] = {"seconds": statistics.median(times), "times_faster": ratio, "energy": energies[name]}
    return results


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = [
        "| shape, rank, tail | projector | ms | times faster than SVD | energy |",
        "| --- | --- | --- | --- | --- |",
    ]
    for shape, rows in results.items():
        for name, row in rows.items():
            if name not in (*SHOWN, DECOMPOSITION):
                continue
            timed = f"{1e3 * row['seconds']:,.1f} | {row['times_faster']:,.1f}" if "seconds" in row else " | "
            lines.append(f"| {shape} | {name} | {timed} | {row['energy']:.5f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    arguments = parser.parse_args()
    results = {}
    for rows, columns, rank in SHAPES:
        for tail in TAILS:
            results[f"{rows}x{columns} r{rank} tail {tail}"] = record(rows, columns, rank, tail, arguments.rounds)
    print(table(results))
    if arguments.json:
        environment = harness.environment(torch.device("cpu"))
        harness.write({"environment": environment, "table": table(results), "results": results}, arguments.json)


if __name__ == "__main__":
    main()
