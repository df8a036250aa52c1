// Picks the kernel of a request for token log-probabilities.
#include "kernels/common/launch.h"
#include "kernels/common/with_type.h"
#include "kernels/policy/logprobs_sm80.cuh"

namespace pykern {
namespace {

// A function of the vocabulary alone: a row's results must not depend on how many rows there are.
template <class T>
Grid grid_of(const TokenLogprobsRows& rows) {
  const int64_t per_thread = kLogprobsUnroll * Pack<T>::kSize;
  const int64_t wanted = (rows.vocabulary + per_thread - 1) / per_thread;
  const int64_t warps = wanted > 0 ? (wanted + kWarpSize - 1) / kWarpSize : 1;
  const int64_t threads = warps * kWarpSize < kLogprobsThreads ? warps * kWarpSize : kLogprobsThreads;
  return Grid{dim3(static_cast<unsigned>(rows.rows)), dim3(static_cast<unsigned>(threads))};
}

template <class T>
const char* forward(const TokenLogprobsParams& params, Stream stream) {
  const auto kernel = params.entropy && params.sum_p2 ? token_logprobs_kernel<T, true, true>
                      : params.entropy                ? token_logprobs_kernel<T, true, false>
                      : params.sum_p2                 ? token_logprobs_kernel<T, false, true>
                                                      : token_logprobs_kernel<T, false, false>;
  return launch(kernel, grid_of<T>(params.rows), stream, params);
}

template <class T>
const char* backward(const TokenLogprobsBackwardParams& params, Stream stream) {
  return launch(token_logprobs_backward_kernel<T>, grid_of<T>(params.rows), stream, params);
}

}  // namespace

const char* launch_token_logprobs(const TokenLogprobsParams& params, Stream stream) {
  return with_any_type(params.rows.type, [&](auto value) { return forward<decltype(value)>(params, stream); });
}

const char* launch_token_logprobs_backward(const TokenLogprobsBackwardParams& params, Stream stream) {
  return with_any_type(params.rows.type, [&](auto value) {
    return backward<decltype(value)>(params, stream);
  });
}

}  // namespace pykern
