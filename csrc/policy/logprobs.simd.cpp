#include "policy/logprobs.h"

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/vector.h"

namespace pykern::PYKERN_SIMD {
namespace {

// Vectors in flight, and elements that are widened once and then stay in the first-level cache.
constexpr int kUnroll = 4;
constexpr int64_t kBlock = kUnroll * kLanes;
constexpr int64_t kChunk = 1024;
constexpr float kLowest = -3.402823466e38f;
constexpr float kMinusInfinity = -__builtin_inff();
// Below this the exponential is 0. Logarithms of probabilities stop here, so that a masked entry
// (-inf) contributes 0 * finite instead of 0 * inf.
constexpr float kSmallestExponent = -1e4f;

struct RowSums {
  float maximum = kLowest;
  double sum = 0, weighted = 0, squares = 0;
};

// Widens `count` <= kChunk logits into `buffer`, padded with -inf to whole blocks; returns the largest.
template <class T>
float widen_chunk(const T* source, int64_t count, float* buffer) {
  vfloat largest[kUnroll];
  for (int u = 0; u < kUnroll; ++u) largest[u] = broadcast(kLowest);
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      const vfloat value = load(source + i + u * kLanes);
      store(buffer + i + u * kLanes, value);
      largest[u] = maximum(value, largest[u]);
    }
  }
  float result = max_lanes(maximum(maximum(largest[0], largest[1]), maximum(largest[2], largest[3])));
  for (; i < count; ++i) {
    buffer[i] = widen(source[i]);
    if (buffer[i] > result) result = buffer[i];
  }
  for (; i < round_up(count, kBlock); ++i) buffer[i] = kMinusInfinity;
  return result;
}

// One exponential per element. `weighted` gathers e * log e, whose terms stay small at any offset of
// the logits, where p * logit would cancel.
template <bool Entropy, bool SumP2>
void add_chunk(RowSums& row, const float* buffer, int64_t padded, float largest, float inverse_temperature) {
  if (largest > row.maximum) {
    // Not "if the maximum is kLowest": logits may have that very value.
    if (row.sum != 0) {
      const double shift = (static_cast<double>(row.maximum) - largest) * inverse_temperature;
      const double factor = __builtin_exp(shift);
      if (Entropy) row.weighted = factor * (row.weighted + shift * row.sum);
      if (SumP2) row.squares *= factor * factor;
      row.sum *= factor;
    }
    row.maximum = largest;
  }
  const vfloat reference = broadcast(row.maximum), inverse = broadcast(inverse_temperature);
  const vfloat smallest = broadcast(kSmallestExponent);
  vfloat sum[kUnroll] = {}, weighted[kUnroll] = {}, squares[kUnroll] = {};
  for (int64_t i = 0; i < padded; i += kBlock) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      const vfloat exponent = (load(buffer + i + u * kLanes) - reference) * inverse;
      const vfloat e = exp(exponent);
      sum[u] += e;
      if (Entropy) weighted[u] += e * select(exponent < smallest, smallest, exponent);
      if (SumP2) squares[u] += e * e;
    }
  }
  row.sum += sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
  if (Entropy) row.weighted += sum_lanes((weighted[0] + weighted[1]) + (weighted[2] + weighted[3]));
  if (SumP2) row.squares += sum_lanes((squares[0] + squares[1]) + (squares[2] + squares[3]));
}

template <class T, bool Entropy, bool SumP2>
void forward_row(const TokenLogprobsForward& params, int64_t index) {
  const TokenLogprobsInput& input = params.input;
  float* statistics = static_cast<float*>(params.statistics) + 2 * index;
  float* logprob = static_cast<float*>(params.logprobs) + index;
  float* entropy = static_cast<float*>(params.entropy) + (Entropy ? index : 0);
  float* sum_p2 = static_cast<float*>(params.sum_p2) + (SumP2 ? index : 0);
  const int64_t target = input.targets[index];
  if (target < 0) {
    statistics[0] = statistics[1] = *logprob = 0;
    if (Entropy) *entropy = 0;
    if (SumP2) *sum_p2 = 0;
    return;
  }
  const T* logits = static_cast<const T*>(input.logits) + input.row_offset[index];
  const float inverse_temperature = static_cast<float>(input.inverse_temperature[index]);
  alignas(64) float buffer[kChunk];
  RowSums row;
  for (int64_t start = 0; start < input.vocabulary; start += kChunk) {
    const int64_t count = input.vocabulary - start < kChunk ? input.vocabulary - start : kChunk;
    const float largest = widen_chunk(logits + start, count, buffer);
    add_chunk<Entropy, SumP2>(row, buffer, round_up(count, kBlock), largest, inverse_temperature);
  }
  const double log_sum = __builtin_log(row.sum);
  statistics[0] = row.maximum;
  statistics[1] = static_cast<float>(log_sum);
  const double exponent = (static_cast<double>(widen(logits[target])) - row.maximum) * inverse_temperature;
  *logprob = static_cast<float>(exponent - log_sum);
  if (Entropy) *entropy = static_cast<float>(log_sum - row.weighted / row.sum);
  if (SumP2) *sum_p2 = static_cast<float>(row.squares / (row.sum * row.sum));
}

