// The operations: pieces of work for the kernels, spread over the threads of a pool (see parallel.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace sol {

// Pieces smaller than this are not worth a thread's attention.
constexpr int64_t kPieceBytes = 32 << 10, kLeastColumns = 64, kMostColumns = 512;

inline size_t bytes_of(Type type) { return type == kFloat ? 4 : 2; }

inline const void* at(const void* data, Type type, int64_t index) {
  return static_cast<const char*>(data) + index * static_cast<int64_t>(bytes_of(type));
}

// float32 as bfloat16 has it, rounded half to even.
inline float as_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x == x) bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline std::vector<float> operands(const float* x, int64_t count, Type type) {
  std::vector<float> copy(x, x + count);
  if (type == kHalf)
    for (float& number : copy) number = as_half(number);
  return copy;
}

// Rows [N, D] in the order in which kernels read what meets bfloat16 numbers.
inline void pair_rows(std::vector<float>& x, int64_t D, Type type) {
  if (type != kHalf) return;
  for (auto row = x.begin(); row != x.end(); row += D)
    for (int64_t c = 0; c + kPaired <= D; c += kPaired) {
      float both[kPaired];
      for (int i = 0; i < kPaired; ++i) both[i / 2 + (i % 2) * (kPaired / 2)] = row[c + i];
      std::copy_n(both, kPaired, row + c);
    }
}

// Columns of each piece when `threads` share products of `columns`: whole vectors, and as many pieces for each
// thread.  Wide pieces, since each row of one is a stream from memory, as long as their sums stay in cache.
inline int64_t columns_a_piece(int64_t columns, int64_t threads) {
  const int64_t pieces = threads * ((columns + threads * kMostColumns - 1) / (threads * kMostColumns));
  return std::max<int64_t>(kLeastColumns, ((columns + pieces - 1) / pieces + 31) / 32 * 32);
}

struct Product {
  const void* w;  // [D, F]
  int64_t F;
  float* y;  // [N, F]
};

// What all products of a call share: operands, and the channels that are not zero in all N rows of x.
struct Operands {
  std::vector<float> x;  // [N, D], rounded to the type of the weights
  int64_t N, D;
  Type type;
  std::vector<int> rows;  // of the weights that are read
};

// x @ some rows of some columns of w, into y.
inline void multiply(const Operands& in, const Product& product, int64_t first, int64_t count, int64_t column,
                     int64_t columns, float* y, int64_t y_stride) {
  kernels().product[in.type](in.x.data(), static_cast<int>(in.N), in.D, in.rows.data() + first,
                             static_cast<int>(count), at(product.w, in.type, column), product.F,
                             static_cast<int>(columns), y, y_stride);
}

// Of one or a few rows of x that meet nearly all weights, all time goes into reading these, so a piece is some whole
// rows of them (of wide ones kMostSums columns, whose sums stay in the first-level cache): one stream from memory.
// Its sums are of its rows alone, and are added up afterwards.  How rows are cut does not depend on the threads, so
// neither does a sum.
constexpr int64_t kFewRows = 4, kPartBytes = 128 << 10, kMostParts = 16, kMostSums = 2048;

