// Work sharing over torch's own thread pool, so torch.set_num_threads governs pykern too.
// No torch header here: *.simd.cpp files include this one.
#pragma once

#include <cstdint>

namespace pykern {

int max_threads();

// Runs body(task, thread, context) once for every task in [0, tasks). Threads take the next task
// as they become free, so the longest tasks should come first; `thread` < max_threads() picks
// scratch memory. A result stays deterministic as long as each task owns what it writes.
// Nested calls run on the calling thread. The body must not throw.
void run_tasks(int64_t tasks, void (*body)(int64_t task, int thread, void* context), void* context);

template <class Body>
void parallel_tasks(int64_t tasks, const Body& body) {
  run_tasks(
      tasks, [](int64_t task, int thread, void* context) { (*static_cast<const Body*>(context))(task, thread); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace pykern
