// A piece of a weight takes its update, wherever what is projected up comes from. Include from *.simd.cpp files only.
#pragma once

#include <type_traits>

#include "common/scratch.h"
#include "common/vector_part.h"
#include "lowrank/parts.h"
#include "lowrank/philox.h"

namespace pykern::PYKERN_SIMD {

using lowrank::ApplyPart;
using lowrank::Rounding;

// Neighbours in memory: a piece of a row or of a column.
template <class T>
struct Piece {
  T* weights;
  T* compensation;
  const T* gradient;       // null where the update has nothing of it
  const float* update;     // up(direction), or null for zeros
  const float* missed;     // up(low), or null for zeros
  bool scales_gradient;
  bool adds_sign;
  const float* factors;    // of the gradient, one for each neighbour, or null: `factor` for all
  float factor;
  int64_t count;
  int64_t index, index_step;  // of the elements in [n, length] order
};

// What `value` is once it is stored as T.
template <class T>
PYKERN_INLINE vfloat as_stored(vfloat value) {
  if constexpr (std::is_same_v<T, float>) return value;
  T stored[kLanes];
  store(stored, value);
  return load(stored);
}

PYKERN_INLINE vfloat sign_of(vfloat value) {
  return value > zero() ? broadcast(1.0f) : value < zero() ? broadcast(-1.0f) : value;
}

template <class T, Rounding Kind>
struct Update {
  const float scale, shrink, step_size, sign_scale, sign_factor;
  const uint64_t seed;
  const uint32_t step;

  explicit Update(const ApplyPart& part)
      : scale(static_cast<float>(part.scale)),
        shrink(static_cast<float>(part.shrink)),
        step_size(static_cast<float>(part.step_size)),
        sign_scale(static_cast<float>(part.sign_scale)),
        sign_factor(static_cast<float>(part.sign_factor)),
        seed(part.seed),
        step(part.step) {}

  void run(const Piece<T>& piece) const {
    for (int64_t i = 0; i < piece.count; i += kLanes) {
      const int64_t count = piece.count - i;
      vfloat direction = piece.update ? load_some(piece.update + i, count) * scale : zero();
      if (piece.gradient) {
        const vfloat gradient = load_some(piece.gradient + i, count);
        if (piece.scales_gradient) {
          direction += gradient * (piece.factors ? load_some(piece.factors + i, count) : broadcast(piece.factor));
        }
        if (piece.adds_sign) {
          const vfloat missed = piece.missed ? load_some(piece.missed + i, count) : zero();
          direction += sign_of(gradient * sign_factor - missed) * sign_scale;
        }
      }
      const vfloat weight = load_some(piece.weights + i, count);
      // A small change of the weight: 1 - decay keeps more digits than decay.
      const vfloat change = weight * -shrink - direction * step_size;
      if constexpr (Kind == Rounding::kahan) {
        const vfloat wanted = load_some(piece.compensation + i, count) + change;
        const vfloat reached = as_stored<T>(weight + wanted);
        store_some(piece.weights + i, reached, count);
        store_some(piece.compensation + i, wanted - (reached - weight), count);
      } else if constexpr (Kind == Rounding::stochastic) {
        const vuint words = philox_from(seed, piece.index + i * piece.index_step, piece.index_step, step);
        store_some(piece.weights + i, round_stochastic<T>(weight + change, words), count);
      } else {
        store_some(piece.weights + i, weight + change, count);
      }
    }
  }
};

// Pieces of one weight.
template <class T>
struct Weights {
  const ApplyPart& part;

  // Elements of G side by side: as they lie, or gathered into `buffer`.
  const T* gradient(int64_t line, int64_t element, int64_t count, T* buffer) const {
    if (!part.grad) return nullptr;
    const T* from = static_cast<const T*>(part.grad) + line * part.grad_line + element * part.grad_element;
    if (part.grad_element == 1) return from;
    for (int64_t i = 0; i < count; ++i) buffer[i] = from[i * part.grad_element];
    return buffer;
  }

  // `line` and `element` say where in memory order the piece begins.
  Piece<T> piece(int64_t line, int64_t element, int64_t count, const float* update, const float* missed,
                 T* buffer) const {
    const int64_t at = line * part.param.stride + element;
    const float* factors = static_cast<const float*>(part.factors);
    Piece<T> result{};
    result.weights = static_cast<T*>(part.data) + at;
    if (part.compensation) result.compensation = static_cast<T*>(part.compensation) + at;
    result.gradient = gradient(line, element, count, buffer);
    result.update = part.direction ? update : nullptr;
    result.missed = part.low ? missed : nullptr;
    result.scales_gradient = factors;
    result.adds_sign = part.low;
    result.count = count;
    if (part.param.rows) {
      result.factors = factors ? factors + element : nullptr;
      result.index = line * part.param.length + element;
      result.index_step = 1;
    } else {
      result.factor = factors ? factors[line] : 0.0f;
      result.index = element * part.param.length + line;
      result.index_step = part.param.length;
    }
    return result;
  }
};

}  // namespace pykern::PYKERN_SIMD