template <class Pool>
void project_whole(Pool& pool, const Operands& in, const std::vector<Product>& products, bool gated) {
  struct Piece {
    const Product* product;
    int64_t column, columns, first, count;
    float* sums;
  };
  struct Sums {
    int64_t parts;
    std::vector<float> data;  // [parts, N, F]
  };
  std::vector<Piece> pieces;
  std::vector<Sums> sums(products.size());
  const int64_t N = in.N, count = static_cast<int64_t>(in.rows.size());
  int64_t added = 0;
  for (size_t i = 0; i < products.size(); ++i) {
    const int64_t F = products[i].F, width = std::min(F, kMostSums);
    const int64_t bytes = count * width * static_cast<int64_t>(bytes_of(in.type));
    const int64_t wanted = std::min(kMostParts, std::max<int64_t>(1, bytes / kPartBytes));
    const int64_t step = std::max<int64_t>(8, ((count + wanted - 1) / wanted + 7) / 8 * 8);
    sums[i].parts = std::max<int64_t>(1, (count + step - 1) / step);
    sums[i].data.resize(sums[i].parts * N * F);
    added += sums[i].parts * N * F;
    for (int64_t part = 0; part < sums[i].parts; ++part)
      for (int64_t c = 0; c < F; c += width)
        pieces.push_back({&products[i], c, std::min(width, F - c), part * step, std::min(step, count - part * step),
                          sums[i].data.data() + part * N * F + c});
  }
  parallel(pool, static_cast<int64_t>(pieces.size()), [&](int64_t p) {
    const Piece& piece = pieces[p];
    multiply(in, *piece.product, piece.first, piece.count, piece.column, piece.columns, piece.sums, piece.product->F);
  });

  const auto total = [&](size_t i, int64_t n, int64_t c, int64_t columns, float* y) {
    const int64_t F = products[i].F;
    const float* part = sums[i].data.data() + n * F + c;
    std::copy_n(part, columns, y);
    for (int64_t rest = 1; rest < sums[i].parts; ++rest) {
      part += N * F;
      for (int64_t j = 0; j < columns; ++j) y[j] += part[j];
    }
  };
  const auto finish = [&](size_t i, int64_t c, int64_t columns) {
    std::vector<float> up(gated ? columns : 0);
    for (int64_t n = 0; n < N; ++n) {
      float* y = products[i].y + n * products[i].F + c;
      total(i, n, c, columns, y);
      if (!gated) continue;
      total(1, n, c, columns, up.data());
      kernels().silu_product(y, up.data(), columns);
    }
  };
  for (size_t i = 0; i < (gated ? 1 : products.size()); ++i) {
    const int64_t F = products[i].F, blocks = (F + kMostColumns - 1) / kMostColumns;
    const auto block = [&](int64_t b) { finish(i, b * kMostColumns, std::min(kMostColumns, F - b * kMostColumns)); };
    if (added * 4 < 8 * kPieceBytes) {
      for (int64_t b = 0; b < blocks; ++b) block(b);
    } else {
      parallel(pool, blocks, block);
    }
  }
}

// Otherwise a piece is some columns: their weights meet all rows of x while they are in cache, and where channels are
// left out there is no stream to keep.
template <class Pool>
void project_columns(Pool& pool, const Operands& in, const std::vector<Product>& products, bool gated) {
  struct Piece {
    const Product* product;
    int64_t column, columns;
  };
  std::vector<Piece> pieces;
  const size_t planned = gated ? 1 : products.size();
  for (size_t i = 0; i < planned; ++i) {
    const int64_t step = columns_a_piece(products[i].F, std::max<int64_t>(1, pool.num_threads()));
    for (int64_t c = 0; c < products[i].F; c += step)
      pieces.push_back({&products[i], c, std::min(step, products[i].F - c)});
  }
  const int64_t count = static_cast<int64_t>(in.rows.size());
  parallel(pool, static_cast<int64_t>(pieces.size()), [&](int64_t p) {
    const auto& [product, column, columns] = pieces[p];
    float* y = product->y + column;
    multiply(in, *product, 0, count, column, columns, y, product->F);
    if (!gated) return;
    std::vector<float> up(in.N * columns);
    multiply(in, products[1], 0, count, column, columns, up.data(), columns);
    for (int64_t n = 0; n < in.N; ++n)
      kernels().silu_product(y + n * product->F, up.data() + n * columns, columns);
  });
}

