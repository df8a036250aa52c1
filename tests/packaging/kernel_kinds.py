"""What each kernel is, and what it is allowed, by patterns of names as tests.packaging.budgets prints them."""

MEMORY = "memory"
"""Bound by memory: its machine code loads sixteen bytes at a time."""

MATRIX = "matrix"
"""Bound by products of matrices: its machine code uses the matrix units."""

OTHER = "other"
"""Neither: a kernel over few values, or one whose accesses can't be wide."""

KINDS: dict[str, str] = {
    # Each has a sibling, a template argument away, for rows that allow no sixteen-byte accesses.
    "attention: gather_rows_kernel<Pack*": MEMORY,
    "attention: gather_rows_kernel<*": OTHER,
    "attention: gather_rows_backward_kernel<*, true>": MEMORY,
    "attention: gather_rows_backward_kernel<*, false>": OTHER,
    "attention: prefix_attention_delta_kernel<*": MEMORY,
    "attention: prefix_attention_sinks_kernel": OTHER,
    "attention: prefix_attention_forward_kernel<*": MATRIX,
    "attention: prefix_attention_paths_kernel": OTHER,
    "attention: prefix_attention_backward_*_kernel<*": MATRIX,
    "attention: prefix_attention_forward_sm90_kernel<*": MATRIX,
    "lowrank: apply_kernel<*": MATRIX,
    "lowrank: apply_sm90_kernel<*": MATRIX,
    "lowrank: project_kernel<*": MATRIX,
    "lowrank: project_sm90_kernel<*": MATRIX,
    "attention: prefix_attention_join_shares_sm90_kernel<*": MEMORY,
    "attention: prefix_attention_bounds_kernel": OTHER,
    "attention: prefix_attention_work_kernel": OTHER,
    "attention: prefix_attention_order_kernel": OTHER,
    "lowrank: adamw_kernel<*": MEMORY,
    "lowrank: apply_wide_kernel<*": MEMORY,
    "lowrank: apply_rows_kernel<*": MEMORY,
    "lowrank: pick_rows_kernel<*, true>": MEMORY,
    "lowrank: pick_rows_kernel<*, false>": OTHER,
    "lowrank: inner_rule_kernel<*": MEMORY,
    "lowrank: inner_rule_8bit_kernel<*": MEMORY,
    "lowrank: column_ratios_kernel<*": MEMORY,
    "lowrank: combine_kernel<*": MEMORY,
    "lowrank: quantize_packs_kernel<*": MEMORY,
    "lowrank: dequantize_packs_kernel<*": MEMORY,
    "lowrank: int8_weights_kernel<true>": MEMORY,
    "offload: staging_copy_kernel<*": MEMORY,
    "offload: staging_code_kernel<true, *": MEMORY,
    # Each has a sibling for rows and addresses that allow no sixteen-byte accesses.
    "offload: norm_kernel<*, true>": MEMORY,
    "offload: norm_backward_kernel<*, true>": MEMORY,
    "offload: norm_kernel<*": OTHER,
    "offload: norm_backward_kernel<*": OTHER,
    "offload: norm_columns_kernel<*": OTHER,
    "offload: activation_kernel<*, true>": MEMORY,
    "offload: activation_kernel<*": OTHER,
    "offload: dropout_kernel<*, true>": MEMORY,
    "offload: dropout_kernel<*": OTHER,
    # Codes are a byte each: eight of them become sixteen bytes.
    "offload: staging_code_kernel<false, *": OTHER,
    "policy: discounted_scan_kernel<*": MEMORY,
    "policy: pack_mask_kernel": MEMORY,
    "policy: policy_loss_gradient_kernel<*": MEMORY,
    # With a ratio of sequences and no divergence it has no tokens to read; it writes their coefficients.
    "policy: policy_loss_kernel<*, true, (LossExtras)0>": OTHER,
    "policy: policy_loss_kernel<*": MEMORY,
    "policy: composed_loss_kernel<*": MEMORY,
    "policy: sequence_sums_kernel<*": MEMORY,
    "policy: ratio_sums_kernel<*": MEMORY,
    "policy: ratio_gradient_kernel<*": MEMORY,
    "policy: measure_rows_kernel<*": MEMORY,
    "policy: token_baseline_kernel<*": MEMORY,
    "policy: token_logprobs_kernel<*": MEMORY,
    "policy: token_logprobs_backward_kernel<*": MEMORY,
    "policy: linear_logprobs_segments_kernel<*": MEMORY,
    "policy: linear_logprobs_gradient_kernel<*": MEMORY,
    "policy: linear_logprobs_accumulate_kernel<*": MEMORY,
    "policy: linear_logprobs_hidden_kernel<*": MEMORY,
    "policy: whiten_kernel<*": MEMORY,
    "policy: whiten_moments_kernel<*": MEMORY,
    # Few values: a dozen numbers for a matrix; a value per sequence or response.
    "lowrank: resolve_steps_kernel": OTHER,
    # float32 and float64 beside the vendor's products, whatever the alignment; parts whose places have none.
    "lowrank: wide_squares_kernel<*": OTHER,
    "lowrank: wide_factor_kernel<*": OTHER,
    "lowrank: project_parts_kernel": OTHER,
    # Rows that allow no sixteen-byte accesses, or lie across: each has a sibling that takes packs.
    "lowrank: quantize_tiles_kernel<*": OTHER,
    "lowrank: dequantize_tiles_kernel<*": OTHER,
    "lowrank: int8_weights_kernel<false>": OTHER,
    "lowrank: residual_limit_kernel<*": OTHER,
    "lowrank: sparse_rows_kernel<*": OTHER,
    "policy: count_sequences_kernel": OTHER,
    # Reads bits alone; see WIDE_STORES.
    "policy: policy_loss_token_weights_kernel<*": OTHER,
    # A value and a byte of its mask for each thread: lanes of a warp meet at the digits that they count.
    "policy: selection_digits_kernel<*": OTHER,
    "policy: selection_ties_kernel<*": OTHER,
    "policy: select_share_kernel<*": OTHER,
    "policy: quantile_kernel<*": OTHER,
    "policy: masked_moments_kernel<*": OTHER,
    "policy: plain_advantages_kernel<*": OTHER,
    "policy: general_advantages_kernel<*": OTHER,
    "policy: group_entropy_kernel": OTHER,
    "policy: group_statistics_kernel<*": OTHER,
    "policy: linear_logprobs_join_kernel<*": OTHER,
    "policy: linear_logprobs_bias_kernel<*": OTHER,
    # A token for each thread, two values and a byte of its mask; a dozen sums of each token.
    "policy: rollout_correction_kernel<*": OTHER,
    "policy: rollout_normalize_kernel<*": OTHER,
    "policy: link_rows_kernel": OTHER,
    "policy: disco_scores_kernel<*": OTHER,
    "policy: disco_groups_kernel<*": OTHER,
    "policy: disco_gradient_kernel<*": OTHER,
    "policy: risk_advantages_kernel<*": OTHER,
}
"""The kind of every kernel; the first pattern that fits counts."""

