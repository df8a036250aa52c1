// Tiles of transposed logits: rows are vocabulary entries, columns (the vector lanes) are tokens.
// In that orientation the weight is read as it lies, only the hidden states are packed (once), and
// the softmax of a token never crosses lanes. Include from *.simd.cpp files only.
#pragma once

#include "common/matmul.h"
#include "common/parallel.h"
#include "policy/linear_logprobs.h"

namespace pykern::PYKERN_SIMD {

// Vocabulary entries per tile: whole row blocks of the vector and of the tile-register products.
constexpr int64_t kTile = 192;
static_assert(kKeptEntries % kTile == 0 && kKeptRows % kPanel == 0);
constexpr float kLowest = -3.402823466e38f;
// As in logprobs.simd.cpp: logarithms of probabilities stop here, where e^x is 0.
constexpr float kSmallestExponent = -1e4f;

// tanh within 3 units in the last place. 1 - 2 / (e^2|x| + 1), and near 0, where that cancels, an odd polynomial.
PYKERN_INLINE vfloat tanh(vfloat x) {
  const vfloat magnitude = x < zero() ? -x : x;
  const vfloat outer = 1.0f - 2.0f / (exp(magnitude + magnitude) + 1.0f);
  const vfloat square = x * x;
  vfloat p = broadcast(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const vfloat inner = x + x * square * p;
  return magnitude < broadcast(0.625f) ? inner : (x < zero() ? -outer : outer);
}

// One tile of weight rows in the compute type: in place where the storage already is that, else converted.
template <class T>
struct WeightTile {
  const T* rows;
  int64_t stride;
};

template <class T, class Storage>
WeightTile<T> weight_tile(const LinearLogprobsInput& input, int64_t first, int64_t count, T* converted) {
  const Storage* source = static_cast<const Storage*>(input.weight) + first * input.weight_stride;
  const int64_t depth = round_up(input.hidden_size, kDepth<T>);
  if constexpr (sizeof(T) == sizeof(Storage)) {
    if (depth == input.hidden_size) return {reinterpret_cast<const T*>(source), input.weight_stride};
  }
  convert_rows(converted, depth, source, input.weight_stride, count, input.hidden_size);
  return {converted, depth};
}

// Elements that weight_tile's `converted` needs.
template <class T>
int64_t converted_tile_size(const LinearLogprobsInput& input) {
  return kTile * round_up(input.hidden_size, kDepth<T>);
}

template <class T>
struct Rows {
  const T* first;
  int64_t stride;
};

// The active hidden states of panel `panel`, kPanel rows: in place where they follow each other in
// memory, else copied into `gathered`, with zeros for tokens past the end.
template <class Storage>
Rows<Storage> panel_rows(const LinearLogprobsInput& input, int64_t panel, Storage* gathered) {
  const int64_t begin = panel * kPanel, end = begin + kPanel;
  const Storage* source = static_cast<const Storage*>(input.hidden);
  if (end <= input.rows && input.active[end - 1] - input.active[begin] == kPanel - 1) {
    return {source + input.active[begin] * input.hidden_stride, input.hidden_stride};
  }
  for (int64_t index = begin; index < end; ++index) {
    Storage* row = gathered + (index - begin) * input.hidden_size;
    if (index < input.rows) {
      std::memcpy(row, source + input.active[index] * input.hidden_stride, input.hidden_size * sizeof(Storage));
    } else {
      std::memset(row, 0, input.hidden_size * sizeof(Storage));
    }
  }
  return {gathered, input.hidden_size};
}

// A tile of the logits that the forward keeps: kTile entries x kPanel of its rows.
template <class T>
T* kept_tile(T* kept, int64_t panels, int64_t tile, int64_t panel) {
  return kept + (tile * panels + panel) * (kTile * kPanel);
}

// Per-token values of all panels; tokens past the end get `padding`.
template <class Value>
void fill_lanes(const LinearLogprobsInput& input, float* lanes, float padding, const Value& value) {
  for (int64_t index = 0; index < input.rows; ++index) lanes[index] = value(input.active[index]);
  for (int64_t index = input.rows; index < round_up(input.rows, kPanel); ++index) lanes[index] = padding;
}

}  // namespace pykern::PYKERN_SIMD
