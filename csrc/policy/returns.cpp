// Host side of discounted_scan on the CPU. A sequence longer than a segment is scanned twice: first for what each of
// its segments does to what comes from the right, then for the results.
#include "policy/returns.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/parallel.h"
#include "policy/returns_arguments.h"
#include "policy/sequences.h"

namespace pykern {
namespace {

constexpr int64_t kSegmentTokens = 8192;
// Segments of one task: a vector's worth.
constexpr int64_t kTaskSegments = 16;

struct Cut {
  std::vector<ScanSegment> segments;
  std::vector<int64_t> with_right_neighbour;  // in the same sequence
  std::vector<int64_t> with_left_neighbour;
};

Cut cut(const std::vector<int64_t>& starts, const double* lambdas, double lambda, double gamma) {
  Cut cut;
  for (size_t sequence = 0; sequence + 1 < starts.size(); ++sequence) {
    const int64_t first = starts[sequence], end = starts[sequence + 1];
    for (int64_t begin = first; begin < end; begin += kSegmentTokens) {
      const int64_t index = static_cast<int64_t>(cut.segments.size());
      const int64_t stop = std::min(begin + kSegmentTokens, end);
      if (begin > first) cut.with_left_neighbour.push_back(index);
      if (stop < end) cut.with_right_neighbour.push_back(index);
      cut.segments.push_back({begin, stop, gamma * (lambdas ? lambdas[sequence] : lambda), 0, 0, 1});
    }
  }
  return cut;
}

// The value of the next token that counts, to the right of each segment's end.
void find_next_values(Cut& cut, const Tensor& values, const uint8_t* mask, bool decay) {
  const bool wide = values.scalar_type() == ScalarType::Double;
  const auto value = [&](int64_t token) {
    return wide ? input<double>(values)[token] : static_cast<double>(input<float>(values)[token]);
  };
  for (auto index = cut.with_right_neighbour.rbegin(); index != cut.with_right_neighbour.rend(); ++index) {
    ScanSegment& segment = cut.segments[*index];
    const ScanSegment& right = cut.segments[*index + 1];
    int64_t token = right.begin;
    while (mask && !decay && token < right.end && !mask[token]) ++token;
    if (token == right.end) {
      segment.next_value = right.next_value;
    } else if (!mask || mask[token]) {
      segment.next_value = value(token);
    }
  }
}

std::tuple<Tensor, Tensor> discounted_scan(Tensor rewards, std::optional<Tensor> values, std::optional<Tensor> mask,
                                           std::optional<Tensor> cu_seqlens, std::optional<Tensor> lambdas,
                                           double gamma, double lambda, bool decay) {
  check_scan(rewards, values, mask, check_cpu);
  const std::vector<int64_t> starts = sequence_bounds(rewards, cu_seqlens, "rewards");
  check_lambdas(lambdas, static_cast<int64_t>(starts.size()) - 1, check_cpu);
  Tensor advantages = values ? torch::stable::empty_like(rewards) : torch::stable::new_empty(rewards, {0});
  Tensor returns = torch::stable::empty_like(rewards);

  const auto* mask_data = mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
  Cut parts = cut(starts, lambdas ? input<double>(*lambdas) : nullptr, lambda, gamma);
  if (values) find_next_values(parts, *values, mask_data, decay);
  const ScanParams params{rewards.const_data_ptr(),
                          values ? values->const_data_ptr() : nullptr,
                          mask_data,
                          values ? advantages.mutable_data_ptr() : nullptr,
                          returns.mutable_data_ptr(),
                          gamma,
                          decay,
                          parts.segments.data()};
  const auto scan = rewards.scalar_type() == ScalarType::Double ? discounted_scan_f64() : discounted_scan_f32();
  const auto run = [&](std::vector<int64_t>& indices, bool write) {
    // The lanes of a vector should have the same length.
    const auto length = [&](int64_t index) { return parts.segments[index].end - parts.segments[index].begin; };
    std::stable_sort(indices.begin(), indices.end(), [&](int64_t a, int64_t b) { return length(a) > length(b); });
    const int64_t count = static_cast<int64_t>(indices.size());
    parallel_tasks((count + kTaskSegments - 1) / kTaskSegments, [&](int64_t task, int) {
      const int64_t first = task * kTaskSegments;
      scan(params, indices.data() + first, std::min(kTaskSegments, count - first), write);
    });
  };

  if (!parts.with_left_neighbour.empty()) {
    std::vector<double> next_values;
    for (const ScanSegment& segment : parts.segments) next_values.push_back(segment.next_value);
    run(parts.with_left_neighbour, false);
    std::sort(parts.with_right_neighbour.begin(), parts.with_right_neighbour.end());
    std::vector<ScanSegment> found = parts.segments;
    for (ScanSegment& segment : parts.segments) segment.next_advantage = 0;
    for (auto index = parts.with_right_neighbour.rbegin(); index != parts.with_right_neighbour.rend(); ++index) {
      const ScanSegment& right = found[*index + 1];
      parts.segments[*index].next_advantage =
          right.next_advantage + right.factor * parts.segments[*index + 1].next_advantage;
    }
    for (size_t index = 0; index < next_values.size(); ++index) parts.segments[index].next_value = next_values[index];
  }
  std::vector<int64_t> all(parts.segments.size());
  for (size_t index = 0; index < all.size(); ++index) all[index] = static_cast<int64_t>(index);
  run(all, true);
  return {advantages, returns};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykern, CPU, m) { m.impl("discounted_scan", TORCH_BOX(&discounted_scan)); }

}  // namespace pykern
