// The operations on a pool of threads against plain loops in double precision; for the compiler's sanitizers.
//
//     make native-check
//
// Python's tests compare the same operations with XLA; here nothing else is in the process, so that a sanitizer
// sees all of it.  Each buffer is as long as what it holds: a read or write past its end is found.
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <mutex>
#include <random>
#include <thread>

#include "ops.h"

namespace {

class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closed_ = true;
    }
    ready_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  int64_t num_threads() const { return static_cast<int64_t>(threads_.size()); }
  void Schedule(std::function<void()> task) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    ready_.notify_one();
  }

 private:
  void work() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      ready_.wait(lock, [this] { return closed_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
    }
  }
  std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<std::function<void()>> tasks_;
  bool closed_ = false;
  std::vector<std::thread> threads_;
};

std::mt19937 rng(0);

std::vector<float> random_floats(size_t count) {
  std::vector<float> x(count);
  for (float& number : x) number = std::normal_distribution<float>()(rng);
  return x;
}

// Numbers of a type, as bytes and as float.
struct Numbers {
  std::vector<char> data;
  std::vector<float> value;
  Numbers(size_t count, sol::Type type) : data(count * sol::bytes_of(type)), value(random_floats(count)) {
    for (size_t i = 0; i < count; ++i) {
      if (type == sol::kHalf) value[i] = sol::as_half(value[i]);
      uint32_t bits;
      std::memcpy(&bits, &value[i], 4);
      const uint16_t high = static_cast<uint16_t>(bits >> 16);
      std::memcpy(data.data() + i * sol::bytes_of(type), type == sol::kHalf ? static_cast<const void*>(&high) : &bits,
                  sol::bytes_of(type));
    }
  }
};

std::vector<char> random_mask(size_t count, double share) {
  std::vector<char> mask(count);
  for (char& bit : mask) bit = std::bernoulli_distribution(share)(rng);
  return mask;
}

const bool* bools(const std::vector<char>& mask) { return reinterpret_cast<const bool*>(mask.data()); }

void expect(double got, double wanted, double size, const char* what) {
  if (std::fabs(got - wanted) <= size * (1 + std::fabs(wanted))) return;
  std::printf("%s: %g is not %g\n", what, got, wanted);
  std::exit(1);
}

void check_products(Pool& pool, sol::Type type, int N, int D, int F) {
  std::vector<float> x = random_floats(N * D);
  for (int d = 0; D % 2 && d < D; d += 3)  // channels that are left out
    for (int n = 0; n < N; ++n) x[n * D + d] = 0;
  const Numbers w(D * F, type), other(D * 7, type), table(F * D, type);
  std::vector<float> y(N * F), z(N * 7), logits(N * F), gated(N * F);
  sol::project(pool, x.data(), N, D, type, {{w.data.data(), F, y.data()}, {other.data.data(), 7, z.data()}}, false);
  sol::project(pool, x.data(), N, D, type, {{w.data.data(), F, gated.data()}, {w.data.data(), F, nullptr}}, true);
  sol::match(pool, x.data(), N, D, type, table.data.data(), F, logits.data());
  for (int n = 0; n < N; ++n)
    for (int f = 0; f < F; ++f) {
      double sum = 0, match = 0, last = 0;
      for (int d = 0; d < D; ++d) {
        const double operand = type == sol::kHalf ? sol::as_half(x[n * D + d]) : x[n * D + d];
        sum += operand * w.value[d * F + f];
        match += operand * table.value[f * D + d];
        if (f < 7) last += operand * other.value[d * 7 + f];
      }
      expect(y[n * F + f], sum, 1e-4, "project");
      expect(gated[n * F + f], sum * sum / (1 + std::exp(-sum)), 1e-3, "gated project");
      expect(logits[n * F + f], match, 1e-4, "match");
      if (f < 7) expect(z[n * 7 + f], last, 1e-4, "the second product");
    }
}

