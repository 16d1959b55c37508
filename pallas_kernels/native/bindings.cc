// The operations as targets of XLA's foreign function interface (`pallas_kernels.native` registers them).
#include <string>

#include "ops.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace sol {
namespace {

using Buffer = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

bool type_of(const Buffer& buffer, Type* type) {
  *type = buffer.element_type() == ffi::DataType::BF16 ? kHalf : kFloat;
  return *type == kHalf || buffer.element_type() == ffi::DataType::F32;
}

ffi::Error wrong_type(const char* what) {
  return ffi::Error::InvalidArgument(std::string(what) + " must be float32 or bfloat16");
}

const float* floats(const Buffer& buffer) { return static_cast<const float*>(buffer.untyped_data()); }
const int* ints(const Buffer& buffer) { return static_cast<const int*>(buffer.untyped_data()); }
const bool* bools(const Buffer& buffer) { return static_cast<const bool*>(buffer.untyped_data()); }

// x [N, D], layer, weights [L, D, F] -> [N, F] of each; with `gated` one [N, F] of two weights.
ffi::Error Project(ffi::ThreadPool pool, Buffer x, Buffer layer, ffi::RemainingArgs weights,
                   ffi::RemainingRets results, bool gated) {
  const int64_t N = x.dimensions()[0], D = x.dimensions()[1];
  Type type = kFloat;
  std::vector<Product> products;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Buffer w = *weights.get<Buffer>(i);
    if (!type_of(w, &type)) return wrong_type("weights");
    const int64_t F = w.dimensions()[2];
    float* y = i < results.size() ? static_cast<float*>((*results.get<Buffer>(i))->untyped_data()) : nullptr;
    products.push_back({at(w.untyped_data(), type, ints(layer)[0] * D * F), F, y});
  }
  project(pool, floats(x), N, D, type, std::move(products), gated);
  return ffi::Error::Success();
}

// x [N, D], table [V, D] -> [N, V]
ffi::Error Match(ffi::ThreadPool pool, Buffer x, Buffer table, Result y) {
  Type type;
  if (!type_of(table, &type)) return wrong_type("a table");
  match(pool, floats(x), x.dimensions()[0], x.dimensions()[1], type, table.untyped_data(), table.dimensions()[0],
        static_cast<float*>(y->untyped_data()));
  return ffi::Error::Success();
}

Mask mask_of(const Buffer& mask) {
  const auto size = mask.dimensions();
  return {bools(mask), size[2], size[3], size[4]};
}

ffi::Error Attend(ffi::ThreadPool pool, Buffer layer, Buffer q, Buffer k, Buffer v, Buffer own_k, Buffer own_v,
                  Buffer keep, Buffer own_keep, Buffer length, Result mixed, int64_t page_size) {
  Attention a;
  const auto q_size = q.dimensions(), k_size = k.dimensions();
  a.B = q_size[0], a.K = q_size[1], a.H = q_size[2], a.G = q_size[3], a.d = q_size[4];
  a.L = k_size[1], a.S = k_size[3], a.T = own_k.dimensions()[3];
  if (!type_of(k, &a.type)) return wrong_type("a cache");
  a.q = floats(q), a.length = ints(length), a.layer = ints(layer)[0], a.page_size = page_size;
  a.k = k.untyped_data(), a.v = v.untyped_data();
  a.own_k = own_k.untyped_data(), a.own_v = own_v.untyped_data();
  a.keep = mask_of(keep), a.own_keep = mask_of(own_keep);
  a.mixed = static_cast<float*>(mixed->untyped_data());
  attend(pool, a);
  return ffi::Error::Success();
}

