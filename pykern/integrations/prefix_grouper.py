"""The interface of the PrefixGrouper package on top of prefix trees, so that its users change one import.

>>> import torch
>>> from pykern.integrations.prefix_grouper import PrefixGrouper  # was: from prefix_grouper import PrefixGrouper
>>> prompts, prompt_mask = torch.tensor([[0, 7, 8]]), torch.tensor([[0, 1, 1]])
>>> responses, response_mask = torch.tensor([[4, 5, 0], [1, 2, 3]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
>>> grouper = PrefixGrouper.from_ungrouped_masks(prompt_mask, response_mask, group_sizes=2)
>>> grouper.concat_input(prompts, prompt_mask, responses, response_mask)
tensor([[7, 8, 4, 5, 1, 2, 3]])
>>> grouper.position_ids
tensor([[0, 1, 2, 3, 2, 3, 4]])

Inside the model, attention is `grouper.forward(attn_func, q, k, v, ...)`; `PrefixGrouper.forward` says what becomes of
`attn_func`. Behind it, `grouper.split_output(logits, include_prefix_last=1)` takes the responses apart again.
"""

import operator
import warnings
from collections.abc import Callable, Sequence
from numbers import Integral

import torch
from torch import Tensor

from ..attention import prefix_attention
from .grouped_layout import (
    CopyTokens,
    GroupInfo,
    Info,
    check_mask,
    check_tokens,
    copy_tokens,
    count_tokens,
    padding_mask_of,
    repeat_rows,
)

# How callers of attention functions name the options of prefix_attention.
_OPTION_OF = {
    "scale": "scale",
    "scaling": "scale",
    "softmax_scale": "scale",
    "window": "window",
    "sliding_window": "window",
    "softcap": "softcap",
    "sinks": "sinks",
    "s_aux": "sinks",
    "alibi_slopes": "alibi_slopes",
}
_DROPOUT = ("dropout", "dropout_p")
_CAUSAL = ("is_causal", "causal")
# What models hand on to their attention though its result doesn't depend on it.
_WITHOUT_EFFECT = frozenset(
    (
        "cache_position",
        "deterministic",
        "layer_idx",
        "logits_to_keep",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "use_cache",
        "use_top_left_mask",
    )
)


def _shared(name: str, description: str) -> property:
    return property(lambda self: getattr(self.group_info, name), doc=description)


