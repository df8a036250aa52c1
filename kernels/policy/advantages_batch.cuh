// Statistics of the whole batch, and what follows from them: by the block that finishes last, which sees what all
// blocks have written of their rows. It goes through the rows in one fixed order.
#pragma once

#include <cmath>

#include "kernels/common/reduce.cuh"
#include "kernels/policy/advantages_values.cuh"

namespace pykern {

enum RowState : uint8_t { kTakesPart = 1, kSignal = 2, kFirstOfGroup = 4, kValidGroup = 8, kSingle = 16 };

struct Moments {
  double count, nonzero, low, high, weight, mean, squares;

  __device__ __forceinline__ bool equal() const { return low == high; }
  __device__ __forceinline__ double variance(int ddof) const { return weight > ddof ? squares / (weight - ddof) : 0; }
  __device__ __forceinline__ double deviation(int ddof) const { return count > 1 ? sqrt(variance(ddof)) : 1; }
};

// Visits rows four at a time, so that their loads overlap: `load(turn, row)` for each, then `use(turn, row)`.
template <class Load, class Use>
__device__ __forceinline__ void for_four_rows(int64_t rows, Load load, Use use) {
  for (int64_t first = threadIdx.x; first < rows; first += int64_t{4} * blockDim.x) {
#pragma unroll
    for (int turn = 0; turn < 4; ++turn) {
      const int64_t row = first + int64_t{turn} * blockDim.x;
      load(turn, row < rows ? row : first);
    }
#pragma unroll
    for (int turn = 0; turn < 4; ++turn) {
      const int64_t row = first + int64_t{turn} * blockDim.x;
      if (row < rows) use(turn, row);
    }
  }
}

// Of the rows for which `read(state, value)` is true, which may change the value; `values` or `lengths` may be null,
// for values of 0 and weights of 1.
template <class Read>
__device__ __forceinline__ Moments block_moments(const double* values, const uint8_t* states, const int64_t* lengths,
                                                 int64_t rows, WarpValues<double>& shared, Read read) {
  Moments moments{0, 0, HUGE_VAL, -HUGE_VAL, 0, 0, 0};
  double value[4], weight[4];
  uint8_t state[4];
  const auto load = [&](int turn, int64_t row) {
    value[turn] = values ? __ldcg(values + row) : 0;
    weight[turn] = lengths ? static_cast<double>(lengths[row]) : 1;
    state[turn] = __ldcg(states + row);
  };
  double sum = 0;
  for_four_rows(rows, load, [&](int turn, int64_t) {
    if (!read(state[turn], value[turn]) || !(weight[turn] > 0)) return;
    moments.count += 1;
    moments.nonzero += value[turn] != 0;
    moments.low = value[turn] < moments.low ? value[turn] : moments.low;
    moments.high = value[turn] > moments.high ? value[turn] : moments.high;
    moments.weight += weight[turn];
    sum += weight[turn] * value[turn];
  });
  moments.count = block_reduce(moments.count, 0.0, Sum{}, shared);
  moments.nonzero = block_reduce(moments.nonzero, 0.0, Sum{}, shared);
  moments.low = block_reduce(moments.low, HUGE_VAL, Smallest{}, shared);
  moments.high = block_reduce(moments.high, -HUGE_VAL, Largest{}, shared);
  moments.weight = block_reduce(moments.weight, 0.0, Sum{}, shared);
  moments.mean = mean_within(block_reduce(sum, 0.0, Sum{}, shared), moments.weight, moments.low, moments.high);
  double squares = 0;
  for_four_rows(rows, load, [&](int turn, int64_t) {
    if (!read(state[turn], value[turn]) || !(weight[turn] > 0)) return;
    const double distance = value[turn] - moments.mean;
    squares += weight[turn] * distance * distance;
  });
  moments.squares = block_reduce(squares, 0.0, Sum{}, shared);
  return moments;
}

// The Beta distribution that the groups' shares of reward suggest. An advantage is divided by its density, held to at
// least 1e-6.
class BetaPrior {
 public:
  __device__ __forceinline__ BetaPrior() : flat_(true), over_correct_(0), over_wrong_(0), scale_(0) {}
  __device__ __forceinline__ explicit BetaPrior(const Moments& shares) {
    const double mean = shares.count > 1 ? shares.mean : 0, variance = shares.count > 1 ? shares.variance(1) : 1;
    flat_ = !(variance > 0);
    const double q = mean * (1 - mean) / variance - 1;
    const double alpha = 1 + q * mean / 3, beta = 1 + q * (1 - mean) / 3;
    over_correct_ = alpha > 1 ? alpha - 1 : 0;
    over_wrong_ = beta > 1 ? beta - 1 : 0;
    scale_ = flat_ ? 0 : lgamma(over_correct_ + over_wrong_ + 2) - lgamma(over_correct_ + 1) - lgamma(over_wrong_ + 1);
  }
  __device__ __forceinline__ double density(double share) const {
    if (flat_) return 1;
    const double correct = over_correct_ > 0 ? over_correct_ * log(share) : 0;
    const double wrong = over_wrong_ > 0 ? over_wrong_ * log(1 - share) : 0;
    const double density = exp(correct + wrong + scale_);
    return density < 1e-6 ? 1e-6 : density;
  }

