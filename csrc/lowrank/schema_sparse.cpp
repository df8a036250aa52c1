#include "common/library.h"

namespace pykern {

STABLE_TORCH_LIBRARY_FRAGMENT(PYKERN_NAMESPACE, m) {
  // A sparse matrix in compressed rows, met by a dense block that begins at (first_row, first_column).
  m.def(
      "sparse_rows_add(Tensor(a!) block, Tensor values, Tensor row_start, Tensor column, *, int first_row, "
      "int first_column) -> ()");
  m.def(
      "sparse_rows_take(Tensor block, Tensor row_start, Tensor column, Tensor(a!) values, *, int first_row, "
      "int first_column) -> ()");
}

}  // namespace pykern
