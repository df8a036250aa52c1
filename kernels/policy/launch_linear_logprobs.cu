// Picks the kernels of a request for token log-probabilities from hidden states.
#include "kernels/common/launch.h"
#include "kernels/common/with_type.h"
#include "kernels/policy/linear_logprobs_sm80.cuh"

namespace pykern {
namespace {

unsigned blocks_for(int64_t count, int64_t per_block) {
  return static_cast<unsigned>((count + per_block - 1) / per_block);
}

template <class Real, bool Softcap>
const char* segments(const LinearLogprobsSegments& params, Stream stream) {
  const dim3 blocks(static_cast<unsigned>(params.chunk.rows), blocks_for(params.chunk.entries, kLinearSegment<Real>));
  const auto kernel = params.weighted ? linear_logprobs_segments_kernel<Real, Softcap, true>
                                      : linear_logprobs_segments_kernel<Real, Softcap, false>;
  return launch(kernel, Grid{blocks, dim3(kLinearThreads)}, stream, params);
}

template <class Real>
const char* segments(const LinearLogprobsSegments& params, Stream stream) {
  return params.chunk.softcap > 0 ? segments<Real, true>(params, stream) : segments<Real, false>(params, stream);
}

template <class T>
const char* gradient(const LinearLogprobsGradient& params, Stream stream) {
  const dim3 blocks(blocks_for(params.chunk.rows, kLinearLogprobsRows),
                    blocks_for(params.chunk.entries, kLinearThreads * Pack<T>::kSize));
  const auto kernel =
      params.chunk.softcap > 0 ? linear_logprobs_gradient_kernel<T, true> : linear_logprobs_gradient_kernel<T, false>;
  return launch(kernel, Grid{blocks, dim3(kLinearThreads)}, stream, params);
}

template <class T>
const char* accumulate(const LinearLogprobsAccumulate& params, Stream stream) {
  const Grid grid{dim3(static_cast<unsigned>(params.rows)), dim3(kLinearThreads)};
  return launch(linear_logprobs_accumulate_kernel<T>, grid, stream, params);
}

}  // namespace

int64_t linear_logprobs_segment(DataType type) {
  return type == DataType::f64 ? kLinearSegment<double> : kLinearSegment<float>;
}

const char* launch_linear_logprobs_segments(const LinearLogprobsSegments& params, Stream stream) {
  return params.chunk.type == DataType::f64 ? segments<double>(params, stream) : segments<float>(params, stream);
}

const char* launch_linear_logprobs_join(const LinearLogprobsJoin& params, Stream stream) {
  const Grid grid{dim3(blocks_for(params.rows, kLinearThreads)), dim3(kLinearThreads)};
  const auto kernel =
      params.type == DataType::f64 ? linear_logprobs_join_kernel<double> : linear_logprobs_join_kernel<float>;
  return launch(kernel, grid, stream, params);
}

const char* launch_linear_logprobs_gradient(const LinearLogprobsGradient& params, Stream stream) {
  return with_any_type(params.gradient_type, [&](auto value) {
    return gradient<decltype(value)>(params, stream);
  });
}

const char* launch_linear_logprobs_bias(const LinearLogprobsBias& params, Stream stream) {
  const Grid grid{dim3(blocks_for(params.entries, kLinearThreads)), dim3(kLinearThreads)};
  const auto kernel =
      params.type == DataType::f64 ? linear_logprobs_bias_kernel<double> : linear_logprobs_bias_kernel<float>;
  return launch(kernel, grid, stream, params);
}

const char* launch_linear_logprobs_accumulate(const LinearLogprobsAccumulate& params, Stream stream) {
  return with_any_type(params.result_type, [&](auto value) {
    return accumulate<decltype(value)>(params, stream);
  });
}

const char* launch_linear_logprobs_hidden(const LinearLogprobsHidden& params, Stream stream) {
  const Grid grid{dim3(static_cast<unsigned>(params.rows)), dim3(kLinearThreads)};
  const auto kernel = params.type == DataType::f64   ? linear_logprobs_hidden_kernel<uint64_t, double>
                      : params.type == DataType::f32 ? linear_logprobs_hidden_kernel<uint32_t, float>
                                                     : linear_logprobs_hidden_kernel<uint16_t, float>;
  return launch(kernel, grid, stream, params);
}

}  // namespace pykern
