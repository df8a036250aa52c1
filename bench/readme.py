"""Writes the measured tables of README.md from the records in bench/results: `python -m bench.readme [--check]`."""

import itertools
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def conditions(environment: dict) -> str:
    return (
        f"{environment['processor']}, {environment['cpu threads']} threads, {environment['cpu level']}, "
        f"torch {environment['torch']}, {environment['date']}."
    )


def family_table(record: dict) -> str:
    """One line per case: median milliseconds, share of the binding limit, and each other provider's time over that."""
    lines = ["| case | ms | of the limit | the others' time over this |", "| --- | ---: | ---: | --- |"]
    cases = itertools.groupby(record["rows"], key=lambda row: f"{row['name']} {row['shape']}")
    for case, (ours, *others) in ((case, list(rows)) for case, rows in cases):
        limit = f"{ours['percent_of_limit']:.0f} % {ours['limit']}" if ours["limit"] else ""
        ratios = "; ".join(f"{row['provider']} {row['time_over_pykern']:.2f}" for row in others)
        lines.append(f"| {case} | {ours['ms_p50']:.3f} | {limit} | {ratios} |")
    return "\n".join([*lines, "", conditions(record["environment"])])


def sections() -> dict[str, str]:
    """Every generated section by the name in its markers."""
    found = {}
    for path in sorted(RESULTS.glob("*/*.json")):
        record = json.loads(path.read_text())
        if "rows" in record and "limits" in record:
            found[f"bench {path.stem}"] = family_table(record)
        elif "table" in record:
            found[path.stem] = "\n".join([record["table"], "", conditions(record["environment"])])
    return found


def render(text: str) -> str:
    """README's text with each marked section replaced; a marker without a record is an error."""
    generated = sections()

    def replace(match: re.Match) -> str:
        name = match["name"]
        if name not in generated:
            raise SystemExit(f"README.md has a section {name!r}, but no record in {RESULTS.name}/ makes it")
        return f"<!-- begin {name} -->\n{generated[name]}\n<!-- end {name} -->"

    return re.sub(r"<!-- begin (?P<name>.+?) -->\n.*?<!-- end (?P=name) -->", replace, text, flags=re.DOTALL)


def main(arguments: list[str]) -> int:
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = render(before)
    if "--check" in arguments:
        print("README.md agrees with bench/results" if before == after else "README.md differs from bench/results")
        return int(before != after)
    readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
