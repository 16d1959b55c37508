// Pieces of work on the threads of a pool, and on the one that asks.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>

namespace sol {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Calls work(i) for each i below `count`, in any order.  A pool has num_threads() and Schedule(task), where a task
// may start late or after the return.
//
// The caller takes pieces as the pool's threads do, so a pool that is busy elsewhere delays nothing, and a call
// from one of the pool's own threads cannot wait for itself.
template <class Pool, class Work>
void parallel(Pool& pool, int64_t count, const Work& work) {
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  if (helpers < 1) {
    for (int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  struct State {
    std::atomic<int64_t> next{0}, done{0};
    const Work* work;  // alive while a piece is left
    int64_t count;
    void take() {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
        (*work)(i);
        done.fetch_add(1, std::memory_order_release);
      }
    }
  };
  auto state = std::make_shared<State>();
  state->work = &work;
  state->count = count;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([state] { state->take(); });
  state->take();
  for (int spins = 0; state->done.load(std::memory_order_acquire) < count; ++spins) {
    if (spins < 2000) {
      relax();
    } else {
      std::this_thread::yield();
    }
  }
}

}  // namespace sol