// y = x @ w for each product; with `gated` the first of two becomes silu(first) * second.  Channels that are zero
// in all N rows of x are not read.
template <class Pool>
void project(Pool& pool, const float* x, int64_t N, int64_t D, Type type, std::vector<Product> products,
             bool gated) {
  Operands in{operands(x, N * D, type), N, D, type, {}};
  in.rows.reserve(D);
  for (int64_t d = 0; d < D; ++d)
    for (int64_t n = 0; n < N; ++n)
      if (!(in.x[n * D + d] == 0)) {
        in.rows.push_back(static_cast<int>(d));
        break;
      }
  if (N < kFewRows && static_cast<int64_t>(in.rows.size()) * 10 >= D * 9) {
    project_whole(pool, in, products, gated);
  } else {
    project_columns(pool, in, products, gated);
  }
}

// y[N, V] = x[N, D] . table[V, D]
template <class Pool>
void match(Pool& pool, const float* x, int64_t N, int64_t D, Type type, const void* table, int64_t V, float* y) {
  const Kernels& kernel = kernels();
  std::vector<float> operand = operands(x, N * D, type);
  pair_rows(operand, D, type);
  const int64_t step = std::max<int64_t>(1, 4 * kPieceBytes / std::max<int64_t>(1, D * bytes_of(type)));
  parallel(pool, (V + step - 1) / step, [&](int64_t piece) {
    const int64_t begin = piece * step;
    kernel.dots[type](operand.data(), static_cast<int>(N), static_cast<int>(D), at(table, type, begin * D),
                      std::min(step, V - begin), y + begin, V);
  });
}

// A mask [B, K, H or 1, G or 1, P], which is broadcast over heads.
struct Mask {
  const bool* data;
  int64_t H, G, P;
  const bool* row(int64_t bk, int64_t h, int64_t g) const {
    return data + ((bk * H + (H == 1 ? 0 : h)) * G + (G == 1 ? 0 : g)) * P;
  }
};

struct Attention {
  int64_t B, K, L, H, G, S, T, d;
  const float* q;       // [B, K, H, G, d]
  const int* length;    // [B, K]
  const void *k, *v;    // [B, L, H, S, d], of which `layer` is read
  const void *own_k, *own_v;  // [B, K, H, T, d]
  Mask keep, own_keep;  // by page, by token
  int64_t layer, page_size;
  Type type;
  float* mixed;  // [B, K, H, G, d]
};

constexpr int64_t kTokensAPiece = 1024;  // long enough for a stream from memory to get going

