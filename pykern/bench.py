"""`python -m pykern bench`: the cases of the repository's bench folder, printed for people."""

import argparse
import sys
from pathlib import Path

from .device import choose_device


def main(arguments: list[str]) -> int:
    repository = Path(__file__).resolve().parent.parent
    if not (repository / "bench" / "harness.py").exists():
        print("pykern bench: needs the repository's bench folder; run it in a checkout of pykern", file=sys.stderr)
        return 2
    sys.path.insert(0, str(repository))
    from bench import harness

    parser = argparse.ArgumentParser(prog="python -m pykern bench", description=harness.__doc__)
    parser.add_argument("family", nargs="*", help=f"any of {', '.join(harness.FAMILIES)}; all by default")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose label contains TEXT")
    parser.add_argument("--seconds", type=float, default=2.0, help="measuring time per provider and case")
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: the GPU where pykern can use it"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    parser.add_argument(
        "--floor", choices=sorted(harness.KNOWN_LIMITS), help="only print the time no case can go below there"
    )
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.family) - set(harness.FAMILIES))
    if unknown:
        parser.error(f"unknown family {', '.join(unknown)}; there are {', '.join(harness.FAMILIES)}")

    try:
        device = choose_device("cpu" if options.floor else options.device)
    except RuntimeError as error:
        parser.error(str(error))
    families = tuple(options.family) or harness.FAMILIES
    kind = "cuda" if options.floor else device.type
    cases = [case for case in harness.load_cases(families, kind) if options.only in case.label]
    if not cases:
        parser.error(f"no case contains {options.only!r}")
    if options.floor:
        harness.print_floors(cases, harness.KNOWN_LIMITS[options.floor])
        return 0
    print(f"device: {device}")
    harness.run(cases, options.seconds, device, options.json)
    if options.json:
        print(f"wrote {options.json}")
    return 0
