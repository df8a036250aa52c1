#include "kernels/common/launch.h"
#include "kernels/common/with_type.h"
#include "kernels/policy/loss_composed_sm80.cuh"
#include "kernels/policy/loss_count_sm80.cuh"
#include "kernels/policy/loss_ratio_sm80.cuh"
#include "kernels/policy/loss_sm80.cuh"
#include "kernels/policy/loss_weights_sm80.cuh"

namespace pykern {
namespace {

int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }
int64_t ceil_divide(int64_t value, int64_t by) { return (value + by - 1) / by; }

Grid grid_of(int64_t blocks, int threads) { return {dim3(static_cast<unsigned>(blocks)), dim3(threads)}; }

// Whether the kernels for clipped ratios and weights know all parts of a loss.
bool is_clip_loss(const LossParams& p) {
  const bool ratio = p.ratio == LossRatio::token || p.ratio == LossRatio::sequence;
  const bool rule = p.rule == LossRule::clip || (p.rule == LossRule::weight && !p.weight_negative_only);
  const bool plain = !(p.bounds.ratio_limit < HUGE_VAL) && p.bounds.negative_scale == 1 &&
                     p.stabilisation == LossStabilisation::none && p.kl_gradient == KlGradient::value &&
                     p.anchor == KlDivergence::none && p.rollout_rule == RolloutRule::truncate;
  const bool more = p.clip_low || p.clip_high || p.second_advantages.values || p.rollout_weights.values || p.keep ||
                    p.entropy || p.token_weights;
  return ratio && rule && plain && !more;
}

// Whether a loss that is none of these has all parts that there are.
bool is_broad(const LossParams& p) {
  return p.clip_low || p.clip_high || p.second_advantages.values || p.anchor != KlDivergence::none;
}

bool is_sequence_ratio(const LossParams& p) { return p.ratio != LossRatio::token; }

// Of a kernel for each of LossExtras, with a ratio of tokens or of sequences.
template <class Entry>
Entry choose(const Entry (&table)[2][3], const LossParams& p) {
  const bool any = p.advantages.per_token || p.rule == LossRule::weight || p.rollout_logprobs;
  const LossExtras extras = any                          ? LossExtras::any
                            : p.kl == KlDivergence::none ? LossExtras::none
                                                         : LossExtras::divergence;
  return table[is_sequence_ratio(p)][static_cast<int>(extras)];
}

template <class T>
int blocks_per_multiprocessor(const LossParams& p) {
  if (!is_clip_loss(p)) {
    return is_broad(p) ? kComposedBlocks<T, LossBreadth::all> : kComposedBlocks<T, LossBreadth::usual>;
  }
  using E = LossExtras;
  constexpr int kBlocks[2][3] = {
      {kLossBlocks<T, false, E::none>, kLossBlocks<T, false, E::divergence>, kLossBlocks<T, false, E::any>},
      {kLossBlocks<T, true, E::none>, kLossBlocks<T, true, E::divergence>, kLossBlocks<T, true, E::any>}};
  return choose(kBlocks, p);
}

template <class T>
LossBounds<T> bounds_as(const LossBounds<double>& from) {
  const auto as = [](double value) { return static_cast<T>(value); };
  return {as(from.ratio_low),
          as(from.ratio_high),
          as(from.ratio_limit),
          as(from.dual_clip),
          {as(from.shape[0]), as(from.shape[1]), as(from.shape[2]), as(from.shape[3])},
          as(from.negative_scale),
          as(from.stabilisation_low),
          as(from.stabilisation_high),
          as(from.log_ratio_limit),
          as(from.sequence_log_ratio_low),
          as(from.sequence_log_ratio_high),
          as(from.kl_coef),
          as(from.kl_log_ratio_limit),
          as(from.kl_limit),
          as(from.anchor_coef),
          as(from.rollout_low),
          as(from.rollout_high),
          as(from.entropy_coef)};
}

template <class T>
bool all_allow_packs(const LossParams& p) {
  const auto of_tokens = [](const LossValues& values) { return values.per_token ? values.values : nullptr; };
  const void* pointers[] = {p.logprobs,
                            p.old_logprobs,
                            p.ref_logprobs,
                            p.anchor_logprobs,
                            p.rollout_logprobs,
                            p.entropy,
                            p.clip_low,
                            p.clip_high,
                            p.token_weights,
                            of_tokens(p.advantages),
                            of_tokens(p.rollout_weights),
                            of_tokens(p.second_advantages),
                            of_tokens(p.advantage_weights),
                            p.coefficient,
                            p.entropy_coefficient};
  for (const void* pointer : pointers) {
    if (!allows_packs(static_cast<const T*>(pointer))) return false;
  }
  return true;
}

// Packed sequences without a mask: their number is all that must be counted, unless it is known.
bool counts_sequences(const LossParams& p) {
  const bool of_sequences = p.aggregate == LossAggregate::sequence_sum || p.aggregate == LossAggregate::sequence_mean ||
                            p.aggregate == LossAggregate::sequence_sum_norm;
  return p.cu_seqlens && of_sequences && !(p.denominator > 0) && !p.count_empty && !p.mask;
}

template <class T>
LossArguments<T> arguments_as(const LossParams& p, bool counted) {
  return {p, bounds_as<T>(p.bounds), all_allow_packs<T>(p), counted,
          p.bounds.kl_log_ratio_limit < HUGE_VAL || p.bounds.kl_limit < HUGE_VAL};
}

Grid grid_of_items(const LossParams& p) {
  const int64_t resident = int64_t{multiprocessors()} * (2048 / kLossThreads);
  return grid_of(at_most(p.sequences * p.grid.parts, resident), kLossThreads);
}

// Where no kernel counts while it adds up ratios of sequences.
const char* launch_counts(const LossParams& p, Stream stream) {
  if (p.mask) return launch(pack_mask_kernel, grid_of_items(p), stream, p);
  if (!counts_sequences(p)) return nullptr;
  const int64_t resident = int64_t{multiprocessors()} * (2048 / kLossThreads);
  const int64_t blocks = ceil_divide(p.sequences, kLossThreads);
  return launch(count_sequences_kernel, grid_of(at_most(blocks, resident), kLossThreads), stream, p);
}

template <class T>
const char* launch_clip_loss(const LossParams& p, const LossArguments<T>& arguments, Stream stream) {
  using Kernel = void (*)(LossArguments<T>);
  using E = LossExtras;
  constexpr Kernel kKernels[2][3] = {
      {policy_loss_kernel<T, false, E::none>, policy_loss_kernel<T, false, E::divergence>,
       policy_loss_kernel<T, false, E::any>},
      {policy_loss_kernel<T, true, E::none>, policy_loss_kernel<T, true, E::divergence>,
       policy_loss_kernel<T, true, E::any>}};
  return launch(choose(kKernels, p), grid_of(p.grid.blocks, kLossThreads), stream, arguments);
}

template <class T>
const char* launch_loss(const LossParams& p, Stream stream) {
  const bool sequence_ratio = is_sequence_ratio(p), clip = is_clip_loss(p);
  const LossArguments<T> arguments = arguments_as<T>(p, p.mask || sequence_ratio || counts_sequences(p));
  const char* error = !sequence_ratio ? launch_counts(p, stream)
                      : clip          ? launch(sequence_sums_kernel<T>, grid_of_items(p), stream, arguments)
                                      : launch(ratio_sums_kernel<T>, grid_of_items(p), stream, arguments);
  if (error) return error;
  if (clip) return launch_clip_loss(p, arguments, stream);
  constexpr void (*kKernels[2][2])(LossArguments<T>) = {
      {composed_loss_kernel<T, false, LossBreadth::usual>, composed_loss_kernel<T, false, LossBreadth::all>},
      {composed_loss_kernel<T, true, LossBreadth::usual>, composed_loss_kernel<T, true, LossBreadth::all>}};
  error = launch(kKernels[sequence_ratio][is_broad(p)], grid_of(p.grid.blocks, kLossThreads), stream, arguments);
  if (error || !sequence_ratio || !p.coefficient || !moves_ratio(p)) return error;
  return launch(ratio_gradient_kernel<T>, grid_of_items(p), stream, arguments);
}

template <class T>
const char* launch_token_weights(const LossParams& p, Stream stream) {
  const char* error = launch_counts(p, stream);
  if (error) return error;
  const LossArguments<T> arguments = arguments_as<T>(p, p.mask || counts_sequences(p));
  return launch(policy_loss_token_weights_kernel<T>, grid_of_items(p), stream, arguments);
}

template <class T>
const char* launch_gradient(const LossGradientParams& p, Stream stream) {
  constexpr int64_t kBlockTokens = 2 * Pack<T>::kSize * kGradientThreads;
  const int64_t blocks = at_most(ceil_divide(p.tokens, kBlockTokens), int64_t{multiprocessors()} * 8 * 4);
  const bool packs =
      allows_packs(static_cast<const T*>(p.coefficient)) && allows_packs(static_cast<const T*>(p.gradient));
  return launch(policy_loss_gradient_kernel<T>, grid_of(blocks, kGradientThreads), stream, p, packs);
}

}  // namespace

