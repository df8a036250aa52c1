#include "kernels/common/launch.h"
#include "kernels/common/with_type.h"
#include "kernels/policy/selection_sm80.cuh"

namespace pykern {
namespace {

int64_t blocks_of(int64_t tokens, int64_t most) {
  const int64_t wanted = (tokens + kSelectionThreads - 1) / kSelectionThreads;
  return wanted < most ? wanted : most;
}

Grid grid_of(int64_t blocks) { return {dim3(static_cast<unsigned>(blocks)), dim3(kSelectionThreads)}; }

template <class T, SelectionOrder order, bool kQuantile>
const char* launch_digits(const SelectionParams& p, Stream stream) {
  for (int pass = 0; pass < SelectionKeys<T, order>::kPasses; ++pass) {
    const char* error =
        launch(selection_digits_kernel<T, order, kQuantile>, grid_of(selection_blocks(p.tokens)), stream, p, pass);
    if (error) return error;
  }
  return nullptr;
}

template <class T, SelectionOrder order>
const char* launch_share(const SelectionParams& p, Stream stream) {
  const Grid grid = grid_of(selection_blocks(p.tokens));
  const char* error = launch_digits<T, order, false>(p, stream);
  if constexpr (order != SelectionOrder::random) {  // whose keys all differ
    if (!error) error = launch(selection_ties_kernel<T, order>, grid, stream, p);
  }
  return error ? error : launch(select_share_kernel<T, order>, grid, stream, p);
}

template <class T>
const char* launch_share_of(const SelectionParams& p, Stream stream) {
  switch (p.order) {
    case SelectionOrder::largest: return launch_share<T, SelectionOrder::largest>(p, stream);
    case SelectionOrder::smallest: return launch_share<T, SelectionOrder::smallest>(p, stream);
    // Nothing of it depends on the values' type.
    case SelectionOrder::random: return launch_share<float, SelectionOrder::random>(p, stream);
  }
  return "masked_select_share: unknown order";
}

template <class T>
const char* launch_quantile_of(const SelectionParams& p, Stream stream) {
  const char* error = launch_digits<T, SelectionOrder::smallest, true>(p, stream);
  if (error) return error;
  const int64_t blocks = p.interpolation == Interpolation::linear ? selection_blocks(p.tokens) : 1;
  return launch(quantile_kernel<T>, grid_of(blocks), stream, p);
}

}  // namespace

int64_t selection_blocks(int64_t tokens) { return blocks_of(tokens, int64_t{multiprocessors()} * 8); }
int64_t moments_blocks(int64_t tokens) { return tokens > 0 ? blocks_of(tokens, int64_t{multiprocessors()} * 8) : 1; }

const char* launch_select_share(DataType type, const SelectionParams& params, Stream stream) {
  return with_wide_type(type, [&](auto value) { return launch_share_of<decltype(value)>(params, stream); });
}

const char* launch_quantile(DataType type, const SelectionParams& params, Stream stream) {
  return with_wide_type(type, [&](auto value) { return launch_quantile_of<decltype(value)>(params, stream); });
}

const char* launch_moments(DataType type, const MomentsParams& params, Stream stream) {
  const Grid grid = grid_of(moments_blocks(params.tokens));
  return with_wide_type(type, [&](auto value) {
    return launch(masked_moments_kernel<decltype(value)>, grid, stream, params);
  });
}

}  // namespace pykern
