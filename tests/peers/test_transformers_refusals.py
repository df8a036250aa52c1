"""What the transformers adapter refuses, each in one line that names the argument."""

import pytest
import torch
import transformers

from pykern.integrations.transformers import register, tree_kwargs
from tests.peers.decoders import NAME, TREES, make_batch, make_model, make_model_of_parts

TREE = TREES["levels"]()
TOKENS = make_batch(TREE)[0][None]
KEYWORDS = tree_kwargs(TREE)
TREE_NAMES = [name for name in KEYWORDS if name.startswith("tree_")]


def call(model, **changes):
    keywords = {**KEYWORDS, **changes}
    return model(keywords.pop("input_ids", TOKENS), **keywords)


def refused(error, pattern, function, *arguments, **keywords):
    with pytest.raises(error, match=pattern) as caught:
        function(*arguments, **keywords)
    assert "\n" not in str(caught.value)


@pytest.fixture
def model():
    return make_model("llama")


def hides_the_first(length):
    mask = torch.ones(1, length, dtype=torch.int64)
    mask[:, 0] = 0
    return mask


@pytest.mark.parametrize(
    "changes, pattern",
    [
        (dict.fromkeys(TREE_NAMES), r"^tree: expected the keyword arguments of tree_kwargs"),
        ({"tree_order": None}, r"^tree: expected the keyword arguments of tree_kwargs"),
        ({"attention_mask": hides_the_first(30)}, r"^attention_mask: expected None, got one that hides tokens"),
        ({"attention_mask": torch.zeros(1, 1, 30, 30)}, r"^attention_mask: expected None, got shape \(1, 1, 30, 30\)"),
        ({"input_ids": TOKENS.repeat(2, 1)}, r"^input_ids: expected one packed row .* got 2 rows"),
        ({"output_attentions": True}, r"^output_attentions: expected None, got bool"),
        ({"position_bias": torch.zeros(1, 4, 30, 30)}, r"^position_bias: expected None, got Tensor"),
        ({"cu_seq_lens_q": torch.tensor([0, 30])}, r"^cu_seq_lens_q: expected None, got Tensor"),
        ({"is_causal": False}, r"^is_causal: expected causal attention, got bidirectional"),
        (
            {"input_ids": TOKENS[:, :7], "position_ids": KEYWORDS["position_ids"][:, :7]},
            r"^tree: expected q's 7 tokens",
        ),
    ],
)
def test_arguments_of_the_call(model, changes, pattern):
    refused(ValueError, pattern, call, model, **changes)


def test_mask_of_ones_is_no_mask(model):
    assert torch.equal(call(model, attention_mask=torch.ones_like(TOKENS)).logits, call(model).logits)


def test_cache_that_holds_tokens(model):
    filled = call(model, use_cache=True)
    assert torch.equal(filled.logits, call(model).logits)
    refused(
        ValueError,
        r"^past_key_values: expected no cache, got 60 keys for 30 tokens",
        call,
        model,
        past_key_values=filled.past_key_values,
    )
    static = transformers.StaticCache(config=model.config, max_cache_len=64)
    refused(ValueError, r"^past_key_values: expected no cache, got 64 keys", call, model, past_key_values=static)


def test_generate(model):
    model.eval()
    refused(ValueError, r"^tree: .* to generate", model.generate, TOKENS, max_new_tokens=2)
    model.set_attn_implementation("sdpa")
    assert model.generate(TOKENS, max_new_tokens=2).shape == (1, 32)


def test_dropout():
    model = make_model("llama", attention_dropout=0.25)
    refused(ValueError, r"^dropout: expected 0, got 0.25; make the model with attention_dropout=0.0", call, model)
    assert call(model.eval()).logits.shape == (1, 30, 97)


def tiny(kind, **changes):
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return getattr(transformers, kind)(**sizes, **changes)


def test_models_whose_other_layers_mix_tokens():
    layers = ["linear_attention", "full_attention"]
    config = tiny("Qwen3NextConfig", layer_types=layers, num_key_value_heads=2, num_experts=0, intermediate_size=48)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
    refused(ValueError, r"^config.layer_types: expected .* got linear_attention", call, model)


def test_attention_by_chunks():
    config = tiny("Llama4TextConfig", num_key_value_heads=2, intermediate_size=48, intermediate_size_mlp=48)
    config.layer_types = ["chunked_attention", "full_attention"]
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
    refused(ValueError, r"^config.layer_types: expected .* got chunked_attention", call, model)


def test_models_that_do_not_use_the_interface():
    config = transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
    refused(ValueError, r"^attn_implementation: expected a model that uses .* got one of BloomConfig", call, model)


def test_models_that_give_attention_no_keyword_arguments():
    config = tiny("NemotronConfig", num_key_value_heads=2, intermediate_size=48)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
    refused(ValueError, r"^tree: .* got none in NemotronAttention; .* if this model gives", call, model)


def test_encoders():
    config = tiny("BertConfig", intermediate_size=48)
    model = transformers.AutoModel.from_config(config, attn_implementation=NAME)
    refused(ValueError, r"^is_causal: expected causal attention, got bidirectional", model, TOKENS)


def test_masks_with_rules_of_their_own():
    model = make_model("gemma3", use_bidirectional_attention=True)
    refused(ValueError, r"^attention_mask: expected a causal mask .* adds a rule of its own", call, model)


def test_image_tokens_that_see_one_another():
    model = make_model_of_parts()
    types = torch.zeros_like(TOKENS)
    pattern = r"^attention_mask: expected a causal mask .* adds a rule of its own"
    refused(ValueError, pattern, call, model, token_type_ids=types)


def test_arguments_of_register_and_tree_kwargs():
    refused(TypeError, r"^name: expected a string", register, None)
    refused(TypeError, r"^name: expected a string", register, "")
    for taken in ("sdpa", "eager"):
        refused(ValueError, r"^name: expected one that is free", register, taken)
    refused(TypeError, r"^tree: expected a PrefixTree, got tuple", tree_kwargs, (TREE.subtree_end, TREE.position))
