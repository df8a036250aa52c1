// The head sizes that kernels are compiled for. Others run in the next larger one, whose tiles are filled with zeros.
#pragma once

#include <type_traits>

#include "kernels/attention/prefix_attention.h"

namespace pykern {

#if defined(PYKERN_EMULATED)
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

template <class Element, int key_size, int value_size>
struct HeadSizes {
  using T = Element;
  static constexpr int kKey = key_size, kValue = value_size;
};

// body(HeadSizes<...>{}) for the smallest that holds the problem's; what it returns, or why there is none.
template <class Body>
const char* with_head_sizes(const PrefixAttentionProblem& problem, const Body& body) {
  const int key = problem.key_size, value = problem.value_size;
  const auto choose = [&](auto element) -> const char* {
    using T = decltype(element);
    // The emulator is built with all sizes of one type but the smallest, and with one of the other.
    constexpr bool emulated = kEmulated, all = !emulated || std::is_same<T, bf16>::value;
    if constexpr (!emulated) {
      if (key <= 32 && value <= 32) return body(HeadSizes<T, 32, 32>{});
    }
    if (key <= 64 && value <= 64) return body(HeadSizes<T, 64, 64>{});
    if constexpr (all) {
      if (key <= 96 && value <= 96) return body(HeadSizes<T, 96, 96>{});
      if (key <= 128 && value <= 128) return body(HeadSizes<T, 128, 128>{});
      if (key <= 192 && value <= 128) return body(HeadSizes<T, 192, 128>{});
      if (key <= 256 && value <= 256) return body(HeadSizes<T, 256, 256>{});
    }
    return all ? "head sizes are at most 256" : "the emulator has float16 for head sizes of at most 64";
  };
  if (problem.type == DataType::bf16) return choose(bf16{});
  if (problem.type == DataType::f16) return choose(f16{});
  return "expected bfloat16 or float16";
}

}  // namespace pykern