WIDE_STORES = (
    "lowrank: apply_kernel<*",
    "lowrank: apply_wide_kernel<*",
    "attention: gather_rows_kernel<Pack*",
    "attention: gather_rows_backward_kernel<*, true>",
    "attention: prefix_attention_forward_kernel<*",
    "attention: prefix_attention_forward_sm90_kernel<*",
    "attention: prefix_attention_backward_keys_kernel<*",
    "attention: prefix_attention_backward_queries_kernel<*",
    "lowrank: adamw_kernel<*",
    "lowrank: inner_rule_kernel<*",
    "lowrank: inner_rule_8bit_kernel<*",
    "lowrank: combine_kernel<*",
    "lowrank: dequantize_packs_kernel<*",
    "offload: staging_copy_kernel<*",
    "offload: staging_code_kernel<false, *",
    "policy: discounted_scan_kernel<*",
    "policy: policy_loss_gradient_kernel<*",
    "policy: policy_loss_kernel<*",
    "policy: policy_loss_token_weights_kernel<*",
    "policy: composed_loss_kernel<*",
    "policy: ratio_gradient_kernel<*",
    "policy: token_baseline_kernel<*",
    "policy: token_logprobs_backward_kernel<*",
    "policy: linear_logprobs_gradient_kernel<*",
    "policy: linear_logprobs_accumulate_kernel<*",
    "policy: linear_logprobs_hidden_kernel<*",
    "policy: whiten_kernel<*",
)
"""Kernels whose results are as large as what they read: their machine code stores sixteen bytes at a time. nvcc may
take an ordinary wide store apart."""

