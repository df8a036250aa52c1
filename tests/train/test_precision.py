"""--dtype mixed: float32 weights under bfloat16 products, which is how a GPU trains; and what a GPU runs by default."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pykern.train import cli
from pykern.train.batch import Groups, pack_groups
from pykern.train.compare import PlainUpdate
from pykern.train.making import make_model, make_optimizer
from pykern.train.trainer import Trainer
from tests.support import DEVICES, on

from .support import TINY_OPTIONS, tiny_trainer

SMALL = {"prompts": 2, "responses": 2, "max_response": 3, "warmup_prompts": 2, "offload": "none"}


def drawn(trainer: Trainer) -> Groups:
    """Responses with advantages of both signs, whatever their rewards are."""
    groups, _ = trainer.collect()
    groups.advantages = torch.linspace(-1, 1, len(groups.advantages)) + 0.1
    return groups


def test_weights_gradients_and_moments_stay_float32():
    trainer = tiny_trainer(dtype="mixed", **SMALL)
    trainer.supervised_step()
    trainer.update(drawn(trainer))
    parameters = list(trainer.model.parameters())
    assert {tensor.dtype for p in parameters for tensor in (p, p.grad)} == {torch.float32}
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    assert {v.dtype for v in states if torch.is_tensor(v) and v.is_floating_point()} == {torch.float32}


class FirstTypes(TorchDispatchMode):
    """Which of pykern's ops were called, with the type of their first argument where it is a tensor."""

    def __init__(self):
        super().__init__()
        self.seen: set[tuple[str, torch.dtype]] = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "pykern" and isinstance(arguments[0], torch.Tensor):
            self.seen.add((function.name(), arguments[0].dtype))
        return function(*arguments, **(keywords or {}))


def test_attention_and_the_head_get_bfloat16():
    trainer = tiny_trainer(dtype="mixed", **SMALL)
    with FirstTypes() as types:
        trainer.supervised_step()
        trainer.collect()
    names = ("pykern::prefix_attention_forward", "pykern::linear_token_logprobs")
    assert {(n, t) for n, t in types.seen if n in names} == {(name, torch.bfloat16) for name in names}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["mixed", "bfloat16"])
def test_steps_on_every_device(device, dtype):
    """One supervised step and one update, against float32 on the CPU."""
    exact = tiny_trainer(**SMALL)
    groups = drawn(exact)
    want = [exact.update(groups), exact.supervised_step()]
    with on(device) as place:
        trainer = tiny_trainer(dtype=dtype, device=place.type, **SMALL)
        groups.advantages, groups.old_logprobs = (t.to(place) for t in (groups.advantages, groups.old_logprobs))
        found = [trainer.update(groups), trainer.supervised_step()]
    for got, expected in zip(found, want):
        assert got["loss"] == pytest.approx(expected["loss"], rel=0.02, abs=0.02)
        assert got["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=0.05)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("mixed", 0.02), ("bfloat16", 0.1)])
def test_sampled_logprobs_are_those_of_the_update(dtype, tolerance):
    trainer = tiny_trainer(dtype=dtype, **SMALL)
    groups, _ = trainer.collect()
    with torch.no_grad():
        again = trainer.logprobs(pack_groups(groups, trainer.device), trainer.config.temperature)
    torch.testing.assert_close(groups.old_logprobs, again, rtol=0, atol=tolerance)


def test_the_plain_update_computes_in_the_same_types():
    trainer = tiny_trainer(dtype="mixed", **SMALL)
    groups = drawn(trainer)
    model = make_model(trainer.config, trainer.device)
    plain = PlainUpdate(trainer.config, model, make_optimizer(trainer.config, model, 1e-3))(groups)
    ours = trainer.update(groups, comparing=True)
    assert plain["gradient"].dtype == torch.float32
    error = (plain["gradient"] - ours["gradient"]).norm() / plain["gradient"].norm()
    assert 1e-5 < error < 0.05


@pytest.mark.parametrize(
    "options, dtype, offload",
    [
        ([], "mixed", "none"),
        (["--dtype", "bfloat16"], "bfloat16", "none"),
        (["--offload", "memory"], "mixed", "memory"),
    ],
)
def test_defaults_on_a_gpu(monkeypatch, tmp_path, options, dtype, offload):
    monkeypatch.setattr(cli, "choose", lambda name: "cuda")
    monkeypatch.setattr(cli, "resolve", lambda config, name: "cpu")
    config = cli.prepare([*TINY_OPTIONS, "--out", str(tmp_path / "run"), *options])[0]
    assert (config.dtype, config.offload) == (dtype, offload)
