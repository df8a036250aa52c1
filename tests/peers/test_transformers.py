"""Models of transformers on a packed tree against the same models on repeated prefixes with their own attention."""

import doctest
import subprocess
import sys

import pytest
import torch
import transformers

import pykern
from pykern.integrations import transformers as adapter
from tests.peers.decoders import (
    MODELS,
    NAME,
    OPTIONS,
    TREES,
    make_model,
    make_model_of_parts,
    run_packed,
    run_repeated,
)
from tests.support import assert_accurate, compile_whole

# Roundings of the largest magnitude; a wrong visible pair is beyond a thousand times this.
UNITS = 50.0


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        try:
            assert_accurate(found[name], tensor, units=UNITS)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("model", MODELS)
def test_packed_tree_equals_repeated_prefixes(model, tree):
    tree = TREES[tree]()
    assert_same(run_packed(make_model(model), tree), run_repeated(make_model(model, "eager"), tree))


@pytest.mark.parametrize("model", ["llama", "mistral"])
def test_implementation_can_be_changed_on_a_model(model):
    tree = TREES["levels"]()
    changed = make_model(model, "sdpa")
    expected = run_repeated(changed, tree)
    changed.set_attn_implementation(NAME)
    assert_same(run_packed(changed, tree), expected)


@pytest.mark.parametrize("model, option", [(model, option) for model in OPTIONS for option in OPTIONS[model]])
def test_what_a_model_asks_for_matters(model, option, monkeypatch):
    """Without it results would be others, so that the comparisons above do test it."""
    tree = TREES["levels"]()
    packed = make_model(model)
    with_it = run_packed(packed, tree, backward=False)["logits"]

    def without(*tensors, **keywords):
        return pykern.prefix_attention(*tensors, **{**keywords, option: None})

    monkeypatch.setattr(adapter, "prefix_attention", without)
    without_it = run_packed(packed, tree, backward=False)["logits"]
    assert (with_it - without_it).abs().max() > 0.01 * with_it.abs().max()


def test_layers_may_differ(monkeypatch):
    seen = []

    def spy(*tensors, **keywords):
        seen.append((keywords["window"], keywords["softcap"], keywords["scale"]))
        return pykern.prefix_attention(*tensors, **keywords)

    monkeypatch.setattr(adapter, "prefix_attention", spy)
    run_packed(make_model("gemma2"), TREES["levels"](), backward=False)
    assert seen == [(5, 2.0, 7**-0.5), (None, 2.0, 7**-0.5)]


