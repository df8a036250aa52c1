// Backward. A group of vocabulary entries x a slab of tokens at a time: its logits are recomputed and
// turned into their gradients, in a buffer of at most 64 MiB; then every tile of the group adds
// its product with the hidden states to grad_weight, and every block of tokens its product with the
// weight to grad_hidden. Each sum has one owner and a fixed order, whatever the number of threads.
//
// The loops are: batches of tokens, groups, slabs. A vocabulary of several groups has all tokens in one
// batch, so that a group's part of grad_weight is finished when the group is; one of a single group has
// one slab per batch, so that the packed hidden states and grad_hidden take a slab's memory only.
//
// Many tokens over a small vocabulary are split instead: each part, as many as the sizes say, runs whole
// on one thread with its own sums for grad_weight, which are then added in order.
#include "policy/linear_logprobs.h"

#include "policy/linear_logprobs_tile.h"

namespace pykern::PYKERN_SIMD {
namespace {

// Of a group x slab. The threads wait for each other twice per slab, so slabs are long.
constexpr int64_t kGradientElements = 1 << 23;
constexpr int64_t kWeightElements = 1 << 21;  // of a group of weight rows
constexpr int64_t kMaxGroupTiles = 8;
constexpr int64_t kMinSlab = 256;
constexpr int64_t kPartTokens = 512, kMaxParts = 16;
constexpr int64_t kPartElements = 1 << 22;  // of the parts' sums for grad_weight
constexpr int64_t kHiddenColumns = 4 * kPanel, kHiddenRows = 384;  // of one task of grad_hidden
constexpr int64_t kWeightRows = 96;                                // of one task of grad_weight
// Rows a power of two apart would share few cache sets.
constexpr int64_t kSkew = 32;

// What the gradient of a logit needs of its token, one value per lane.
struct Lanes {
  float *inverse_temperature, *maximum, *log_sum, *grad_logprob, *grad_entropy, *entropy;
  int32_t* target;
};
constexpr int kLaneArrays = 7;

// Where a panel of logit gradients goes: `rows` has the tokens of one vocabulary entry side by side,
// `packed` is the matrix product's operand. Either may be null.
template <class T>
struct GradientTarget {
  T* rows;
  int64_t rows_stride;
  T* packed;
};

template <class T>
PYKERN_INLINE void store_gradients(const GradientTarget<T>& target, int64_t v, int64_t lane, vfloat even, vfloat odd,
                                   bool has_odd) {
  if constexpr (kDepth<T> == 1) {
    if (target.rows) store(target.rows + v * target.rows_stride + lane, even);
    if (target.packed) store(target.packed + v * kPanel + lane, even);
  } else {
    const vuint low = round_to_bf16_bits(even), high = round_to_bf16_bits(odd);
    if (target.rows) {
      const vhalf even_row = __builtin_convertvector(low, vhalf), odd_row = __builtin_convertvector(high, vhalf);
      std::memcpy(target.rows + v * target.rows_stride + lane, &even_row, sizeof even_row);
      if (has_odd) std::memcpy(target.rows + (v + 1) * target.rows_stride + lane, &odd_row, sizeof odd_row);
    }
    if (target.packed) {
      const vuint pairs = low | high << 16;
      std::memcpy(target.packed + v * kPanel + 2 * lane, &pairs, sizeof pairs);
    }
  }
}

// Whether logits have a softcap, and whether they have been through it.
enum class Cap { kNone, kAhead, kApplied };

// d loss / d logit = (g_l ([v = target] - p) - g_H p (log p + H)) / T, times 1 - tanh^2 under a softcap.
template <class T, Cap Softcap, bool Entropy>
void logit_gradients(const float* logits, int64_t count, int64_t first, const float* bias, float softcap,
                     const Lanes& lanes, int64_t token, const GradientTarget<T>& target) {
  const vfloat smallest = broadcast(kSmallestExponent);
  const vfloat cap = broadcast(softcap), inverse_cap = broadcast(Softcap == Cap::kNone ? 0.0f : 1.0f / softcap);
  for (int j = 0; j < kPanelVectors; ++j) {
    const int64_t lane = j * kLanes;
    const vfloat inverse = load(lanes.inverse_temperature + token + lane);
    const vfloat maximum = load(lanes.maximum + token + lane), log_sum = load(lanes.log_sum + token + lane);
    const vfloat grad_logprob = load(lanes.grad_logprob + token + lane);
    const vfloat grad_entropy = load(lanes.grad_entropy + token + lane);
    const vfloat entropy = load(lanes.entropy + token + lane);
    vint target_entry;
    std::memcpy(&target_entry, lanes.target + token + lane, sizeof target_entry);
    const auto gradient = [&](int64_t v) __attribute__((always_inline)) {
      vfloat z = load(logits + v * kPanel + lane) + broadcast(bias ? bias[v] : 0.0f);
      vfloat slope = inverse;
      if (Softcap != Cap::kNone) {
        const vfloat t = Softcap == Cap::kAhead ? tanh(z * inverse_cap) : z * inverse_cap;
        if (Softcap == Cap::kAhead) z = cap * t;
        slope *= 1.0f - t * t;
      }
      const vfloat exponent = (z - maximum) * inverse - log_sum;
      vfloat factor = -grad_logprob;
      if (Entropy) factor -= grad_entropy * (select(exponent < smallest, smallest, exponent) + entropy);
      const vfloat direct = target_entry == broadcast(static_cast<int32_t>(first + v)) ? grad_logprob : zero();
      return (exp(exponent) * factor + direct) * slope;
    };
    int64_t v = 0;
    for (; v + 2 <= count; v += 2) {
      const vfloat even = gradient(v), odd = gradient(v + 1);
      store_gradients(target, v, lane, even, odd, true);
      if (kDepth<T> == 1) store_gradients(target, v + 1, lane, odd, odd, false);
    }
    if (v < count) store_gradients(target, v, lane, gradient(v), zero(), false);
  }
}

// target[column * target_stride + row] = source[row * source_stride + column]
template <class T, class Source>
void transpose(T* target, int64_t target_stride, const Source* source, int64_t source_stride, int64_t rows,
               int64_t columns) {
  for (int64_t column = 0; column < columns; column += kLanes) {
    const int64_t width = columns - column < kLanes ? columns - column : kLanes;
    for (int64_t row = 0; row < rows; row += kLanes) {
      const int64_t height = rows - row < kLanes ? rows - row : kLanes;
      const Source* from = source + row * source_stride + column;
      T* to = target + column * target_stride + row;
      if (width == kLanes && height == kLanes) {
        vuint square[kLanes];
        for (int i = 0; i < kLanes; ++i) square[i] = (vuint)load(from + i * source_stride);
        detail::transpose<kLanes>(square);
        for (int i = 0; i < kLanes; ++i) store(to + i * target_stride, (vfloat)square[i]);
        continue;
      }
      for (int64_t i = 0; i < width; ++i) {
        for (int64_t j = 0; j < height; ++j) narrow(widen(from[j * source_stride + i]), to + i * target_stride + j);
      }
    }
  }
}

template <class T>
double sum_row(const T* row, int64_t count) {
  vfloat sum = zero();
  for (int64_t i = 0; i < count; i += kLanes) sum += load(row + i);
  return sum_lanes(sum);
}

template <class Storage>
class Backward {
  using T = compute_t<Storage>;

