"""Writes the measured tables from the records in bench/results: `python -m bench.readme [--check]`.

The README beside the records has all of them, that of the project the rows that HEADLINES names.
"""

import itertools
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
# Every page, and the folder of the records that it shows.
PAGES = {ROOT / "README.md": RESULTS / "cpu-amd-epyc"}
PAGES |= {page: page.parent for page in sorted(RESULTS.glob("*/README.md"))}

# What a row of each table begins with to stand among the headlines.
HEADLINES = {
    "compare": r"(1|5|10) ",
    "bench attention": r"prefix_attention \w+ \w+ P=4096 G=16 R=256 H=8/2 D=128",
    "bench policy": r"(group_advantages 16384|policy_loss grpo 64x|gae|token_logprobs_forward_backward .* bfloat16)",
    "linear_head": "",
    "bench lowrank": r"\w+_step 4096x4096",
    "bench lowrank_kept_pages": r"\w+_step 4096x4096",
    "lowrank_refresh": r".* (gram|power|SVD)",
    "pretraining": "",
    "offload_memory": "",
    "pipeline_memory": "",
}


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


def sections(folder: Path) -> dict[str, str]:
    """Every table of a folder's records by the name in its markers."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        if "rows" in record and "limits" in record:
            found[f"bench {path.stem}"] = family_table(record)
        elif "table" in record:
            found[path.stem] = "\n".join([record["table"], "", conditions(record["environment"])])
    return found


def headlines(section: str, rows: str) -> str:
    """The first table of a section, of it the rows that match, with what stands before it."""
    paragraphs = section.split("\n\n")
    first = next(number for number, paragraph in enumerate(paragraphs) if paragraph.startswith("|"))
    names, rule, *lines = paragraphs[first].splitlines()
    kept = [line for line in lines if re.match(rf"\| {rows}", line)]
    if not kept:
        raise SystemExit(f"no row of the table with {names!r} begins with {rows!r}; change HEADLINES")
    return "\n\n".join([*paragraphs[:first], "\n".join([names, rule, *kept])])


def render(text: str, folder: Path) -> str:
    """A page's text with each marked section replaced; a marker without a record is an error."""
    tables = sections(folder)

    def replace(match: re.Match) -> str:
        marker = match["name"]
        name = marker.removeprefix("headlines ")
        if name not in tables:
            raise SystemExit(f"a page has a section {marker!r}, but no record in {folder.relative_to(ROOT)} makes it")
        table = tables[name] if name == marker else headlines(tables[name], HEADLINES[name])
        return f"<!-- begin {marker} -->\n{table}\n<!-- end {marker} -->"

    return re.sub(r"<!-- begin (?P<name>.+?) -->\n.*?<!-- end (?P=name) -->", replace, text, flags=re.DOTALL)


def main(arguments: list[str]) -> int:
    differing = 0
    for page, folder in PAGES.items():
        before = page.read_text()
        after = render(before, folder)
        if before == after:
            continue
        if "--check" in arguments:
            print(f"{page.relative_to(ROOT)} differs from the records in bench/results")
            differing += 1
        else:
            page.write_text(after)
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