def test_logprobs_of_responses_from_the_rows_that_predict_them():
    """Log-probabilities of responses from the logits of the rows that predict them, which alone are computed."""
    prompts, responses = [[5, 6, 7], [8]], [[[1, 2], [3], []], [[4, 5, 6]]]
    batch = pykern.pack(prompts, responses)
    model = make_model("llama")
    keywords = adapter.tree_kwargs(batch.tree)
    kept = model(batch.token_ids[None], logits_to_keep=batch.predictor_rows, **keywords).logits[0]
    found = pykern.token_logprobs(kept, batch.targets)

    model.set_attn_implementation("eager")
    expected = []
    for prompt, group in zip(prompts, responses, strict=True):
        for response in group:
            logits = model(torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            expected.append(logits.log_softmax(-1)[range(len(response)), response])
    assert_accurate(found, torch.cat(expected), units=UNITS)


# --- other ways to run a model -----------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_activation_checkpointing(model, reentrant, monkeypatch):
    tree = TREES["levels"]()
    checkpointed = make_model(model)
    expected = run_packed(checkpointed, tree)
    calls = 0

    def spy(*tensors, **keywords):
        nonlocal calls
        calls += 1
        return pykern.prefix_attention(*tensors, **keywords)

    monkeypatch.setattr(adapter, "prefix_attention", spy)
    checkpointed.activation_checkpointing_enable({"use_reentrant": reentrant})
    found = run_packed(checkpointed, tree)
    assert calls == 2 * checkpointed.config.num_hidden_layers
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("model", ["llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt_oss"])
def test_compile_in_one_graph(model):
    tree = TREES["levels"]()
    plain = make_model(model)
    expected = run_packed(plain, tree)
    assert_same(run_packed(Compiled(plain), tree), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("model", ["llama", "gemma2"])
def test_compile_in_one_graph_with_activation_checkpointing(model, reentrant):
    tree = TREES["groups"]()
    plain = make_model(model)
    expected = run_packed(plain, tree)
    plain.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(run_packed(Compiled(plain), tree), expected)


def test_compiled_once_for_trees_of_any_size():
    plain = make_model("mistral")
    compiled = Compiled(plain)
    for tree in TREES.values():
        assert_same(run_packed(compiled, tree()), run_packed(plain, tree()))


class Compiled:
    """A model whose forward is compiled; its parameters stay its own."""

    def __init__(self, model):
        self.compiled = compile_whole(model)
        self.zero_grad, self.named_parameters = model.zero_grad, model.named_parameters

    def __call__(self, *arguments, **keywords):
        return self.compiled(*arguments, **keywords)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("model", ["llama", "mistral", "gemma2", "gemma3", "gpt_oss"])
def test_half_precision(model, dtype):
    tree = TREES["groups"]()
    # Every expert is chosen: rounding must not choose others.
    changes = {"num_experts_per_tok": 4} if model == "gpt_oss" else {}
    packed, repeated = (make_model(model, name, dtype, **changes) for name in (NAME, "eager"))
    exact = run_repeated(make_model(model, "eager", **changes).to(dtype).float(), tree)
    found, baseline = run_packed(packed, tree), run_repeated(repeated, tree)
    for name, tensor in exact.items():
        assert found[name].dtype == dtype
        assert_accurate(found[name], tensor, baseline[name], units=4.0)


def test_autocast():
    tree = TREES["groups"]()
    for model in ("llama", "qwen3"):
        exact = run_repeated(make_model(model, "eager"), tree)
        with torch.autocast("cpu", torch.bfloat16):
            found = run_packed(make_model(model), tree)
            baseline = run_repeated(make_model(model, "eager"), tree)
        for name, tensor in exact.items():
            assert_accurate(found[name].bfloat16(), tensor, baseline[name], units=4.0)


def test_text_part_of_a_model_of_several_parts():
    model = make_model_of_parts()
    assert model.config.vision_config._attn_implementation != NAME
    tree = TREES["levels"]()
    found = run_packed(model, tree, backward=False)
    model.set_attn_implementation("eager")
    assert_same(found, run_repeated(model, tree, backward=False))


# --- registering -------------------------------------------------------------------------------------


def test_register_adds_and_changes_nothing_else():
    interfaces = (transformers.AttentionInterface, transformers.AttentionMaskInterface)
    before = [dict(interface()) for interface in interfaces]
    assert adapter.register("other_name") == "other_name"
    try:
        for interface, entries in zip(interfaces, before, strict=True):
            assert {name: value for name, value in interface().items() if name != "other_name"} == entries
        assert_same(
            run_packed(make_model("llama", "other_name"), TREES["levels"](), backward=False),
            run_packed(make_model("llama"), TREES["levels"](), backward=False),
        )
    finally:
        for interface in interfaces:
            del interface._global_mapping["other_name"]


def test_pykern_imports_no_transformers():
    check = "import pykern, sys; sys.exit('transformers' in sys.modules or 'pykern.integrations' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_example_of_the_documentation():
    failed, attempted = doctest.testmod(adapter)
    assert attempted >= 10
    assert failed == 0


def test_tree_kwargs_are_plain_tensors_of_the_tree():
    tree = TREES["padded"]()
    keywords = adapter.tree_kwargs(tree)
    assert keywords["position_ids"].tolist() == [tree.position.tolist()]
    assert keywords["position_ids"].dtype == torch.int64
    assert all(type(value) in (torch.Tensor, bool) for value in keywords.values())
    passed = [value for name, value in keywords.items() if name.startswith("tree_")]
    assert all(value is tensor for value, tensor in zip(passed, tree.tensors, strict=True))
