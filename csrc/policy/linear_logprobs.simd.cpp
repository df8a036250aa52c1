// Forward: tasks are (stripe of vocabulary) x (chunk of tokens). Each keeps the running maximum and
// sums of its tokens over its stripe; the stripes, whose number depends on the vocabulary alone, are
// merged in order, so results are the same for any number of threads.
#include "policy/linear_logprobs.h"

#include "policy/linear_logprobs_tile.h"

namespace pykern::PYKERN_SIMD {
namespace {

constexpr int64_t kMaxStripes = 32;

// Running softmax sums of every (stripe, token).
struct Partial {
  float *maximum, *sum, *weighted;
};

// Finishes a tile of logits (bias, softcap), in place; returns the largest per lane. The temperature
// comes after the largest is subtracted, where it costs no digits.
template <bool Softcap>
PYKERN_INLINE void finish_logits(float* tile, int64_t count, const float* bias, float softcap, vfloat* largest) {
  const vfloat cap = broadcast(softcap), inverse_cap = broadcast(Softcap ? 1.0f / softcap : 0.0f);
  for (int64_t v = 0; v < count; ++v) {
    const vfloat offset = broadcast(bias ? bias[v] : 0.0f);
#pragma GCC unroll 4
    for (int j = 0; j < kPanelVectors; ++j) {
      vfloat z = load(tile + v * kPanel + j * kLanes) + offset;
      if (Softcap) z = cap * tanh(z * inverse_cap);
      if (Softcap || bias) store(tile + v * kPanel + j * kLanes, z);
      largest[j] = maximum(z, largest[j]);
    }
  }
}

template <bool Entropy>
PYKERN_INLINE void add_tile(const float* tile, int64_t count, const vfloat* largest, const float* inverse,
                            float* maxima, float* sums, float* weighted_sums) {
  const vfloat smallest = broadcast(kSmallestExponent);
  vfloat scale[kPanelVectors], reference[kPanelVectors], sum[kPanelVectors], weighted[kPanelVectors];
  for (int j = 0; j < kPanelVectors; ++j) {
    const vfloat before = load(maxima + j * kLanes);
    scale[j] = load(inverse + j * kLanes);
    reference[j] = maximum(before, largest[j]);
    const vfloat difference = (before - reference[j]) * scale[j];
    const vfloat shift = select(difference < smallest, smallest, difference);
    const vfloat factor = exp(shift);
    sum[j] = load(sums + j * kLanes);
    if (Entropy) weighted[j] = factor * (load(weighted_sums + j * kLanes) + shift * sum[j]);
    sum[j] *= factor;
    store(maxima + j * kLanes, reference[j]);
  }
  vfloat tile_sum[kPanelVectors] = {}, tile_weighted[kPanelVectors] = {};
  for (int64_t v = 0; v < count; ++v) {
#pragma GCC unroll 4
    for (int j = 0; j < kPanelVectors; ++j) {
      const vfloat exponent = (load(tile + v * kPanel + j * kLanes) - reference[j]) * scale[j];
      const vfloat e = exp(exponent);
      tile_sum[j] += e;
      if (Entropy) tile_weighted[j] += e * select(exponent < smallest, smallest, exponent);
    }
  }
  for (int j = 0; j < kPanelVectors; ++j) {
    store(sums + j * kLanes, sum[j] + tile_sum[j]);
    if (Entropy) store(weighted_sums + j * kLanes, weighted[j] + tile_weighted[j]);
  }
}

// Merges the stripes of one token and writes its results.
void write_token(const LinearLogprobsForward& params, const Partial& partial, int64_t stripes, int64_t stride,
                 int64_t index, float target_logit) {
  float largest = kLowest;
  for (int64_t s = 0; s < stripes; ++s) {
    const float maximum = partial.maximum[s * stride + index];
    largest = maximum > largest ? maximum : largest;
  }
  const int64_t row = params.input.active[index];
  const double inverse = params.input.inverse_temperature[row];
  double sum = 0, weighted = 0;
  for (int64_t s = 0; s < stripes; ++s) {
    const int64_t at = s * stride + index;
    const double shift = (static_cast<double>(partial.maximum[at]) - largest) * inverse;
    const double factor = __builtin_exp(shift);
    sum += factor * partial.sum[at];
    if (params.entropy) weighted += factor * (partial.weighted[at] + shift * partial.sum[at]);
  }
  const double log_sum = __builtin_log(sum);
  static_cast<float*>(params.statistics)[2 * row] = largest;
  static_cast<float*>(params.statistics)[2 * row + 1] = static_cast<float>(log_sum);
  const double exponent = (static_cast<double>(target_logit) - largest) * inverse;
  static_cast<float*>(params.logprobs)[row] = static_cast<float>(exponent - log_sum);
  if (params.entropy) static_cast<float*>(params.entropy)[row] = static_cast<float>(log_sum - weighted / sum);
}

template <class Storage>
bool forward(const LinearLogprobsForward& params) {
  using T = compute_t<Storage>;
  const LinearLogprobsInput& input = params.input;
  const int64_t depth = round_up(input.hidden_size, kDepth<T>);
  const int64_t panels = ceil_div(input.rows, kPanel), tokens = panels * kPanel;
  const int64_t tiles = ceil_div(input.vocabulary, kTile);
  const int64_t stripes = tiles < kMaxStripes ? tiles : kMaxStripes;
  const int threads = max_threads();

  const Scratch packed_memory(packed_size<T>(depth, tokens) * sizeof(T));
  const Scratch lane_memory((2 + 3 * stripes) * tokens * sizeof(float)), bias_memory(input.vocabulary * sizeof(float));
  const int64_t tile_bytes = round_up(converted_tile_size<T>(input) * sizeof(T), 64);
  const int64_t thread_bytes = tile_bytes + round_up(kPanel * (depth > kTile ? depth : kTile) * sizeof(float), 64);
  const Scratch thread_memory(threads * thread_bytes);
  if (!packed_memory.get<T>() || !lane_memory.get<float>() || !bias_memory.get<float>() || !thread_memory.get<char>()) {
    return false;
  }
  T* packed = packed_memory.get<T>();
  float* inverse = lane_memory.get<float>();
  float* target_logit = inverse + tokens;
  const Partial partial{target_logit + tokens, target_logit + (1 + stripes) * tokens,
                        target_logit + (1 + 2 * stripes) * tokens};
  float* bias = input.bias ? bias_memory.get<float>() : nullptr;
  if (bias) {
    for (int64_t v = 0; v < input.vocabulary; ++v) bias[v] = static_cast<float>(input.bias[v]);
  }
  fill_lanes(input, target_logit, 0.0f, [](int64_t) { return 0.0f; });
  fill_lanes(input, inverse, 1.0f, [&](int64_t row) { return static_cast<float>(input.inverse_temperature[row]); });

  parallel_tasks(panels, [&](int64_t panel, int thread) {
    const Rows<Storage> rows = panel_rows(
        input, panel, reinterpret_cast<Storage*>(thread_memory.get<char>() + thread * thread_bytes + tile_bytes));
    pack(packed + panel * kPanel * depth, rows.first, input.hidden_size, kPanel, 1, rows.stride);
  });

  // As many tokens per task as leave every thread several tasks: a weight tile is read once per task.
  int64_t chunk = 512 / kPanel;
  while (chunk > 1 && stripes * ceil_div(panels, chunk) < 4 * threads) chunk /= 2;
  const int64_t chunks = ceil_div(panels, chunk);
  parallel_tasks(stripes * chunks, [&](int64_t task, int thread) {
    const int64_t stripe = task / chunks, first_panel = task % chunks * chunk;
    const int64_t last_panel = first_panel + chunk < panels ? first_panel + chunk : panels;
    char* memory = thread_memory.get<char>() + thread * thread_bytes;
    float* scratch = reinterpret_cast<float*>(memory + tile_bytes);
    const int64_t lanes = stripe * tokens + first_panel * kPanel;
    for (int64_t i = 0; i < (last_panel - first_panel) * kPanel; ++i) {
      partial.maximum[lanes + i] = kLowest;
      partial.sum[lanes + i] = partial.weighted[lanes + i] = 0;
    }
    for (int64_t tile = tiles * stripe / stripes; tile < tiles * (stripe + 1) / stripes; ++tile) {
      const int64_t first = tile * kTile;
      const int64_t count = input.vocabulary - first < kTile ? input.vocabulary - first : kTile;
      const WeightTile<T> weight = weight_tile<T, Storage>(input, first, count, reinterpret_cast<T*>(memory));
      for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        float* logits = params.kept ? kept_tile(params.kept, panels, tile, panel) : scratch;
        matmul(count, kPanel, depth, weight.rows, weight.stride, 1, packed + panel * kPanel * depth, logits, kPanel,
               false);
        vfloat largest[kPanelVectors];
        for (int j = 0; j < kPanelVectors; ++j) largest[j] = broadcast(kLowest);
        const float* tile_bias = bias ? bias + first : nullptr;
        const int64_t token = panel * kPanel, at = stripe * tokens + token;
        const auto softcap = static_cast<float>(input.softcap);
        if (softcap > 0) {
          finish_logits<true>(logits, count, tile_bias, softcap, largest);
        } else {
          finish_logits<false>(logits, count, tile_bias, softcap, largest);
        }
        for (int64_t lane = 0; lane < kPanel && token + lane < input.rows; ++lane) {
          const int64_t target = input.targets[input.active[token + lane]] - input.vocabulary_start - first;
          if (target >= 0 && target < count) target_logit[token + lane] = logits[target * kPanel + lane];
        }
        float *maxima = partial.maximum + at, *sums = partial.sum + at, *weighted = partial.weighted + at;
        if (params.entropy) {
          add_tile<true>(logits, count, largest, inverse + token, maxima, sums, weighted);
        } else {
          add_tile<false>(logits, count, largest, inverse + token, maxima, sums, weighted);
        }
      }
    }
  });

  parallel_tasks(panels, [&](int64_t panel, int) {
    for (int64_t index = panel * kPanel; index < (panel + 1) * kPanel && index < input.rows; ++index) {
      write_token(params, partial, stripes, tokens, index, target_logit[index]);
    }
  });
  return true;
}

}  // namespace

bool linear_logprobs_forward(const LinearLogprobsForward& params) {
  if (params.input.type == DataType::f32) return forward<float>(params);
  if (params.input.type == DataType::bf16) return forward<bf16>(params);
  return forward<f16>(params);
}

}  // namespace pykern::PYKERN_SIMD