template <class Pool>
void attend(Pool& pool, const Attention& a) {
  const Kernels& kernel = kernels();
  const int64_t R = a.K * a.G, size = R * (a.d + 2);
  int64_t longest = 0;
  for (int64_t i = 0; i < a.B * a.K; ++i) longest = std::max<int64_t>(longest, a.length[i]);
  longest = std::min(longest, a.S);
  const int64_t blocks = (longest + kTokensAPiece - 1) / kTokensAPiece;
  const int64_t pieces = blocks + 1;  // the last has every row's own tokens
  std::vector<float> room(a.B * a.H * pieces * size);
  const int own_length = static_cast<int>(a.T);
  std::vector<float> paired(a.q, a.q + a.B * a.K * a.H * a.G * a.d);
  pair_rows(paired, a.d, a.type);

  const auto part_at = [&](int64_t bh, int64_t piece) {
    float* mixed = room.data() + (bh * pieces + piece) * size;
    return Part{mixed, mixed + R * a.d, mixed + R * (a.d + 1)};
  };
  const auto piece_of = [&](int64_t i) {
    const int64_t bh = i / pieces, piece = i % pieces, b = bh / a.H, h = bh % a.H;
    const Part part = part_at(bh, piece);
    if (piece < blocks) {
      std::vector<float> q(R * a.d);
      std::vector<const bool*> keep(R);
      std::vector<int> length(R);
      for (int64_t k = 0; k < a.K; ++k) {
        const int64_t bk = b * a.K + k;
        std::copy_n(paired.data() + (bk * a.H + h) * a.G * a.d, a.G * a.d, q.data() + k * a.G * a.d);
        for (int64_t g = 0; g < a.G; ++g) {
          keep[k * a.G + g] = a.keep.row(bk, h, g);
          length[k * a.G + g] = a.length[bk];
        }
      }
      const int64_t head = ((b * a.L + a.layer) * a.H + h) * a.S * a.d;
      const Query query{q.data(),           keep.data(),
                        length.data(),      static_cast<int>(R),
                        static_cast<int>(a.d), static_cast<int>(a.page_size)};
      const int64_t begin = piece * kTokensAPiece;
      kernel.attend[a.type](query, at(a.k, a.type, head), at(a.v, a.type, head), static_cast<int>(begin),
                            static_cast<int>(std::min(begin + kTokensAPiece, longest)), part);
      return;
    }
    std::vector<const bool*> keep(a.G);
    const std::vector<int> length(a.G, own_length);
    for (int64_t k = 0; k < a.K; ++k) {
      const int64_t bkh = (b * a.K + k) * a.H + h;
      for (int64_t g = 0; g < a.G; ++g) keep[g] = a.own_keep.row(b * a.K + k, h, g);
      const Query query{paired.data() + bkh * a.G * a.d, keep.data(), length.data(),
                        static_cast<int>(a.G), static_cast<int>(a.d), 1};
      const int64_t row = k * a.G;
      kernel.attend[a.type](query, at(a.own_k, a.type, bkh * a.T * a.d), at(a.own_v, a.type, bkh * a.T * a.d), 0,
                            own_length, Part{part.mixed + row * a.d, part.top + row, part.total + row});
    }
  };
  const int64_t bytes = 2 * a.B * a.H * longest * a.d * static_cast<int64_t>(bytes_of(a.type));
  const int64_t count = a.B * a.H * pieces;
  if (bytes < 4 * kPieceBytes) {
    for (int64_t i = 0; i < count; ++i) piece_of(i);
  } else {
    parallel(pool, count, piece_of);
  }

  for (int64_t bh = 0; bh < a.B * a.H; ++bh) {
    const int64_t b = bh / a.H, h = bh % a.H;
    for (int64_t r = 0; r < R; ++r) {
      float* mixed = a.mixed + (((b * a.K + r / a.G) * a.H + h) * a.G + r % a.G) * a.d;
      float top = -std::numeric_limits<float>::infinity(), total = 0;
      for (int64_t p = 0; p < pieces; ++p) {
        const float other = part_at(bh, p).top[r];
        top = other > top ? other : top;
      }
      const float base = std::isinf(top) && top < 0 ? 0 : top;
      std::fill_n(mixed, a.d, 0.0f);
      for (int64_t p = 0; p < pieces; ++p) {
        const Part part = part_at(bh, p);
        const float share = std::exp(part.top[r] - base);
        if (share == 0) continue;
        total += share * part.total[r];
        for (int64_t c = 0; c < a.d; ++c) mixed[c] += share * part.mixed[r * a.d + c];
      }
      if (total != 0)
        for (int64_t c = 0; c < a.d; ++c) mixed[c] /= total;
    }
  }
}

struct Choice {
  int64_t B, K, L, H, G, P, N, d;
  const float* q;               // [B, K, H, G, d]
  const void* bounds;           // [B, L, H, P, 2d], of which `layer` is read
  const void* own_bounds;       // [B, K, H, N, 2d]
  const bool *used, *own_used;  // [B, K, P], [B, K, N]
  const int* pages;             // [B, K]
  int64_t layer;
  Type type;
  bool of_group;
  bool *keep, *own_keep;  // [B, K, H, G, P], [B, K, H, G, N]
};

