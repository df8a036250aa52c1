// The change of weights, sixteen bytes at a time, from what is projected up.
#pragma once

#include "kernels/common/vector.cuh"
#include "kernels/lowrank/grouped.h"
#include "kernels/lowrank/weight_change.cuh"

namespace pykern::lowrank {

using ApplyTable = GroupedTable<ApplyMatrix>;

struct ApplyCall {
  ApplyTable table;
  ApplyRule rule;
};
static_assert(sizeof(ApplyCall) <= 32764, "more than the parameters of a kernel hold");

constexpr int kApplyThreads = 256;
constexpr int kApplyWarps = kApplyThreads / kWarpSize;
// Rows and packs of a weight, as it lies in memory, that a block changes at a time.
constexpr int kSlabRows = 64, kSlabPacks = 16;
constexpr int kThreadPacks = kSlabRows * kSlabPacks / kApplyThreads;
constexpr int kPacksInFlight = 2;

// A sign in two bits, and what they stand for; NaN stays NaN.
__device__ __forceinline__ uint32_t sign_code(float value) {
  return value > 0 ? 1u : value < 0 ? 2u : value == 0 ? 0u : 3u;
}
__device__ __forceinline__ float sign_of_code(uint32_t code) {
  return code == 3 ? __uint_as_float(0x7fc00000u) : code == 2 ? -1.0f : static_cast<float>(code);
}

// What a thread changes of a weight as it lies in memory: `columns` elements of a row are neighbours.
template <class T, bool along_length>
class WeightPacks {
 public:
  using C = Compute<T>;
  static constexpr int kSize = Pack<T>::kSize;
  static constexpr bool kSixteenBits = sizeof(T) == 2;

  struct Place {
    int slab_row, slab_pack;  // within the slab
    int row, column;          // of the first element
  };
  struct Loaded {
    Pack<T> weight, gradient, lost;
  };

  __device__ __forceinline__ WeightPacks(const ApplyMatrix& m, const ApplyRule& rule)
      : m_(m),
        rule_(rule),
        change_(rule, m),
        rows_(along_length ? m.n : m.length),
        columns_(along_length ? m.length : m.n),
        aligned_(allows_packs(weight_at(0, 0), m.param_stride) && allows_packs(gradient_at(0, 0), m.grad_stride) &&
                 allows_packs(lost_at(0, 0), m.param_stride)) {}

