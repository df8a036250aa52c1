"""Prefix attention for the decoder models of Hugging Face transformers, through its attention interface.

Prompts and their responses go through the model as one packed row, every shared prefix once:

>>> import pykern
>>> from transformers import AutoModelForCausalLM, LlamaConfig
>>> from pykern.integrations.transformers import register, tree_kwargs
>>> config = LlamaConfig(
...     vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
...     num_key_value_heads=2,
... )
>>> name = register()
>>> model = AutoModelForCausalLM.from_config(config, attn_implementation=name)
>>> batch = pykern.pack([[1, 2, 3]], [[[4, 5], [6, 7, 8]]])
>>> logits = model(batch.token_ids[None], **tree_kwargs(batch.tree)).logits
>>> logits.shape  # 3 prompt tokens, 2 + 3 response tokens
torch.Size([1, 8, 100])
>>> logprobs = pykern.token_logprobs(batch.gather(logits[0]), batch.targets)
>>> logprobs.shape  # of 4, 5 and 6, 7, 8, as cu_seqlens tells
torch.Size([5])
>>> logprobs.sum().backward()

`logits_to_keep=batch.predictor_rows` makes the model compute no other logits than those of the rows that predict
response tokens; `logits[0]` then has a row per target, and nothing is to gather.

`labels` don't go with a packed row: the model would take the next row for the next token, and at a branch it is not.

The adapter has run with transformers 4.57, 5.0 and 5.23.
"""

from functools import cache

import torch
from torch import Tensor, nn

from ..attention import PrefixTree, prefix_attention

try:
    from transformers import MODEL_MAPPING, AttentionInterface, AttentionMaskInterface
except ImportError as error:
    raise ImportError(
        "pykern.integrations.transformers needs the package transformers, 4.57 or newer; "
        f"pip install transformers: {error}"
    ) from error

NAME = "pykern_prefix"
"""What `attn_implementation` calls prefix attention."""

_TREE = ("tree_subtree_end", "tree_position", "tree_bounds", "tree_order")

# Keyword arguments by which a model asks its attention for what `prefix_attention` has no argument for: to overlook one
# would be to compute something else.
_REFUSED = {
    "position_bias": "has no bias per pair",
    "indices": "attends to the whole path",
    "block_indices": "attends to the whole path",
    "sinks": "has a sink per head, not per token",
    "cu_seq_lens_q": "takes the sequences from the tree",
    "output_attentions": "has no attention weights to return",
}

# Layers that see other tokens through attention alone, and those that see none.
_LAYER_TYPES = {"full_attention", "sliding_attention", "moe", "mlp", "sparse", "dense"}


