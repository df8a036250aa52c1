// Ops about the library itself.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include <string>

#include "common/cpu_level.h"
#include "common/peak.h"

namespace pykern {
namespace {

std::string level_name() { return cpu_level_name(cpu_level()); }
std::string best_level_name() { return cpu_level_name(best_cpu_level()); }

bool choose_level(std::string name) {
  for (int level = 0; level < kCpuLevels; ++level) {
    if (name == cpu_level_name(static_cast<CpuLevel>(level))) return set_cpu_level(static_cast<CpuLevel>(level));
  }
  return false;
}

std::string built_with() {
#if defined(__clang__)
  std::string text = __VERSION__;
#else
  std::string text = "GCC " __VERSION__;
#endif
  text += ", headers of torch " TORCH_VERSION ", levels";
  for (int level = 0; level < kCpuLevels; ++level) {
    if (cpu_level_built(static_cast<CpuLevel>(level)))
      text += std::string(" ") + cpu_level_name(static_cast<CpuLevel>(level));
  }
  return text;
}

double run_matmul_in_cache(bool bfloat16, int64_t repeats) { return matmul_in_cache()(bfloat16, repeats); }

}  // namespace

STABLE_TORCH_LIBRARY(pykern, m) {
  m.def("cpu_level() -> str");
  m.def("best_cpu_level() -> str");
  m.def("set_cpu_level(str level) -> bool");
  m.def("built_with() -> str");
  m.def("matmul_in_cache(bool bfloat16, int repeats) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(pykern, CompositeExplicitAutograd, m) {
  m.impl("cpu_level", TORCH_BOX(&level_name));
  m.impl("best_cpu_level", TORCH_BOX(&best_level_name));
  m.impl("set_cpu_level", TORCH_BOX(&choose_level));
  m.impl("built_with", TORCH_BOX(&built_with));
  m.impl("matmul_in_cache", TORCH_BOX(&run_matmul_in_cache));
}

}  // namespace pykern