ffi::Error SelectPages(ffi::ThreadPool pool, Buffer layer, Buffer q, Buffer bounds, Buffer own_bounds,
                       Buffer used, Buffer own_used, Buffer pages, Result keep, Result own_keep, bool of_group) {
  Choice a;
  const auto q_size = q.dimensions();
  a.B = q_size[0], a.K = q_size[1], a.H = q_size[2], a.G = q_size[3], a.d = q_size[4];
  a.L = bounds.dimensions()[1], a.P = bounds.dimensions()[3], a.N = own_bounds.dimensions()[3];
  if (!type_of(bounds, &a.type)) return wrong_type("bounds");
  a.q = floats(q), a.bounds = bounds.untyped_data(), a.own_bounds = own_bounds.untyped_data();
  a.used = bools(used), a.own_used = bools(own_used), a.pages = ints(pages), a.layer = ints(layer)[0];
  a.of_group = of_group;
  a.keep = static_cast<bool*>(keep->untyped_data()), a.own_keep = static_cast<bool*>(own_keep->untyped_data());
  select_pages(pool, a);
  return ffi::Error::Success();
}

// k [..., H, N, d], valid [..., N] -> [..., H, P, 2d]
ffi::Error PageBounds(ffi::ThreadPool pool, Buffer k, Buffer valid, Result bounds, int64_t page_size) {
  Type type;
  if (!type_of(k, &type)) return wrong_type("keys");
  const auto size = k.dimensions();
  const int64_t N = size[size.size() - 2], d = size[size.size() - 1];
  const int64_t lists = static_cast<int64_t>(k.element_count()) / std::max<int64_t>(1, N * d);
  const int64_t masks = static_cast<int64_t>(valid.element_count()) / std::max<int64_t>(1, N);
  page_bounds(pool, k.untyped_data(), bools(valid), lists, masks, N, d, page_size, type, bounds->untyped_data());
  return ffi::Error::Success();
}

ffi::Error KeepChannels(Buffer x, Buffer count, Result y) {
  keep_channels(floats(x), ints(count), x.dimensions()[0], x.dimensions()[1],
                static_cast<float*>(y->untyped_data()), nullptr, nullptr);
  return ffi::Error::Success();
}

// The RMSNorm of rows, then `keep_channels`.
ffi::Error NormPrune(Buffer x, Buffer count, Buffer gain, Result y, Result channels, Result kept, float eps) {
  Type type;
  if (!type_of(gain, &type)) return wrong_type("a gain");
  const int64_t N = x.dimensions()[0], D = x.dimensions()[1];
  std::vector<float> normed(N * D);
  for (int64_t n = 0; n < N; ++n)
    kernels().norm(floats(x) + n * D, gain.untyped_data(), type, static_cast<int>(D), eps, normed.data() + n * D);
  keep_channels(normed.data(), ints(count), N, D, static_cast<float*>(y->untyped_data()),
                static_cast<int*>(channels->untyped_data()), static_cast<int*>(kept->untyped_data()));
  return ffi::Error::Success();
}

ffi::Error Quantize(Buffer y, Buffer top, Result rounded) {
  const int64_t N = y.dimensions()[0], D = y.dimensions()[1];
  for (int64_t n = 0; n < N; ++n)
    kernels().quantize(floats(y) + n * D, static_cast<int>(D), floats(top)[n],
                       static_cast<float*>(rounded->untyped_data()) + n * D);
  return ffi::Error::Success();
}

// `Quantize`, added to the residual, and the RMSNorm of that.
ffi::Error QuantizeResidual(Buffer y, Buffer top, Buffer residual, Buffer gain, Result stream, Result normed,
                            float eps) {
  Type type;
  if (!type_of(gain, &type)) return wrong_type("a gain");
  const int64_t N = y.dimensions()[0], D = y.dimensions()[1];
  std::vector<float> rounded(D);
  for (int64_t n = 0; n < N; ++n) {
    kernels().quantize(floats(y) + n * D, static_cast<int>(D), floats(top)[n], rounded.data());
    float* out = static_cast<float*>(stream->untyped_data()) + n * D;
    for (int64_t c = 0; c < D; ++c) out[c] = floats(residual)[n * D + c] + rounded[c];
    kernels().norm(out, gain.untyped_data(), type, static_cast<int>(D), eps,
                   static_cast<float*>(normed->untyped_data()) + n * D);
  }
  return ffi::Error::Success();
}

