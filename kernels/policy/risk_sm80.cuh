// RiskPO's advantages in one launch. A block per row; that of a bundle's first row sees to the bundle. Bundles are
// small, so who belongs to whom is found by comparing all rows of a bundle.
#pragma once

#include <cmath>

#include "kernels/common/device.h"
#include "kernels/common/reduce.cuh"
#include "kernels/policy/risk.h"

namespace pykern {

constexpr int kRiskThreads = 128;

struct RiskShared {
  WarpValues<double> doubles;
  WarpValues<int> integers;
  int of_warps[kWarpSize];
  unsigned long long start;
  PaperScores scores;
};

template <class T>
class RiskBundle {
 public:
  __device__ __forceinline__ RiskBundle(const RiskParams& params, RiskShared& shared)
      : p_(params), shared_(shared), rewards_(static_cast<const T*>(params.rewards)) {}

  __device__ __forceinline__ void run() {
    const int64_t row = blockIdx.x;
    write_nothing(row);
    if (!leads(row)) return;
    list_rows(row);
    if (size_ == 0) return;
    find_prompts();
    const int prompts = count_prompts();
    add_up_papers();
    describe_papers();
    write_rows(prompts);
    if (threadIdx.x != 0) return;
    atomicAdd(&p_.counts[kRiskBundles], 1ull);
    atomicAdd(&p_.counts[kRiskPapers], static_cast<unsigned long long>(papers_));
  }

 private:
  __device__ __forceinline__ double reward(int64_t row) const { return static_cast<double>(rewards_[row]); }
  __device__ __forceinline__ bool finite(int64_t row) const { return reward(row) - reward(row) == 0; }

  // Rows that never become part of a list are nobody else's to write.
  __device__ __forceinline__ void write_nothing(int64_t row) {
    if (threadIdx.x != 0 || finite(row)) return;
    static_cast<T*>(p_.advantages)[row] = 0;
    static_cast<T*>(p_.papers)[row] = static_cast<T>(NAN);
    atomicAdd(&p_.counts[kRiskNonFinite], 1ull);
  }

  // Whether no earlier row that takes part has the same bundle. Neighbours are most likely to have it.
  __device__ __forceinline__ bool leads(int64_t row) const {
    if (!finite(row)) return false;
    const int64_t bundle = p_.bundles[row];
    for (int64_t from = row - 1; from >= 0; from -= blockDim.x) {
      const int64_t other = from - static_cast<int64_t>(threadIdx.x);
      if (__syncthreads_or(other >= 0 && p_.bundles[other] == bundle && finite(other))) return false;
    }
    return true;
  }

  // Visits the rows of the bundle in their order, `visit(row, place)`, and returns their number.
  template <class Visit>
  __device__ __forceinline__ int visit_rows(int64_t first, Visit visit) {
    const int64_t bundle = p_.bundles[first];
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    int found = 0;
    for (int64_t from = first; from < p_.rows; from += blockDim.x) {
      const int64_t row = from + threadIdx.x;
      const bool mine = row < p_.rows && p_.bundles[row] == bundle && finite(row);
      const unsigned in_warp = __ballot_sync(kFullWarp, mine);
      if (lane == 0) shared_.of_warps[warp] = __popc(in_warp);
      __syncthreads();
      int before = found;
      for (int other = 0; other < static_cast<int>(blockDim.x) / kWarpSize; ++other) {
        if (other < warp) before += shared_.of_warps[other];
        found += shared_.of_warps[other];
      }
      if (mine) visit(row, before + __popc(in_warp & ((1u << lane) - 1)));
      __syncthreads();
    }
    return found;
  }

  // Where a bundle's list lies is chance; nothing depends on it.
  __device__ __forceinline__ void list_rows(int64_t first) {
    size_ = visit_rows(first, [](int64_t, int) {});
    if (threadIdx.x == 0) shared_.start = atomicAdd(p_.listed, static_cast<unsigned long long>(size_));
    __syncthreads();
    list_ = p_.lists + shared_.start;
    papers_of_ = p_.paper_lists + shared_.start;
    visit_rows(first, [&](int64_t row, int place) { list_[place].row = static_cast<int32_t>(row); });
  }

