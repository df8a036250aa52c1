// risk_advantages on a GPU: what the host hands over.
#pragma once

#include <cstdint>

#include "kernels/common/numeric.h"
#include "kernels/common/stream.h"
#include "kernels/policy/risk_rule.h"

namespace pykern {

// Sums of integers hold no more rows than this.
constexpr int64_t kMaxRiskRows = (int64_t{1} << 31) - 1;

// Of a row that takes part, in the list of its bundle.
struct RiskRow {
  int32_t row;
  int32_t place;      // among the responses of its prompt
  int32_t responses;  // of its prompt
  int32_t first;      // place in the list of its prompt's first response
  double mean, deviation;
};

// Of a paper, in the memory of its bundle's list.
struct RiskPaper {
  double score, distances, sorted;
};

struct RiskParams {
  const void* rewards;  // float32 or float64, as are advantages and papers
  const int64_t *groups, *bundles;
  const double* tracked;  // [2] or null
  void *advantages, *papers;
  unsigned long long* counts;  // [kRiskCounts], zero at first
  unsigned long long* listed;  // zero at first: rows in lists so far
  RiskRow* lists;              // [rows]
  RiskPaper* paper_lists;      // [rows]
  int64_t rows;
  RiskRule rule;
};

const char* launch_risk_advantages(DataType type, const RiskParams& params, Stream stream);

}  // namespace pykern