// All but the last three dimensions, and what is moved between them.
template <class Whole, class Part>
Move move_of(const Whole& whole, const Part& part, const Buffer& start) {
  const auto from = whole.dimensions(), to = part.dimensions(), starts = start.dimensions();
  const size_t lead = from.size() - 3;
  Move a;
  a.whole.assign(from.begin(), from.begin() + lead);
  a.part.assign(to.begin(), to.begin() + lead);
  a.starts.assign(starts.begin(), starts.end());
  a.H = from[lead], a.N = from[lead + 1], a.M = to[lead + 1];
  a.bytes = from[lead + 2] * static_cast<int64_t>(ffi::ByteWidth(whole.element_type()));
  a.start = ints(start);
  return a;
}

// x [..., H, N, d], start [...] -> [..., H, M, d]; leading dimensions of what is given may be 1 instead.
ffi::Error Cut(Buffer x, Buffer start, Result out) {
  cut(move_of(x, *out, start), static_cast<const char*>(x.untyped_data()), static_cast<char*>(out->untyped_data()));
  return ffi::Error::Success();
}

// x [..., H, N, d], part [..., H, M, d], start [...] -> x, which XLA gives as the result to be changed.
ffi::Error Put(Buffer x, Buffer part, Buffer start, Result out) {
  if (out->untyped_data() != x.untyped_data()) std::memcpy(out->untyped_data(), x.untyped_data(), x.size_bytes());
  put(move_of(x, part, start), static_cast<const char*>(part.untyped_data()), static_cast<char*>(out->untyped_data()));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace sol

using Buffer = ffi::AnyBuffer;

#define SOL_EXPORT __attribute__((visibility("default")))

extern "C" {

#define SOL_TEXT(x) #x
#define SOL_VERSION(major, minor) SOL_TEXT(major) "." SOL_TEXT(minor)
// The interface that the library was compiled for.
SOL_EXPORT const char* sol_interface() { return SOL_VERSION(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); }
SOL_EXPORT const char* sol_kernels() { return sol::kernels().name; }
// Takes those of another instruction set, or the best again (""); says whether the machine has it.
SOL_EXPORT bool sol_use_kernels(const char* name) {
  const sol::Kernels* found = *name ? sol::find_kernels(name) : nullptr;
  if (*name && !found) return false;
  sol::use_kernels(found);
  return true;
}

#define SOL_TARGET(name, function, binding) \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, sol::function, binding)

#pragma GCC visibility push(default)
SOL_TARGET(sol_project, Project,
           ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Buffer>().Arg<Buffer>().RemainingArgs().RemainingRets().Attr<bool>("gated"));
SOL_TARGET(sol_match, Match, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Buffer>().Arg<Buffer>().Ret<Buffer>());
SOL_TARGET(sol_attend, Attend,
           ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
               .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Ret<Buffer>()
               .Attr<int64_t>("page_size"));
SOL_TARGET(sol_select_pages, SelectPages,
           ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
               .Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Ret<Buffer>().Ret<Buffer>().Attr<bool>("of_group"));
SOL_TARGET(sol_page_bounds, PageBounds,
           ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Buffer>().Arg<Buffer>().Ret<Buffer>().Attr<int64_t>("page_size"));
SOL_TARGET(sol_keep_channels, KeepChannels, ffi::Ffi::Bind().Arg<Buffer>().Arg<Buffer>().Ret<Buffer>());
SOL_TARGET(sol_norm_prune, NormPrune,
           ffi::Ffi::Bind().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Ret<Buffer>().Ret<Buffer>().Ret<Buffer>().Attr<float>("eps"));
SOL_TARGET(sol_quantize, Quantize, ffi::Ffi::Bind().Arg<Buffer>().Arg<Buffer>().Ret<Buffer>());
SOL_TARGET(sol_quantize_residual, QuantizeResidual,
           ffi::Ffi::Bind().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Ret<Buffer>().Ret<Buffer>().Attr<float>("eps"));
SOL_TARGET(sol_cut, Cut, ffi::Ffi::Bind().Arg<Buffer>().Arg<Buffer>().Ret<Buffer>());
SOL_TARGET(sol_put, Put, ffi::Ffi::Bind().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Ret<Buffer>());
#pragma GCC visibility pop

}  // extern "C"