 public:
  // With `weight_sums` [vocabulary, round_up(hidden_size, kPanel)] given, grad_weight is left there.
  Backward(const LinearLogprobsBackward& params, int threads, int64_t gradient_elements, float* weight_sums)
      : params_(params),
        input_(params.input),
        threads_(threads),
        depth_(round_up(input_.hidden_size, kDepth<T>)),
        panels_(ceil_div(input_.rows, kPanel)),
        tokens_(panels_ * kPanel),
        tiles_(ceil_div(input_.vocabulary, kTile)),
        group_tiles_(group_tiles(input_.hidden_size, tiles_)),
        slab_(slab_tokens(tokens_, group_tiles_ * kTile, gradient_elements)),
        batch_(group_tiles_ == tiles_ ? slab_ : tokens_),
        weight_columns_(round_up(input_.hidden_size, kPanel)),
        hidden_stride_(batch_ + kSkew),
        rows_stride_(slab_ + kSkew),
        transposed_stride_(group_tiles_ * kTile + kSkew),
        tile_bytes_(round_up(converted_tile_size<T>(input_) * sizeof(T), 64)),
        thread_bytes_(tile_bytes_ + round_up(kPanel * (depth_ > kTile ? depth_ : kTile) * sizeof(float), 64)),
        needs_weight_sums_(params.grad_weight || params.weight_sums),
        weight_needs_grad_(needs_weight_sums_ || params.grad_bias),
        packed_(params.kept ? 0 : packed_size<T>(depth_, batch_) * sizeof(T)),
        packed_tokens_(needs_weight_sums_ ? batch_ * weight_columns_ * sizeof(T) : 0),
        lane_memory_(kLaneArrays * tokens_ * sizeof(float)),
        bias_(input_.vocabulary * sizeof(float)),
        thread_memory_(threads_ * thread_bytes_),
        gradient_rows_(weight_needs_grad_ ? group_tiles_ * kTile * rows_stride_ * sizeof(T) : 0),
        gradient_packed_(params.grad_hidden ? group_tiles_ * kTile * slab_ * sizeof(T) : 0),
        transposed_(params.grad_hidden ? input_.hidden_size * transposed_stride_ * sizeof(T) : 0),
        own_weight_sums_(
            needs_weight_sums_ && !weight_sums ? group_tiles_ * kTile * weight_columns_ * sizeof(float) : 0),
        hidden_sums_(params.grad_hidden ? input_.hidden_size * hidden_stride_ * sizeof(float) : 0),
        given_weight_sums_(weight_sums),
        sums_stride_(params.weight_sums ? params.sums_stride : weight_columns_) {}

