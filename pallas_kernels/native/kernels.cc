// The kernels for each instruction set, and the choice among them when the library is first used.
#include "kernels.h"

#include <cstring>
#include <type_traits>

namespace sol {

namespace baseline {
constexpr const char* kName = "baseline";
#include "kernels.inc"
}  // namespace baseline

// One file for all: flags such as -march=native would bind the library to the machine that built it.
#if defined(__x86_64__) && defined(__clang__)
#define SOL_X86 1
#elif defined(__x86_64__) && defined(__GNUC__)
#define SOL_X86 1
#endif

#ifdef SOL_X86

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
constexpr const char* kName = "avx2";
#include "kernels.inc"
}  // namespace avx2
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#endif
namespace avx512 {
constexpr const char* kName = "avx512";
#include "kernels.inc"
}  // namespace avx512
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // SOL_X86

namespace {

const Kernels* best() {
#ifdef SOL_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return &avx512::table;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2::table;
#endif
  return &baseline::table;
}

const Kernels*& chosen() {
  static const Kernels* found = best();
  return found;
}

}  // namespace

const Kernels& kernels() { return *chosen(); }

const Kernels* find_kernels(const char* name) {
  const Kernels* most = best();
  if (std::strcmp(name, "baseline") == 0) return &baseline::table;
#ifdef SOL_X86
  if (std::strcmp(name, "avx2") == 0 && most != &baseline::table) return &avx2::table;
  if (std::strcmp(name, "avx512") == 0 && most == &avx512::table) return &avx512::table;
#endif
  return std::strcmp(name, most->name) == 0 ? most : nullptr;
}

void use_kernels(const Kernels* found) { chosen() = found ? found : best(); }

}  // namespace sol
