// The CPU kernels for AVX2 with F16C. Compiled with -mavx2 -mf16c.
#include <immintrin.h>

#include "kernels.h"

namespace fastclip::cpu::avx2 {

constexpr int kWide = 4;
using vd = __m256d;
using vf = __m256;

static inline vd load_wide(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
static inline vd load_wide(const double* p) { return _mm256_loadu_pd(p); }
static inline vf load_bf16(const std::uint16_t* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
static inline vf load_f16(const std::uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline void store_f16(std::uint16_t* p, vf values) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
}
static inline vd widen_low(vf values) { return _mm256_cvtps_pd(_mm256_castps256_ps128(values)); }
static inline vd widen_high(vf values) { return _mm256_cvtps_pd(_mm256_extractf128_ps(values, 1)); }

}  // namespace fastclip::cpu::avx2

#define FASTCLIP_ISA avx2
#include "kernels.inl"

namespace fastclip::cpu {
const Kernels& kernels_avx2() {
  static constexpr Kernels kKernels = avx2::table("avx2");
  return kKernels;
}
}  // namespace fastclip::cpu