void check_attention(Pool& pool, sol::Type type, int B, int K, int S, int T, int d, int page) {
  const int L = 2, H = 2, G = 3, P = (S + page - 1) / page, layer = 1;
  std::vector<float> q = random_floats(B * K * H * G * d), mixed(q.size());
  const Numbers k(B * L * H * S * d, type), v(B * L * H * S * d, type);
  const Numbers own_k(B * K * H * T * d, type), own_v(B * K * H * T * d, type);
  const std::vector<char> keep = random_mask(B * K * H * G * P, 0.3), own_keep = random_mask(B * K * T, 0.7);
  std::vector<int> length(B * K);
  for (int& n : length) n = std::uniform_int_distribution<int>(0, S)(rng);
  sol::attend(pool, {B, K, L, H, G, S, T, d, q.data(), length.data(), k.data.data(), v.data.data(),
                     own_k.data.data(), own_v.data.data(), {bools(keep), H, G, P}, {bools(own_keep), 1, 1, T},
                     layer, page, type, mixed.data()});
  for (int row = 0; row < B * K * H * G; ++row) {
    const int bk = row / (H * G), h = row / G % H, b = bk / K;
    std::vector<double> sum(d);
    double total = 0;
    const auto add = [&](const float* key, const float* value) {
      double logit = 0;
      for (int c = 0; c < d; ++c) logit += static_cast<double>(q[row * d + c]) * key[c];
      const double weight = std::exp(logit / std::sqrt(static_cast<double>(d)));
      total += weight;
      for (int c = 0; c < d; ++c) sum[c] += weight * value[c];
    };
    for (int t = 0; t < length[bk]; ++t)
      if (keep[row * P + t / page]) {
        const int at = (((b * L + layer) * H + h) * S + t) * d;
        add(&k.value[at], &v.value[at]);
      }
    for (int t = 0; t < T; ++t)
      if (own_keep[bk * T + t]) {
        const int at = ((bk * H + h) * T + t) * d;
        add(&own_k.value[at], &own_v.value[at]);
      }
    for (int c = 0; c < d; ++c) expect(mixed[row * d + c], total == 0 ? 0 : sum[c] / total, 1e-4, "attend");
  }
}

void check_choice(Pool& pool, sol::Type type, int B, int K, int P, int N, int d) {
  const int L = 2, H = 2, G = 3, layer = 1;
  const std::vector<float> q = random_floats(B * K * H * G * d);
  const Numbers bounds(B * L * H * P * 2 * d, type), own(B * K * H * N * 2 * d, type);
  const std::vector<char> used = random_mask(B * K * P, 0.8), own_used = random_mask(B * K * N, 0.8);
  std::vector<int> pages(B * K);
  for (int& n : pages) n = std::uniform_int_distribution<int>(1, P + N)(rng);
  std::vector<char> keep(B * K * H * G * P), own_keep(B * K * H * G * N);
  sol::select_pages(pool, {B, K, L, H, G, P, N, d, q.data(), bounds.data.data(), own.data.data(), bools(used),
                           bools(own_used), pages.data(), layer, type, false, reinterpret_cast<bool*>(keep.data()),
                           reinterpret_cast<bool*>(own_keep.data())});
  for (int row = 0; row < B * K * H * G; ++row) {
    const int bk = row / (H * G);
    int kept = 0, available = 0;
    for (int p = 0; p < P; ++p) kept += keep[row * P + p] && used[bk * P + p], available += used[bk * P + p];
    for (int p = 0; p < N; ++p) kept += own_keep[row * N + p] && own_used[bk * N + p], available += own_used[bk * N + p];
    expect(kept, std::min(pages[bk], available), 0, "pages kept");
  }
}

void check_bounds(Pool& pool, sol::Type type, int M, int N, int d, int page) {
  const int P = (N + page - 1) / page;
  const Numbers k(M * N * d, type);
  const std::vector<char> valid = random_mask(N, 0.7);
  std::vector<char> bounds(M * P * 2 * d * sol::bytes_of(type));
  sol::page_bounds(pool, k.data.data(), bools(valid), M, 1, N, d, page, type, bounds.data());
  for (int m = 0; m < M; ++m)
    for (int t = 0; t < N; ++t)
      for (int c = 0; c < d && valid[t]; ++c) {
        float high = 0;
        const size_t at = ((m * P + t / page) * 2 * d + c) * sol::bytes_of(type);
        std::memcpy(reinterpret_cast<char*>(&high) + 4 - sol::bytes_of(type), bounds.data() + at, sol::bytes_of(type));
        expect(high >= k.value[(m * N + t) * d + c], 1, 0, "a bound");
      }
}

