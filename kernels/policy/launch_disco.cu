#include "kernels/common/launch.h"
#include "kernels/common/with_type.h"
#include "kernels/policy/disco_sm80.cuh"

namespace pykern {
namespace {

template <class T>
const char* launch_loss(const DiscoParams& p, Stream stream) {
  const int64_t sequences = p.batch.sequences, most = int64_t{multiprocessors()} * 8;
  const auto grid = [](int64_t blocks) { return Grid{dim3(static_cast<unsigned>(blocks)), dim3(kSequenceThreads)}; };
  const Grid of_sequences = grid(sequences < most ? sequences : most);
  const char* error = launch(disco_scores_kernel<T>, of_sequences, stream, p);
  if (!error) {
    error = launch(disco_groups_kernel<T>, grid((sequences + kSequenceThreads - 1) / kSequenceThreads), stream, p);
  }
  if (error || !p.coefficient) return error;
  return launch(disco_gradient_kernel<T>, of_sequences, stream, p);
}

}  // namespace

const char* launch_disco_loss(DataType type, const DiscoParams& params, Stream stream) {
  return with_wide_type(type, [&](auto value) { return launch_loss<decltype(value)>(params, stream); });
}

}  // namespace pykern
