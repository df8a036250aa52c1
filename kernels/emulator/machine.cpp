// The scheduler: starts blocks, runs ready threads in the chosen order, reports who waits for ever.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "kernels/emulator/async_state.h"
#include "kernels/emulator/memory.h"

namespace pykern::emulator {

Machine machine;
Thread* current = nullptr;

namespace {

// Blocks in flight at a time: enough that blocks which wait for each other get on.
constexpr int kResidentBlocks = 4;
// Rounds in which threads do nothing but spin before that counts as a hang.
constexpr int64_t kIdleRounds = 20000;
constexpr size_t kMaxShared = 227 * 1024, kMaxStaticShared = 48 * 1024;
// Where dynamic shared memory begins in the window of shared memory; static objects follow it.
constexpr uint32_t kWindowBegin = 1024;

int chosen_capability = 90;
std::vector<Order> chosen_orders = {{Order::forward, 0}, {Order::reverse, 0}, {Order::random, 1}};
std::vector<std::unique_ptr<Thread>> idle_threads;
std::mutex one_launch;

void run_thread(void* argument) {
  auto* thread = static_cast<Thread*>(argument);
  machine.kernel.run(machine.kernel.call);
  thread->state = Thread::done;
  thread_exited(thread);
  thread->fiber.suspend();
}

Thread* take_thread() {
  if (idle_threads.empty()) return new Thread;
  Thread* thread = idle_threads.back().release();
  idle_threads.pop_back();
  return thread;
}

char* shared_memory(size_t alignment, size_t bytes) {
  void* memory = nullptr;
  const size_t allocated = std::max<size_t>(bytes + kNearBytes, 1);
  if (posix_memalign(&memory, std::max(alignment, sizeof(void*)), allocated)) std::abort();
  poison(memory, bytes);
  return static_cast<char*>(memory);
}

void start_block(int64_t number) {
  auto block = std::make_unique<Block>();
  const Dim3 &grid = machine.grid, &size = machine.block;
  block->number = number;
  block->index = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                  static_cast<unsigned>(number / grid.x / grid.y)};
  const size_t bytes = machine.dynamic_bytes;
  block->shared.push_back({nullptr, shared_memory(1024, bytes), bytes, nullptr, kWindowBegin});
#ifdef PYKERN_EMULATOR_CHECKED
  block->shared[0].cells = std::make_unique<Cell[]>(machine.dynamic_bytes);
#endif
  const int threads = static_cast<int>(size.x * size.y * size.z);
  block->live = threads;
  for (int i = 0; i < threads; ++i) {
    Thread* thread = take_thread();
    const unsigned n = static_cast<unsigned>(i);
    thread->block = block.get();
    thread->number = i;
    thread->rank = number * kMaxThreads + i;
    thread->index = {n % size.x, n / size.x % size.y, n / size.x / size.y};
    thread->clock = Clock{};
    thread->async.reset();
    thread->mbarrier = nullptr;
    thread->fiber.prepare(&run_thread, thread);
    block->threads.push_back(thread);
    wake(thread);
  }
  machine.counters.threads += threads;
  machine.resident.push_back(std::move(block));
}

std::string waiting_report() {
  std::string report;
  int told = 0;
  for (const auto& block : machine.resident) {
    std::vector<std::pair<std::string, std::vector<int>>> places;
    int exited = 0;
    for (const Thread* thread : block->threads) {
      if (thread->state == Thread::done) {
        ++exited;
        continue;
      }
      const std::string place =
          thread->state == Thread::ready ? std::string("spin")
          : thread->mbarrier             ? describe_poll(*thread)
          : thread->barrier > 0
              ? text("wait at barrier %d (%s:%d)", thread->barrier, thread->site.file, thread->site.line)
          : thread->barrier == 0 ? text("wait at %s (%s:%d)", thread->what, thread->site.file, thread->site.line)
                                 : text("wait in %s with mask 0x%08x (%s:%d)", thread->what, thread->mask,
                                        thread->site.file, thread->site.line);
      auto known = std::find_if(places.begin(), places.end(), [&](const auto& entry) { return entry.first == place; });
      if (known == places.end()) {
        places.push_back({place, {thread->number}});
      } else {
        known->second.push_back(thread->number);
      }
    }
    if (places.empty() || ++told > 2) continue;
    report += text("; block (%u, %u, %u): ", block->index.x, block->index.y, block->index.z);
    for (const auto& [place, threads] : places) {
      report +=
          text("%zu threads (first %d, last %d) %s, ", threads.size(), threads.front(), threads.back(), place.c_str());
    }
    report += text("%d have exited", exited);
  }
  return report;
}

void order_ready(std::vector<Thread*>& threads) {
  const auto before = [](const Thread* a, const Thread* b) { return a->rank < b->rank; };
  // One warp that has met comes in order.
  if (!std::is_sorted(threads.begin(), threads.end(), before)) std::sort(threads.begin(), threads.end(), before);
  if (machine.order.kind == Order::reverse) std::reverse(threads.begin(), threads.end());
  if (machine.order.kind == Order::random) std::shuffle(threads.begin(), threads.end(), machine.random);
}

// No thread is ready, or they only spin: lets copies land, and when there are none, polls of mbarriers fail, once.
bool go_on_without_threads() {
  bool landed = false;
  for (auto& block : machine.resident) landed = land_one(*block) || landed;
  if (landed) return true;
  if (machine.events == machine.events_at_retry) return false;
  machine.events_at_retry = machine.events;
  bool retried = false;
  for (auto& block : machine.resident) {
    retried = retried || has_polls(*block);
    retry_polls(*block);
  }
  return retried;
}

void retire(std::unique_ptr<Block>& block) {
  for (Thread* thread : block->threads) idle_threads.emplace_back(thread);
  block.reset();
}

void run_grid() {
  const int64_t blocks = int64_t{machine.grid.x} * machine.grid.y * machine.grid.z;
  std::vector<int64_t> waiting(blocks);
  for (int64_t i = 0; i < blocks; ++i) waiting[i] = blocks - 1 - i;
  if (machine.order.kind == Order::reverse) std::reverse(waiting.begin(), waiting.end());
  if (machine.order.kind == Order::random) std::shuffle(waiting.begin(), waiting.end(), machine.random);

  int64_t idle = 0;
  std::vector<Thread*> round;
  machine.events_at_retry = -1;
  while (machine.error.empty()) {
    while (!waiting.empty() && machine.resident.size() < kResidentBlocks) {
      start_block(waiting.back());
      waiting.pop_back();
    }
    if (machine.resident.empty()) break;
    round.clear();
    round.swap(machine.ready);
    if (round.empty()) {
      if (go_on_without_threads()) continue;
      machine.error = "hang: no thread can go on" + waiting_report();
      break;
    }
    order_ready(round);
    const int64_t before = machine.events;
    for (Thread* thread : round) {
      current = thread;
      ++machine.counters.switches;
      thread->fiber.resume();
      current = nullptr;
      if (!machine.error.empty()) break;
    }
    idle = machine.events == before ? idle + 1 : 0;
    if (idle % 8 == 7) go_on_without_threads();
    for (auto& block : machine.resident) maybe_land(*block);
    if (idle > kIdleRounds && machine.error.empty()) {
      machine.error = "hang: threads spin and nothing changes" + waiting_report();
    }
    for (auto& block : machine.resident) {
      if (block->live > 0) continue;
      if (machine.error.empty()) machine.error = finish_async(*block);
      retire(block);
    }
    machine.resident.erase(std::remove(machine.resident.begin(), machine.resident.end(), nullptr),
                           machine.resident.end());
  }
  for (auto& block : machine.resident) retire(block);
  machine.resident.clear();
  machine.ready.clear();
}

const char* order_name(const Order& order) {
  static std::string name;
  name = order.kind == Order::forward   ? "forward"
         : order.kind == Order::reverse ? "reverse"
                                        : text("random (seed %llu)", static_cast<unsigned long long>(order.seed));
  return name.c_str();
}

// The content of every buffer that kernels may write.
std::vector<std::vector<char>> snapshot() {
  std::vector<std::vector<char>> contents;
  for (const Buffer& buffer : announced()) {
    contents.emplace_back();
    if (buffer.access != Access::read) contents.back().assign(buffer.begin, buffer.end);
  }
  return contents;
}

void restore(const std::vector<std::vector<char>>& contents) {
  for (size_t i = 0; i < contents.size(); ++i) {
    if (!contents[i].empty()) std::memcpy(announced()[i].begin, contents[i].data(), contents[i].size());
  }
}

std::string difference(const std::vector<std::vector<char>>& first, const Order& order) {
  for (size_t i = 0; i < first.size(); ++i) {
    const Buffer& buffer = announced()[i];
    if (buffer.access != Access::write) continue;
    for (size_t byte = 0; byte < first[i].size(); ++byte) {
      if (first[i][byte] != buffer.begin[byte]) {
        return text("results differ between thread orders: buffer %zu at byte %zu of %zu, %s against %s", i, byte,
                    first[i].size(), order_name(chosen_orders[0]), std::string(order_name(order)).c_str());
      }
    }
  }
  return "";
}

std::string check_limits(const Dim3& grid, const Dim3& block, size_t dynamic_shared) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z) return text("grid (%u, %u, %u) has no blocks", grid.x, grid.y, grid.z);
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    return text("grid (%u, %u, %u) exceeds the limits 2^31 - 1, 65535, 65535", grid.x, grid.y, grid.z);
  }
  if (!threads || threads > kMaxThreads || block.x > 1024 || block.y > 1024 || block.z > 64) {
    return text("block (%u, %u, %u) exceeds the limits: 1024 threads, 64 in z", block.x, block.y, block.z);
  }
  if (dynamic_shared > kMaxShared)
    return text("%zu bytes of shared memory exceed the limit %zu", dynamic_shared, kMaxShared);
  return "";
}

}  // namespace