  static bool one_group(const LinearLogprobsInput& input) {
    const int64_t tiles = ceil_div(input.vocabulary, kTile);
    return group_tiles(input.hidden_size, tiles) == tiles;
  }

  bool run() {
    const Scratch* const workspace[] = {&packed_,         &packed_tokens_, &lane_memory_,     &bias_,
                                        &thread_memory_,  &gradient_rows_, &gradient_packed_, &transposed_,
                                        &own_weight_sums_, &hidden_sums_};
    for (const Scratch* memory : workspace) {
      if (!memory->get<char>()) return false;
    }
    fill();
    for (int64_t batch = 0; batch < tokens_; batch += batch_) {
      const int64_t batch_end = tokens_ - batch < batch_ ? tokens_ : batch + batch_;
      pack_hidden(batch, batch_end);
      for (int64_t tile = 0; tile < tiles_; tile += group_tiles_) {
        const int64_t tile_end = tiles_ - tile < group_tiles_ ? tiles_ : tile + group_tiles_;
        if (params_.grad_hidden && (batch == 0 || group_tiles_ < tiles_)) transpose_weight(tile, tile_end);
        for (int64_t slab = batch; slab < batch_end; slab += slab_) {
          const int64_t count = batch_end - slab < slab_ ? batch_end - slab : slab_;
          make_gradients(tile, tile_end, batch, slab, count);
          use_gradients(tile, tile_end, batch, slab, count);
        }
      }
      if (params_.grad_hidden) write_hidden(batch, batch_end);
    }
    return true;
  }

 private:
  static int64_t group_tiles(int64_t hidden_size, int64_t tiles) {
    int64_t count = kWeightElements / ((hidden_size > 0 ? hidden_size : 1) * kTile);
    count = count < kMaxGroupTiles ? count : kMaxGroupTiles;
    count = count < tiles ? count : tiles;
    return count > 0 ? count : 1;
  }

  static int64_t slab_tokens(int64_t tokens, int64_t group, int64_t gradient_elements) {
    int64_t limit = gradient_elements / group;
    limit = limit > kMinSlab ? limit : kMinSlab;
    return round_up(ceil_div(tokens, ceil_div(tokens, limit)), kPanel);
  }

  int64_t tile_count(int64_t tile) const {
    const int64_t left = input_.vocabulary - tile * kTile;
    return left < kTile ? left : kTile;
  }

  const Storage* weight_row(int64_t entry) const {
    return static_cast<const Storage*>(input_.weight) + entry * input_.weight_stride;
  }

