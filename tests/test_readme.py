"""README.md keeps its word: its examples run, and its tables are those of the recorded runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import pykern
from bench import readme

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_there_is_an_example_per_family():
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: re.search(r"pykern\.(\w+)", code)[1])
def test_example_runs(code):
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    refused = re.search(r"NotImplementedError: (\w+): .* has no CUDA kernel for (\w+)", finished.stderr)
    if refused and pykern.choose_device().type == "cuda":
        assert refused[2] not in pykern._native.cuda_ops
    else:
        assert finished.returncode == 0, finished.stderr


def test_a_headline_that_no_row_has_is_told():
    table = "| case | ms |\n| --- | ---: |\n| gae 3 | 1 |"
    assert readme.headlines(table, "gae") == table
    with pytest.raises(SystemExit, match="no row of the table with .* begins with 'other'; change HEADLINES"):
        readme.headlines(table, "other")


def test_tables_agree_with_the_records():
    finished = subprocess.run(
        [sys.executable, "-m", "bench.readme", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
