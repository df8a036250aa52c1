// wgmma: threads of a warpgroup issue products one by one; the first that waits has them computed.
#include <algorithm>
#include <cstring>

#include "kernels/emulator/async_state.h"
#include "kernels/emulator/memory.h"
#include "kernels/emulator/rows.h"

namespace pykern::emulator {
namespace {

constexpr int kGroupThreads = 128, kRows = 64, kDepth = 16;

int group_index() { return current->number / kGroupThreads; }
Warpgroup& own_group() { return async_of(*current->block).warpgroups[group_index()]; }
Actor products_of(int group) { return static_cast<Actor>(kFirstWarpgroup + group); }

uint32_t repeat_of(ptx::Swizzle swizzle) { return swizzle == ptx::Swizzle::none ? 16 : 8 * ptx::swizzle_span(swizzle); }

// A tile of shared memory: 16 bytes for each of the places where eight elements lie together.
class Tile {
 public:
  Tile(uint64_t bits, bool transposed, int size, const char* name, const void* from)
      : matrix_(ptx::decode(bits)), major_(transposed ? ptx::Major::mn : ptx::Major::k), size_(size) {
    if (bits != ptx::encode(matrix_)) fail(text("wgmma: reserved bits of the descriptor of %s are set", name), from);
    const uint32_t repeat = repeat_of(matrix_.swizzle), span = ptx::swizzle_span(matrix_.swizzle);
    if (matrix_.base_offset != 0 || matrix_.address % repeat >= span) {
      fail(text("wgmma: tile %s begins %u bytes past a multiple of %u, where its swizzle repeats", name,
                matrix_.address % repeat, repeat),
           from);
    }
    for (int mn = 0; mn < size; mn += transposed ? 8 : 1) {
      for (int k = 0; k < kDepth; k += transposed ? 1 : 8) {
        const uint32_t address = place(mn, k);
        char* chunk = window_pointer(address);
        if (!chunk || !in_shared(chunk, 16)) {
          fail(text("wgmma: element (%d, %d) of tile %s is at address %u, outside shared memory", mn, k, name, address),
               from);
        }
        chunks.push_back(chunk);
      }
    }
  }

  // Row by row, [size][16].
  void read(MatrixType type, float* values) const {
    for (size_t i = 0; i < chunks.size(); ++i) {
      uint16_t elements[8];
      std::memcpy(elements, chunks[i], 16);
      const int at = static_cast<int>(i);
      for (int j = 0; j < 8; ++j) {
        const int mn = major_ == ptx::Major::mn ? at / kDepth * 8 + j : at / 2;
        const int k = major_ == ptx::Major::mn ? at % kDepth : at % 2 * 8 + j;
        values[mn * kDepth + k] = widen_element(type, elements[j]);
      }
    }
  }

  std::vector<char*> chunks;

 private:
  uint32_t place(int mn, int k) const {
    const uint32_t offset = ptx::element_offset(matrix_, major_, static_cast<uint32_t>(mn), static_cast<uint32_t>(k));
    return ptx::swizzled(matrix_.address + offset, matrix_.swizzle);
  }