  // The hidden states of a batch as the operand of the logits and, slab by slab, of grad_weight.
  void pack_hidden(int64_t batch, int64_t batch_end) {
    parallel_tasks((batch_end - batch) / kPanel, [&](int64_t task, int thread) {
      const int64_t token = task * kPanel, slab = token / slab_ * slab_;
      const int64_t slab_count = batch_end - batch - slab < slab_ ? batch_end - batch - slab : slab_;
      const Rows<Storage> rows = panel_rows(
          input_, (batch + token) / kPanel,
          reinterpret_cast<Storage*>(thread_memory_.get<char>() + thread * thread_bytes_ + tile_bytes_));
      if (!params_.kept) {
        pack(packed_.get<T>() + token * depth_, rows.first, input_.hidden_size, kPanel, 1, rows.stride);
      }
      if (!needs_weight_sums_) return;
      T* packed_slab = packed_tokens_.get<T>() + slab * weight_columns_;
      for (int64_t column = 0; column < input_.hidden_size; column += kPanel) {
        const int64_t columns = input_.hidden_size - column < kPanel ? input_.hidden_size - column : kPanel;
        pack(packed_slab + column * slab_count + (token - slab) * kPanel, rows.first + column, kPanel, columns,
             rows.stride, 1);
      }
    });
  }

  // Lanes past the last token have probability 0 and no gradient.
  void fill() {
    float* memory = lane_memory_.get<float>();
    lanes_ = {memory, memory + tokens_, memory + 2 * tokens_, memory + 3 * tokens_, memory + 4 * tokens_,
              memory + 5 * tokens_, reinterpret_cast<int32_t*>(memory + 6 * tokens_)};
    const auto at = [](const void* pointer, int64_t row) {
      return pointer ? static_cast<const float*>(pointer)[row] : 0.0f;
    };
    fill_lanes(input_, lanes_.inverse_temperature, 1.0f,
               [&](int64_t row) { return static_cast<float>(input_.inverse_temperature[row]); });
    fill_lanes(input_, lanes_.maximum, -kLowest, [&](int64_t row) { return at(params_.statistics, 2 * row); });
    fill_lanes(input_, lanes_.log_sum, 0.0f, [&](int64_t row) { return at(params_.statistics, 2 * row + 1); });
    fill_lanes(input_, lanes_.grad_logprob, 0.0f, [&](int64_t row) { return at(params_.grad_logprobs, row); });
    fill_lanes(input_, lanes_.grad_entropy, 0.0f, [&](int64_t row) { return at(params_.grad_entropy, row); });
    fill_lanes(input_, lanes_.entropy, 0.0f,
               [&](int64_t row) { return params_.grad_entropy ? at(params_.entropy, row) : 0.0f; });
    for (int64_t index = 0; index < tokens_; ++index) {
      const int64_t target = index < input_.rows ? input_.targets[input_.active[index]] - input_.vocabulary_start : -1;
      lanes_.target[index] = target >= 0 && target < input_.vocabulary ? static_cast<int32_t>(target) : -1;
    }
    if (input_.bias && !params_.kept) {
      for (int64_t v = 0; v < input_.vocabulary; ++v) bias_.get<float>()[v] = static_cast<float>(input_.bias[v]);
    }
  }

  void transpose_weight(int64_t first_tile, int64_t last_tile) {
    parallel_tasks(last_tile - first_tile, [&](int64_t task, int) {
      const int64_t tile = first_tile + task, count = tile_count(tile);
      T* target = transposed_.get<T>() + task * kTile;
      transpose(target, transposed_stride_, weight_row(tile * kTile), input_.weight_stride, count, input_.hidden_size);
      for (int64_t v = count; v < round_up(count, kDepth<T>); ++v) {
        for (int64_t h = 0; h < input_.hidden_size; ++h) narrow(0.0f, target + h * transposed_stride_ + v);
      }
    });
  }

