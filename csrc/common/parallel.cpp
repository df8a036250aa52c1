#include "common/parallel.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>

namespace pykern {

int max_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

void run_tasks(int64_t tasks, void (*body)(int64_t, int, void*), void* context) {
  const int threads = max_threads();
  if (tasks <= 1 || threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task, 0, context);
    return;
  }
  std::atomic<int64_t> next{0};
  // One iteration per thread. torch may hand several to one thread (a nested call runs them all in
  // turn); the shared counter keeps that correct, and each iteration's number stays its own.
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t task = next.fetch_add(1); task < tasks; task = next.fetch_add(1)) {
        body(task, static_cast<int>(thread), context);
      }
    }
  });
}

}  // namespace pykern
