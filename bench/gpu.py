"""One run on a machine with a GPU: tests, golden vectors, benches and sanitizers, as JSON and a table.

`make gpu OUT=folder` calls it; it needs no network, and ends within nine minutes: what there is no time for is not
run, and says so. A step that fails or runs out of time is reported in its line, and the others still run. Exit status
1 if a step did not pass.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("attention", "policy", "lowrank", "offload")
SHORTEST_STEP = 5  # seconds
# Whole training steps, compiled ones among them, take their time.
BENCH_SECONDS = {"attention": 90, "policy": 90, "lowrank": 90, "offload": 180}
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")


@dataclass
class Step:
    """A command of the run, and what came of it."""

    name: str
    command: list[str]
    timeout: int
    folder: Path = ROOT
    environment: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    status: str = "not run"
    output: str = ""

    def start(self) -> subprocess.Popen:
        self._begin = time.monotonic()
        # Not a pipe: a full one would hold up the step until those before it are done.
        self._printed = tempfile.TemporaryFile("w+", errors="replace")
        return subprocess.Popen(
            self.command,
            cwd=self.folder,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **self.environment},
            stdout=self._printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def finish(self, process: subprocess.Popen) -> None:
        try:
            process.wait(timeout=max(1.0, self.timeout - (time.monotonic() - self._begin)))
            self.status = "passed" if process.returncode == 0 else f"failed ({process.returncode})"
        except subprocess.TimeoutExpired:
            end(process)
            process.wait()
            self.status = f"ran out of {self.timeout} s"
        with self._printed as printed:
            printed.seek(0)
            self.output = printed.read()
        self.seconds = time.monotonic() - self._begin

    def record(self) -> dict:
        return {
            "name": self.name,
            "command": " ".join(self.command),
            "status": self.status,
            "seconds": round(self.seconds, 1),
            "output_tail": self.output[-4000:],
        }


def end(process: subprocess.Popen) -> None:
    """With what it has started, compilers or workers, which would slow what is timed next."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_together(steps: list[Step], deadline: float) -> None:
    """Runs the steps at the same time, until `deadline` on the monotonic clock. Ctrl-C ends them all."""
    left = int(deadline - time.monotonic())
    if left < SHORTEST_STEP:
        for step in steps:
            print(f"{step.name:<28} not run, no time is left", flush=True)
        return
    for step in steps:
        step.timeout = min(step.timeout, left)
    processes: list[subprocess.Popen] = []
    try:
        for step in steps:
            processes.append(step.start())
        for step, process in zip(steps, processes, strict=True):
            step.finish(process)
            print(f"{step.name:<28} {step.status:<16} {step.seconds:6.1f} s", flush=True)
    finally:
        for process in processes:
            if process.poll() is None:
                end(process)


def build_step(architecture: str) -> Step:
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    variables = {"PYKERN_CUDA": "1", "PYKERN_CUDA_ARCHS": architecture, "MAX_JOBS": str(os.cpu_count() or 1)}
    return Step("build for this GPU", build, 300, environment=variables)


def install_step(wheel: Path, site: Path) -> Step:
    """Installs the wheel in an empty folder, beside copies of what the other steps run: not this checkout's pykern."""
    if not wheel.is_file():
        raise SystemExit(f"gpu: --wheel {wheel}: expected a wheel of pykern, found no such file")
    shutil.rmtree(site, ignore_errors=True)
    for name in ("tests", "bench", "kernels"):
        shutil.copytree(ROOT / name, site / name)
    shutil.copy(ROOT / "pyproject.toml", site)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site)]
    return Step("install the wheel", [*command, str(wheel.resolve())], 60)


def has_module(name: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, check=False).returncode == 0


def test_step(out: Path, folder: Path) -> Step:
    folders = [*(f"tests/{family}" for family in FAMILIES), "tests/cuda"]
    workers = ["-n", "4"] if has_module("xdist") else []
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-k",
        "cuda",
        *workers,
        f"--junitxml={out / 'tests.xml'}",
        *folders,
    ]
    return Step("tests on cuda", command, 210, folder)


def sanitizer_steps(folder: Path) -> list[Step]:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return []
    cases = [sys.executable, "-m", "tests.kernel_cases"]
    return [
        Step(f"compute-sanitizer {name}", [tool, f"--tool={name}", "--error-exitcode=99", *cases], 200, folder)
        for name in SANITIZERS
    ]


def bench_steps(out: Path, seconds: float, folder: Path) -> list[Step]:
    return [
        Step(
            f"bench {family}",
            [sys.executable, "-m", "pykern", "bench", family, "--device", "cuda", "--seconds", str(seconds),
             "--json", str(out / f"{family}.json")],
            BENCH_SECONDS[family],
            folder,
        )
        for family in FAMILIES
    ]  # fmt: skip