  void make_gradients(int64_t first_tile, int64_t last_tile, int64_t batch, int64_t slab, int64_t slab_count) {
    const int64_t slab_panels = slab_count / kPanel, group_tiles = last_tile - first_tile;
    const int64_t padded_group = round_up(group_entries(first_tile, last_tile), kDepth<T>);
    int64_t chunk = slab_panels;
    while (chunk > 1 && group_tiles * ceil_div(slab_panels, chunk) < 4 * threads_) chunk = (chunk + 1) / 2;
    const int64_t chunks = ceil_div(slab_panels, chunk);
    parallel_tasks(group_tiles * chunks, [&](int64_t task, int thread) {
      const int64_t group_tile = task / chunks, first_panel = task % chunks * chunk;
      const int64_t last_panel = first_panel + chunk < slab_panels ? first_panel + chunk : slab_panels;
      const int64_t first = (first_tile + group_tile) * kTile, count = tile_count(first_tile + group_tile);
      char* memory = thread_memory_.get<char>() + thread * thread_bytes_;
      float* scratch = reinterpret_cast<float*>(memory + tile_bytes_);
      WeightTile<T> weight{};
      if (!params_.kept) weight = weight_tile<T, Storage>(input_, first, count, reinterpret_cast<T*>(memory));
      for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        const int64_t token = slab + panel * kPanel;
        const float* logits = scratch;
        if (params_.kept) {
          logits = kept_logits(first_tile + group_tile, token, scratch);
        } else {
          matmul(count, kPanel, depth_, weight.rows, weight.stride, 1, packed_.get<T>() + (token - batch) * depth_,
                 scratch, kPanel, false);
        }
        const GradientTarget<T> target{
            weight_needs_grad_ ? gradient_rows_.get<T>() + group_tile * kTile * rows_stride_ + panel * kPanel : nullptr,
            rows_stride_,
            params_.grad_hidden ? gradient_packed_.get<T>() + (panel * padded_group + group_tile * kTile) * kPanel
                                : nullptr};
        if (input_.softcap <= 0) {
          write_gradients<Cap::kNone>(logits, count, first, token, target);
        } else if (params_.kept) {
          write_gradients<Cap::kApplied>(logits, count, first, token, target);
        } else {
          write_gradients<Cap::kAhead>(logits, count, first, token, target);
        }
      }
    });
  }

  template <Cap Softcap>
  void write_gradients(const float* logits, int64_t count, int64_t first, int64_t token,
                       const GradientTarget<T>& target) {
    const float* bias = input_.bias && !params_.kept ? bias_.get<float>() + first : nullptr;
    const auto softcap = static_cast<float>(input_.softcap);
    params_.grad_entropy ? logit_gradients<T, Softcap, true>(logits, count, first, bias, softcap, lanes_, token, target)
                         : logit_gradients<T, Softcap, false>(logits, count, first, bias, softcap, lanes_, token,
                                                              target);
  }

  // The kept logits of a panel of tokens: in place where those are a panel of the forward, else gathered. Lanes past
  // the last token get 0, as a row left out may hold NaN.
  const float* kept_logits(int64_t tile, int64_t token, float* gathered) const {
    const int64_t panels = ceil_div(params_.kept_rows, kPanel), rows = input_.rows - token;
    const int64_t count = rows < kPanel ? rows : kPanel;
    const int64_t* index = params_.kept_index + token;
    const bool to_the_end = index[0] + count == params_.kept_rows;
    if (index[0] % kPanel == 0 && index[count - 1] - index[0] == count - 1 && (count == kPanel || to_the_end)) {
      return kept_tile(params_.kept, panels, tile, index[0] / kPanel);
    }
    const float* lanes[kPanel];
    for (int64_t lane = 0; lane < count; ++lane) {
      lanes[lane] = kept_tile(params_.kept, panels, tile, index[lane] / kPanel) + index[lane] % kPanel;
    }
    for (int64_t v = 0; v < tile_count(tile); ++v) {
      float* row = gathered + v * kPanel;
      for (int64_t lane = 0; lane < count; ++lane) row[lane] = lanes[lane][v * kPanel];
      for (int64_t lane = count; lane < kPanel; ++lane) row[lane] = 0;
    }
    return gathered;
  }

  int64_t group_entries(int64_t first_tile, int64_t last_tile) const {
    const int64_t end = last_tile * kTile;
    return (end < input_.vocabulary ? end : input_.vocabulary) - first_tile * kTile;
  }

