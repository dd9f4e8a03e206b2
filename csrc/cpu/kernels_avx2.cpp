// The CPU kernels for AVX2 with FMA and F16C. Compiled with -mavx2 -mfma -mf16c.
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
static inline void store_bf16(std::uint16_t* p, vf values) {
  const __m256i bits = _mm256_castps_si256(values);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
  const __m256i stored = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(stored), _mm256_extracti128_si256(stored, 1)));
}
static inline vd add_square(vd sum, vd x) { return _mm256_fmadd_pd(x, x, sum); }
static inline vf add_square(vf sum, vf x) { return _mm256_fmadd_ps(x, x, sum); }
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
