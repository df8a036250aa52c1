#include "kernels/common/launch.h"
#include "kernels/common/with_type.h"
#include "kernels/policy/whiten_sm80.cuh"

namespace pykern {
namespace {

template <class T>
const char* launch_whiten(const WhitenParams& p, Stream stream) {
  const auto allows = [](const void* pointer) { return allows_packs(static_cast<const T*>(pointer)); };
  const bool packs = allows(p.values) && allows(p.result) && reinterpret_cast<uintptr_t>(p.mask) % kQuad == 0;
  const char* error = launch(whiten_moments_kernel<T>, {dim3(static_cast<unsigned>(p.blocks)), dim3(kMomentThreads)},
                             stream, p, packs);
  if (error) return error;
  const int64_t blocks = (p.tokens + kQuad * kWhitenThreads - 1) / (kQuad * kWhitenThreads);
  const int64_t most = int64_t{multiprocessors()} * 8 * 4;
  return launch(whiten_kernel<T>, {dim3(static_cast<unsigned>(blocks < most ? blocks : most)), dim3(kWhitenThreads)},
                stream, p, packs);
}

}  // namespace

int64_t whiten_blocks(const WhitenParams& p) {
  constexpr int64_t kBlockTokens = 2 * kQuad * kMomentThreads;
  const int64_t wanted = (p.tokens + kBlockTokens - 1) / kBlockTokens;
  return wanted < kMomentThreads ? wanted : kMomentThreads;
}

const char* launch_masked_whiten(DataType type, const WhitenParams& params, Stream stream) {
  return with_wide_type(type, [&](auto value) { return launch_whiten<decltype(value)>(params, stream); });
}

}  // namespace pykern