  void use_gradients(int64_t first_tile, int64_t last_tile, int64_t batch, int64_t slab, int64_t count) {
    const int64_t hidden_blocks = ceil_div(input_.hidden_size, kHiddenRows);
    const int64_t hidden_tasks = params_.grad_hidden ? ceil_div(count, kHiddenColumns) * hidden_blocks : 0;
    const int64_t entries = group_entries(first_tile, last_tile), padded_group = round_up(entries, kDepth<T>);
    const int64_t weight_tasks = weight_needs_grad_ ? ceil_div(entries, kWeightRows) : 0;
    parallel_tasks(hidden_tasks + weight_tasks, [&](int64_t task, int) {
      if (task >= hidden_tasks) {
        const int64_t entry = (task - hidden_tasks) * kWeightRows;
        const int64_t weight_rows = entries - entry < kWeightRows ? entries - entry : kWeightRows;
        return add_weight(first_tile * kTile, entry, weight_rows, batch, slab, count);
      }
      const int64_t column = task / hidden_blocks * kHiddenColumns, row = task % hidden_blocks * kHiddenRows;
      const int64_t columns = count - column < kHiddenColumns ? count - column : kHiddenColumns;
      const int64_t rows = input_.hidden_size - row < kHiddenRows ? input_.hidden_size - row : kHiddenRows;
      matmul(rows, columns, padded_group, transposed_.get<T>() + row * transposed_stride_, transposed_stride_, 1,
             gradient_packed_.get<T>() + column * padded_group,
             hidden_sums_.get<float>() + row * hidden_stride_ + (slab - batch) + column, hidden_stride_,
             first_tile > 0);
    });
  }

  // `count` vocabulary entries from `entry` of the group that starts at `group`, and one slab.
  void add_weight(int64_t group, int64_t entry, int64_t count, int64_t batch, int64_t slab, int64_t tokens) {
    const int64_t first = group + entry;
    const T* gradients = gradient_rows_.get<T>() + entry * rows_stride_;
    if (params_.grad_bias) {
      for (int64_t v = 0; v < count; ++v) {
        const double sum = sum_row(gradients + v * rows_stride_, tokens);
        params_.grad_bias[first + v] = slab > 0 || params_.kept ? params_.grad_bias[first + v] + sum : sum;
      }
    }
    if (!needs_weight_sums_) return;
    // Given sums are those of the whole vocabulary.
    float* sums = given_weight_sums_ ? given_weight_sums_ + first * sums_stride_
                                     : own_weight_sums_.get<float>() + entry * sums_stride_;
    matmul(count, input_.hidden_size, tokens, gradients, rows_stride_, 1,
           packed_tokens_.get<T>() + (slab - batch) * weight_columns_, sums, sums_stride_,
           slab > 0 || params_.weight_sums);
    if (slab + tokens == tokens_ && !given_weight_sums_) {
      convert_rows(static_cast<Storage*>(params_.grad_weight) + first * input_.hidden_size, input_.hidden_size, sums,
                   sums_stride_, count, input_.hidden_size);
    }
  }

  void write_hidden(int64_t batch, int64_t batch_end) {
    parallel_tasks((batch_end - batch) / kPanel, [&](int64_t task, int thread) {
      const int64_t first = batch + task * kPanel, hidden_size = input_.hidden_size;
      const int64_t count = input_.rows - first < kPanel ? input_.rows - first : kPanel;
      float* rows = reinterpret_cast<float*>(thread_memory_.get<char>() + thread * thread_bytes_ + tile_bytes_);
      transpose(rows, hidden_size, hidden_sums_.get<float>() + task * kPanel, hidden_stride_, hidden_size, count);
      for (int64_t i = 0; i < count; ++i) {
        convert_rows(static_cast<Storage*>(params_.grad_hidden) + input_.active[first + i] * hidden_size, hidden_size,
                     rows + i * hidden_size, 0, 1, hidden_size);
      }
    });
  }

