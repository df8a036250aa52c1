// The way of a block through the tokens that it has to do with.
#pragma once

#include "kernels/attention/visibility.cuh"

namespace pykern {

// Units of kBoundsTokens tokens, in rising order, without those that a test says nothing is visible of. A warp's lanes
// test 32 of them at a time, since most of a large tree may have to be skipped.
struct VisibleUnits {
  int next, stop;      // what has not been tested yet
  unsigned some, all;  // of the 32 tested last
  bool is_all;         // what the test said of the last one that advance gave

  // The next one, or -1. test(unit) is a Visible. All lanes of a warp must call.
  template <class Test>
  __device__ __forceinline__ int advance(const Test& test) {
    while (some == 0) {
      if (next >= stop) return -1;
      const int unit = next + static_cast<int>(threadIdx.x % kWarpSize);
      const Visible visible = unit < stop ? test(unit) : Visible::none;
      some = __ballot_sync(kFullWarp, visible != Visible::none);
      all = __ballot_sync(kFullWarp, visible == Visible::all);
      next += kWarpSize;
    }
    const int bit = __ffs(static_cast<int>(some)) - 1;
    some &= some - 1;
    is_all = all >> bit & 1;
    return next - kWarpSize + bit;
  }
};

}  // namespace pykern
