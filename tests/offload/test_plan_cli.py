"""`python -m pykern plan`: what its options mean, what it writes, and one line for what cannot be."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pykern.offload import planning
from pykern.offload.planning.cli import InputError, main, make_plan
from pykern.offload.planning.cost import layer_bytes, layer_flops
from pykern.offload.planning.orders import SCHEDULES
from pykern.offload.planning.planner import plan
from pykern.offload.planning.table import table
from pykern.offload.planning.types import Times

SMALL = ["--devices", "4", "--microbatches", "8"]


def test_as_a_command(tmp_path):
    picture, plan_file = tmp_path / "plan.png", tmp_path / "plan.json"
    command = [sys.executable, "-m", "pykern", "plan", "po_h", *SMALL, "--chunks", "2", "--k", "0.8",
               "--png", str(picture), "--json", str(plan_file)]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    made = plan("po_h", 4, 2, 8, times=(1.0, 1.0, 1.0), bytes=1, bandwidth=2 / (0.8 * 3))
    assert result.stdout == table(made) + "\n"
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    written = json.loads(plan_file.read_text())
    assert {name: written[name] for name in ("schedule", "devices", "chunks", "microbatches", "seconds")} == {
        "schedule": "po", "devices": 4, "chunks": 2, "microbatches": 8, "seconds": made.seconds,
    }  # fmt: skip
    for rank, content in enumerate(written["ranks"]):
        assert [tuple(action[:3]) for action in content["actions"]] == list(made.order.ranks[rank])
        assert [tuple(action[3:]) for action in content["actions"]] == list(made.spans[rank])
        assert content["copies"] == [copy._asdict() for copy in made.copies[rank]]
        assert [tuple(transfer) for transfer in content["transfers"]] == list(made.transfers[rank])
        assert content["host_bytes"] == sum(content["slot_bytes"]) == made.host_bytes[rank]
        assert content["peak_blocks"] == made.peak_blocks[rank] and content["staging_bytes"] == 0
    assert written["times"]["forward"] == [1.0] * 8 and written["seconds_alone"] == made.seconds_alone
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "plan.png"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule(schedule, capsys):
    assert main([schedule, *SMALL, "--offload", "full"]) == 0
    output = capsys.readouterr()
    assert output.out.startswith({"po_h": "po", "po_f": "po"}.get(schedule, schedule) + ": 4 devices, ")
    assert output.err == ""


def test_options_are_plans_arguments(tmp_path):
    options = (
        "--times 11ms,12000us,0.009 --bytes 1.5KiB --bandwidth 3MB,2MB/s --offload 2,1,1,0 --budget 4KiB "
        "--host-budget 3000 --directions two --file-bandwidth 1G --transfer 1ms --group 3 --backward whole "
        "--stall allow --slack 0.1 --shortest 1"
    )
    made, _ = make_plan(["gis", *SMALL, *options.split()])
    times = Times((0.011,) * 8, (0.012,) * 8, (0.009,) * 8, 0.001)
    assert made == plan(
        "gis", 4, 2, 8, times=times, bytes=(1536,) * 8, bandwidth=(3e6, 2e6), offload=(2, 1, 1, 0), budget=4096,
        host_budget=3000, directions="two", file_bandwidth=1e9, group=3, split_backward=False, stall="allow",
        slack=0.1, shortest=1.0,
    )  # fmt: skip
    assert make_plan(["po", *SMALL, "--k", "2", "--no-pairs", "--offload", "1"])[0] == plan(
        "po", 4, 2, 8, times=Times((1.0,) * 8, (1.0,) * 8, (1.0,) * 8), bytes=(1,) * 8, bandwidth=2 / (2 * 3.0),
        pairs=False, offload=1,
    )  # fmt: skip
    file = tmp_path / "stages"
    file.write_text("# per stage\n" + "".join(f"{n + 1}ms, 2ms, 1ms, {n + 3}KiB\n" for n in range(4)) + "\n")
    made, _ = make_plan(["1f1b", "--devices", "4", "--microbatches", "8", "--stages", str(file), "--k", "0.5"])
    assert made.times.forward == (0.001, 0.002, 0.003, 0.004)
    assert made.block_bytes == (3072, 4096, 5120, 6144)
    assert made.request["bandwidth"] == pytest.approx(2 * 6144 / (0.5 * 0.007))
    # The paper's model of 10.5 billion parameters, at 16384 tokens.
    options = "--chunks 5 --layer 16384,5120,40,8 --flops 220T --bandwidth 15G --layers 2 --batch 3"
    made, _ = make_plan(["po_f", *SMALL, *options.split()])
    seconds = [2 * flops / 220e12 for flops in layer_flops(3, 16384, 5120)]
    assert made == plan(
        "po_f", 4, 5, 8, times=Times(*((value,) * 20 for value in seconds)),
        bytes=(2 * 3 * 16384 * 5120 * 168 // 10,) * 20, bandwidth=(15e9, 15e9),
    )  # fmt: skip
    assert made.request["bytes"][0] == round(2 * layer_bytes(3, 16384, 5120, 40, 8))


def test_what_has_no_meaning_is_one_line(tmp_path, capsys):
    stages = tmp_path / "stages"
    stages.write_text("1,1,1\n1,1\n")
    some = tmp_path / "some"
    some.write_text("1,1,1,4\n1,1,1\n")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    empty = tmp_path / "empty"
    empty.write_text("# nothing\n")
    missing = tmp_path / "missing"
    for arguments, message in [
        ([], "the following arguments are required: SCHEDULE, --devices, --microbatches"),
        (["gpipe", *SMALL], "schedule: expected one of gis, gis_h, po, "),
        (["gis", "--devices", "0", "--microbatches", "4"], "devices: expected at least 1, got 0"),
        (["gis", "--devices", "two", "--microbatches", "4"], "argument --devices: invalid int value: 'two'"),
        (["gis", *SMALL, "--chunks", "-1"], "chunks: expected at least 1, got -1"),
        (["gis", *SMALL, "--times", "1,2"], "argument --times: expected forward, input's and weights' backward"),
        (["gis", *SMALL, "--times", "1,2,3h"], "argument --times: expected seconds, such as 11ms, got '3h'"),
        (["gis", *SMALL, "--times=-1,2,3"], "argument --times: expected seconds, such as 11ms, got '-1'"),
        (["gis", *SMALL, "--bytes", "3XB"], "argument --bytes: expected bytes, such as 350MiB, got '3XB'"),
        (["gis", *SMALL, "--bandwidth", "fast"], "argument --bandwidth: expected a rate per second, such as 20GB"),
        (["gis", *SMALL, "--bandwidth", "1e400"], "argument --bandwidth: expected a rate per second, such as 20GB"),
        (["gis", *SMALL, "--bandwidth", "1,2,3"], "argument --bandwidth: expected one rate, or one out and one back"),
        (["gis", *SMALL, "--bandwidth", "0"], "bandwidth: expected a finite number above 0, got 0.0"),
        (["gis", *SMALL, "--k", "0"], "--k: expected a number between 1e-9 and 1e9, got 0"),
        (["gis", *SMALL, "--k", "nan"], "--k: expected a number between 1e-9 and 1e9, got nan"),
        (["gis", *SMALL, "--bytes", "1e30"], "bytes: expected less than 2**63, got 1"),
        (["gis", *SMALL, "--layer", "8," + "9" * 400, "--flops", "1T"], "int too large to convert to float"),
        (
            ["gis", "--devices", "9" * 15, "--microbatches", "1"],
            "devices: expected at most 10000000 blocks, got devices",
        ),
        (["gis", *SMALL, "--slack=-1"], "slack: expected a finite number of at least 0, got -1"),
        (["gis", *SMALL, "--k", "1", "--bandwidth", "1G"], "--k: --bandwidth says how long copies take, too"),
        (["gis", *SMALL, "--offload", "most"], "argument --offload: expected half, full, or a number of chunks"),
        (["gis", *SMALL, "--offload", "3"], "offload: expected at most the 2 chunks of a rank, got 3"),
        (["gis", *SMALL, "--stages", str(stages)], f"--stages {stages}, line 2: expected F,I,W or F,I,W,BYTES"),
        (["gis", *SMALL, "--stages", str(some)], f"--stages {some}: bytes on 1 of 2 lines, expected all or none"),
        (["gis", *SMALL, "--stages", str(binary)], f"--stages {binary}: expected text, one line"),
        (["gis", *SMALL, "--stages", str(empty)], f"--stages {empty}: has no lines F,I,W"),
        (["gis", *SMALL, "--stages", str(missing)], f"--stages {missing}: No such file or directory"),
        (["gis", *SMALL, "--stages", str(some), "--times", "1,1,1"], "--times: --stages has times, too"),
        (["gis", *SMALL, "--layer", "4096"], "argument --layer: expected S,H or S,H,Q,K, such as 4096,5120,40,8"),
        (["gis", *SMALL, "--layer", "4096,0"], "argument --layer: expected S,H or S,H,Q,K, such as 4096,5120,40,8"),
        (["gis", *SMALL, "--layer", "8,8"], "--layer: needs --flops, the operations per second"),
        (["gis", *SMALL, "--layer", "8,8", "--times", "1,1,1"], "--times: --layer has times, too; give one of them"),
        (["gis", *SMALL, "--flops", "220T"], "--flops: goes with --layer; give that, too"),
        (["gis", *SMALL, "--layer", "8,8", "--flops", "1T", "--batch", "0"], "--batch: expected more than 0, got 0"),
        (["gis", *SMALL, "--png", str(missing / "a.png")], f"--png {missing / 'a.png'}: No such file or directory"),
        (["gis", *SMALL, "--json", str(tmp_path)], f"--json {tmp_path}: Is a directory"),
        (["gis", *SMALL, "--png", str(tmp_path / "a.png"), "--png-inches", "0"], "--png-inches: expected 1 to 200"),
    ]:
        assert main(arguments) == 2, arguments
        output = capsys.readouterr()
        assert output.out == "" and output.err.count("\n") == 1
        assert output.err.startswith(f"pykern plan: {message}"), output.err
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == ["binary", "empty", "some", "stages"]
    with pytest.raises(InputError, match="^--bytes: --stages has bytes, too; give one of them$"):
        four = tmp_path / "four"
        four.write_text("1,1,1,4\n" * 8)
        make_plan(["gis", *SMALL, "--stages", str(four), "--bytes", "4"])


def test_planning_needs_neither_torch_nor_matplotlib():
    for path in Path(planning.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in imports if isinstance(node, ast.ImportFrom) and node.level == 0}
        found = {name.partition(".")[0] for name in names} & {"torch", "numpy", "pykern", "matplotlib"}
        assert found <= ({"matplotlib"} if path.name == "drawing.py" else set()), path.name
        # Only when something is drawn, or for a type checker.
        assert not any(isinstance(node, ast.Import | ast.ImportFrom) and "matplotlib" in ast.unparse(node)
                       for node in tree.body)  # fmt: skip


def test_no_png_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["gis", *SMALL, "--png", str(tmp_path / "a.png")]) == 2
    assert capsys.readouterr().err == "pykern plan: png: drawing a plan needs matplotlib; pip install matplotlib\n"
    assert main(["gis", *SMALL]) == 0
    assert list(tmp_path.iterdir()) == []