class PrefixGrouper:
    """Prompts with their responses, each prompt once: `[prefix, suffix, suffix, ...]` in a row, padded to a batch.

    group_info: `[prefix length, suffix length, ...]` of each of b samples, padding not counted; lengths may be zero and
        samples of different numbers of suffixes, at least one each. With None, `init` is to be called before use.
    device: where the index tensors and masks are made (torch's default device if None). Every method computes on the
        device of the tensors it is given.
    padding_mode: "right" or "left" pads the samples to the longest; a mask [b, seq] puts the tokens of each sample
        where it is True, in their order.

    Everything is differentiable, tokens of padding come out as zeros and their gradients are zero.

    use_attn_func: an attribute, to be set on the class or an instance, that settles what `forward` otherwise decides by
        itself: True, its attn_func computes; False, `prefix_attention` does.

    Beyond the package: `position_ids`, `tree`, and `None` for an attn_func.
    """

    use_attn_func: bool | None = None

    def __init__(
        self,
        group_info: Sequence[Sequence[int]] | None = None,
        device: torch.device | str | None = None,
        padding_mode: str | Tensor = "right",
    ):
        if group_info is not None:
            self.init(group_info, device, padding_mode)

    def init(
        self,
        group_info: Sequence[Sequence[int]],
        device: torch.device | str | None = None,
        padding_mode: str | Tensor = "right",
    ) -> None:
        """Sets what the constructor takes, for a PrefixGrouper made without. A second call replaces it, and warns."""
        if "group_info" in self.__dict__:
            warnings.warn("PrefixGrouper.init: the group_info it had is replaced", stacklevel=2)
        self.group_info = GroupInfo.from_list(group_info, device, padding_mode)

    def __getattr__(self, name: str):
        # Reached for what no instance has, and by properties of an instance without group_info.
        if name.startswith("__") or "group_info" in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        raise AttributeError(f"{name}: this PrefixGrouper has no group_info yet; call init(group_info) before")

    @classmethod
    def from_ungrouped_masks(
        cls,
        prefix_mask: Tensor,
        suffix_mask: Tensor,
        group_sizes: int | Sequence[int],
        device: torch.device | str | None = None,
        padding_mode: str | Tensor = "right",
    ) -> "PrefixGrouper":
        """With the lengths that masks tell.

        prefix_mask: [b, prefix seq]; suffix_mask: [suffixes, suffix seq], those of sample 0 first; nonzero for tokens.
        group_sizes: the number of suffixes of every sample, or of each.
        """
        for name, mask in (("prefix_mask", prefix_mask), ("suffix_mask", suffix_mask)):
            check_mask(name, mask)
        samples, suffixes = prefix_mask.shape[0], suffix_mask.shape[0]
        try:
            every = [group_sizes] * samples if isinstance(group_sizes, Integral) else group_sizes
            sizes = [operator.index(size) for size in every]
        except TypeError:
            raise TypeError(f"group_sizes: expected an integer or a list of them, got {group_sizes!r}") from None
        if len(sizes) != samples:
            raise ValueError(f"group_sizes: expected one for each of the {samples} prefixes, got {len(sizes)}")
        if any(size < 1 for size in sizes):
            raise ValueError(f"group_sizes: expected at least 1 suffix in each sample, got {min(sizes)}")
        if sum(sizes) != suffixes:
            raise ValueError(f"group_sizes: expected a sum of {suffixes}, the rows of suffix_mask, got {sum(sizes)}")
        prefix_lens = count_tokens(prefix_mask).tolist()
        suffix_lens = iter(count_tokens(suffix_mask).tolist())
        group_info = [
            [length, *(next(suffix_lens) for _ in range(size))] for length, size in zip(prefix_lens, sizes, strict=True)
        ]
        return cls(group_info, device, padding_mode)

    # --- layouts ----------------------------------------------------------------------------------

    @staticmethod
    def convert_padding(x: Tensor, x_mask: Tensor, padding_mode: str | Tensor = "right") -> Tensor:
        """The tokens of `x` in another padding.

        x: [b, seq, ...]; x_mask: [b, seq], nonzero for tokens. padding_mode: as the constructor has it.
        Returns [b, longest, ...], or [b, columns of the mask, ...], zeros where there is no token.
        """
        check_mask("x_mask", x_mask)
        check_tokens("x", x, x_mask.shape, "x_mask")
        padding_mask = padding_mask_of(padding_mode, count_tokens(x_mask).cpu())
        source, target = x_mask.nonzero(), padding_mask.nonzero()
        return copy_tokens(padding_mask.shape, (x, source, target))

    def concat_input(self, prefix: Tensor, prefix_mask: Tensor, suffix: Tensor, suffix_mask: Tensor) -> Tensor:
        """Puts prefixes and suffixes together, as the padding mode says.

        prefix: [b, prefix seq, ...], token ids or features; suffix: [suffixes, suffix seq, ...], of the same dtype.
        prefix_mask, suffix_mask: [b, prefix seq] and [suffixes, suffix seq], nonzero for tokens, in any place; as many
            in each row as group_info says.

        Returns [b, seq, ...], zeros for padding.
        """
        indices = []
        prefix_lens = [info.prefix_len for info in self.group_info]
        suffix_lens = [length for info in self.group_info for length in info.suffix_lens]
        for name, x, mask, expected in (
            ("prefix", prefix, prefix_mask, prefix_lens),
            ("suffix", suffix, suffix_mask, suffix_lens),
        ):
            check_mask(f"{name}_mask", mask)
            check_tokens(name, x, mask.shape, f"{name}_mask")
            counts = count_tokens(mask).tolist()
            if counts != expected:
                raise ValueError(
                    f"{name}_mask: expected rows of {expected} tokens, as group_info says, got {counts}; make the "
                    "PrefixGrouper by from_ungrouped_masks(prefix_mask, suffix_mask, group_sizes)"
                )
            indices.append(mask.nonzero())
        return self._group(prefix, suffix, *indices)

    def split_output(self, output: Tensor, include_prefix_last: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Takes the output of a model apart again: the inverse of `concat_input`, but for where padding is.

        output: [b, seq, ...], such as logits or hidden states.
        include_prefix_last: n moves the last n columns of the prefixes in front of every suffix of their sample. With
            1, `suffix_output[:, :-1]` predicts the tokens of the suffixes, and `suffix_mask[:, 1:]` is their mask.

        Returns prefix_output [b, longest prefix - n, ...], padded on the left; prefix_mask, its mask; suffix_output
        [suffixes, longest suffix + n, ...], padded on the right, and on the left where a prefix is shorter than n;
        suffix_mask, its mask.
        Targets have to be padded on the right too: `convert_padding`.
        """
        if isinstance(include_prefix_last, bool) or not isinstance(include_prefix_last, int):
            raise TypeError(f"include_prefix_last: expected an integer, got {type(include_prefix_last).__name__}")
        if include_prefix_last < 0:
            raise ValueError(f"include_prefix_last: expected at least 0, got {include_prefix_last}")
        check_tokens("output", output, self.x_shape, "the padding mask")
        prefix = copy_tokens(self.prefix_x_shape, (output, self.grouped_prefix_indices, self.ungrouped_prefix_indices))
        last = min(include_prefix_last, prefix.shape[1])
        kept = prefix.shape[1] - last
        prefix_mask = self.ungrouped_prefix_mask

        suffixes, width = self.suffix_x_shape
        target = self.ungrouped_suffix_indices
        copies = [(output, self.grouped_suffix_indices, target)]
        suffix_mask = self.ungrouped_suffix_mask
        if last:
            # In front of the suffixes right away: a concatenation would copy all of them once more.
            front = torch.cartesian_prod(*(torch.arange(size, device=target.device) for size in (suffixes, last)))
            copies = [
                (repeat_rows(prefix[:, kept:], self.group_info.sample_sizes), front, front),
                (output, self.grouped_suffix_indices, target + target.new_tensor([0, last])),
            ]
            suffix_mask = self.batch_repeat_cat(prefix_mask[:, kept:], suffix_mask, cat_dim=1)
            prefix, prefix_mask = prefix[:, :kept], prefix_mask[:, :kept]
        suffix = copy_tokens((suffixes, width + last), *copies)
        return prefix, prefix_mask, suffix, suffix_mask

    def get_ungroup_args(self, device: torch.device | str | None = None) -> tuple[tuple[Tensor, ...], tuple]:
        """What `ungroup` copies, for code that does so itself.

        Returns (ungrouped_prefix_indices, ungrouped_suffix_indices, grouped_prefix_indices, grouped_suffix_indices) on
        `device` and (prefix_x_shape, suffix_x_shape).
        """
        indices = (
            self.ungrouped_prefix_indices,
            self.ungrouped_suffix_indices,
            self.grouped_prefix_indices,
            self.grouped_suffix_indices,
        )
        return tuple(index.to(device) for index in indices), (self.prefix_x_shape, self.suffix_x_shape)

    def ungroup(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Takes q, k and v, each [b, heads, seq, head size], apart.

        Returns q, k, v of the prefixes, [b, heads, longest prefix, head size], padded on the left, and q, k, v of the
        suffixes, [suffixes, heads, longest suffix, head size], padded on the right.
        """
        self._check_heads(q, k, v)
        prefixes, suffixes = [], []
        for x in (q, k, v):
            x = x.transpose(1, 2)
            prefix = copy_tokens(self.prefix_x_shape, (x, self.grouped_prefix_indices, self.ungrouped_prefix_indices))
            suffix = copy_tokens(self.suffix_x_shape, (x, self.grouped_suffix_indices, self.ungrouped_suffix_indices))
            prefixes.append(prefix.transpose(1, 2).contiguous())
            suffixes.append(suffix.transpose(1, 2).contiguous())
        return *prefixes, *suffixes

    def group(self, o_prefix: Tensor, o_suffix: Tensor) -> Tensor:
        """Puts the attention outputs of `ungroup`'s parts together.

        o_prefix: [b, longest prefix, heads, head size]; o_suffix: [suffixes, longest suffix, heads, head size].
        Returns [b, seq, heads, head size].
        """
        check_tokens("o_prefix", o_prefix, self.prefix_x_shape, "the prefixes")
        check_tokens("o_suffix", o_suffix, self.suffix_x_shape, "the suffixes")
        return self._group(o_prefix, o_suffix, self.ungrouped_prefix_indices, self.ungrouped_suffix_indices)

    def batch_repeat_cat(self, prefix: Tensor, suffix: Tensor, cat_dim: int) -> Tensor:
        """Concatenates each row of `suffix` [suffixes, ...] behind its sample's row of `prefix` [b, ...]."""
        if prefix.shape[0] != self.x_shape[0]:
            raise ValueError(f"prefix: expected {self.x_shape[0]} rows, one per sample, got {prefix.shape[0]}")
        return torch.cat([repeat_rows(prefix, self.group_info.sample_sizes), suffix], dim=cat_dim)

    def _group(self, prefix: Tensor, suffix: Tensor, prefix_indices: Tensor, suffix_indices: Tensor) -> Tensor:
        if suffix.dtype != prefix.dtype:
            raise TypeError(f"suffix: expected the prefix's dtype {prefix.dtype}, got {suffix.dtype}; cast them alike")
        if suffix.shape[2:] != prefix.shape[2:]:
            raise ValueError(
                f"suffix: expected tokens of shape {tuple(prefix.shape[2:])}, as the prefix has, got "
                f"{tuple(suffix.shape[2:])}"
            )
        return copy_tokens(
            self.x_shape,
            (prefix, prefix_indices, self.grouped_prefix_indices),
            (suffix, suffix_indices, self.grouped_suffix_indices),
        )

    # --- attention --------------------------------------------------------------------------------

    def forward(self, attn_func: Callable | None, /, q: Tensor, k: Tensor, v: Tensor, *args, **kwargs) -> Tensor:
        """Causal attention in which every suffix sees its prefix and itself, but no other suffix.

        q: [b, Hq, seq, D]; k: [b, Hk, seq, D]; v: [b, Hk, seq, Dv]; Hk may be fewer heads than Hq. No mask is passed,
            so a window has to be, if there is one.
        Returns [b, seq, Hq, Dv].

        One call of `prefix_attention` on the tree computes it, without a copy of a prefix, wherever the keywords say
        what is wanted, as in calls of transformers' attention functions (and so in verl) and of Flash Attention. Read
        are `scale`, `scaling` or `softmax_scale` (1 / sqrt(D) if absent or None); `window`, `sliding_window` or
        `window_size`; `softcap`; `sinks` or `s_aux`; `alibi_slopes`. `attn_func` then isn't called, so what it would do
        of its own, beyond its keywords, is not done. Under autocast, q, k and v are cast to autocast's dtype.

        `attn_func` is called where only it can know, with a warning that says why: if no keyword names an option of
        attention (`scale=None` is enough of one), and for dropout, attention that isn't causal, further positional
        arguments and keywords of other meaning. As in the package, it gets q, k, v, a mask [rows, keys] of what isn't
        padding, then `args` and `kwargs`, and returns [rows, queries, heads, head size]: once for the prefixes, padded
        on the left, once for the suffixes, with each prefix's keys and values repeated in front of each suffix's. It
        has to be causal with the last query at the last key. `use_attn_func` settles it either way.

        With None for `attn_func`, such arguments raise ValueError or TypeError instead.
        """
        if attn_func is not None and not callable(attn_func):
            raise TypeError(f"attn_func: expected a function or None, got {type(attn_func).__name__}")
        self._check_heads(q, k, v)
        options, named, obstacle = _read_options(args, kwargs)
        if attn_func is None and self.use_attn_func:
            raise ValueError("attn_func: expected a function, since use_attn_func is True, got None")
        if obstacle is not None and (attn_func is None or self.use_attn_func is False):
            raise ValueError(
                f"forward: prefix_attention can't take {obstacle}; leave it out, or pass an attn_func that can"
            )
        if attn_func is None or self.use_attn_func is False:
            return self._attend(q, k, v, options)
        if self.use_attn_func is None:
            if obstacle is None and named:
                return self._attend(q, k, v, options)
            why = "no keyword says what it computes" if obstacle is None else f"prefix_attention can't take {obstacle}"
            warnings.warn(
                f"PrefixGrouper.forward: attn_func is called, twice and on repeated prefixes, as {why}; for one call "
                "of prefix_attention pass its options by keyword (scale=None at least), or set "
                "PrefixGrouper.use_attn_func = False (True: no warning)",
                stacklevel=2,
            )

        q_prefix, k_prefix, v_prefix, q_suffix, k_suffix, v_suffix = self.ungroup(q, k, v)
        o_prefix = attn_func(q_prefix, k_prefix, v_prefix, self.prefix_attn_mask.to(q.device), *args, **kwargs)
        o_suffix = attn_func(
            q_suffix,
            self.batch_repeat_cat(k_prefix, k_suffix, cat_dim=2),
            self.batch_repeat_cat(v_prefix, v_suffix, cat_dim=2),
            self.suffix_attn_mask.to(q.device),
            *args,
            **kwargs,
        )
        return self.group(o_prefix, o_suffix)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
        if torch.is_autocast_enabled(q.device.type):
            dtype = torch.get_autocast_dtype(q.device.type)
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        tree, rows = self.group_info.tree_on(q.device), self.group_info.token_rows
        # Where a model's projection is only seen as [b, heads, seq, head size], this takes it back without a copy.
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        if rows is None:
            return prefix_attention(q, k, v, tree, **options).unflatten(0, self.x_shape)
        rows = rows.to(q.device)
        q, k, v = (CopyTokens.apply((len(rows),), (rows,), (None,), x) for x in (q, k, v))
        out = prefix_attention(q, k, v, tree, **options)
        return CopyTokens.apply(self.x_shape, (None,), (rows,), out)

    def _check_heads(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        batch, columns = self.x_shape
        for name, x in (("q", q), ("k", k), ("v", v)):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
            if x.dim() != 4 or x.shape[0] != batch or x.shape[2] != columns:
                raise ValueError(
                    f"{name}: expected [{batch}, heads, {columns}, head size], as the padding mask is "
                    f"[{batch}, {columns}], got shape {tuple(x.shape)}"
                )

    # --- what group_info holds --------------------------------------------------------------------

    prefix_lens = _shared("prefix_lens", "int64 [b]: tokens of each prefix.")
    grouped_suffix_lens = _shared("grouped_suffix_lens", "int64 [b]: tokens of all suffixes of each sample.")
    ungrouped_suffix_lens = _shared("ungrouped_suffix_lens", "int64 [suffixes]: tokens of each suffix.")
    num_samples = _shared("num_samples", "int64 [b]: suffixes of each sample.")
    total_lens = _shared("total_lens", "int64 [b]: tokens of each sample, its prefix counted once.")
    padding_mask = _shared("padding_mask", "bool [b, seq]: True for tokens, the attention mask of the grouped batch.")
    grouped_prefix_mask = _shared("grouped_prefix_mask", "bool [b, seq]: True for tokens of the prefixes.")
    grouped_suffix_mask = _shared("grouped_suffix_mask", "bool [b, seq]: True for tokens of the suffixes.")
    ungrouped_prefix_mask = _shared("ungrouped_prefix_mask", "bool [b, longest prefix]: padded on the left.")
    ungrouped_suffix_mask = _shared("ungrouped_suffix_mask", "bool [suffixes, longest suffix]: padded on the right.")
    prefix_attn_mask = _shared("prefix_attn_mask", "ungrouped_prefix_mask, the mask of attention over the prefixes.")
    suffix_attn_mask = _shared(
        "suffix_attn_mask", "bool [suffixes, longest prefix + longest suffix]: that of the suffixes' keys."
    )
    grouped_prefix_indices = _shared("grouped_prefix_indices", "int64 [tokens, 2]: where grouped_prefix_mask is True.")
    grouped_suffix_indices = _shared("grouped_suffix_indices", "int64 [tokens, 2]: where grouped_suffix_mask is True.")
    ungrouped_prefix_indices = _shared(
        "ungrouped_prefix_indices", "int64 [tokens, 2]: where ungrouped_prefix_mask is True."
    )
    ungrouped_suffix_indices = _shared(
        "ungrouped_suffix_indices", "int64 [tokens, 2]: where ungrouped_suffix_mask is True."
    )
    x_shape = _shared("x_shape", "(b, seq), the shape of the grouped batch.")
    prefix_x_shape = _shared("prefix_x_shape", "(b, longest prefix).")
    suffix_x_shape = _shared("suffix_x_shape", "(suffixes, longest suffix).")
    position_ids = _shared("position_ids", "int64 [b, seq]: suffixes go on where their prefix ends; 0 for padding.")
    tree = _shared(
        "tree", "The PrefixTree of the b * seq rows; of the tokens alone, if padding lies between tokens of a sample."
    )


# --- parts ----------------------------------------------------------------------------------------


def _read_options(args: tuple, kwargs: dict) -> tuple[dict, bool, str | None]:
    """The options of prefix_attention, whether a keyword named one, and what it can't take, if anything."""
    options, named = {}, False
    obstacle = f"{len(args)} further positional arguments" if args else None
    for name, value in kwargs.items():
        option = _OPTION_OF.get(name)
        if name == "window_size":
            # Flash Attention's (left, right), the query itself not counted, -1 for no bound.
            if value is not None and not isinstance(value, (tuple, list)):
                raise TypeError(f"window_size: expected (left, right) or None, got {type(value).__name__}")
            option, value = "window", None if value is None or value[0] < 0 else value[0] + 1
        if option is not None:
            named = True
            if value is None or (option == "softcap" and value == 0):
                continue
            if option in options:
                raise TypeError(f"{name}: expected one keyword for the {option}, got two")
            options[option] = value
        elif name in _DROPOUT:
            named = True
            if value:
                obstacle = obstacle or f"{name}={value}"
        elif name in _CAUSAL:
            named = True
            if value is not None and not value:
                obstacle = obstacle or f"{name}={value}"
        elif value is not None and name not in _WITHOUT_EFFECT:
            obstacle = obstacle or f"the keyword {name}"
    return options, named, obstacle


__all__ = ["GroupInfo", "Info", "PrefixGrouper"]
