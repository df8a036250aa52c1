// group_advantages and group_entropy on a GPU: what the host hands over.
#pragma once

#include <cstdint>

#include "kernels/common/numeric.h"
#include "kernels/common/stream.h"
#include "kernels/policy/advantages_parts.h"

namespace pykern {

// A block whose groups have no more rows than this keeps them in shared memory.
constexpr int64_t kSharedGroupRows = 512;
// Of the table in which a block finds its groups, for each of its rows.
constexpr int64_t kPlainRowBytes = 10 * 8;
constexpr int64_t kAdvantageRowBytes = 22 * 8;
constexpr int64_t kEntropyRowBytes = 9 * 8;
// Sums of integers hold no more rows than this.
constexpr int64_t kMaxAdvantageRows = (int64_t{1} << 31) - 1;

// A filter takes groups out of statistics of the whole batch, so it has a launch of its own where there are any.
enum class AdvantageStage : int { whole, filter, after_filter };

// What the last block learns of the rows, [components, rows] each with `decompose`, else [1, rows]; null if not needed.
struct BatchColumns {
  double* value;     // the transformed reward
  double* centred;   // its distance from the baseline, if that is one of the group
  double* divisor;   // of the group
  double* mean;      // of the group
  double *low, *high;
  double* deviation;  // of the group, plus eps
  uint8_t* states;    // see RowState
};

struct AdvantageParams {
  const void* rewards;  // [rows, components], float32 or float64, as are baseline_rewards and advantages
  const int64_t* ids;
  const int64_t* lengths;        // null if not needed
  const void* baseline_rewards;  // null unless the baseline is given
  void* advantages;
  bool* keep;                    // written, but read after a filter
  unsigned long long* counts;    // [AdvantageCount::count], zero at first
  unsigned long long* finished;  // zero at first: blocks that are through
  unsigned char* tables;         // [rows, kPlainRowBytes or kAdvantageRowBytes]; null for up to kSharedGroupRows rows
  BatchColumns columns;
  double* combined;              // [rows], for the last block
  int64_t rows;
  int components;
  bool decompose;
  Transform transform;
  Baseline baseline;
  Scale scale;
  Finish finish;
  Filter filter;
  AdvantageStage stage;
  bool group_transform, grouped, by_length;  // transforms_by_group(), is_grouped(), weighs_by_length()
  bool whole_batch;                          // needs_whole_batch()
  int ddof;
  bool singleton_self;
  double weights[kMaxComponents];
  double eps, finish_eps;
  double k;
  double overlong_longest, overlong_buffer, overlong_factor;
  double relative_length, fallback, window_low, window_high;
};

// Estimators of one reward and statistics of its group: a kernel with less to carry.
constexpr bool is_plain(const AdvantageParams& p) {
  return p.components == 1 && (!p.decompose || p.weights[0] == 1) && !(p.overlong_buffer > 0) &&
         p.transform == Transform::none && p.finish == Finish::none &&
         (p.baseline == Baseline::none || p.baseline == Baseline::group_mean ||
          p.baseline == Baseline::leave_one_out || p.baseline == Baseline::given) &&
         (p.scale == Scale::none || p.scale == Scale::group_std);
}

// Whether statistics of all rows or of all groups decide an advantage.
constexpr bool needs_whole_batch(const AdvantageParams& p) {
  return p.baseline == Baseline::batch_mean || p.baseline == Baseline::groups_mean || p.finish != Finish::none ||
         p.scale == Scale::beta || p.scale == Scale::batch_std || p.scale == Scale::centred_batch_std ||
         p.scale == Scale::groups_std || p.scale == Scale::nonzero_share || p.scale == Scale::valid_share;
}

const char* launch_group_advantages(DataType type, const AdvantageParams& params, Stream stream);

struct EntropyParams {
  const int64_t *ids, *answers;
  double* entropy;
  int64_t* sizes;
  unsigned char* tables;  // [rows, kEntropyRowBytes]; null for up to kSharedGroupRows rows
  int64_t rows;
};

const char* launch_group_entropy(const EntropyParams& params, Stream stream);

}  // namespace pykern
