"""The head of a large vocabulary: time against the matrix products alone, peak memory against the eager head.

    python -m bench.policy.linear_head [--rows 4096] [--hidden-size 1024] [--vocabulary 151936] [--rounds 3]
        [--json FILE]

Forward and backward in bfloat16, on the CPU. Times are taken in turn in one process; each peak, beyond hidden states
and weight, in a process of its own. The eager head takes 7 GB at the default sizes.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from bench.processes import peak_bytes, run_alone, write

PROVIDERS = ("linear_token_logprobs", "linear_policy_loss", "linear, log_softmax")


def step(provider: str, sizes: tuple[int, int, int]):
    import torch

    import pykern
    from bench.policy.cases_linear import head_and_targets
    from bench.policy.cases_logprobs import by_eager_head

    hidden, weight, targets = head_and_targets(*sizes, torch.bfloat16)
    weights = torch.randn(sizes[0])

    def run() -> None:
        hidden.grad = weight.grad = None
        if provider == "linear_policy_loss":
            loss, _ = pykern.linear_policy_loss(hidden[None], weight, targets[None], None, weights[None])
            loss.backward()
        else:
            function = by_eager_head if provider == "linear, log_softmax" else pykern.linear_token_logprobs
            function(hidden, weight, targets).backward(weights)

    return run, hidden, weight


def peak(provider: str, sizes: tuple[int, int, int]) -> int:
    """Bytes beyond what the process has when the step begins."""
    run, hidden, weight = step(provider, sizes)
    # The peak so far is that of the arguments' making.
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = peak_bytes()
    run()
    return peak_bytes() - before


def times(sizes: tuple[int, int, int], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of linear_token_logprobs and of its products, round by round."""
    from bench.policy.cases_linear import products_alone

    ours, hidden, weight = step("linear_token_logprobs", sizes)
    found = ([], [])
    for function, seconds in rounds * list(zip((ours, products_alone(hidden, weight)), found)):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return found


def table(label: str, results: dict) -> str:
    eager = results["peak_bytes"][PROVIDERS[-1]]
    lines = [
        f"Forward and backward, {label}: {results['seconds']:.2f} s, its products alone by torch.mm "
        f"{results['seconds_products']:.2f} s, ratio {results['ratio']:.3f} (medians).",
        "",
        "| peak memory beyond hidden states and weight | MB | of the eager head's |",
        "| --- | ---: | ---: |",
    ]
    lines += [f"| {name} | {size / 1e6:,.0f} | {size / eager:.3f} |" for name, size in results["peak_bytes"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    parser.add_argument("--one", choices=PROVIDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = (arguments.rows, arguments.hidden_size, arguments.vocabulary)
    if arguments.one:
        print(json.dumps(peak(arguments.one, sizes)))
        return
    label = "N={} H={} V={} bfloat16".format(*sizes)
    options = dict(zip(("rows", "hidden-size", "vocabulary"), sizes))
    peaks = {provider: run_alone("bench.policy.linear_head", {**options, "one": provider}) for provider in PROVIDERS}
    ours, products = times(sizes, arguments.rounds)
    results = {
        "peak_bytes": peaks,
        "seconds": statistics.median(ours),
        "seconds_products": statistics.median(products),
        "ratio": statistics.median(a / b for a, b in zip(ours, products)),
    }
    print(table(label, results))
    write(results, table(label, results), arguments.json)


if __name__ == "__main__":
    main()
