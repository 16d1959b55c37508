// Pieces of work on threads that wait for them, and on the one that asks.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

namespace sol {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Threads of our own that look out for work for a while after the last, for a decode step asks some 200 times
// for a tenth of a millisecond: a thread that sleeps in between, as those of XLA's pool do, comes too late.
//
// One caller has them at a time.  It takes pieces itself, so that a thread that comes late, or never (after a
// fork), delays nothing.
class Workers {
 public:
  static constexpr auto kLookOut = std::chrono::microseconds(200);

  // Those of the process, started by the first call.  They are never ended: they hold nothing while they wait.
  static Workers& of_process(int64_t count) {
    static Workers* const workers = new Workers(count);
    return *workers;
  }

  explicit Workers(int64_t count) {
    for (int64_t i = 0; i < count; ++i) std::thread([this] { serve(); }).detach();
  }

  // Calls work(i) for each i below `count`, in any order; false, and nothing is done, while another caller does.
  template <class Work>
  bool run(int64_t count, const Work& work) {
    std::unique_lock<std::mutex> lock(owner_, std::try_to_lock);
    if (!lock) return false;
    work_ = &work;
    call_ = [](const void* work, int64_t i) { (*static_cast<const Work*>(work))(i); };
    count_ = count;
    next_ = 0;
    open_ = true;
    ++turn_;
    if (asleep_ > 0) {
      { std::lock_guard<std::mutex> awake(sleep_); }
      wake_.notify_all();
    }
    take();
    open_ = false;
    // Whoever is still inside has a piece; whoever comes now finds it closed.
    for (int spins = 0; inside_ > 0; ++spins) spins < 2000 ? relax() : std::this_thread::yield();
    return true;
  }

 private:
  void take() {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) call_(work_, i);
  }

  void serve() {
    for (uint64_t seen = 0;;) {
      wait_beyond(seen);
      seen = turn_;
      ++inside_;
      if (open_) take();
      --inside_;
    }
  }

  void wait_beyond(uint64_t seen) {
    const auto end = std::chrono::steady_clock::now() + kLookOut;
    do {
      for (int spins = 0; spins < 32; ++spins) {
        if (turn_ != seen) return;
        relax();
      }
    } while (std::chrono::steady_clock::now() < end);
    std::unique_lock<std::mutex> lock(sleep_);
    ++asleep_;
    wake_.wait(lock, [&] { return turn_ != seen; });
    --asleep_;
  }

  std::mutex owner_, sleep_;
  std::condition_variable wake_;
  // Of the work: written while it is closed and nobody is inside, read by those who came in and found it open.
  const void* work_ = nullptr;
  void (*call_)(const void*, int64_t) = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0}, inside_{0}, asleep_{0};
  std::atomic<uint64_t> turn_{0};  // how many works there were
  std::atomic<bool> open_{false};
};

// Calls work(i) for each i below `count` on the threads of a pool, which has num_threads() and Schedule(task), where
// a task may start late or after the return.  A call from one of the pool's own threads cannot wait for itself.
template <class Pool, class Work>
void parallel_on(Pool& pool, int64_t helpers, int64_t count, const Work& work) {
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
  for (int spins = 0; state->done.load(std::memory_order_acquire) < count; ++spins)
    spins < 2000 ? relax() : std::this_thread::yield();
}

// Calls work(i) for each i below `count`, in any order, with as many threads as the pool has: on `Workers`, or on
// the pool's while they are another's (of several devices of one process).
template <class Pool, class Work>
void parallel(Pool& pool, int64_t count, const Work& work) {
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  if (helpers < 1) {
    for (int64_t i = 0; i < count; ++i) work(i);
  } else if (!Workers::of_process(pool.num_threads() - 1).run(count, work)) {
    parallel_on(pool, helpers, count, work);
  }
}

}  // namespace sol
