"""verl's own CPU tests, which its package brings along, with pykern's functions in the places of verl's."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import verl

HERE = Path(__file__).parent
THEIRS = Path(verl.__file__).parent.parent / "tests" / "trainer" / "ppo"
SUITES = {
    "test_core_algos_on_cpu.py": 20,
    "test_loss_aggregation_on_cpu.py": 6,
    "test_rollout_corr.py": 15,
    "test_reinforce_pp_multiturn_on_cpu.py": 6,
    "test_dynamic_policy_losses_on_cpu.py": 1,
}
"""Files, and how many of their tests are to pass at least."""


@pytest.mark.parametrize("name", SUITES)
def test_verls_own_tests(name, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "verl_substitution", "-p", "no:cacheprovider", THEIRS / name],
        cwd=tmp_path,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent.parent)]), "VERL_FORCE_DEVICE": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= SUITES[name]
    assert int(re.search(r"calls of pykern: (\d+)", done.stdout)[1]) > 0
