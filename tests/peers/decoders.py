"""Tiny random decoder models of transformers, and what they compute sequence by sequence with their own attention."""

import torch
import transformers
from torch import Tensor

import pykern
from pykern.integrations.transformers import register, tree_kwargs
from tests.attention.trees import random_tree, with_padding

NAME = register()
VOCABULARY = 97
WINDOW = 5

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_GEMMA = {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 7}
_EXPERTS = {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}

MODELS = {
    "llama": lambda: transformers.LlamaConfig(**_SIZES),
    "qwen2": lambda: transformers.Qwen2Config(**_SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**_SIZES, head_dim=16),
    # Whose layers tell the window to the mask alone.
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **_SIZES,
        sliding_window=WINDOW,
        use_sliding_window=True,
        max_window_layers=1,
        layer_types=["sliding_attention", "full_attention"],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "mistral": lambda: transformers.MistralConfig(**_SIZES, sliding_window=WINDOW),
    "gemma2": lambda: transformers.Gemma2Config(**_SIZES, **_GEMMA, attn_logit_softcapping=2.0),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_SIZES, **_GEMMA, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(**_SIZES, **_EXPERTS, sliding_window=WINDOW),
    # Keys of 24, values of 16.
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **{**_SIZES, "num_key_value_heads": 4},
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        first_k_dense_replace=2,
    ),
}

OPTIONS = {
    "llama": [],
    "qwen2": [],
    "qwen3": [],
    "qwen2_moe": ["window"],
    "mistral": ["window"],
    "gemma2": ["window", "softcap", "scale"],
    "gemma3": ["window", "scale"],
    "gpt_oss": ["window", "sinks"],
    "deepseek_v3": [],
}
"""What each of them asks of attention beyond the tree."""

TREES = {
    "levels": lambda: pykern.PrefixTree.from_parents([5, 3, 0, 4, 2, 0, 6, 1, 9], [-1, 0, 0, 1, 1, 2, 2, 6, 3]),
    "groups": lambda: pykern.PrefixTree.from_groups([11, 1, 0, 7], [[3, 0, 8, 1], [2, 5], [4], []]),
    "random": lambda: random_tree(3, 12, 14),
    "padded": lambda: with_padding(pykern.PrefixTree.from_groups([9], [[4, 7, 2]]), 6),
}


def make_model(name: str, attention: str = NAME, dtype: torch.dtype = torch.float32, **changes):
    """The model in training mode, with weights large enough for attention to be far from uniform."""
    config = MODELS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.5 if parameter.dim() == 1 else 0.2, generator=generator)
    return model.to(dtype).train()


def make_model_of_parts():
    """Text and images, with prefix attention in the part for text."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    text = MODELS["gemma3"]().to_dict()
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return transformers.AutoModelForImageTextToText.from_config(config, attn_implementation={"text_config": NAME})


def make_batch(tree: pykern.PrefixTree) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Token ids [T]; the rows of every sequence that has tokens; a gradient for the logits of each."""
    generator = torch.Generator().manual_seed(2)
    token_ids = torch.randint(VOCABULARY, (tree.num_tokens,), generator=generator)
    paths = [path for path in tree.sequence_rows.split(tree.cu_seqlens.diff().tolist()) if len(path)]
    return token_ids, paths, [torch.randn(len(path), VOCABULARY, generator=generator) for path in paths]


def run_packed(model, tree: pykern.PrefixTree, backward: bool = True) -> dict[str, Tensor]:
    """Logits of every sequence, one after the other, and the gradient of every parameter, from one packed row."""
    token_ids, paths, weights = make_batch(tree)
    model.zero_grad()
    logits = model(token_ids[None], **tree_kwargs(tree)).logits[0]
    logits = torch.cat([logits[path] for path in paths])
    if backward:
        (logits * torch.cat(weights)).sum().backward()
    return _results(model, logits, backward)


def run_repeated(model, tree: pykern.PrefixTree, backward: bool = True) -> dict[str, Tensor]:
    """The same from the sequences one by one, prefixes repeated, with the model's own attention."""
    token_ids, paths, weights = make_batch(tree)
    model.zero_grad()
    logits = []
    for path, weight in zip(paths, weights, strict=True):
        logits.append(model(token_ids[path][None], use_cache=False).logits[0])
        if backward:
            (logits[-1] * weight).sum().backward()
    return _results(model, torch.cat(logits), backward)


def _results(model, logits: Tensor, backward: bool) -> dict[str, Tensor]:
    found = {"logits": logits.detach()}
    for name, parameter in model.named_parameters() if backward else ():
        assert parameter.grad is not None, f"no gradient for {name}"
        found[name] = parameter.grad.clone()
    return found
