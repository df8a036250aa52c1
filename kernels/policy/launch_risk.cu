#include "kernels/common/launch.h"
#include "kernels/common/with_type.h"
#include "kernels/policy/risk_sm80.cuh"

namespace pykern {

const char* launch_risk_advantages(DataType type, const RiskParams& params, Stream stream) {
  const Grid grid{dim3(static_cast<unsigned>(params.rows)), dim3(kRiskThreads)};
  return with_wide_type(type, [&](auto value) {
    return launch(risk_advantages_kernel<decltype(value)>, grid, stream, params);
  });
}

}  // namespace pykern