  // Row s of the slab is row_of(s) of the weight. `source` gives what is projected up, by up(place, values), and the
  // sign of what the subspace leaves of the gradient, by sign(place, e, gradient). With `kCodes` the weights stay, and
  // source.keep(place, codes) gets those signs.
  template <bool kCodes, class RowOf, class Source>
  __device__ __forceinline__ void visit(const RowOf& row_of, int first_column, bool inside, Source& source) const {
    if (inside && aligned_) {
#pragma unroll 1
      for (int first = 0; first < kThreadPacks; first += kPacksInFlight) {
        Loaded loaded[kPacksInFlight];
#pragma unroll
        for (int i = 0; i < kPacksInFlight; ++i) {
          const Place place = place_of(first + i, row_of, first_column);
          if (!kCodes) loaded[i].weight = load_pack<Reuse::stream>(weight_at(place.row, place.column));
          if (m_.grad) loaded[i].gradient = load_pack(gradient_at(place.row, place.column));
          if (!kCodes && m_.compensation) loaded[i].lost = load_pack<Reuse::stream>(lost_at(place.row, place.column));
        }
#pragma unroll
        for (int i = 0; i < kPacksInFlight; ++i) {
          const Place place = place_of(first + i, row_of, first_column);
          finish<kCodes>(place, loaded[i], kSize, source);
          if (!kCodes) store_pack<Reuse::stream>(weight_at(place.row, place.column), loaded[i].weight);
          if (!kCodes && m_.compensation) store_pack<Reuse::stream>(lost_at(place.row, place.column), loaded[i].lost);
        }
      }
      return;
    }
#pragma unroll 1
    for (int i = 0; i < kThreadPacks; ++i) {
      const Place place = place_of(i, row_of, first_column);
      const int left = place.row < rows_ ? columns_ - place.column : 0;
      const int count = left < 0 ? 0 : left < kSize ? left : kSize;
      Loaded loaded{};
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        if (e >= count) continue;
        if (!kCodes) loaded.weight[e] = weight_at(place.row, place.column)[e];
        if (m_.grad) loaded.gradient[e] = gradient_at(place.row, place.column)[e];
        if (!kCodes && m_.compensation) loaded.lost[e] = lost_at(place.row, place.column)[e];
      }
      finish<kCodes>(place, loaded, count, source);
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        if (kCodes || e >= count) continue;
        weight_at(place.row, place.column)[e] = loaded.weight[e];
        if (m_.compensation) lost_at(place.row, place.column)[e] = loaded.lost[e];
      }
    }
  }

  __device__ __forceinline__ bool inside(int first_row, int first_column, int row_count) const {
    return first_row + row_count <= rows_ && first_column + kSlabPacks * kSize <= columns_;
  }

 private:
  __device__ __forceinline__ T* weight_at(int row, int column) const {
    return static_cast<T*>(m_.param) + row * m_.param_stride + column;
  }
  __device__ __forceinline__ T* lost_at(int row, int column) const {
    return static_cast<T*>(m_.compensation) + row * m_.param_stride + column;
  }
  __device__ __forceinline__ const T* gradient_at(int row, int column) const {
    return static_cast<const T*>(m_.grad) + row * m_.grad_stride + column;
  }

  template <class RowOf>
  __device__ __forceinline__ Place place_of(int i, const RowOf& row_of, int first_column) const {
    const int index = i * kApplyThreads + static_cast<int>(threadIdx.x);
    const int slab_row = index / kSlabPacks, slab_pack = index % kSlabPacks;
    return {slab_row, slab_pack, row_of(slab_row), first_column + slab_pack * kSize};
  }

  __device__ __forceinline__ C factor(int row, int column, int e) const {
    return static_cast<const C*>(m_.factors)[along_length ? column + e : row];
  }

  template <bool kCodes, class Source>
  __device__ __forceinline__ void finish(const Place& place, Loaded& loaded, int count, Source& source) const {
    C up[kSize];
    source.up(place, up);
    if constexpr (kCodes) {
      uint32_t codes = 0;
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        codes |= sign_code(change_.to_gradient * static_cast<C>(widen(loaded.gradient[e])) - up[e]) << (2 * e);
      }
      source.keep(place, codes);
    } else {
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        if (e >= count) continue;
        C direction = change_.scale * up[e];
        if (m_.grad) {
          const C gradient = static_cast<C>(widen(loaded.gradient[e]));
          if (m_.factors) direction += gradient * factor(place.row, place.column, e);
          if (m_.low) direction += change_.sign_scale * source.sign(place, e, change_.to_gradient * gradient);
        }
        up[e] = change_(widen(loaded.weight[e]), direction);
      }
      round(place, up, loaded);
    }
  }

  // Lanes outside the weight round what nobody stores.
  __device__ __forceinline__ void round(const Place& place, const C (&change)[kSize], Loaded& loaded) const {
    if (rule_.rounding == WeightRounding::kahan) {
#pragma unroll
      for (int e = 0; e < kSize; ++e) change_kahan(change[e], loaded.weight[e], loaded.lost[e]);
    } else if (kSixteenBits && rule_.rounding == WeightRounding::stochastic) {
      if constexpr (kSixteenBits) {
        const uint32_t step = static_cast<uint32_t>(*m_.step);
        const int64_t first = along_length ? int64_t{place.row} * m_.length + place.column
                                           : int64_t{place.column} * m_.length + place.row;
        // Four at once leave registers for the sums.
#pragma unroll
        for (int at = 0; at < kSize; at += 4) {
          const auto element = [&](int e) {
            return static_cast<uint64_t>(first + (at + e) * int64_t{along_length ? 1 : m_.length});
          };
          change_stochastic<4>(change + at, m_.seed, element, step, loaded.weight.values + at);
        }
      }
    } else {
#pragma unroll
      for (int e = 0; e < kSize; ++e) narrow(static_cast<C>(widen(loaded.weight[e])) + change[e], loaded.weight[e]);
    }
  }

  const ApplyMatrix& m_;
  const ApplyRule& rule_;
  const WeightChange<T> change_;
  const int rows_, columns_;
  const bool aligned_;
};

}  // namespace pykern::lowrank