WARPGROUP_KERNELS = (
    "attention: prefix_attention_forward_sm90_kernel<*",
    "attention: prefix_attention_backward_*_sm90_kernel<*",
    "lowrank: apply_sm90_kernel<*",
    "lowrank: project_sm90_kernel<*",
)
"""Kernels for compute capability 9.0 alone: warpgroups multiply what tensor copies bring."""

LOCAL_MEMORY: dict[str, str] = {}
"""Kernels that may spill or have a stack frame, and why."""

DOUBLES: dict[str, str] = {
    "*<double*": "the tensors are float64",
    "lowrank: apply_*kernel<*": "learning rate, factor and decay of a weight, once per thread",
    "lowrank: resolve_steps_kernel": "a thread per matrix: bias corrections, as torch's optimizers have them",
    "lowrank: column_ratios_kernel<*": "norms of a column, once per column: their difference would cancel in float32",
    "lowrank: residual_limit_kernel<*": "sums over all columns, and the limit made of them",
    "lowrank: int8_weights_kernel<*": "a rate and its factors, which the host gives as doubles",
    "lowrank: combine_kernel<*": "rounds a limit and what the host gives as doubles",
    "policy: selection_digits_kernel<*": "one thread: the rank of a share or a quantile among all tokens",
    "policy: quantile_kernel<*": "one thread: the weights of two values",
    "policy: masked_moments_kernel<*": "sums over all tokens",
    "policy: risk_advantages_kernel<*": "sums in float64 are what risk_advantages promises",
    "policy: *_advantages_kernel<*": "sums in float64 are what group_advantages promises",
    "policy: group_entropy_kernel": "its result is float64",
    "policy: group_statistics_kernel<*": "sums in float64 are what group_statistics promises",
    "policy: rollout_correction_kernel<*": "sums over all tokens, and the ratio of a whole sequence",
    "policy: rollout_normalize_kernel<*": "one divisor per thread",
    "policy: disco_scores_kernel<*": "sums over all tokens of a sequence",
    "policy: disco_groups_kernel<*": "a group's exponentials, a value per sequence",
    "policy: disco_gradient_kernel<*": "one factor per sequence",
    "policy: discounted_scan_kernel<*": "running values, which rounding in float32 would let drift",
    "policy: measure_rows_kernel<*": "sums over all tokens of a response",
    "policy: policy_loss_kernel<*": "sums over all tokens, and the ratio of a whole sequence",
    "policy: composed_loss_kernel<*": "sums over all tokens, and the ratio of a whole sequence",
    "policy: sequence_sums_kernel<*": "sums over all tokens of a sequence",
    "policy: ratio_*_kernel<*": "sums over all tokens of a sequence, and its ratio",
    "policy: policy_loss_token_weights_kernel<*": "one over a count, once per part of a sequence",
    "policy: token_baseline_kernel<*": "sums over the tokens before, and over the responses of a group",
    "policy: token_logprobs_kernel<*": "sums over a vocabulary, once per row and warp",
    "policy: token_logprobs_backward_kernel<*": "a temperature per row, once per row",
    "policy: linear_logprobs_segments_kernel<*": "a temperature per row, once per row and segment; the bias",
    "policy: linear_logprobs_join_kernel<*": "sums over a vocabulary, once per row and segment",
    "policy: linear_logprobs_gradient_kernel<*": "a temperature per row, once per row; the bias",
    "policy: linear_logprobs_hidden_kernel<*, double>": "the tensors are float64",
    "policy: linear_logprobs_bias_kernel<*": "sums over all rows, once per entry and 64 rows",
    "policy: whiten*_kernel<*": "moments of all tokens",
}
"""Kernels that may compute in double precision, and why."""