Block::Block() = default;
Block::~Block() {
  for (SharedObject& object : shared) std::free(object.memory);
}

std::string text(const char* format, ...) {
  char line[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(line, sizeof(line), format, arguments);
  va_end(arguments);
  return line;
}

void set_compute_capability(int capability) { chosen_capability = capability; }
int compute_capability() { return chosen_capability; }
void set_orders(std::vector<Order> orders) { chosen_orders = std::move(orders); }
const std::vector<Order>& orders() { return chosen_orders; }
const Counters& counters() { return machine.counters; }

void wake(Thread* thread) {
  thread->state = Thread::ready;
  machine.ready.push_back(thread);
}

const char* launch(const Dim3& blocks, const Dim3& threads, size_t dynamic_shared, Entry kernel) {
  const std::lock_guard<std::mutex> lock(one_launch);
  static std::string report;
  report = check_limits(blocks, threads, dynamic_shared);
  if (!report.empty()) return report.c_str();
  ++machine.counters.launches;
  machine.kernel = kernel;
  machine.grid = blocks;
  machine.block = threads;
  machine.dynamic_bytes = dynamic_shared;
  const auto before = snapshot();
  std::vector<std::vector<char>> first;
  for (size_t turn = 0; turn < chosen_orders.size(); ++turn) {
    if (turn > 0) restore(before);
    machine.order = chosen_orders[turn];
    machine.random.seed(machine.order.seed);
    machine.static_bytes = 0;
    machine.error.clear();
    machine.error_address = nullptr;
    run_grid();
    if (!machine.error.empty()) {
      report = machine.error;
      if (machine.error_address) report += " at " + source_place(machine.error_address);
      report += text(" [thread order %s]", order_name(machine.order));
      return report.c_str();
    }
    if (turn == 0) {
      first = snapshot();
    } else {
      report = difference(first, machine.order);
      if (!report.empty()) return report.c_str();
    }
  }
  return nullptr;
}

Index3 thread_index() { return current->index; }
Index3 block_index() { return current->block->index; }
Dim3 block_size() { return machine.block; }
Dim3 grid_size() { return machine.grid; }
int lane() { return current->lane(); }

unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(current->block->shared[0].memory); }

