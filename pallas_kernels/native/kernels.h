// Kernels for CPUs: what each does to one piece of work, on one thread.  They know nothing of XLA or threads.
//
// Shapes are as in the Python package: N rows, D channels in, F channels out, R query rows of one key/value
// head, d channels of a head, P pages.  Weights, caches and bounds are float32 or bfloat16; all else is float32,
// and so are sums.  What a number comes to depends neither on the piece that it is in nor on the threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sol {

using std::size_t;
using half = uint16_t;  // bfloat16, as its bits
constexpr int kPaired = 32;  // in paired order the even ones of so many numbers come before the odd ones

enum Type { kFloat = 0, kHalf = 1 };

struct Query {
  const float* q;           // [R, d], in paired order where keys are bfloat16
  const bool* const* keep;  // [R], each a mask by page
  const int* length;       // [R], tokens that count
  int R, d, page_size;
};

// Attention over some tokens: values weighted by exp(logit - top), the top logit, the weights' sum.
struct Part {
  float* mixed;  // [R, d]
  float* top;    // [R]
  float* total;  // [R]
};

struct Kernels {
  const char* name;
  // y[N, columns] = x[N, .] @ w[., columns] over the `count` rows of w in `rows`; w's rows are `stride` apart.
  void (*product[2])(const float* x, int N, size_t x_stride, const int* rows, int count, const void* w,
                     size_t stride, int columns, float* y, size_t y_stride);
  // y[N, count] = x[N, D] . table[count, D], row by row; where the table is bfloat16, x is in paired order.
  void (*dots[2])(const float* x, int N, int D, const void* table, size_t count, float* y, size_t y_stride);
  // gate = silu(gate) * up
  void (*silu_product)(float* gate, const float* up, size_t count);
  // Attention over the tokens [begin, end) of one head, as a part.
  void (*attend[2])(const Query& query, const void* k, const void* v, int begin, int end, Part part);
  // The largest and smallest of each page's valid keys: [P, 2d].
  void (*bounds[2])(const void* k, const bool* valid, int N, int d, int page_size, void* bounds);
  // keep[i] = score[i] is at least the k-th largest; of |score| with `magnitude`.  `bits` has room for `count`.
  void (*select)(const float* score, int count, int k, bool magnitude, int* bits, bool* keep);
  // y = RMSNorm(x) * gain
  void (*norm)(const float* x, const void* gain, Type type, int D, float eps, float* y);
  // y is rounded to whole multiples, `top` at most, of a scale for the row; 0 leaves it as it is.
  void (*quantize)(const float* y, int D, float top, float* rounded);
};

// The fastest that this machine runs, or those called `name`: "baseline", "avx2", "avx512".
const Kernels& kernels();
const Kernels* find_kernels(const char* name);
void use_kernels(const Kernels* found);

}  // namespace sol
