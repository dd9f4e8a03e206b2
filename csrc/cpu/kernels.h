// What each instruction set offers the CPU engine. One table of functions per set; nothing else is
// shared between their translation units, so that no AVX code can end up in the default variant.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../tensor_table.h"

namespace fastclip::cpu {

// Everything about a chunk that isn't a sum of squares.
struct Survey {
  double max_abs;     // NaN left out; 0 for a chunk of zeros
  double min_abs;     // NaN left out; Inf if there is nothing else
  double sum_abs;     // NaN if there is one; may overflow for float64; 0 if it wasn't asked for
  std::int64_t zeros;
  std::int64_t nans;  // a complex number with a NaN part is a NaN
  std::int64_t infs;
};

// What the weights of a chunk add up to, as a plain sum: to be trusted only as far as the engine says.
struct WeightSums {
  double sum_squares;
  double max_abs;
  double sum_abs;
};

struct Kernels {
  const char* name;
  // Sum of (|x| * scale)^2; not finite if an element isn't, or if the sum overflowed.
  double (*sum_squares)(DType, const void* data, std::int64_t size, double scale);
  // Sum of (|x| / unit)^power; power finite, not 0.
  double (*sum_powers)(DType, const void* data, std::int64_t size, double unit, double power);
  bool (*all_zero)(DType, const void* data, std::int64_t size);
  Survey (*survey)(DType, const void* data, std::int64_t size, bool with_sum);
  void (*scale)(DType, void* data, std::int64_t size, double factor);
  // |x| > bound becomes sign(x) * bound, NaN stays. Like the next: returns whether anything was written.
  bool (*clamp)(DType, void* data, std::int64_t size, double bound);
  bool (*zero_nonfinite)(DType, void* data, std::int64_t size);
  // grad += of_sign * sign(weight), then += of_weight * weight; f64, f32, bf16, f16 only. -> sums over the weights.
  WeightSums (*penalise)(DType, void* grads, const void* weights, std::int64_t size, double of_sign, double of_weight);
};

// How far ahead a 16-bit stream, which takes 256 bytes at a time, is fetched; see engine.cpp.
extern const std::int64_t half_prefetch_bytes;

const Kernels& kernels_default();
#if defined(FASTCLIP_X86)
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
#endif

}  // namespace fastclip::cpu
