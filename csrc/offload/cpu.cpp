// The engine's ops. They have no fake kernel and no autograd formula on purpose: they move bytes in
// and out of a store that outlives every graph, are called from saved-tensor hooks alone, which run
// beside traced code and never in it, and their effect has no shape for a tracer to know. All of them
// are composite: a block may have no parts, and then no tensor tells the dispatcher a device.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <unistd.h>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <algorithm>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "common/checks.h"
#include "offload/engine.h"

namespace pykern {
namespace {

struct Opened {
  std::shared_ptr<Engine> engine;
  std::string error;
  int process;
};

// Never destroyed: engines left open at the end of the process go with it, threads and all.
struct Registry {
  std::mutex mutex;
  std::unordered_map<int64_t, Opened> engines;
  int64_t next = 1;
};

Registry& registry() {
  static Registry* const all = new Registry;
  return *all;
}

std::shared_ptr<Engine> engine(int64_t handle) {
  const std::lock_guard<std::mutex> guard(registry().mutex);
  const auto found = registry().engines.find(handle);
  if (found == registry().engines.end() || !found->second.engine) {
    throw std::runtime_error("offload: closed before its saved tensors were used");
  }
  if (found->second.process != getpid()) {
    throw std::runtime_error("offload: opened before a fork, which copies no threads; what the parent saved must be "
                             "used there, and a child opens its own");
  }
  return found->second.engine;
}

// The tiers of an engine, memory first; why one of them can't be made.
std::string make_tiers(const std::vector<int64_t>& memory, const std::string& folder, const std::vector<int64_t>& file,
                       int64_t delay_seed, std::vector<std::unique_ptr<Tier>>& tiers) {
  const auto add = [&](MediumResult made, int64_t limit, int64_t growth) {
    if (made.medium) tiers.push_back(std::make_unique<Tier>(std::move(made.medium), limit, growth));
    return made.error;
  };
  if (!memory.empty()) {
    // What may be spilled lies as direct writes want it.
    const std::string error = add(make_arena(memory[0], folder.empty() ? 64 : kPage), memory[0], memory[1]);
    if (!error.empty()) return error;
  }
  if (folder.empty()) return "";
  const FileTransfers transfers = file[3] ? FileTransfers::best : FileTransfers::threads;
  return add(make_spill_file(folder, {transfers, delay_seed}), file[0], file[2]);
}

// memory: limit and growth, or nothing. folder: of the file, or empty for none. file: limit (-1 for none), initial
// size, growth, and whether io_uring may be used. link: bytes per second out and in, seconds of latency, directions,
// or nothing. A handle is returned even if opening fails: `offload_error` then tells why, and `offload_close` ends it.
int64_t open_engine(std::vector<int64_t> memory, std::string folder, std::vector<int64_t> file,
                    std::vector<int64_t> slots, int64_t threads, int64_t queue_bytes, int64_t buffer_bytes,
                    std::vector<double> link, int64_t delay_seed) {
  std::vector<std::unique_ptr<Tier>> tiers;
  Opened opened{nullptr, make_tiers(memory, folder, file, delay_seed, tiers), getpid()};
  if (opened.error.empty()) {
    Engine::Options options{threads, queue_bytes, buffer_bytes, delay_seed, {}};
    if (!link.empty()) options.link = {link[0], link[1], link[2], static_cast<int64_t>(link[3])};
    opened.engine = std::make_shared<Engine>(std::move(tiers), options);
    opened.error = opened.engine->lay_out(slots);
    if (opened.error.empty() && !folder.empty()) opened.error = opened.engine->preallocate(file[1]);
  }
  const std::lock_guard<std::mutex> guard(registry().mutex);
  const int64_t handle = registry().next++;
  registry().engines.emplace(handle, std::move(opened));
  return handle;
}

std::string opening_error(int64_t handle) {
  const std::lock_guard<std::mutex> guard(registry().mutex);
  const auto found = registry().engines.find(handle);
  return found == registry().engines.end() ? "closed" : found->second.error;
}

void close_engine(int64_t handle) {
  Opened closed;
  {
    const std::lock_guard<std::mutex> guard(registry().mutex);
    const auto found = registry().engines.find(handle);
    if (found == registry().engines.end()) return;
    closed = std::move(found->second);
    registry().engines.erase(found);
  }
  // A forked child has the engine but not its threads; joining them would wait for ever.
  if (closed.process != getpid()) new std::shared_ptr<Engine>(std::move(closed.engine));
}

int64_t store(int64_t handle, std::vector<Tensor> parts, std::vector<int64_t> offsets, int64_t bytes,
              int64_t slot, int64_t tier) {
  STD_TORCH_CHECK(parts.size() == offsets.size(), "offsets: expected one per part (", parts.size(), "), got ",
                  offsets.size());
  STD_TORCH_CHECK(bytes >= 0, "nbytes: expected at least 0, got ", bytes);
  std::vector<Piece> pieces;
  for (size_t index = 0; index < parts.size(); ++index) {
    const Tensor& part = parts[index];
    check_cpu(part, "parts");
    check_dim(part, 1, "parts");
    check_type(part, ScalarType::Byte, "parts");
    check_contiguous(part, "parts");
    STD_TORCH_CHECK(offsets[index] >= 0 && offsets[index] <= bytes - part.numel(), "offsets: part ", index, " of ",
                    part.numel(), " bytes at ", offsets[index], " does not fit into a block of ", bytes);
    if (part.numel() > 0) pieces.push_back({offsets[index], part.numel(), input<char>(part)});
  }
  std::sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) { return a.offset < b.offset; });
  for (size_t index = 1; index < pieces.size(); ++index) {
    STD_TORCH_CHECK(pieces[index - 1].end() <= pieces[index].offset, "offsets: the parts at ",
                    pieces[index - 1].offset, " and ", pieces[index].offset, " overlap");
  }
  return engine(handle)->store(std::move(parts), std::move(pieces), bytes, slot, tier);
}

