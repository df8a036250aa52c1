"""The benches of a GPU's link, in little: all of them but the compiled steps, on the CPU and simulated streams."""

import json

import pytest
import torch

from bench import harness
from bench.offload import cases_gpu
from bench.timing import link_rates
from tests.offload.support import assert_bit_equal

EAGER = {name: peer for name, peer in cases_gpu.PEERS.items() if "compile" not in name}
LIMITS = harness.Limits({"float32": 1e12, "bfloat16": 1e12}, 1e9)


def test_every_provider_has_its_time_and_memory(monkeypatch, tmp_path, capsys):
    path = tmp_path / "offload.json"
    cases = cases_gpu.cases("cpu", EAGER)
    assert len({case.label for case in cases}) == len(cases) == 5
    monkeypatch.setattr(harness, "measure_limits", lambda device: LIMITS)
    monkeypatch.setattr(harness, "link_rates", lambda device: link_rates(device)[:1])
    # As on a GPU: all in this process.
    monkeypatch.setattr(harness, "run_alone", lambda function, device, *arguments: function(device, *arguments))
    monkeypatch.setattr(harness, "load_cases", lambda families, device: cases)
    record = harness.run(cases[:4], 0.0, path=path)
    assert json.loads(path.read_text()) == record and record["missing"] == {}
    out, back = record["limits"]["links"]["out"], record["limits"]["links"]["back"]
    assert record["links"][0]["out"] == out and record["links"][0]["back"] == back
    copies = [row for row in record["rows"] if row["name"].startswith("copies")]
    assert [row["provider"] for row in copies] == ["pykern", "copy_"] * 3
    for row in copies:
        assert row["limit"] == f"link {row['name'].split()[1]}" and "peak_bytes" not in row
        assert row["percent_of_limit"] == pytest.approx(
            100 * row["gb_per_s"] * 1e9 / (out if "out" in row["limit"] else back)
        )
    steps = [row for row in record["rows"] if row["name"].startswith("step")]
    assert [row["provider"] for row in steps[1:]] == ["pykern, all layers", "no offload", *EAGER]
    assert all(isinstance(row["peak_bytes"], int) for row in steps)
    printed = capsys.readouterr().out
    assert "planned: " in printed and "of 4 layers leave" in printed and "GB at most" in printed
    assert "link to host" in printed


@pytest.mark.parametrize("block_type", [cases_gpu.Block, cases_gpu.FusedBlock])
def test_every_step_has_the_same_gradients(block_type):
    stack = cases_gpu.Stack(cases_gpu.SIZES["cpu"], block_type)
    found = {}
    for name, step in cases_gpu.steps(stack, EAGER).items():
        step()
        found[name] = [parameter.grad.clone() for parameter in stack.blocks.parameters()]
    assert len(found) == 5
    for gradients in found.values():
        assert_bit_equal(gradients, found["no offload"])


@pytest.mark.parametrize("parts", [1, 256])
def test_copies_move_what_they_should(parts):
    block, device = torch.arange(1 << 20).to(torch.uint8), cases_gpu.stream_device(torch.device("cpu"))
    engine = cases_gpu.StreamedEngine(device, slot_bytes=[block.numel()])
    cases_gpu.out(engine, list(block.chunk(parts)))()
    cases_gpu.back(engine, block)()
    counters = engine.counters()
    assert (counters["offloads"], counters["reloads"], counters["slots"]) == (2, 1, 1)
    assert counters["offloaded_bytes"] == 2 * block.numel()


def test_a_torch_without_compiled_offload_is_told(monkeypatch):
    from torch._functorch import config

    stack = cases_gpu.Stack(cases_gpu.SIZES["cpu"], cases_gpu.Block)
    step = cases_gpu.CompiledOffload(stack)
    monkeypatch.setattr(step, "_settings", {"no_such_setting": True})
    assert not hasattr(config, "no_such_setting")
    with pytest.raises(NotImplementedError, match=r"torch .* has no torch._functorch.config.no_such_setting"):
        step()
