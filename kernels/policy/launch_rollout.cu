#include "kernels/common/launch.h"
#include "kernels/common/with_type.h"
#include "kernels/policy/rollout_sm80.cuh"

namespace pykern {
namespace {

template <class T>
const char* launch_correction(const RolloutParams& p, Stream stream) {
  const int64_t most = int64_t{multiprocessors()} * 8;
  const auto grid = [&](int64_t blocks) {
    // One at least: it says what the metrics of nothing are.
    return Grid{dim3(static_cast<unsigned>(blocks < 1 ? 1 : blocks < most ? blocks : most)), dim3(kSequenceThreads)};
  };
  const char* error = launch(rollout_correction_kernel<T>, grid(p.batch.sequences), stream, p);
  if (error || !p.rules.normalize || !p.weights) return error;
  const int64_t count = p.rules.weight == RolloutWeight::token ? p.batch.tokens : p.batch.sequences;
  return launch(rollout_normalize_kernel<T>, grid((count + kSequenceThreads - 1) / kSequenceThreads), stream, p, count);
}

}  // namespace

const char* launch_rollout_correction(DataType type, const RolloutParams& params, Stream stream) {
  return with_wide_type(type, [&](auto value) { return launch_correction<decltype(value)>(params, stream); });
}

}  // namespace pykern