 private:
  bool flat_;
  double over_correct_, over_wrong_, scale_;
};

enum Population : int { kBatch, kGroups, kShares, kCentred, kValidRows, kPopulations };

struct BatchShared {
  bool last;
  WarpValues<double> values;
  Moments moments[kPopulations];
};

template <class T>
class WholeBatch {
 public:
  __device__ __forceinline__ WholeBatch(const AdvantageParams& params, const RowRewards<T>& rewards,
                                        BatchShared& shared)
      : p_(params), rewards_(rewards), shared_(shared) {}

  // Whether all other blocks have written their rows. All threads must call.
  __device__ __forceinline__ bool is_last_block() {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) shared_.last = atomicAdd(p_.finished, Word{1}) == gridDim.x - 1;
    __syncthreads();
    if (shared_.last) __threadfence();
    return shared_.last;
  }

  __device__ __forceinline__ void run() {
    const int parts = p_.decompose ? p_.components : 1;
    for (int part = 0; part < parts; ++part) {
      const int64_t begin = part * p_.rows;
      measure(begin);
      combine(begin, part);
    }
    finish();
  }

 private:
  __device__ __forceinline__ bool needs(int population) const {
    switch (population) {
      case kBatch:
        return p_.baseline == Baseline::batch_mean || p_.scale == Scale::batch_std || p_.scale == Scale::nonzero_share;
      case kGroups: return p_.baseline == Baseline::groups_mean || p_.scale == Scale::groups_std;
      case kShares: return p_.scale == Scale::beta;
      case kCentred: return p_.scale == Scale::centred_batch_std;
      default: return p_.scale == Scale::valid_share;
    }
  }

  static __device__ __forceinline__ double share(uint8_t state, double mean) {
    return (state & kSingle) || mean < 0 ? 0 : mean > 1 ? 1 : mean;
  }

  // The column of which the distance from the baseline is made.
  __device__ __forceinline__ const double* distance_source() const {
    return p_.baseline == Baseline::batch_mean    ? p_.columns.value
           : p_.baseline == Baseline::groups_mean ? p_.columns.mean
                                                  : p_.columns.centred;
  }
  __device__ __forceinline__ double subtracted() const {
    return p_.baseline == Baseline::batch_mean    ? shared_.moments[kBatch].mean
           : p_.baseline == Baseline::groups_mean ? shared_.moments[kGroups].mean
                                                  : 0;
  }

  __device__ __forceinline__ void measure(int64_t begin) {
#pragma unroll 1
    for (int population = 0; population < kPopulations; ++population) {
      if (!needs(population)) continue;
      const double* values = population == kBatch       ? p_.columns.value
                             : population == kCentred   ? distance_source()
                             : population == kValidRows ? nullptr
                                                        : p_.columns.mean;
      const double baseline = population == kCentred ? subtracted() : 0;
      const Moments moments = block_moments(
          values ? values + begin : nullptr, p_.columns.states + begin, nullptr, p_.rows, shared_.values,
          [&](uint8_t state, double& value) {
            if (population == kShares) value = share(state, value);
            if (population == kCentred) value = state & kSignal ? value - baseline : 0;
            if (population == kValidRows) value = state & kValidGroup ? 1 : 0;
            return (state & (population == kGroups || population == kShares ? kFirstOfGroup : kTakesPart)) != 0;
          });
      if (threadIdx.x == 0) shared_.moments[population] = moments;
      __syncthreads();
    }
  }

  // Whether the statistics of the batch leave any signal.
  __device__ __forceinline__ bool has_signal() const {
    const auto spread = [&](Population population) {
      return shared_.moments[population].count == 1 || !shared_.moments[population].equal();
    };
    if (p_.baseline == Baseline::batch_mean && shared_.moments[kBatch].equal()) return false;
    if (p_.baseline == Baseline::groups_mean && shared_.moments[kGroups].equal()) return false;
    switch (p_.scale) {
      case Scale::batch_std: return spread(kBatch);
      case Scale::centred_batch_std: return spread(kCentred);
      case Scale::groups_std: return spread(kGroups);
      default: return true;
    }
  }