// d loss / d logit = (g_l ([v = target] - p) - g_H p (log p + H) + 2 g_S p (p - S)) / T.
template <class T>
void backward_row(const TokenLogprobsBackward& params, int64_t index) {
  const TokenLogprobsInput& input = params.input;
  const auto at = [index](const void* pointer) { return pointer ? static_cast<const float*>(pointer)[index] : 0.0f; };
  T* gradient = static_cast<T*>(params.grad_logits) +
                (params.in_place ? input.row_offset[index] : index * input.vocabulary);
  const int64_t target = input.targets[index];
  const float g_logprob = at(params.grad_logprobs);
  const float g_entropy = at(params.grad_entropy), g_squares = at(params.grad_sum_p2);
  if (target < 0 || (g_logprob == 0 && g_entropy == 0 && g_squares == 0)) {
    __builtin_memset(gradient, 0, input.vocabulary * sizeof(T));
    return;
  }
  const T* logits = static_cast<const T*>(input.logits) + input.row_offset[index];
  const float inverse_temperature = static_cast<float>(input.inverse_temperature[index]);
  const float* statistics = static_cast<const float*>(params.statistics) + 2 * index;
  const vfloat reference = broadcast(statistics[0]), log_sum = broadcast(statistics[1]);
  const vfloat inverse = broadcast(inverse_temperature), smallest = broadcast(kSmallestExponent);
  const vfloat entropy = broadcast(params.grad_entropy ? at(params.entropy) : 0.0f);
  const vfloat sum_p2 = broadcast(params.grad_sum_p2 ? at(params.sum_p2) : 0.0f);
  const vfloat from_logprob = broadcast(-g_logprob), from_entropy = broadcast(g_entropy);
  const vfloat from_squares = broadcast(2 * g_squares);
  const auto of_vector = [&](vfloat logit) {
    const vfloat exponent = (logit - reference) * inverse - log_sum;
    const vfloat log_p = select(exponent < smallest, smallest, exponent);
    const vfloat p = exp(exponent);
    return p * (from_logprob - from_entropy * (log_p + entropy) + from_squares * (p - sum_p2)) * inverse;
  };
  // Before the first store: in place, the gradient takes the place of the logits.
  float of_target[kLanes];
  store(of_target, of_vector(broadcast(widen(logits[target]))));
  int64_t i = 0;
  for (; i + kBlock <= input.vocabulary; i += kBlock) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) store(gradient + i + u * kLanes, of_vector(load(logits + i + u * kLanes)));
  }
  for (; i < input.vocabulary; i += kLanes) {
    const int64_t count = input.vocabulary - i < kLanes ? input.vocabulary - i : kLanes;
    store_partial(gradient + i, of_vector(load_partial(logits + i, count)), count);
  }
  narrow(of_target[0] + g_logprob * inverse_temperature, gradient + target);
}

// Tasks of several rows where rows are short.
template <class Body>
void for_rows(const TokenLogprobsInput& input, const Body& body) {
  const int64_t rows_per_task = ceil_div(32768, input.vocabulary > 0 ? input.vocabulary : 1);
  parallel_tasks(ceil_div(input.rows, rows_per_task), [&](int64_t task, int) {
    const int64_t begin = task * rows_per_task;
    const int64_t end = begin + rows_per_task < input.rows ? begin + rows_per_task : input.rows;
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

template <class T>
void forward(const TokenLogprobsForward& params) {
  for_rows(params.input, [&](int64_t row) {
    if (params.entropy && params.sum_p2) return forward_row<T, true, true>(params, row);
    if (params.entropy) return forward_row<T, true, false>(params, row);
    if (params.sum_p2) return forward_row<T, false, true>(params, row);
    forward_row<T, false, false>(params, row);
  });
}

template <class T>
void backward(const TokenLogprobsBackward& params) {
  for_rows(params.input, [&](int64_t row) { backward_row<T>(params, row); });
}

}  // namespace

void token_logprobs_forward(const TokenLogprobsForward& params) {
  if (params.input.type == DataType::f32) return forward<float>(params);
  if (params.input.type == DataType::bf16) return forward<bf16>(params);
  forward<f16>(params);
}

void token_logprobs_backward(const TokenLogprobsBackward& params) {
  if (params.input.type == DataType::f32) return backward<float>(params);
  if (params.input.type == DataType::bf16) return backward<bf16>(params);
  backward<f16>(params);
}

}  // namespace pykern::PYKERN_SIMD
