// What the CPU and the CUDA side of prefix attention ask of their arguments.
#pragma once

#include <optional>
#include <utility>

#include "common/checks.h"

namespace pykern {

constexpr int64_t kTileTokens = 64;
constexpr int64_t kBlockTokens = 128;
constexpr int64_t kMaxHeadSize = 256;

// The type of lse, sinks and slopes.
inline ScalarType statistic_type(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// int32 [tokens], contiguous.
inline void check_tokens(const Tensor& tensor, const char* name, DeviceCheck check_device) {
  check_device(tensor, name);
  check_type(tensor, ScalarType::Int, name);
  check_dim(tensor, 1, name);
  check_contiguous(tensor, name);
  STD_TORCH_CHECK(tensor.size(0) <= INT32_MAX - kBlockTokens, name, ": too many tokens");
}

inline void check_tree(const Tensor& subtree_end, const Tensor& position, const Tensor& bounds, const Tensor& order,
                       int64_t tokens, DeviceCheck check_device) {
  check_tokens(subtree_end, "subtree_end", check_device);
  check_tokens(position, "position", check_device);
  check_size(subtree_end, 0, tokens, "subtree_end");
  check_size(position, 0, tokens, "position");
  for (const auto& [tensor, name] : {std::pair{&bounds, "bounds"}, {&order, "order"}}) {
    check_device(*tensor, name);
    check_type(*tensor, ScalarType::Int, name);
    check_dim(*tensor, 2, name);
    check_contiguous(*tensor, name);
  }
  check_size(bounds, 0, (tokens + kTileTokens - 1) / kTileTokens, "bounds");
  check_size(bounds, 1, 4, "bounds");
  check_size(order, 0, 2, "order");
  check_size(order, 1, (tokens + kBlockTokens - 1) / kBlockTokens, "order");
}

// One value for each query head.
inline void check_per_head(const std::optional<Tensor>& tensor, const Tensor& q, const char* name,
                           DeviceCheck check_device) {
  if (!tensor) return;
  check_device(*tensor, name);
  check_type(*tensor, statistic_type(q), name);
  check_dim(*tensor, 1, name);
  check_size(*tensor, 0, q.size(1), name);
  check_contiguous(*tensor, name);
}

inline void check_heads(const Tensor& q, const Tensor& k, const Tensor& v, DeviceCheck check_device) {
  for (const auto& [tensor, name] : {std::pair{&q, "q"}, {&k, "k"}, {&v, "v"}}) {
    check_device(*tensor, name);
    check_dim(*tensor, 3, name);
    check_type(*tensor, q.scalar_type(), name);
    check_size(*tensor, 0, q.size(0), name);
  }
  check_size(k, 2, q.size(2), "k");
  check_size(v, 1, k.size(1), "v");
  STD_TORCH_CHECK(k.size(1) > 0 && q.size(1) % k.size(1) == 0, "q: expected a multiple of ", k.size(1), " heads, got ",
                  q.size(1));
  STD_TORCH_CHECK(q.size(2) <= kMaxHeadSize && v.size(2) <= kMaxHeadSize, "head size: at most ", kMaxHeadSize);
}

// The forward's output or its gradient, [tokens, query heads, value size].
inline void check_output(const Tensor& tensor, const Tensor& q, const Tensor& v, const char* name,
                         DeviceCheck check_device) {
  check_device(tensor, name);
  check_type(tensor, q.scalar_type(), name);
  check_dim(tensor, 3, name);
  check_size(tensor, 0, q.size(0), name);
  check_size(tensor, 1, q.size(1), name);
  check_size(tensor, 2, v.size(2), name);
}

// lse or its gradient, [tokens, query heads].
inline void check_statistic(const Tensor& tensor, const Tensor& q, const char* name, DeviceCheck check_device) {
  check_device(tensor, name);
  check_type(tensor, statistic_type(q), name);
  check_dim(tensor, 2, name);
  check_size(tensor, 0, q.size(0), name);
  check_size(tensor, 1, q.size(1), name);
}

}  // namespace pykern