  __device__ __forceinline__ void find_prompts() {
    for (int place = threadIdx.x; place < size_; place += blockDim.x) {
      RiskRow& mine = list_[place];
      const int64_t group = p_.groups[mine.row];
      int responses = 0, before = 0, first = size_;
      double sum = 0, squares = 0;
      for (int other = 0; other < size_; ++other) {
        const int64_t row = list_[other].row;
        if (p_.groups[row] != group) continue;
        first = first < other ? first : other;
        before += other < place;
        ++responses;
        sum += reward(row);
      }
      const double mean = sum / responses;
      for (int other = first; other < size_; ++other) {
        const int64_t row = list_[other].row;
        if (p_.groups[row] == group) squares += (reward(row) - mean) * (reward(row) - mean);
      }
      mine.place = before;
      mine.responses = responses;
      mine.first = first;
      mine.mean = mean;
      mine.deviation = responses > 1 ? sqrt(squares / (responses - 1)) : 0;
    }
    __syncthreads();
  }

  // Of the bundle; its papers are as many as the fewest responses to one of them.
  __device__ __forceinline__ int count_prompts() {
    int prompts = 0, fewest = size_;
    for (int place = threadIdx.x; place < size_; place += blockDim.x) {
      const RiskRow& mine = list_[place];
      prompts += mine.first == place;
      fewest = fewest < mine.responses ? fewest : mine.responses;
    }
    papers_ = block_reduce(fewest, size_, Smallest{}, shared_.integers);
    return block_reduce(prompts, 0, Sum{}, shared_.integers);
  }

  __device__ __forceinline__ void add_up_papers() {
    for (int paper = threadIdx.x; paper < papers_; paper += blockDim.x) {
      double score = 0, distances = 0;
      for (int place = 0; place < size_; ++place) {
        const RiskRow& response = list_[place];
        if (response.place != paper) continue;
        score += reward(response.row);
        distances += reward(response.row) - response.mean;
      }
      papers_of_[paper].score = score;
      papers_of_[paper].distances = distances;
    }
    __syncthreads();
  }

  __device__ __forceinline__ void describe_papers() {
    double sum = 0, squares = 0;
    for (int paper = threadIdx.x; paper < papers_; paper += blockDim.x) {
      const double score = papers_of_[paper].score;
      sum += score;
      int rank = 0;
      for (int other = 0; other < papers_; ++other) {
        const double of_other = papers_of_[other].score;
        rank += of_other < score || (of_other == score && other < paper);
      }
      papers_of_[rank].sorted = score;
    }
    const double mean = block_reduce(sum, 0.0, Sum{}, shared_.doubles) / papers_;
    for (int paper = threadIdx.x; paper < papers_; paper += blockDim.x) {
      const double distance = papers_of_[paper].score - mean;
      squares += distance * distance;
    }
    squares = block_reduce(squares, 0.0, Sum{}, shared_.doubles);
    if (threadIdx.x == 0) {
      PaperScores& scores = shared_.scores;
      scores.count = papers_;
      scores.low = papers_of_[0].sorted;
      scores.high = papers_of_[papers_ - 1].sorted;
      scores.low_quantile = quantile(p_.rule.low_level, 0);
      scores.high_quantile = quantile(p_.rule.high_level, 1);
      scores.deviation = papers_ > 1 ? sqrt(squares / (papers_ - 1)) : 1;
    }
    __syncthreads();
  }

  struct Sorted {
    const RiskPaper* papers;
    __device__ __forceinline__ double operator[](int64_t index) const { return papers[index].sorted; }
  };

  __device__ __forceinline__ double quantile(double level, int side) const {
    const double of_bundle = sorted_quantile(Sorted{papers_of_}, papers_, level);
    return p_.tracked ? joint_quantile(p_.rule, of_bundle, p_.tracked[side]) : of_bundle;
  }

  __device__ __forceinline__ void write_rows(int prompts) {
    for (int place = threadIdx.x; place < size_; place += blockDim.x) {
      const RiskRow& mine = list_[place];
      double advantage = 0, score = NAN;
      if (mine.place < papers_) {
        const RiskPaper& paper = papers_of_[mine.place];
        if (mine.first == 0) score = paper.score;
        const double utility = paper_utility(p_.rule, shared_.scores, paper.score), value = reward(mine.row);
        advantage = risk_share(p_.rule, utility, value, mine.deviation, value - mine.mean, paper.distances, prompts);
      }
      static_cast<T*>(p_.advantages)[mine.row] = static_cast<T>(advantage);
      static_cast<T*>(p_.papers)[mine.row] = static_cast<T>(score);
    }
  }

  const RiskParams& p_;
  RiskShared& shared_;
  const T* rewards_;
  RiskRow* list_ = nullptr;
  RiskPaper* papers_of_ = nullptr;
  int size_ = 0, papers_ = 0;
};

template <class T>
__global__ void __launch_bounds__(kRiskThreads) risk_advantages_kernel(RiskParams params) {
  PYKERN_SHARED(RiskShared, shared);
  RiskBundle<T>(params, shared).run();
}

}  // namespace pykern
