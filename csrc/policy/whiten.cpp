// Host side of masked_whiten on the CPU: moments of runs of tokens, merged in their order.
#include "policy/whiten.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "common/parallel.h"
#include "policy/returns_arguments.h"

namespace pykern {
namespace {

constexpr int64_t kRunTokens = 16384;

void merge(TokenMoments& all, const TokenMoments& more) {
  if (more.count == 0) return;
  const double count = all.count + more.count, distance = more.mean - all.mean, share = more.count / count;
  all.mean += distance * share;
  all.squares += more.squares + distance * distance * all.count * share;
  all.low = std::min(all.low, more.low);
  all.high = std::max(all.high, more.high);
  all.count = count;
}

// Equal values whiten to exactly zero, or stay; a NaN or infinity among them does not hide.
Whitening whitening(const TokenMoments& all, bool shift_mean, double eps, int64_t ddof) {
  const bool finite = all.mean - all.mean == 0;
  const double mean = finite ? std::min(std::max(all.mean, all.low), all.high) : all.mean;
  if (finite && all.low == all.high) return {all.low, 0, shift_mean ? 0 : all.low};
  const double variance = std::max(all.squares, 0.0) / (all.count - static_cast<double>(ddof));
  return {mean, 1 / std::sqrt(variance + eps), shift_mean ? 0 : mean};
}

template <class T, class Moments, class Whiten>
void run(const Tensor& values, const uint8_t* mask, bool shift_mean, double eps, int64_t ddof, Moments moments,
         Whiten whiten, Tensor& result) {
  const int64_t tokens = values.numel(), runs = (tokens + kRunTokens - 1) / kRunTokens;
  const T* source = input<T>(values);
  T* target = output<T>(result);
  const auto size = [&](int64_t index) { return std::min(kRunTokens, tokens - index * kRunTokens); };
  const auto kept = [&](int64_t index) { return mask ? mask + index * kRunTokens : nullptr; };
  std::vector<TokenMoments> of_run(runs);
  parallel_tasks(runs, [&](int64_t index, int) {
    of_run[index] = moments(source + index * kRunTokens, kept(index), size(index));
  });
  TokenMoments all{0, HUGE_VAL, -HUGE_VAL, 0, 0};
  for (const TokenMoments& more : of_run) merge(all, more);
  const Whitening by = whitening(all, shift_mean, eps, ddof);
  parallel_tasks(runs, [&](int64_t index, int) {
    whiten(source + index * kRunTokens, kept(index), size(index), by, target + index * kRunTokens);
  });
}

Tensor masked_whiten(Tensor values, std::optional<Tensor> mask, bool shift_mean, double eps, int64_t ddof) {
  check_whiten(values, mask, eps, ddof, check_cpu);
  Tensor result = torch::stable::empty_like(values);
  const auto* mask_data = mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
  if (values.scalar_type() == ScalarType::Double) {
    run<double>(values, mask_data, shift_mean, eps, ddof, token_moments_f64(), whiten_f64(), result);
  } else {
    run<float>(values, mask_data, shift_mean, eps, ddof, token_moments_f32(), whiten_f32(), result);
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykern, CPU, m) { m.impl("masked_whiten", TORCH_BOX(&masked_whiten)); }

}  // namespace pykern