  ptx::MatrixDescriptor matrix_;
  ptx::Major major_;
  int size_;
};

Tile tile_a(const Product& product, const void* from) {
  return Tile(product.a, product.shape.a_transposed, kRows, "a", from);
}
Tile tile_b(const Product& product, const void* from) {
  return Tile(product.b, product.shape.b_transposed, product.shape.columns, "b", from);
}

// All threads have issued it: from now on its tiles are read.
void begin(Block& block, const Product& product, const void* from) {
  const auto check = [&](const Tile& tile) {
    for (const char* chunk : tile.chunks) begin_engine_read(block, chunk, 16, product.known, 0, "wgmma", from);
  };
  if (!product.shape.a_in_registers) check(tile_a(product, from));
  check(tile_b(product, from));
}

int row_of(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i * 8; }

void compute(Block& block, Warpgroup& group, Product& product) {
  const ProductShape& shape = product.shape;
  const int columns = shape.columns;
  const auto registers = static_cast<size_t>(columns / 2);
  std::vector<float> a(kRows * kDepth), b(static_cast<size_t>(columns) * kDepth), across(b.size());
  std::vector<float> d(static_cast<size_t>(kRows) * columns, 0.0f);
  product.time = ++group.time;
  const Actor actor = products_of(static_cast<int>(&group - block.async->warpgroups));
  const auto take = [&](const Tile& tile, float* values) {
    tile.read(shape.type, values);
    for (const char* chunk : tile.chunks) end_engine_read(block, chunk, 16, actor, product.time);
  };
  if (!shape.a_in_registers) {
    take(tile_a(product, nullptr), a.data());
  } else {
    for (int thread = 0; thread < kGroupThreads; ++thread) {
      for (int i = 0; i < 4; ++i) {
        float* pair = &a[static_cast<size_t>(row_of(thread, i % 2) * kDepth + thread % 4 * 2 + i / 2 * 8)];
        unpack(shape.type, product.a_registers[static_cast<size_t>(thread * 4 + i)], pair[0], pair[1]);
      }
    }
  }
  take(tile_b(product, nullptr), b.data());
  for (int n = 0; n < columns; ++n) {
    for (int k = 0; k < kDepth; ++k)
      across[static_cast<size_t>(k * columns + n)] = b[static_cast<size_t>(n * kDepth + k)];
  }
  const auto each = [&](auto action) {
    for (int thread = 0; thread < kGroupThreads; ++thread) {
      for (int r = 0; r < columns / 2; ++r) {
        const int column = r / 4 * 8 + thread % 4 * 2 + r % 2;
        action(product.values[static_cast<size_t>(thread * columns / 2 + r)],
               d[static_cast<size_t>(row_of(thread, r / 2 % 2) * columns + column)]);
      }
    }
  };
  if (shape.accumulate) each([](float value, float& sum) { sum = value; });
  for (int row = 0; row < kRows; row += 2) {
    const float* factors = &a[static_cast<size_t>(row * kDepth)];
    float* sums = &d[static_cast<size_t>(row * columns)];
    for (int n = 0; n < columns; n += 8) {
      multiply_two_rows<kDepth>(sums + n, sums + columns + n, factors, factors + kDepth,
                                &across[static_cast<size_t>(n)], columns);
    }
  }
  each([](float& value, float sum) { value = sum; });
  product.done = true;
  ++machine.events;
  // Products that add to the same registers go on from here.
  size_t own = 0;
  while (&group.products[own] != &product) ++own;
  for (size_t t = 0; t < kGroupThreads; ++t) {
    for (auto next = group.products.begin() + static_cast<std::ptrdiff_t>(own) + 1; next != group.products.end();
         ++next) {
      if (next->accumulators[t] != product.accumulators[t] || !product.accumulators[t]) continue;
      std::copy_n(&product.values[t * registers], registers, &next->values[t * registers]);
      break;
    }
  }
}

// The latest product before `end` that adds to these registers of the thread, if it is still under way for it.
Product* pending_on(Warpgroup& group, size_t end, int thread, const float* d) {
  while (end-- > 0) {
    Product& product = group.products[end];
    if (product.accumulators[static_cast<size_t>(thread)] == d) return &product;
  }
  return nullptr;
}

// Hands the thread its results, unless another product under way adds to the same registers.
void deliver(Warpgroup& group, size_t at, int thread) {
  Product& product = group.products[at];
  const auto registers = static_cast<size_t>(product.shape.columns / 2), t = static_cast<size_t>(thread);
  float* target = product.accumulators[t];
  product.accumulators[t] = nullptr;
  bool taken = false;
  for (size_t next = at + 1; next < group.products.size() && !taken; ++next) {
    Product& other = group.products[next];
    taken = other.accumulators[t] == target;
  }
  if (!taken) std::memcpy(target, &product.values[t * registers], registers * sizeof(float));
}

}  // namespace

void product_fence(Site) { async_of(*current).registers_fenced = true; }

void product_issue(const ProductShape& shape, float* d, const uint32_t* a_registers, uint64_t a, uint64_t b,
                   Site site) {
  const void* from = __builtin_return_address(0);
  Thread& self = *current;
  Block& block = *self.block;
  const int t = self.number % kGroupThreads;
  if (static_cast<size_t>(self.number - t + kGroupThreads) > block.threads.size()) {
    fail("wgmma: the block's last warpgroup has fewer than 128 threads", from);
  }
  Warpgroup& group = own_group();
  AsyncThread& own = async_of(self);
  const auto at = static_cast<size_t>(own.products++ - group.first);
  if (at == group.products.size()) {
    group.products.emplace_back();
    Product& made = group.products.back();
    made.shape = shape;
    made.a = a;
    made.b = b;
    made.site = site;
    made.group = own.committed;
    made.values.resize(static_cast<size_t>(kGroupThreads * shape.columns / 2));
    made.a_registers.resize(kGroupThreads * 4);
    std::fill(made.known, made.known + kClocks, ~0u);
  }
  Product& product = group.products[at];
  if (std::memcmp(&product.shape, &shape, sizeof(shape)) != 0 || product.a != a || product.b != b ||
      product.site.line != site.line || product.group != own.committed) {
    fail(text("wgmma: threads of one warpgroup issue different products at %s:%d and %s:%d", product.site.file,
              product.site.line, site.file, site.line),
         from);
  }
  const auto registers = static_cast<size_t>(shape.columns / 2);
  if (const Product* before = pending_on(group, at, t, d)) {
    if (before->shape.columns != shape.columns) fail("wgmma: products of different shape share accumulators", from);
    if (before->done) {
      std::copy_n(&before->values[static_cast<size_t>(t) * registers], registers,
                  &product.values[static_cast<size_t>(t) * registers]);
    }
  } else {
    if (!own.registers_fenced) fail("wgmma: no wgmma.fence since the last wait", from);
    std::memcpy(&product.values[static_cast<size_t>(t) * registers], d, registers * sizeof(float));
  }
  if (shape.a_in_registers) {
    if (!own.registers_fenced) fail("wgmma: no wgmma.fence since the last wait", from);
    std::memcpy(&product.a_registers[static_cast<size_t>(t) * 4], a_registers, 4 * sizeof(uint32_t));
  }
  poison(d, registers * sizeof(float));
  product.accumulators[static_cast<size_t>(t)] = d;
  for (int i = 0; i < kClocks; ++i) {
    const uint32_t seen = self.clock.seen[i];
    product.known[i] = std::min(product.known[i], i == self.warp() ? std::max(seen, self.clock.now) : seen);
  }
  released(self);
  if (++product.arrived < kGroupThreads) return;
  begin(block, product, from);
  for (Thread* thread : group.waiting) wake(thread);
  group.waiting.clear();
}

void product_commit(Site) { ++async_of(*current).committed; }

void product_wait(int groups_left, Site site) {
  Thread& self = *current;
  Warpgroup& group = own_group();
  AsyncThread& own = async_of(self);
  const int t = self.number % kGroupThreads, last = own.committed - groups_left;
  own.registers_fenced = false;
  while (own.delivered < own.products) {
    const auto at = [&] { return static_cast<size_t>(own.delivered - group.first); };
    if (group.products[at()].group >= last) break;
    while (group.products[at()].arrived < kGroupThreads) {
      self.state = Thread::waiting;
      self.what = "wgmma.wait_group";
      self.site = site;
      self.mask = ~0u;
      group.waiting.push_back(&self);
      self.fiber.suspend();
    }
    Product& product = group.products[at()];
    if (!product.done) compute(*self.block, group, product);
    deliver(group, at(), t);
    uint32_t& seen = self.clock.seen[clock_of(products_of(group_index()))];
    seen = std::max(seen, product.time);
    ++own.delivered;
    ++product.delivered;
    while (!group.products.empty() && group.products.front().delivered == kGroupThreads) {
      group.products.pop_front();
      ++group.first;
    }
  }
}

}  // namespace pykern::emulator