template <class Pool>
void select_pages(Pool& pool, const Choice& a) {
  const Kernels& kernel = kernels();
  const int64_t R = a.K * a.G, M = a.P + a.N, width = 2 * a.d;
  std::vector<char> decided(a.B * a.K);
  bool all = true;
  for (int64_t bk = 0; bk < a.B * a.K; ++bk) {
    const bool *used = a.used + bk * a.P, *own = a.own_used + bk * a.N;
    const int64_t available = std::count(used, used + a.P, true) + std::count(own, own + a.N, true);
    decided[bk] = a.pages[bk] >= available;
    all = all && decided[bk];
    if (!decided[bk]) continue;
    // Beyond the pages in use the threshold is that of the others, which then pass too.
    const bool beyond = a.pages[bk] > available;
    for (int64_t row = bk * a.H * a.G; row < (bk + 1) * a.H * a.G; ++row) {
      for (int64_t p = 0; p < a.P; ++p) a.keep[row * a.P + p] = beyond || used[p];
      for (int64_t p = 0; p < a.N; ++p) a.own_keep[row * a.N + p] = beyond || own[p];
    }
  }
  if (all) return;

  // Scores [B, H, R, M]: one arithmetic for shared and own pages, so that equal bounds tie.
  std::vector<float> score(a.B * a.H * R * M), query(a.B * a.H * R * width);
  for (int64_t b = 0; b < a.B; ++b)
    for (int64_t h = 0; h < a.H; ++h)
      for (int64_t r = 0; r < R; ++r) {
        const float* q = a.q + (((b * a.K + r / a.G) * a.H + h) * a.G + r % a.G) * a.d;
        float* both = query.data() + ((b * a.H + h) * R + r) * width;
        for (int64_t c = 0; c < a.d; ++c) {
          both[c] = q[c] < 0 ? 0 : q[c];
          both[a.d + c] = q[c] > 0 ? 0 : q[c];
        }
      }
  pair_rows(query, width, a.type);
  const int64_t step = std::max<int64_t>(16, kPieceBytes / (width * static_cast<int64_t>(bytes_of(a.type))));
  const int64_t blocks = (a.P + step - 1) / step, pieces = blocks + 1;
  parallel(pool, a.B * a.H * pieces, [&](int64_t i) {
    const int64_t bh = i / pieces, piece = i % pieces, b = bh / a.H, h = bh % a.H;
    const float* q = query.data() + bh * R * width;
    float* out = score.data() + bh * R * M;
    if (piece < blocks) {
      const int64_t begin = piece * step;
      const int64_t head = (((b * a.L + a.layer) * a.H + h) * a.P + begin) * width;
      kernel.dots[a.type](q, static_cast<int>(R), static_cast<int>(width), at(a.bounds, a.type, head),
                          std::min(step, a.P - begin), out + begin, M);
      return;
    }
    for (int64_t k = 0; k < a.K; ++k) {
      const int64_t head = ((b * a.K + k) * a.H + h) * a.N * width;
      kernel.dots[a.type](q + k * a.G * width, static_cast<int>(a.G), static_cast<int>(width),
                          at(a.own_bounds, a.type, head), a.N, out + k * a.G * M + a.P, M);
    }
  });

  const float lowest = -std::numeric_limits<float>::infinity();
  parallel(pool, a.B * a.K * a.H, [&](int64_t i) {
    const int64_t bk = i / a.H, h = i % a.H, b = bk / a.K, k = bk % a.K;
    if (decided[bk]) return;
    std::vector<int> bits((M + 15) / 16 * 16);
    std::vector<char> keep(M);
    float* first = score.data() + ((b * a.H + h) * R + k * a.G) * M;
    if (a.of_group)
      for (int64_t p = 0; p < M; ++p)
        for (int64_t g = 1; g < a.G; ++g) first[p] += first[g * M + p];
    for (int64_t g = 0; g < a.G; ++g) {
      float* row = a.of_group ? first : first + g * M;
      if (g == 0 || !a.of_group) {
        for (int64_t p = 0; p < a.P; ++p)
          if (!a.used[bk * a.P + p]) row[p] = lowest;
        for (int64_t p = 0; p < a.N; ++p)
          if (!a.own_used[bk * a.N + p]) row[a.P + p] = lowest;
        kernel.select(row, static_cast<int>(M), a.pages[bk], false, bits.data(),
                      reinterpret_cast<bool*>(keep.data()));
      }
      const int64_t out = (bk * a.H + h) * a.G + g;
      std::copy_n(reinterpret_cast<const bool*>(keep.data()), a.P, a.keep + out * a.P);
      std::copy_n(reinterpret_cast<const bool*>(keep.data()) + a.P, a.N, a.own_keep + out * a.N);
    }
  });
}

