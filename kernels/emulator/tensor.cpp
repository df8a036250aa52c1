// Copies of boxes of tensors: which bytes, where the swizzle puts them, and zeros outside the tensor.
#include "kernels/emulator/async_state.h"

namespace pykern::emulator {
namespace {

// The pieces of the box whose first element has these coordinates.
class Box {
 public:
  Box(const TensorMap& map, const int* coordinates, void* shared, bool zeros) : map_(map), zeros_(zeros) {
    shared_ = static_cast<char*>(shared);
    window_ = window_address(shared);
    for (int d = 0; d < map.rank; ++d) first_[d] = coordinates[d];
    add(map.rank - 1, map.base, true);
  }

  std::vector<Piece> pieces;
  int64_t bytes = 0;

 private:
  void add(int dimension, char* global, bool inside) {
    if (dimension == 0) {
      add_row(global, inside);
      return;
    }
    for (int i = 0; i < map_.box[dimension]; ++i) {
      const int64_t at = first_[dimension] + i;
      const bool within = at >= 0 && at < map_.sizes[dimension];
      add(dimension - 1, within ? global + at * map_.strides[dimension] : global, inside && within);
    }
  }

  void add_row(char* global, bool inside) {
    for (int i = 0; i < map_.box[0];) {
      // As many elements as lie together in sixteen bytes, and on one side of the tensor's border.
      const int64_t at = first_[0] + i;
      const bool within = inside && at >= 0 && at < map_.sizes[0];
      int count = 0;
      do {
        ++count;
      } while (i + count < map_.box[0] && (bytes + count * map_.element_bytes) % 16 != 0 &&
               within == (inside && at + count >= 0 && at + count < map_.sizes[0]));
      if (within || zeros_) {
        const uint32_t target = ptx::swizzled(window_ + static_cast<uint32_t>(bytes), map_.swizzle);
        pieces.push_back({shared_ + (static_cast<int64_t>(target) - window_),
                          within ? global + at * map_.element_bytes : nullptr, count * map_.element_bytes});
      }
      i += count;
      bytes += count * map_.element_bytes;
    }
  }

  const TensorMap& map_;
  bool zeros_;
  char* shared_;
  uint32_t window_;
  int64_t first_[5];
};

size_t box_bytes(const TensorMap& map) {
  int64_t bytes = map.element_bytes;
  for (int d = 0; d < map.rank; ++d) bytes *= map.box[d];
  return static_cast<size_t>(bytes);
}

void check(const TensorMap& map, const void* shared, int rank, const void* return_address) {
  if (map.rank != rank)
    fail(text("cp.async.bulk.tensor: %d coordinates for a map of rank %d", rank, map.rank), return_address);
  if (reinterpret_cast<uintptr_t>(&map) % 64)
    fail("cp.async.bulk.tensor: the tensor map is not 64-byte aligned", return_address);
  require_shared(shared, box_bytes(map), 128, "cp.async.bulk.tensor", return_address);
}

}  // namespace

void tensor_load(void* shared, const TensorMap* map, const int* coordinates, int rank, uint64_t* mbarrier, Site site) {
  const void* from = __builtin_return_address(0);
  check(*map, shared, rank, from);
  Box box(*map, coordinates, shared, true);
  for (const Piece& piece : box.pieces) {
    if (piece.global)
      require_global(piece.global, static_cast<size_t>(piece.bytes), 1, false, "cp.async.bulk.tensor", from);
  }
  start_load(shared, std::move(box.pieces), box.bytes, mbarrier, "cp.async.bulk.tensor", site, from);
}

void tensor_store(const TensorMap* map, const int* coordinates, int rank, const void* shared, Site site) {
  const void* from = __builtin_return_address(0);
  check(*map, shared, rank, from);
  Box box(*map, coordinates, const_cast<void*>(shared), false);
  for (const Piece& piece : box.pieces) {
    require_global(piece.global, static_cast<size_t>(piece.bytes), 1, true, "cp.async.bulk.tensor", from);
  }
  start_store(shared, std::move(box.pieces), box.bytes, "cp.async.bulk.tensor", site, from);
}

}  // namespace pykern::emulator