def count_tests(report: Path) -> dict[str, int]:
    """Tests executed, failed and skipped, from pytest's XML."""
    if not report.exists():
        return {"executed": 0, "failed": 0, "skipped": 0}
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total, failed, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites for name in names)
        for names in (("tests",), ("failures", "errors"), ("skipped",))
    )
    return {"executed": total - skipped, "failed": failed, "skipped": skipped}


def bench_lines(out: Path) -> list[str]:
    """One line per case: milliseconds, share of the limit, each peer's time over pykern's; of steps, memory."""
    lines = []
    for family in FAMILIES:
        path = out / f"{family}.json"
        if not path.exists():
            continue
        record = json.loads(path.read_text())
        by_case: dict[str, list[dict]] = {}
        for row in record["rows"]:
            by_case.setdefault(f"{row['family']}/{row['name']}[{row['shape']}]", []).append(row)
        for label, rows in by_case.items():
            ours, *peers = rows
            limit = f"{ours['percent_of_limit']:5.1f}% of {ours['limit']}" if ours["limit"] else ""
            ratios = ", ".join(map(ratio_of, rows if "peak_bytes" in ours else peers))
            lines.append(f"{label:<64} {ours['ms_p50']:9.4f} ms  {limit:<18} {ratios}")
        lines += [link_line(link) for link in record.get("links", ())]
        lines += [f"{label:<64} not run: {reason}" for label, reason in record["missing"].items()]
    return lines


def ratio_of(row: dict) -> str:
    memory = f" at {row['peak_bytes'] / 1e9:.2f} GB" if "peak_bytes" in row else ""
    return f"{row['provider']} {row['time_over_pykern']:.2f}x{memory}"


def link_line(link: dict) -> str:
    rates = (link[name] / 1e9 for name in ("out", "back", "out_beside_back", "back_beside_out"))
    apart = "out {:.2f}, back {:.2f}, at once {:.2f} and {:.2f} GB/s".format(*rates)
    return f"link to {link['memory']} memory, {link['nbytes'] / 2**20:g} MiB: {apart}"


def summarize(steps: list[Step], out: Path) -> tuple[str, dict]:
    tests = count_tests(out / "tests.xml")
    lines = ["", f"{'step':<28} {'result':<16} {'seconds':>8}"]
    lines += [f"{step.name:<28} {step.status:<16} {step.seconds:8.1f}" for step in steps]
    lines += [
        "",
        f"tests on cuda: {tests['executed']} executed, {tests['failed']} failed, {tests['skipped']} skipped",
        "",
    ]
    lines += bench_lines(out)
    return "\n".join(lines), {"tests": tests, "steps": [step.record() for step in steps]}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="where JSON, golden vectors and summary go"
    )
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="install this wheel instead of building")
    parser.add_argument("--minutes", type=float, default=9.0, help="for the whole run")
    parser.add_argument("--seconds", type=float, default=0.2, help="measuring time per provider and case")
    options = parser.parse_args(arguments)
    # The summary has the last seconds.
    deadline = time.monotonic() + 60 * options.minutes - 10
    import torch

    if not torch.cuda.is_available():
        print(
            "gpu: this machine has no GPU that torch can use; 'make test' runs the kernels on the emulator",
            file=sys.stderr,
        )
        return 2
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    # Written out: the package isn't built yet.
    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")

    folder = ROOT if options.wheel is None else ROOT / "build" / "gpu"
    install = build_step(architecture) if options.wheel is None else install_step(options.wheel, folder)
    run_together([install], deadline)
    steps = [install]
    if install.status == "passed":
        tests = test_step(out, folder)
        golden = Step("golden vectors", [sys.executable, "-m", "tests.emulator.golden", "--record"], 120, folder)
        run_together([tests, golden], deadline)
        # By themselves: nothing else may use the GPU or the processor.
        benches = bench_steps(out, options.seconds, folder)
        for bench in benches:
            run_together([bench], deadline)
        sanitizers = sanitizer_steps(folder)
        run_together(sanitizers, deadline)
        steps += [tests, golden, *benches, *sanitizers]
        with zipfile.ZipFile(out / "golden.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted((folder / "tests" / "emulator" / "golden").glob("*")):
                archive.write(path, path.name)
    text, record = summarize(steps, out)
    record["device"] = torch.cuda.get_device_name()
    record["torch"], record["cuda"] = torch.__version__, torch.version.cuda
    (out / "summary.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "summary.txt").write_text(text + "\n")
    (out / "tests.xml").unlink(missing_ok=True)
    print(text)
    if not shutil.which("compute-sanitizer"):
        print("compute-sanitizer is not on the PATH: the sanitizers did not run")
    return int(any(step.status != "passed" for step in steps))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