// The bounds [M, P, 2d] of the pages of M lists of N keys; lists [M / masks] of a row share its mask [masks, N].
template <class Pool>
void page_bounds(Pool& pool, const void* k, const bool* valid, int64_t M, int64_t masks, int64_t N, int64_t d,
                 int64_t page_size, Type type, void* bounds) {
  const Kernels& kernel = kernels();
  const int64_t P = (N + page_size - 1) / page_size, width = static_cast<int64_t>(bytes_of(type));
  parallel(pool, M, [&](int64_t m) {
    kernel.bounds[type](at(k, type, m * N * d), valid + m / (M / masks) * N, static_cast<int>(N),
                        static_cast<int>(d), static_cast<int>(page_size),
                        static_cast<char*>(bounds) + m * P * 2 * d * width);
  });
}

// Moves rows of `bytes` between lists [..., H, N] and [..., H, M], from the `start`th of each of the first.
struct Move {
  std::vector<int64_t> whole, part, starts;  // leading dimensions; 1 where a list, or a start, is shared
  int64_t H, N, M, bytes;
  const int* start;  // from the end if negative; what is outside of a list is moved into it, as JAX does
};

// Calls `move(row of the whole, row of the part)` for each list; there are `M * bytes` bytes to move.
template <class Function>
void each_list(const Move& a, const std::vector<int64_t>& every, Function move) {
  int64_t total = 1;
  for (const int64_t size : every) total *= size;
  const auto index = [&](const std::vector<int64_t>& sizes, int64_t i) {
    int64_t found = 0, stride = 1;
    for (size_t axis = every.size(); axis-- > 0; i /= every[axis]) {
      if (sizes[axis] != 1) found += i % every[axis] * stride;
      stride *= sizes[axis];
    }
    return found;
  };
  for (int64_t i = 0; i < total; ++i) {
    const int64_t given = a.start[index(a.starts, i)];
    const int64_t start = std::clamp<int64_t>(given < 0 ? given + a.N : given, 0, a.N - a.M);
    for (int64_t h = 0; h < a.H; ++h)
      move((index(a.whole, i) * a.H + h) * a.N + start, (index(a.part, i) * a.H + h) * a.M);
  }
}

inline void cut(const Move& a, const char* x, char* out) {
  each_list(a, a.part, [&](int64_t from, int64_t to) {
    std::memcpy(out + to * a.bytes, x + from * a.bytes, a.M * a.bytes);
  });
}

inline void put(const Move& a, const char* part, char* x) {
  each_list(a, a.whole, [&](int64_t to, int64_t from) {
    std::memcpy(x + to * a.bytes, part + from * a.bytes, a.M * a.bytes);
  });
}

// Rows without all but their `count` largest channels, and the list of channels: kept ones first.
inline void keep_channels(const float* x, const int* count, int64_t N, int64_t D, float* y, int* channels,
                          int* kept_count) {
  std::vector<int> bits((D + 15) / 16 * 16);
  std::vector<char> keep(D);
  for (int64_t n = 0; n < N; ++n, x += D, y += D) {
    kernels().select(x, static_cast<int>(D), count[n], true, bits.data(), reinterpret_cast<bool*>(keep.data()));
    int kept = 0;
    for (int64_t c = 0; c < D; ++c) kept += keep[c];
    if (channels) {
      int next[2] = {kept, 0};
      for (int64_t c = 0; c < D; ++c) channels[n * D + next[static_cast<int>(keep[c])]++] = static_cast<int>(c);
      kept_count[n] = kept;
    }
    for (int64_t c = 0; c < D; ++c) y[c] = keep[c] ? x[c] : 0.0f;
  }
}

}  // namespace sol