  __device__ __forceinline__ double batch_divisor() const {
    switch (p_.scale) {
      case Scale::batch_std: return shared_.moments[kBatch].deviation(p_.ddof) + p_.eps;
      case Scale::centred_batch_std: return shared_.moments[kCentred].deviation(p_.ddof) + p_.eps;
      case Scale::groups_std: return shared_.moments[kGroups].deviation(p_.ddof) + p_.eps;
      case Scale::nonzero_share: {
        const Moments& batch = shared_.moments[kBatch];
        return batch.nonzero > 0 ? batch.nonzero / batch.count : HUGE_VAL;
      }
      case Scale::valid_share: {
        const Moments& valid = shared_.moments[kValidRows];
        return valid.nonzero > 0 ? valid.nonzero / valid.count + p_.eps : HUGE_VAL;
      }
      default: return 1;
    }
  }

  // A group whose advantages would be too large by its tokens' deviation goes by its own.
  __device__ __forceinline__ void fall_back(int64_t at, double baseline, double& distance, double& divisor) const {
    const double low = fabs(__ldcg(p_.columns.low + at) - baseline);
    const double high = fabs(__ldcg(p_.columns.high + at) - baseline);
    const double largest = p_.baseline == Baseline::groups_mean ? fabs(distance) : low > high ? low : high;
    if (!(largest / divisor >= p_.fallback)) return;
    distance = __ldcg(p_.columns.value + at) - __ldcg(p_.columns.mean + at);
    divisor = __ldcg(p_.columns.deviation + at);
  }

  // Adds the part's advantages to those of the parts before it, and their signals to the states of the first.
  __device__ __forceinline__ void combine(int64_t begin, int part) {
    const bool signal = has_signal();
    const double baseline = subtracted(), of_batch = batch_divisor();
    const double* const source = distance_source() + begin;
    const double weight = p_.decompose ? p_.weights[part] : 1;
    const BetaPrior prior = p_.scale == Scale::beta ? BetaPrior(shared_.moments[kShares]) : BetaPrior();
    double distance[4], divisor[4];
    uint8_t state[4];
    for_four_rows(
        p_.rows,
        [&](int turn, int64_t row) {
          state[turn] = __ldcg(p_.columns.states + begin + row);
          distance[turn] = __ldcg(source + row);
          divisor[turn] = p_.columns.divisor ? __ldcg(p_.columns.divisor + begin + row) : of_batch;
        },
        [&](int turn, int64_t row) {
          const bool has = signal && (state[turn] & kSignal);
          double advantage = 0;
          if (has) {
            if (p_.scale == Scale::beta) {
              divisor[turn] = prior.density(share(state[turn], __ldcg(p_.columns.mean + begin + row)));
            }
            distance[turn] -= baseline;
            if (p_.columns.deviation && !(state[turn] & kSingle)) {
              fall_back(begin + row, baseline, distance[turn], divisor[turn]);
            }
            advantage = weight * (distance[turn] / divisor[turn]);
          }
          if (part > 0) {
            advantage += p_.combined[row];
            if (has) p_.columns.states[row] = __ldcg(p_.columns.states + row) | kSignal;
          } else if (!has && (state[turn] & kSignal)) {
            p_.columns.states[row] = static_cast<uint8_t>(state[turn] & ~kSignal);
          }
          p_.combined[row] = advantage;
        });
  }

  __device__ __forceinline__ void finish() {
    const bool whitens = p_.finish == Finish::token_whiten;
    double mean = 0, divisor = 1;
    bool signal = true;
    if (p_.finish != Finish::none) {
      __syncthreads();
      const Moments all = block_moments(p_.combined, reinterpret_cast<const uint8_t*>(p_.keep),
                                        whitens ? p_.lengths : nullptr, p_.rows, shared_.values,
                                        [](uint8_t keep, double&) { return keep != 0; });
      mean = all.mean;
      divisor = whitens ? sqrt(all.variance(p_.ddof) + p_.finish_eps) : sqrt(all.variance(p_.ddof)) + p_.finish_eps;
      signal = all.count > 0 && !all.equal();
    }
    T* const advantages = static_cast<T*>(p_.advantages);
    double value[4];
    uint8_t state[4];
    for_four_rows(
        p_.rows,
        [&](int turn, int64_t row) {
          value[turn] = p_.combined[row];
          state[turn] = __ldcg(p_.columns.states + row);
        },
        [&](int turn, int64_t row) {
          const bool has = signal && (state[turn] & kSignal) && !(whitens && rewards_.length(row) == 0);
          advantages[row] = static_cast<T>(has ? (value[turn] - mean) / divisor : 0);
        });
  }

  const AdvantageParams& p_;
  const RowRewards<T>& rewards_;
  BatchShared& shared_;
};

}  // namespace pykern
