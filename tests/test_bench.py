"""The bench's arithmetic, and the report of `make gpu`, on figures made up here."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pykern
from bench import gpu, harness
from bench.timing import CpuClock

ROOT = Path(__file__).resolve().parent.parent
LIMITS = harness.Limits({"float32": 1e12, "bfloat16": 4e12}, 1e9)


def case(flops: float = 0.0, moved: float = 0.0, dtype: str = "float32") -> harness.Case:
    providers = {"pykern": lambda: time.sleep(1e-3), "slow peer": lambda: time.sleep(4e-3)}
    return harness.Case("policy", "op", "3x5", lambda: providers, flops, moved, dtype)


def test_floor_is_the_larger_of_both_bounds():
    assert harness.floor_of(case(flops=2e9, moved=1e6), LIMITS) == (2e-3, "arithmetic")
    assert harness.floor_of(case(flops=2e9, moved=3e6), LIMITS) == (3e-3, "memory")
    assert harness.floor_of(case(flops=2e9, dtype="bfloat16"), LIMITS) == (0.5e-3, "arithmetic")


def test_rows_compare_providers_in_one_run():
    timed = case(moved=5e5)
    ours, peer = harness.rows(timed, harness.time_case(timed, torch.device("cpu"), seconds=0.05), LIMITS)
    assert ours["provider"] == "pykern" and ours["time_over_pykern"] == 1.0
    assert peer["time_over_pykern"] > 1.5
    assert 0 < ours["percent_of_limit"] < 50 and ours["limit"] == "memory"
    assert ours["timed_by"] == "wall clock"


def test_quick_calls_are_timed_together():
    assert CpuClock(lambda: None).calls > 100


def test_a_peer_that_fails_is_told_and_the_others_are_timed(monkeypatch, tmp_path, capsys):
    def fail():
        raise ValueError("no such shape\nand more")

    providers = {"pykern": lambda: None, "broken": fail, "peer": lambda: None}
    run_here(monkeypatch, harness.Case("policy", "op", "1", lambda: providers))
    record = harness.run(harness.load_cases(), 0.01, path=tmp_path / "record.json")
    assert [row["provider"] for row in record["rows"]] == ["pykern", "peer"]
    assert record["missing"] == {"policy/op[1] broken": "ValueError: no such shape"}
    assert json.loads((tmp_path / "record.json").read_text()) == record
    assert "broken not run: ValueError: no such shape" in capsys.readouterr().out
    run_here(monkeypatch, harness.Case("policy", "op", "1", lambda: {"pykern": fail}))
    with pytest.raises(ValueError, match="no such shape"):
        harness.run(harness.load_cases(), 0.01)


def run_here(monkeypatch, case: harness.Case) -> None:
    """This is the only case, and it is timed in this process."""
    monkeypatch.setattr(harness, "measure_limits", lambda device: LIMITS)
    monkeypatch.setattr(harness, "load_cases", lambda *arguments: [case])
    monkeypatch.setattr(harness, "run_alone", lambda function, device, *arguments: function(device, *arguments))


def test_what_goes_over_a_link_is_held_to_the_link():
    copy = harness.Case("offload", "copies out", "1", dict, bytes=1e6, link="out")
    assert harness.floor_of(copy, LIMITS) == (0.0, "link out")
    assert harness.floor_of(copy, replace(LIMITS, links={"out": 5e8, "back": 1e8})) == (2e-3, "link out")


def test_op_without_a_kernel_is_recorded_with_its_reason(monkeypatch, capsys):
    def refuse():
        raise NotImplementedError("op: no CUDA kernel")

    run_here(monkeypatch, harness.Case("policy", "op", "1", refuse))
    record = harness.run(harness.load_cases(), 0.01)
    assert record["rows"] == [] and record["missing"] == {"policy/op[1]": "op: no CUDA kernel"}
    assert "not run: op: no CUDA kernel" in capsys.readouterr().out


def test_a_case_on_the_cpu_has_a_process_of_its_own():
    cpu = torch.device("cpu")
    assert harness.run_alone(process_id, cpu) not in (os.getpid(), harness.run_alone(process_id, cpu))
    (case,) = (case for case in harness.load_cases(("policy",)) if case.name == "gae")
    (ours, *_), _ = harness.run_alone(harness.time_listed, cpu, "policy", case.label, 0.01)
    assert ours.provider == "pykern" and 0 < ours.p20 <= ours.p50 <= ours.p80


def process_id(device: torch.device) -> int:
    return os.getpid()


def test_cases_have_different_labels():
    for device in ("cpu", "cuda"):
        labels = [case.label for case in harness.load_cases(device=device)]
        assert len(set(labels)) == len(labels)


def test_cases_for_a_gpu_are_more_than_those_for_a_cpu():
    labels = {device: {case.label for case in harness.load_cases(device=device)} for device in ("cpu", "cuda")}
    assert "policy/policy_loss grpo[16384x8192]" in labels["cuda"] - labels["cpu"]
    assert "policy/token_logprobs_forward[8192x151936 bfloat16]" in labels["cuda"] - labels["cpu"]


def test_floors_are_printed_without_running_anything():
    done = subprocess.run(
        [sys.executable, "-m", "pykern", "bench", "policy", "--floor", "NVIDIA H200"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "token_logprobs_forward[8192x151936 bfloat16]" in done.stdout and "0.5789 ms by memory" in done.stdout


# --- make gpu -------------------------------------------------------------------------------------


@pytest.mark.skipif(pykern.choose_device().type == "cuda", reason="asks for a machine without a GPU")
def test_gpu_run_needs_a_gpu(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--out", str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_make_gpu_asks_for_a_folder():
    done = subprocess.run(["make", "gpu"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "make gpu OUT=folder" in done.stderr


def test_steps_report_failure_and_time_out():
    steps = [
        gpu.Step("good", [sys.executable, "-c", "print('well')"], 60),
        gpu.Step("bad", [sys.executable, "-c", "import sys; sys.exit(7)"], 60),
        gpu.Step("endless", ["sh", "-c", "sleep 60 & echo $!; wait"], 2),
    ]
    gpu.run_together(steps, time.monotonic() + 60)
    assert [step.status for step in steps] == ["passed", "failed (7)", "ran out of 2 s"]
    assert steps[0].output == "well\n" and steps[2].seconds < 20
    # What it had started has ended, too.
    assert not is_running(int(steps[2].output))


def is_running(process: int) -> bool:
    """Neither gone nor dead and waiting for its parent."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_step_that_prints_much_does_not_wait_for_another(tmp_path):
    """The first ends when the second has printed more than a pipe holds."""
    done = tmp_path / "done"
    steps = [
        gpu.Step("waits", ["sh", "-c", f"while [ ! -e {done} ]; do sleep 0.05; done"], 20),
        gpu.Step("prints", ["sh", "-c", f"head -c 1000000 /dev/zero | tr '\\0' x; touch {done}"], 20),
    ]
    gpu.run_together(steps, time.monotonic() + 60)
    assert [step.status for step in steps] == ["passed", "passed"]
    assert len(steps[1].output) == 1_000_000


