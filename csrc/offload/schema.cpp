#include "common/library.h"

STABLE_TORCH_LIBRARY_FRAGMENT(PYKERN_NAMESPACE, m) {
  m.def(
      "offload_open(int[] memory, str folder, int[] file, int[] slots, int threads, int queue_bytes, "
      "int buffer_bytes, float[] link, int delay_seed) -> int");
  m.def("offload_error(int engine) -> str");
  m.def("offload_close(int engine) -> ()");
  m.def("offload_store(int engine, Tensor[] parts, int[] offsets, int nbytes, int slot, int tier) -> int");
  m.def("offload_settle(int engine, int item) -> bool");
  m.def("offload_reserve(int engine, int item) -> ()");
  m.def("offload_unreserve(int engine, int item) -> ()");
  m.def("offload_load(int engine, int item) -> Tensor");
  m.def("offload_release(int engine, int item) -> ()");
  m.def("offload_map_allocations(int threshold) -> bool");
  m.def("offload_synchronize(int engine) -> ()");
  m.def("offload_take_failure(int engine) -> str");
  m.def("offload_description(int engine) -> str");
  m.def("offload_counters(int engine) -> float[]");
  m.def("offload_reset_counters(int engine) -> ()");
  // Many tensors into one block of bytes, each at its offset in its codec, and back.
  m.def("offload_pack(Tensor[] tensors, int[] offsets, int[] codecs, Tensor(a!) staging) -> ()");
  m.def("offload_unpack(Tensor staging, int[] offsets, int[] codecs, Tensor(a!)[] tensors) -> ()");
}
