// group_advantages on a GPU: what the host hands over.
#pragma once

#include <cstdint>

#include "kernels/common/numeric.h"
#include "kernels/common/stream.h"

namespace pykern {

// In the order of BASELINES and SCALES in pykern/policy/advantages.py.
enum class Baseline : int { none, group_mean, leave_one_out, length_weighted, given };
enum class Scale : int { none, group_std, batch_std, token_whiten };

// A block whose groups have no more rows than this keeps them in shared memory.
constexpr int64_t kSharedGroupRows = 512;
// Of the table in which a block finds its groups, for each of its rows.
constexpr int64_t kGroupRowBytes = 11 * 8;
// Sums of integers hold no more rows than this.
constexpr int64_t kMaxAdvantageRows = (int64_t{1} << 31) - 1;

struct AdvantageParams {
  const void* rewards;  // float32 or float64, as are baseline_rewards and advantages
  const int64_t* ids;
  const int64_t* lengths;         // null if not needed
  const void* baseline_rewards;   // null unless the baseline is given
  void* advantages;
  unsigned long long* counts;     // [4], zero at first: see METRICS in pykern/policy/advantages.py
  unsigned long long* finished;   // zero at first: blocks that are through; whitening only
  unsigned char* tables;          // [rows, kGroupRowBytes]; null for up to kSharedGroupRows rows
  double* centred;                // [rows], whitening only: the distance from the baseline
  uint8_t* states;                // [rows], whitening only
  int64_t rows;
  Baseline baseline;
  Scale scale;
  double eps;
  int ddof;
  bool singleton_self;
};

const char* launch_group_advantages(DataType type, const AdvantageParams& params, Stream stream);

}  // namespace pykern
