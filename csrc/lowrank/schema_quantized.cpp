#include "common/library.h"

namespace pykern {

STABLE_TORCH_LIBRARY_FRAGMENT(PYKERN_NAMESPACE, m) {
  // pykern/lowrank/quantized.py says what each op does.
  m.def(
      "quantize_groups(Tensor[] values, Tensor(a!)[] codes, Tensor(b!)[] scale, Tensor(c!)[] zero, "
      "Tensor? found_inf, *, int bits) -> ()");
  m.def(
      "dequantize_groups(Tensor[] codes, Tensor[] scale, Tensor[] zero, Tensor(a!)[] values, Tensor? grad_scale, *, "
      "int bits, bool adds, bool maximize) -> ()");
  m.def(
      "low_rank_apply_int8(Tensor(a!)[] codes, Tensor(b!)[] scale, Tensor(c!)[] zero, Tensor[] left, Tensor[] right, "
      "Tensor[] step, int[] seeds, Tensor step_factor, Tensor lr, Tensor? found_inf, *, float factor, "
      "float weight_decay, bool decay_after) -> ()");
}

}  // namespace pykern
