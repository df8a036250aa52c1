#include "kernels/common/launch.h"
#include "kernels/common/with_type.h"
#include "kernels/policy/returns_sm80.cuh"

namespace pykern {
namespace {

int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }
int64_t ceil_divide(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Packed sequences may differ in length, and the host does not know theirs.
int64_t usual_length(const DiscountedScanParams& p) {
  return p.cu_seqlens ? ceil_divide(p.tokens, p.sequences) : p.columns;
}

int64_t threads_of_block(const DiscountedScanParams& p) {
  return at_most(ceil_divide(usual_length(p), kQuad * kWarpSize) * kWarpSize, kScanThreads);
}

template <class T>
const char* launch_scan(const DiscountedScanParams& p, Stream stream) {
  const auto allows = [](const void* pointer) { return allows_packs(static_cast<const T*>(pointer)); };
  const bool packs = allows(p.rewards) && allows(p.values) && allows(p.advantages) && allows(p.returns) &&
                     reinterpret_cast<uintptr_t>(p.mask) % kQuad == 0;
  const Grid grid{dim3(static_cast<unsigned>(p.sequences * p.parts)),
                  dim3(static_cast<unsigned>(threads_of_block(p)))};
  return launch(p.values ? discounted_scan_kernel<T, true> : discounted_scan_kernel<T, false>, grid, stream, p, packs);
}

}  // namespace

int64_t discounted_scan_parts(const DiscountedScanParams& p) {
  constexpr int64_t kFewestTiles = 4;
  const int64_t threads = threads_of_block(p), resident = int64_t{multiprocessors()} * (2048 / threads) / 2;
  if (p.sequences >= resident) return 1;
  const int64_t longest = p.cu_seqlens ? at_most(2 * usual_length(p), p.tokens) : p.columns;
  const int64_t worthwhile = ceil_divide(longest, kFewestTiles * kQuad * threads);
  return at_most(worthwhile, ceil_divide(resident, p.sequences));
}

const char* launch_discounted_scan(DataType type, const DiscountedScanParams& params, Stream stream) {
  return with_wide_type(type, [&](auto value) { return launch_scan<decltype(value)>(params, stream); });
}

}  // namespace pykern
