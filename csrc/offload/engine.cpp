#include "offload/engine.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>

namespace pykern {

using torch::stable::Tensor;

namespace {

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

int64_t Engine::store(const Tensor& source) {
  drop_finished();
  const int64_t bytes = source.numel();
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
  item->source = source;
  const int64_t number = next_item_++;
  items_.emplace(number, item);
  writes_.push_back(item);
  queued_bytes_ += bytes;
  lock.unlock();
  work_arrived_.notify_one();
  return number;
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
  Lock lock(mutex_);
  const ItemPointer item = find(number);
  ++item->reservations;
  if (item->source || item->buffer || item->reading) return;
  item->buffer = item->shared.lock();
  if (item->buffer) return;
  item->reading = true;
  reads_.push_back(item);
  lock.unlock();
  work_arrived_.notify_one();
}

void Engine::unreserve(int64_t number) {
  std::shared_ptr<Buffer> buffer;
  {
    const Lock lock(mutex_);
    const ItemPointer item = find(number);
    if (--item->reservations == 0) {
      buffer = std::move(item->buffer);
      if (item->reading && !item->active && erase_from(reads_, item)) item->reading = false;
      if (item->stored) drop_source(*item);
    }
  }
  drop_finished();
}

Tensor Engine::load(int64_t number) {
  std::shared_ptr<Buffer> buffer;
  std::optional<Tensor> source;
  int64_t bytes;
  {
    Lock lock(mutex_);
    const ItemPointer item = find(number);
    bytes = item->bytes;
    ++item->reservations;
    std::optional<Clock::time_point> begin;
    for (;;) {
      if (item->source) {
        source = item->source;
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
      } else if (!item->active && erase_from(reads_, item)) {
        reads_.push_front(item);
      }
      if (!begin) begin = Clock::now();
      work_ended_.wait(lock);
    }
    if (begin) load_seconds_ += seconds_since(*begin);
    if (--item->reservations == 0) {
      item->buffer.reset();
      if (item->stored) drop_source(*item);
    }
    if (!source && !buffer) {
      const std::string error = std::move(item->error);
      item->error.clear();
      throw std::runtime_error("ActivationOffload: " + error);
    }
  }
  drop_finished();
  if (source) return *source;
  const int64_t size = bytes, stride = 1;
  return torch::stable::from_blob(
      buffer->data(), {&size, 1}, {&stride, 1}, torch::stable::Device(torch::headeronly::DeviceType::CPU),
      torch::headeronly::ScalarType::Byte, [buffer](void*) mutable { buffer.reset(); });
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
    if (!item->active) {
      if (erase_from(writes_, item)) queued_bytes_ -= item->bytes;
      erase_from(reads_, item);
      drop_source(*item);
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
    throw std::runtime_error("ActivationOffload: the saved tensor was released before its use");
  }
  return found->second;
}

void Engine::return_slot(Item& item) {
  if (item.offset < 0) return;
  if (options_.delay_seed >= 0) {
    const std::vector<char> poison(slots_.rounded(item.bytes), '\xff');
    medium_->write(item.offset, poison.data(), static_cast<int64_t>(poison.size()));
  }
  slots_.give(item.offset, item.bytes);
  item.offset = -1;
}

void Engine::drop_source(Item& item) {
  if (!item.source) return;
  finished_.push_back(std::move(*item.source));
  item.source.reset();
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
    item->active = true;
    ++active_;
    lock.unlock();
    pause(random);
    lock.lock();
    is_read ? run_read(lock, item) : run_write(lock, item);
    lock.unlock();
    pause(random);
    lock.lock();
    item->active = false;
    --active_;
    if (item->released) {
      drop_source(*item);
      return_slot(*item);
    }
    work_ended_.notify_all();
  }
}

void Engine::run_write(Lock& lock, const ItemPointer& item) {
  const void* source = item->source->const_data_ptr();
  lock.unlock();
  const std::string error = medium_->write(item->offset, source, item->bytes);
  lock.lock();
  queued_bytes_ -= item->bytes;
  if (error.empty()) {
    item->stored = true;
    ++written_;
    written_bytes_ += item->bytes;
    if (item->reservations == 0) drop_source(*item);
  } else {
    // The source stays where it is: nothing is lost, and nothing more is written.
    write_failed_ = true;
    failure_ = error;
  }
}

void Engine::run_read(Lock& lock, const ItemPointer& item) {
  lock.unlock();
  std::shared_ptr<Buffer> buffer = buffers_->take(item->bytes);
  const std::string error = buffer ? medium_->read(item->offset, buffer->data(), item->bytes)
                                   : "no memory to bring back " + std::to_string(item->bytes) + " bytes";
  lock.lock();
  item->reading = false;
  if (error.empty()) {
    ++read_;
    read_bytes_ += item->bytes;
    item->shared = buffer;
    if (item->reservations > 0) item->buffer = std::move(buffer);
  } else {
    item->error = error;
  }
}

void Engine::pause(std::mt19937_64& random) const {
  if (options_.delay_seed < 0) return;
  std::this_thread::sleep_for(std::chrono::microseconds(random() % 500));
}

}  // namespace pykern