bool settle(int64_t handle, int64_t item) { return engine(handle)->settle(item); }

Tensor load(int64_t handle, int64_t item) { return engine(handle)->load(item); }
void reserve(int64_t handle, int64_t item) { engine(handle)->reserve(item); }
void unreserve(int64_t handle, int64_t item) { engine(handle)->unreserve(item); }

// Called by finalizers, which may come after the engine's own.
void release(int64_t handle, int64_t item) {
  std::shared_ptr<Engine> owner;
  {
    const std::lock_guard<std::mutex> guard(registry().mutex);
    const auto found = registry().engines.find(handle);
    if (found == registry().engines.end() || found->second.process != getpid()) return;
    owner = found->second.engine;
  }
  if (owner) owner->release(item);
}

// glibc maps allocations from a threshold on, and a freed mapping leaves the process. But it raises
// the threshold to the largest mapping freed so far, up to 32 MiB; the tensors below it then come
// from a heap that keeps, and by the slack that aligned requests need can't reuse, what is freed.
bool map_allocations(int64_t threshold) {
#if defined(__GLIBC__)
  constexpr int64_t kMostThatGlibcTakes = int64_t{32} << 20;
  return mallopt(M_MMAP_THRESHOLD, static_cast<int>(std::min(threshold, kMostThatGlibcTakes))) == 1;
#else
  (void)threshold;
  return false;
#endif
}

void synchronize(int64_t handle) { engine(handle)->synchronize(); }
std::string take_failure(int64_t handle) { return engine(handle)->take_failure(); }
std::string description(int64_t handle) { return engine(handle)->description(); }
std::vector<double> counters(int64_t handle) { return engine(handle)->counters(); }
void reset_counters(int64_t handle) { engine(handle)->reset_counters(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykern, CompositeExplicitAutograd, m) {
  m.impl("offload_open", TORCH_BOX(&open_engine));
  m.impl("offload_error", TORCH_BOX(&opening_error));
  m.impl("offload_close", TORCH_BOX(&close_engine));
  m.impl("offload_store", TORCH_BOX(&store));
  m.impl("offload_settle", TORCH_BOX(&settle));
  m.impl("offload_load", TORCH_BOX(&load));
  m.impl("offload_reserve", TORCH_BOX(&reserve));
  m.impl("offload_unreserve", TORCH_BOX(&unreserve));
  m.impl("offload_release", TORCH_BOX(&release));
  m.impl("offload_map_allocations", TORCH_BOX(&map_allocations));
  m.impl("offload_synchronize", TORCH_BOX(&synchronize));
  m.impl("offload_take_failure", TORCH_BOX(&take_failure));
  m.impl("offload_description", TORCH_BOX(&description));
  m.impl("offload_counters", TORCH_BOX(&counters));
  m.impl("offload_reset_counters", TORCH_BOX(&reset_counters));
}

}  // namespace pykern
