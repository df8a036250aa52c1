#include "kernels/common/launch.h"
#include "kernels/policy/risk_sm80.cuh"

namespace pykern {

const char* launch_risk_advantages(DataType type, const RiskParams& params, Stream stream) {
  const Grid grid{dim3(static_cast<unsigned>(params.rows)), dim3(kRiskThreads)};
  switch (type) {
    case DataType::f32: return launch(risk_advantages_kernel<float>, grid, stream, params);
    case DataType::f64: return launch(risk_advantages_kernel<double>, grid, stream, params);
    default: return "risk_advantages: rewards of this dtype have no kernel";
  }
}

}  // namespace pykern
