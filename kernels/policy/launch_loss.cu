#include "kernels/common/launch.h"
#include "kernels/policy/loss_count_sm80.cuh"
#include "kernels/policy/loss_sm80.cuh"

namespace pykern {
namespace {

int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }
int64_t ceil_divide(int64_t value, int64_t by) { return (value + by - 1) / by; }

Grid grid_of(int64_t blocks, int threads) { return {dim3(static_cast<unsigned>(blocks)), dim3(threads)}; }

// Of a kernel for each of LossExtras, with a ratio of tokens or of sequences.
template <class Entry>
Entry choose(const Entry (&table)[2][3], const LossParams& p) {
  const bool any = p.per_token_advantages || p.weight_clip || p.rollout_logprobs;
  const LossExtras extras = any                          ? LossExtras::any
                            : p.kl == KlDivergence::none ? LossExtras::none
                                                         : LossExtras::divergence;
  return table[p.sequence_ratio][static_cast<int>(extras)];
}

template <class T>
int blocks_per_multiprocessor(const LossParams& p) {
  using E = LossExtras;
  constexpr int kBlocks[2][3] = {
      {kLossBlocks<T, false, E::none>, kLossBlocks<T, false, E::divergence>, kLossBlocks<T, false, E::any>},
      {kLossBlocks<T, true, E::none>, kLossBlocks<T, true, E::divergence>, kLossBlocks<T, true, E::any>}};
  return choose(kBlocks, p);
}

template <class T>
LossBounds<T> bounds_as(const LossBounds<double>& from) {
  return {static_cast<T>(from.ratio_low),        static_cast<T>(from.ratio_high),
          static_cast<T>(from.dual_clip),        static_cast<T>(from.log_ratio_limit),
          static_cast<T>(from.sequence_log_ratio_limit), static_cast<T>(from.kl_coef),
          static_cast<T>(from.kl_log_ratio_limit), static_cast<T>(from.kl_limit),
          static_cast<T>(from.rollout_clip)};
}

template <class T>
bool all_allow_packs(const LossParams& p) {
  const void* of_tokens[] = {p.logprobs,         p.old_logprobs, p.per_token_advantages ? p.advantages : nullptr,
                             p.ref_logprobs, p.rollout_logprobs, p.coefficient};
  for (const void* pointer : of_tokens) {
    if (!allows_packs(static_cast<const T*>(pointer))) return false;
  }
  return true;
}

template <class T>
const char* launch_loss(const LossParams& p, Stream stream) {
  const bool of_sequences = p.aggregate == LossAggregate::sequence_sum || p.aggregate == LossAggregate::sequence_mean ||
                            p.aggregate == LossAggregate::sequence_sum_norm;
  const bool only_sequences = p.cu_seqlens && of_sequences && !(p.denominator > 0) && !p.mask && !p.sequence_ratio;
  const LossArguments<T> arguments{p, bounds_as<T>(p.bounds), all_allow_packs<T>(p),
                                   p.mask || p.sequence_ratio || only_sequences,
                                   p.bounds.kl_log_ratio_limit < HUGE_VAL || p.bounds.kl_limit < HUGE_VAL};
  const int64_t items = p.sequences * p.grid.parts, resident = multiprocessors() * (2048 / kLossThreads);
  const char* error = nullptr;
  if (p.sequence_ratio) {
    error = launch(sequence_sums_kernel<T>, grid_of(at_most(items, resident), kLossThreads), stream, arguments);
  } else if (p.mask) {
    error = launch(pack_mask_kernel, grid_of(at_most(items, resident), kLossThreads), stream, p);
  } else if (only_sequences) {
    const int64_t blocks = ceil_divide(p.sequences, kLossThreads);
    error = launch(count_sequences_kernel, grid_of(at_most(blocks, resident), kLossThreads), stream, p);
  }
  if (error) return error;
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
const char* launch_gradient(const LossGradientParams& p, Stream stream) {
  constexpr int64_t kBlockTokens = 2 * Pack<T>::kSize * kGradientThreads;
  const int64_t blocks = at_most(ceil_divide(p.tokens, kBlockTokens), int64_t{multiprocessors()} * 8 * 4);
  const bool packs =
      allows_packs(static_cast<const T*>(p.coefficient)) && allows_packs(static_cast<const T*>(p.gradient));
  return launch(policy_loss_gradient_kernel<T>, grid_of(blocks, kGradientThreads), stream, p, packs);
}

}  // namespace

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
  const int64_t parts = p.sequence_ratio ? at_most(wanted, kMostSequenceParts) : wanted;
  return {parts, at_most(p.sequences * parts, resident)};
}

const char* launch_policy_loss(DataType type, const LossParams& params, Stream stream) {
  switch (type) {
    case DataType::f32: return launch_loss<float>(params, stream);
    case DataType::f64: return launch_loss<double>(params, stream);
    default: return "policy_loss: log-probabilities of this dtype have no kernel";
  }
}

const char* launch_policy_loss_gradient(DataType type, const LossGradientParams& params, Stream stream) {
  switch (type) {
    case DataType::f32: return launch_gradient<float>(params, stream);
    case DataType::f64: return launch_gradient<double>(params, stream);
    default: return "policy_loss_backward: a gradient of this dtype has no kernel";
  }
}

}  // namespace pykern