void* static_shared(const void* site, size_t bytes, size_t alignment) {
  Block& block = *current->block;
  for (SharedObject& object : block.shared) {
    if (object.site == site) return object.memory;
  }
  size_t total = bytes;
  for (size_t i = 1; i < block.shared.size(); ++i) total += block.shared[i].bytes;
  if (total > kMaxStaticShared)
    fail(text("%zu bytes of static shared memory exceed the limit %zu", total, kMaxStaticShared));
  if (total + machine.dynamic_bytes > kMaxShared) {
    fail(text("%zu bytes of shared memory exceed the limit %zu", total + machine.dynamic_bytes, kMaxShared));
  }
  char* memory = shared_memory(alignment, bytes);
  const SharedObject& last = block.shared.back();
  const auto step = static_cast<uint32_t>(alignment), free = last.window + static_cast<uint32_t>(last.bytes) + step - 1;
  block.shared.push_back({site, memory, bytes, nullptr, free / step * step});
#ifdef PYKERN_EMULATOR_CHECKED
  block.shared.back().cells = std::make_unique<Cell[]>(bytes);
#endif
  return memory;
}

void fail(const std::string& message, const void* return_address) {
  if (machine.error.empty()) {
    machine.error = message + text(" (block (%u, %u, %u), thread %d)", current->block->index.x, current->block->index.y,
                                   current->block->index.z, current->number);
    machine.error_address = return_address;
  }
  // Never resumed: the launch is given up.
  current->fiber.suspend();
  std::abort();
}

void yield() {
  Thread* self = current;
  wake(self);
  self->fiber.suspend();
}

void maybe_yield() {
  if (machine.order.kind == Order::random && machine.random() % 2) yield();
}

}  // namespace pykern::emulator