def test_steps_end_with_the_whole_run(capsys):
    late = gpu.Step("endless", [sys.executable, "-c", "import time; time.sleep(60)"], 60)
    gpu.run_together([late], time.monotonic() + gpu.SHORTEST_STEP + 1)
    assert late.status.startswith("ran out of") and late.seconds < 30
    never = gpu.Step("never", ["true"], 60)
    gpu.run_together([never], time.monotonic() + 1)
    assert never.status == "not run" and "no time is left" in capsys.readouterr().out


@pytest.mark.skipif(pykern.choose_device().type == "cuda", reason="asks for a machine without a GPU")
def test_gpu_run_reports_what_failed(monkeypatch, tmp_path, capsys):
    """The whole run with its steps replaced; the golden vectors, which are not, fail without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    good = ["true"]
    monkeypatch.setattr(gpu, "build_step", lambda architecture: gpu.Step(f"build {architecture}", good, 10))
    monkeypatch.setattr(gpu, "test_step", lambda out, folder: gpu.Step("tests on cuda", good, 10, folder))
    monkeypatch.setattr(gpu, "bench_steps", lambda out, seconds, folder: [gpu.Step("bench policy", good, 10, folder)])
    monkeypatch.setattr(gpu, "sanitizer_steps", lambda folder: [gpu.Step("memcheck", good, 10, folder)])
    assert gpu.main(["--out", str(tmp_path / "out")]) == 1
    record = json.loads((tmp_path / "out" / "summary.json").read_text())
    statuses = {step["name"]: step["status"] for step in record["steps"]}
    assert statuses.pop("golden vectors").startswith("failed")
    assert statuses == dict.fromkeys(("build 90a", "tests on cuda", "bench policy", "memcheck"), "passed")
    assert record["device"] == "some GPU" and (tmp_path / "out" / "golden.zip").exists()
    assert "memcheck" in capsys.readouterr().out


def test_summary_counts_tests_and_compares(tmp_path):
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite tests="9" failures="1" errors="1" skipped="2"></testsuite></testsuites>'
    )
    assert gpu.count_tests(tmp_path / "tests.xml") == {"executed": 7, "failed": 2, "skipped": 2}
    row = {"family": "policy", "name": "op", "shape": "3x5", "ms_p50": 0.5, "limit": "memory", "percent_of_limit": 87.5}
    rows = [
        {**row, "provider": "pykern", "time_over_pykern": 1.0},
        {**row, "provider": "peer", "time_over_pykern": 2.25},
    ]
    (tmp_path / "policy.json").write_text(json.dumps({"rows": rows, "missing": {"policy/other[1]": "no kernel"}}))
    steps = [{**row, "name": "step", "peak_bytes": size * 10**9} for row, size in zip(rows, (3, 9), strict=True)]
    rates = dict.fromkeys(("out", "back", "out_beside_back", "back_beside_out"), 5e10)
    link = {"memory": "registered", "nbytes": 1 << 28, **rates}
    (tmp_path / "offload.json").write_text(json.dumps({"rows": steps, "missing": {}, "links": [link]}))
    text, record = gpu.summarize([gpu.Step("tests on cuda", ["true"], 1, status="passed")], tmp_path)
    assert "7 executed, 2 failed, 2 skipped" in text
    assert "0.5000 ms   87.5% of memory   peer 2.25x" in text
    assert "87.5% of memory   pykern 1.00x at 3.00 GB, peer 2.25x at 9.00 GB" in text
    assert "link to registered memory, 256 MiB: out 50.00, back 50.00, at once 50.00 and 50.00 GB/s" in text
    assert "policy/other[1]" in text and "not run: no kernel" in text
    assert record["steps"][0]["status"] == "passed"


def test_missing_wheel_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="expected a wheel of pykern, found no such file"):
        gpu.install_step(tmp_path / "none.whl", tmp_path / "site")