void check_rows(int N, int D) {
  const std::vector<float> x = random_floats(N * D);
  std::vector<int> count(N), channels(N * D), kept(N);
  for (int& n : count) n = std::uniform_int_distribution<int>(1, D)(rng);
  std::vector<float> y(N * D), rounded(D);
  sol::keep_channels(x.data(), count.data(), N, D, y.data(), channels.data(), kept.data());
  for (int n = 0; n < N; ++n) expect(kept[n], count[n], 0, "channels kept");
  sol::kernels().quantize(x.data(), D, 7, rounded.data());
  float largest = 0;
  for (int c = 0; c < D; ++c) largest = std::max(largest, std::fabs(x[c]));
  for (int c = 0; c < D; ++c) expect(rounded[c], x[c], 0.51 * largest / 7, "a rounded number");
}

// Lists [2, H, N] and [2, H, M]: what is cut is put elsewhere, and nothing else changes.
void check_moves(int64_t H, int64_t N, int64_t M, int64_t d) {
  const auto bytes = static_cast<int64_t>(sizeof(float)) * d;
  std::vector<float> x(2 * H * N * d), part(2 * H * M * d);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i);
  const std::vector<float> before = x;
  for (const int start : {0, 1, -1, 1000, -1000}) {
    const int starts[2] = {start, 0};
    sol::cut({{2}, {2}, {2}, H, N, M, bytes, starts}, reinterpret_cast<char*>(x.data()),
             reinterpret_cast<char*>(part.data()));
    const int64_t begin = std::clamp<int64_t>(start < 0 ? start + N : start, 0, N - M);
    expect(part[0], before[begin * d], 0, "the first number that is cut");
    expect(part.back(), before[((2 * H - 1) * N + M) * d - 1], 0, "the last number that is cut");
    const int shared = 0;
    std::fill(part.begin(), part.end(), -1.0f);
    sol::put({{2}, {1}, {1}, H, N, M, bytes, &shared}, reinterpret_cast<char*>(part.data()),
             reinterpret_cast<char*>(x.data()));
    for (int64_t row = 0; row < 2 * H * N; ++row)
      expect(x[row * d], row % N < M ? -1 : before[row * d], 0, "what was put");
    x = before;
  }
}

// Several callers at a time, as the devices of one process are: one has the workers, the others the pool.
void check_callers(Pool& pool) {
  constexpr int kCallers = 4, kRounds = 300, kPieces = 64;
  std::vector<std::thread> callers;
  std::atomic<int64_t> wrong{0};
  for (int caller = 0; caller < kCallers; ++caller)
    callers.emplace_back([&] {
      for (int round = 0; round < kRounds; ++round) {
        std::vector<int> times(kPieces);  // each piece is one thread's alone
        sol::parallel(pool, kPieces, [&](int64_t i) { ++times[i]; });
        wrong += kPieces - std::count(times.begin(), times.end(), 1);
        if (round % 100 == 0) std::this_thread::sleep_for(2 * sol::Workers::kLookOut);  // until they sleep
      }
    });
  for (std::thread& caller : callers) caller.join();
  expect(static_cast<double>(wrong), 0, 0, "pieces not done once");
}

}  // namespace

int main() {
  Pool pool(3);
  check_callers(pool);
  check_moves(3, 9, 4, 5);
  check_moves(1, 1, 1, 1);
  for (const char* name : {"baseline", "avx2", "avx512"}) {
    const sol::Kernels* found = sol::find_kernels(name);
    if (!found) continue;
    sol::use_kernels(found);
    for (const sol::Type type : {sol::kFloat, sol::kHalf}) {
      for (const int rows : {1, 3, 5, 15}) {
        for (const int size : {1, 31, 64, 200}) check_products(pool, type, rows, size + 9, size);
        check_products(pool, type, rows, 400, 301);  // in several parts
        check_products(pool, type, rows, 10, 2100);  // and blocks
      }
      for (const int d : {8, 24, 64, 100})
        for (const int S : {1, 61, 700}) {
          check_attention(pool, type, 1, 1, S, 16, d, 8);
          check_attention(pool, type, 2, 3, S, 1, d, 1);
          check_attention(pool, type, 1, 5, S, 5, d, 8);  // 15 rows: blocks of 8, 4, 2 and 1
          check_choice(pool, type, 2, 2, S, 3, d);
          check_choice(pool, type, 1, 1, S, 1, d);
          check_bounds(pool, type, 5, S, d, 8);
        }
    }
    for (const int size : {1, 15, 16, 577}) check_rows(3, size);
    std::printf("%s: well\n", name);
  }
}
