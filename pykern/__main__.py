"""`python -m pykern info | plan | train | bench`."""

import sys

from ._native import info

USAGE = """usage: python -m pykern COMMAND [options]

  info    versions, processor features, CUDA kernels present or why not
  plan    order, copies and memory of a pipeline schedule with activation offload; draws it
  train   GRPO training of a small language model on the four families
  bench   times the ops against PyTorch and installed peers

'python -m pykern COMMAND --help' tells a command's options."""


def main(arguments: list[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command == "info":
        entries = info()
        width = max(map(len, entries))
        for name, value in entries.items():
            print(f"{name:<{width}}  {value}")
        return 0
    if command == "plan":
        from .offload.planning.cli import main as plan

        return plan(rest)
    if command == "train":
        from .train.cli import main as train

        return train(rest)
    if command == "bench":
        from .bench import main as bench

        return bench(rest)
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    print(f"pykern: unknown command {command!r}\n\n{USAGE}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