  const LinearLogprobsBackward& params_;
  const LinearLogprobsInput& input_;
  const int threads_;
  const int64_t depth_, panels_, tokens_, tiles_, group_tiles_, slab_, batch_, weight_columns_;
  const int64_t hidden_stride_, rows_stride_, transposed_stride_, tile_bytes_, thread_bytes_;
  const bool needs_weight_sums_, weight_needs_grad_;
  const Scratch packed_, packed_tokens_, lane_memory_, bias_, thread_memory_;
  const Scratch gradient_rows_, gradient_packed_, transposed_, own_weight_sums_, hidden_sums_;
  float* const given_weight_sums_;
  const int64_t sums_stride_;
  Lanes lanes_{};
};

template <class Storage>
bool backward_in_parts(const LinearLogprobsBackward& params, int64_t parts) {
  const LinearLogprobsInput& input = params.input;
  const int64_t columns = round_up(input.hidden_size, kPanel), part_elements = input.vocabulary * columns;
  const int64_t part_rows = round_up(ceil_div(input.rows, parts), kPanel);
  parts = ceil_div(input.rows, part_rows);
  const Scratch weight_memory(params.grad_weight ? parts * part_elements * sizeof(float) : 0);
  const Scratch bias_memory(params.grad_bias ? parts * input.vocabulary * sizeof(double) : 0);
  if (!weight_memory.get<char>() || !bias_memory.get<char>()) return false;
  float* weight_sums = params.grad_weight ? weight_memory.get<float>() : nullptr;
  double* bias_sums = params.grad_bias ? bias_memory.get<double>() : nullptr;

  bool done[kMaxParts] = {};
  parallel_tasks(parts, [&](int64_t part, int) {
    LinearLogprobsBackward mine = params;
    mine.input.active += part * part_rows;
    mine.input.rows = input.rows - part * part_rows < part_rows ? input.rows - part * part_rows : part_rows;
    mine.grad_bias = bias_sums ? bias_sums + part * input.vocabulary : nullptr;
    float* sums = weight_sums ? weight_sums + part * part_elements : nullptr;
    // Nested tasks stay on this thread. Slabs as short as may be, for the second-level cache.
    done[part] = Backward<Storage>(mine, 1, 0, sums).run();
  });
  for (int64_t part = 0; part < parts; ++part) {
    if (!done[part]) return false;
  }

  parallel_tasks(ceil_div(input.vocabulary, kWeightRows), [&](int64_t task, int) {
    const int64_t first = task * kWeightRows;
    const int64_t count = input.vocabulary - first < kWeightRows ? input.vocabulary - first : kWeightRows;
    if (weight_sums) {
      for (int64_t part = 1; part < parts; ++part) {
        for (int64_t i = first * columns; i < (first + count) * columns; i += kLanes) {
          store(weight_sums + i, load(weight_sums + i) + load(weight_sums + part * part_elements + i));
        }
      }
      convert_rows(static_cast<Storage*>(params.grad_weight) + first * input.hidden_size, input.hidden_size,
                   weight_sums + first * columns, columns, count, input.hidden_size);
    }
    if (bias_sums) {
      for (int64_t v = first; v < first + count; ++v) {
        params.grad_bias[v] = 0;
        for (int64_t part = 0; part < parts; ++part) params.grad_bias[v] += bias_sums[part * input.vocabulary + v];
      }
    }
  });
  return true;
}

template <class Storage>
bool backward(const LinearLogprobsBackward& params) {
  const LinearLogprobsInput& input = params.input;
  if (params.kept) return Backward<Storage>(params, max_threads(), kGradientElements, params.weight_sums).run();
  int64_t parts = input.rows / kPartTokens;
  parts = parts < kMaxParts ? parts : kMaxParts;
  const int64_t fit = kPartElements / (input.vocabulary * round_up(input.hidden_size + 1, kPanel));
  parts = parts < fit ? parts : fit;
  if (parts > 1 && Backward<Storage>::one_group(input)) return backward_in_parts<Storage>(params, parts);
  return Backward<Storage>(params, max_threads(), kGradientElements, nullptr).run();
}

}  // namespace

bool linear_logprobs_backward(const LinearLogprobsBackward& params) {
  if (params.input.type == DataType::f32) return backward<float>(params);
  if (params.input.type == DataType::bf16) return backward<bf16>(params);
  return backward<f16>(params);
}

}  // namespace pykern::PYKERN_SIMD
