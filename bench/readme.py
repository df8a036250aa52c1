"""Writes the measured tables of README.md from the records in bench/results: `python -m bench.readme [--check]`."""

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
    """One line per case and provider: median milliseconds and the time over pykern's."""
    lines = ["| case | provider | ms | time over pykern's |", "| --- | --- | ---: | ---: |"]
    for row in record["rows"]:
        case = f"{row['name']} {row['shape']}"
        lines.append(f"| {case} | {row['provider']} | {row['ms_p50']:.3f} | {row['time_over_pykern']:.2f} |")
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