def register(name: str = NAME) -> str:
    """Registers prefix attention and its mask with transformers, for every model of this process, and returns `name`.

    A model takes it by `from_pretrained(..., attn_implementation=name)`, `from_config(...)` likewise, or
    `model.set_attn_implementation(name)`; of a model of several parts, the text part alone should:
    `attn_implementation={"text_config": name}`. Every call of the model then needs `tree_kwargs(tree)`. Nothing else in
    transformers changes, and a second call does no harm.

    Works with models that give their keyword arguments on to transformers' attention interface: Llama, Qwen2, Qwen3,
    Mistral, Gemma 2 and 3, gpt-oss and most others. Scale, softcap and sinks are those the model passes, the window is
    that of its mask, so layers may differ in all of them. Windows count `tree.position`. Under autocast, attention
    computes in autocast's dtype. Activation checkpointing, reentrant or not, and torch.compile work as for any other
    implementation.

    Refused with one line: a call without a tree, an `attention_mask`, more rows than one, a KV cache that holds tokens
    (so generating; use another implementation for that), dropout, `output_attentions`, attention that isn't causal or
    goes by chunks, and biases or key selections of a model that `prefix_attention` has no argument for.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"name: expected a string such as {NAME!r}, got {name!r}")
    for interface, function in ((AttentionInterface, _attention), (AttentionMaskInterface, _mask)):
        if interface().get(name, function) is not function:
            raise ValueError(f"name: expected one that is free, got {name!r}, which transformers has; such as {NAME!r}")
    AttentionInterface.register(name, _attention)
    AttentionMaskInterface.register(name, _mask)
    return name


def tree_kwargs(tree: PrefixTree) -> dict[str, Tensor | bool]:
    """The keyword arguments that a model with prefix attention is called with, beside `input_ids` [1, T].

        model(token_ids[None], **tree_kwargs(tree))

    tree: a PrefixTree of T tokens, on the model's device.

    Returns `position_ids`, int64 [1, T], which is `tree.position`; `use_cache`, False; and `tree.tensors`, which the
    model hands on to every layer: `tree_subtree_end`, `tree_position`, `tree_bounds` and `tree_order`. They are plain
    tensors, so activation checkpointing, torch.compile and hooks that move arguments between devices treat them as
    any other.
    """
    if not isinstance(tree, PrefixTree):
        raise TypeError(
            f"tree: expected a PrefixTree, got {type(tree).__name__}; make one by PrefixTree.from_groups(...)"
        )
    return {
        "position_ids": tree.position.to(torch.int64)[None],
        "use_cache": False,
        **dict(zip(_TREE, tree.tensors, strict=True)),
    }


def _mask(
    batch_size: int,
    kv_length: int,
    mask_function,
    q_length: int | None = None,
    cache_position: Tensor | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    config=None,
    device=None,
    **others,
) -> Tensor:
    """What a model hands to `_attention` as the mask of its layers: no elements, but the window as its last size.

    The tree is not known here, and no mask is needed; but the window of a layer is told here by every model, and to
    attention by some only. Attention that would go without a mask by its own code fails at a tensor, unlike at None.
    """
    _check_one_row(batch_size)
    # Older releases tell the queries by their places in the cache.
    _check_no_cache(cache_position.shape[0] if q_length is None else q_length, kv_length)
    # Some models make a mask of ones by themselves. Its values can't be looked at while torch.compile traces.
    if attention_mask is not None and (torch.compiler.is_compiling() or not attention_mask.all()):
        raise ValueError(
            f"attention_mask: expected None, got one that hides tokens, shape {tuple(attention_mask.shape)}; leave it "
            "out, the tree tells which tokens are padding"
        )
    # Only masks of bidirectional attention may be asked to be left out as such.
    if "allow_is_bidirectional_skip" in others:
        raise _not_causal()
    if use_vmap or "or_mask" in getattr(mask_function, "__name__", ""):
        raise ValueError(
            "attention_mask: expected a causal mask or one with a window, but this model adds a rule of its own (as "
            "for image tokens); use another attn_implementation"
        )
    for layer in getattr(config, "layer_types", None) or ():
        if layer not in _LAYER_TYPES:
            raise ValueError(
                f"config.layer_types: expected full_attention and sliding_attention, got {layer}; such a layer does "
                "not know the tree, so give this model its sequences one by one"
            )
    if not torch.compiler.is_compiling() and not _asks_the_interface(type(config)):
        raise ValueError(
            f"attn_implementation: expected a model that uses transformers' AttentionInterface, got one of "
            f"{type(config).__name__}, which does not"
        )
    return torch.empty(1, 1, 0, local_size or 0, dtype=torch.bool, device=device)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others,
) -> tuple[Tensor, None]:
    """query [1, Hq, T, D], key [1, Hk, T, D], value [1, Hk, T, Dv] -> out [1, T, Hq, Dv], and no weights."""
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise _not_causal()
    _check_one_row(query.shape[0])
    _check_no_cache(query.shape[2], key.shape[2])
    if dropout:
        raise ValueError(f"dropout: expected 0, got {dropout}; make the model with attention_dropout=0.0")
    for name, reason in _REFUSED.items():
        given = others.get(name)
        if given is not None and given is not False:
            raise ValueError(
                f"{name}: expected None, got {type(given).__name__}; prefix attention {reason}, so leave it out or use "
                "another attn_implementation"
            )
    tree = tuple(others.get(name) for name in _TREE)
    if any(part is None for part in tree):
        raise ValueError(
            f"tree: expected the keyword arguments of tree_kwargs(tree), got none in {type(module).__name__}; call "
            "model(token_ids[None], **tree_kwargs(tree)); to generate, or if this model gives its attention no keyword "
            "arguments, use another attn_implementation"
        )

    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    out = prefix_attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        tree,
        scale=scaling,
        window=_window(attention_mask, sliding_window),
        softcap=softcap,
        sinks=s_aux,
    )
    return out[None], None


@cache
def _asks_the_interface(config_type: type) -> bool:
    """Whether models with this configuration call what is registered; others compute by their own code, tree or not."""
    model = MODEL_MAPPING.get(config_type, None)
    model = model[0] if isinstance(model, (list, tuple)) else model
    can_set = getattr(model, "_can_set_attn_implementation", None)
    return can_set is None or can_set()


def _window(attention_mask: Tensor | None, sliding_window: int | None) -> int | None:
    if attention_mask is None:
        return sliding_window
    if attention_mask.dim() != 4 or attention_mask.shape[2] != 0:
        raise ValueError(
            f"attention_mask: expected None, got shape {tuple(attention_mask.shape)}; leave it out, the tree tells "
            "which token sees which"
        )
    return attention_mask.shape[3] or None


def _check_one_row(rows: int) -> None:
    if rows != 1:
        raise ValueError(
            f"input_ids: expected one packed row [1, tokens], got {rows} rows; pack them by pykern.pack(...)"
        )


def _check_no_cache(queries: int, keys: int) -> None:
    if keys != queries:
        raise ValueError(
            f"past_key_values: expected no cache, got {keys} keys for {queries} tokens; pass use_cache=False; to "
            "generate, use another attn_implementation"
        )


def _not_causal() -> ValueError:
    return ValueError(
        "is_causal: expected causal attention, got bidirectional; of a model of several parts, set the text part "
        f'alone: attn_implementation={{"text_config": "{NAME}"}}'
    )


__all__ = ["NAME", "register", "tree_kwargs"]