int loss_part_sums(const LossParams& p) {
  if (!is_sequence_ratio(p)) return 0;
  return is_clip_loss(p) ? static_cast<int>(kPartSums) : static_cast<int>(kComposedSums);
}

LossGrid loss_grid(DataType type, const LossParams& p) {
  const int64_t resident = int64_t{multiprocessors()} * (type == DataType::f64 ? blocks_per_multiprocessor<double>(p)
                                                                               : blocks_per_multiprocessor<float>(p));
  // Parts of up to six tiles, as many of them for one block as for another. Packed sequences may differ in
  // length, and the host does not know theirs. A ratio of sequences is put together from all parts of one.
  constexpr int64_t kMostTiles = 6, kMostSequenceParts = 512;
  const int64_t tiles_of_block = ceil_divide(ceil_divide(p.tokens, kTileTokens), resident);
  const int64_t tiles = ceil_divide(tiles_of_block, ceil_divide(tiles_of_block, kMostTiles));
  const int64_t longest = p.cu_seqlens ? 2 * ceil_divide(p.tokens, p.sequences) : p.columns;
  const int64_t wanted = ceil_divide(ceil_divide(longest, kTileTokens), tiles);
  const int64_t parts = is_sequence_ratio(p) ? at_most(wanted, kMostSequenceParts) : wanted;
  return {parts, at_most(p.sequences * parts, resident)};
}

const char* launch_policy_loss(DataType type, const LossParams& params, Stream stream) {
  return with_wide_type(type, [&](auto value) { return launch_loss<decltype(value)>(params, stream); });
}

const char* launch_policy_loss_gradient(DataType type, const LossGradientParams& params, Stream stream) {
  return with_wide_type(type, [&](auto value) { return launch_gradient<decltype(value)>(params, stream); });
}

const char* launch_policy_loss_token_weights(DataType type, const LossParams& params, Stream stream) {
  return with_wide_type(type, [&](auto value) {
    return launch_token_weights<decltype(value)>(params, stream);
  });
}

}  // namespace pykern
