#include "offload/engine.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>

namespace pykern {

using torch::stable::Tensor;

namespace {

// All bits set are NaN in every floating-point type: whoever reads what is undefined shows it.
constexpr char kPoison = '\xff';

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

template <class Queue, class Value>
bool erase_from(Queue& queue, const Value& value) {
  const auto found = std::find(queue.begin(), queue.end(), value);
  if (found == queue.end()) return false;
  queue.erase(found);
  return true;
}

}  // namespace

Engine::Engine(std::unique_ptr<Medium> medium, const Options& options)
    : medium_(std::move(medium)),
      options_(options),
      buffers_(std::make_shared<BufferPool>(options.queue_bytes, options.delay_seed >= 0)),
      slots_(medium_->granularity()) {
  for (int64_t worker = 0; worker < options.threads; ++worker) workers_.emplace_back([this, worker] { work(worker); });
}

Engine::~Engine() {
  {
    const Lock lock(mutex_);
    stopping_ = true;
  }
  work_arrived_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

std::string Engine::preallocate(int64_t bytes) {
  const Lock lock(mutex_);
  const int64_t extent = slots_.rounded(bytes);
  if (extent <= slots_.extent()) return "";
  const std::string error = medium_->grow(extent);
  if (error.empty()) slots_.grow(extent);
  return error;
}

int64_t Engine::store(std::vector<Tensor> sources, std::vector<Piece> pieces, int64_t bytes) {
  drop_finished();
  Lock lock(mutex_);
  const auto has_room = [&] { return queued_bytes_ == 0 || queued_bytes_ + bytes <= options_.queue_bytes; };
  if (!has_room()) {
    const auto begin = Clock::now();
    while (!has_room()) {
      work_ended_.wait(lock);
      lock.unlock();
      drop_finished();
      lock.lock();
    }
    store_seconds_ += seconds_since(begin);
  }
  if (write_failed_) return -1;
  int64_t offset = slots_.take(bytes);
  if (offset < 0) {
    if (!make_room(bytes, failure_)) return -1;
    offset = slots_.take(bytes);
  }
  const auto item = std::make_shared<Item>();
  item->offset = offset;
  item->bytes = bytes;
  item->sources = std::move(sources);
  item->pieces = std::move(pieces);
  const int64_t number = next_item_++;
  items_.emplace(number, item);
  writes_.push_back(item);
  queued_bytes_ += bytes;
  lock.unlock();
  work_arrived_.notify_one();
  return number;
}

bool Engine::settle(int64_t number) {
  bool stored;
  {
    Lock lock(mutex_);
    const ItemPointer item = find(number);
    // Somebody waits for this one: ahead of what was queued before it.
    if (erase_from(writes_, item)) writes_.push_front(item);
    const auto settled = [&] { return item->released || item->failed || (item->stored && item->active == 0); };
    if (!settled()) {
      const auto begin = Clock::now();
      work_ended_.wait(lock, settled);
      store_seconds_ += seconds_since(begin);
    }
    stored = item->stored;
    if (stored && item->held && !item->released) {
      drop_sources(*item);
      if (item->reservations > 0 && !item->buffer && !item->reading) start_reading(item);
    }
  }
  drop_finished();
  return stored;
}

bool Engine::make_room(int64_t bytes, std::string& error) {
  const int64_t needed = slots_.extent_for(bytes);
  if (options_.limit >= 0 && needed > options_.limit) return false;
  int64_t wanted = std::max(needed, slots_.extent() + options_.growth);
  if (options_.limit >= 0) wanted = std::min(wanted, options_.limit);
  std::string why = medium_->grow(wanted);
  if (!why.empty() && needed < wanted) {
    wanted = needed;
    why = medium_->grow(wanted);
  }
  if (!why.empty()) {
    error = why;
    return false;
  }
  slots_.grow(wanted);
  return true;
}

void Engine::reserve(int64_t number) {
  const Lock lock(mutex_);
  const ItemPointer item = find(number);
  ++item->reservations;
  if (item->held || item->buffer || item->reading) return;
  item->buffer = item->shared.lock();
  if (!item->buffer) start_reading(item);
}

void Engine::start_reading(const ItemPointer& item) {
  item->reading = true;
  reads_.push_back(item);
  work_arrived_.notify_one();
}

void Engine::unreserve(int64_t number) {
  std::shared_ptr<Buffer> buffer;
  {
    const Lock lock(mutex_);
    buffer = end_reservation(find(number));
  }
  drop_finished();
}

Tensor Engine::load(int64_t number) {
  std::shared_ptr<Buffer> buffer, unused;
  std::optional<Tensor> whole;
  int64_t bytes;
  {
    Lock lock(mutex_);
    const ItemPointer item = find(number);
    bytes = item->bytes;
    ++item->reservations;
    std::optional<Clock::time_point> begin;
    for (;;) {
      if (item->held && (whole = whole_block(*item))) {
        ++forwarded_;
        forwarded_bytes_ += bytes;
        break;
      }
      if (!item->reading) {
        buffer = item->buffer ? item->buffer : item->shared.lock();
        if (buffer || !item->error.empty()) break;
        item->reading = true;
        // Somebody waits for this one: ahead of what is only expected to be needed.
        reads_.push_front(item);
        work_arrived_.notify_one();
      } else if (erase_from(reads_, item)) {
        reads_.push_front(item);
      }
      if (!begin) begin = Clock::now();
      work_ended_.wait(lock);
    }
    if (begin) load_seconds_ += seconds_since(*begin);
    unused = end_reservation(item);
    if (!whole && !buffer) {
      const std::string error = std::move(item->error);
      item->error.clear();
      throw std::runtime_error("offload: " + error);
    }
  }
  drop_finished();
  if (whole) return *whole;
  const int64_t size = bytes, stride = 1;
  return torch::stable::from_blob(
      buffer->data(), {&size, 1}, {&stride, 1}, torch::stable::Device(torch::headeronly::DeviceType::CPU),
      torch::headeronly::ScalarType::Byte, [buffer](void*) mutable { buffer.reset(); });
}

std::optional<Tensor> Engine::whole_block(const Item& item) {
  for (const Tensor& source : item.sources) {
    if (source.numel() == item.bytes && item.bytes > 0) return source;
  }
  return std::nullopt;
}

void Engine::release(int64_t number) {
  {
    const Lock lock(mutex_);
    const auto found = items_.find(number);
    if (found == items_.end()) return;
    const ItemPointer item = std::move(found->second);
    items_.erase(found);
    item->released = true;
    item->buffer.reset();
    if (erase_from(writes_, item)) queued_bytes_ -= item->bytes;
    erase_from(reads_, item);
    if (item->active == 0) {
      drop_sources(*item);
      return_slot(*item);
    }
  }
  work_ended_.notify_all();
  drop_finished();
}

void Engine::synchronize() {
  {
    Lock lock(mutex_);
    work_ended_.wait(lock, [&] { return writes_.empty() && reads_.empty() && active_ == 0; });
  }
  drop_finished();
}

std::string Engine::take_failure() {
  const Lock lock(mutex_);
  return std::exchange(failure_, "");
}

std::vector<double> Engine::counters() {
  const Lock lock(mutex_);
  const auto as_double = [](int64_t value) { return static_cast<double>(value); };
  return {as_double(written_),           as_double(written_bytes_),     as_double(read_),
          as_double(read_bytes_),        as_double(forwarded_),         as_double(forwarded_bytes_),
          load_seconds_,                 store_seconds_,                as_double(slots_.count()),
          as_double(slots_.peak_count()), as_double(slots_.used_bytes()), as_double(slots_.peak_bytes()),
          as_double(slots_.extent())};
}

void Engine::reset_counters() {
  const Lock lock(mutex_);
  written_ = written_bytes_ = read_ = read_bytes_ = forwarded_ = forwarded_bytes_ = 0;
  load_seconds_ = store_seconds_ = 0;
  slots_.reset_peaks();
}

Engine::ItemPointer Engine::find(int64_t number) const {
  const auto found = items_.find(number);
  if (found == items_.end()) {
    throw std::runtime_error("offload: the saved tensor was released before its use");
  }
  return found->second;
}

void Engine::return_slot(Item& item) {
  if (item.offset < 0) return;
  if (options_.delay_seed >= 0) {
    const std::vector<char> poison(slots_.rounded(item.bytes), kPoison);
    const auto bytes = static_cast<int64_t>(poison.size());
    medium_->write(item.offset, {{0, bytes, poison.data()}}, bytes);
  }
  slots_.give(item.offset, item.bytes);
  item.offset = -1;
}

void Engine::drop_sources(Item& item) {
  for (Tensor& source : item.sources) finished_.push_back(std::move(source));
  item.sources.clear();
  item.held = false;
}

void Engine::drop_if_idle(Item& item) {
  if (item.stored && item.held && item.reservations == 0 && item.active == 0) drop_sources(item);
}

std::shared_ptr<Buffer> Engine::end_reservation(const ItemPointer& item) {
  if (--item->reservations > 0) return nullptr;
  if (erase_from(reads_, item)) item->reading = false;
  drop_if_idle(*item);
  return std::move(item->buffer);
}

void Engine::drop_finished() {
  std::vector<Tensor> finished;
  const Lock lock(mutex_);
  finished.swap(finished_);
}

// --- workers --------------------------------------------------------------------------------------

void Engine::work(int64_t worker) {
  std::mt19937_64 random(static_cast<uint64_t>(options_.delay_seed) * 1000003u + static_cast<uint64_t>(worker));
  Lock lock(mutex_);
  for (;;) {
    work_arrived_.wait(lock, [&] { return stopping_ || !reads_.empty() || !writes_.empty(); });
    if (stopping_) return;
    const bool is_read = !reads_.empty();
    std::deque<ItemPointer>& queue = is_read ? reads_ : writes_;
    const ItemPointer item = std::move(queue.front());
    queue.pop_front();
    ++item->active;
    ++active_;
    lock.unlock();
    pause(random);
    lock.lock();
    is_read ? run_read(lock, item) : run_write(lock, item);
    lock.unlock();
    pause(random);
    lock.lock();
    --item->active;
    --active_;
    if (!item->released) {
      drop_if_idle(*item);
    } else if (item->active == 0) {
      drop_sources(*item);
      return_slot(*item);
    }
    work_ended_.notify_all();
  }
}

void Engine::run_write(Lock& lock, const ItemPointer& item) {
  lock.unlock();
  const std::string error = medium_->write(item->offset, item->pieces, item->bytes);
  lock.lock();
  queued_bytes_ -= item->bytes;
  if (error.empty()) {
    item->stored = true;
    ++written_;
    written_bytes_ += item->bytes;
  } else {
    // The sources stay where they are: nothing is lost, and nothing more is written.
    item->failed = write_failed_ = true;
    failure_ = error;
  }
}

void Engine::run_read(Lock& lock, const ItemPointer& item) {
  const bool held = item->held;
  lock.unlock();
  std::shared_ptr<Buffer> buffer = buffers_->take(item->bytes);
  std::string error;
  if (!buffer) {
    error = "no memory to bring back " + std::to_string(item->bytes) + " bytes";
  } else if (held) {
    for (const Piece& piece : item->pieces) std::memcpy(buffer->data() + piece.offset, piece.data, piece.bytes);
  } else {
    error = medium_->read(item->offset, buffer->data(), item->bytes);
  }
  if (error.empty()) fill_gaps(*item, buffer->data());
  lock.lock();
  item->reading = false;
  if (error.empty()) {
    (held ? forwarded_ : read_) += 1;
    (held ? forwarded_bytes_ : read_bytes_) += item->bytes;
    item->shared = buffer;
    if (item->reservations > 0) item->buffer = std::move(buffer);
  } else {
    item->error = error;
  }
}

void Engine::fill_gaps(const Item& item, char* block) const {
  if (options_.delay_seed < 0) return;
  int64_t filled = 0;
  for (const Piece& piece : item.pieces) {
    std::memset(block + filled, kPoison, piece.offset - filled);
    filled = piece.end();
  }
  std::memset(block + filled, kPoison, item.bytes - filled);
}

void Engine::pause(std::mt19937_64& random) const {
  if (options_.delay_seed < 0) return;
  std::this_thread::sleep_for(std::chrono::microseconds(random() % 500));
}

}  // namespace pykern
