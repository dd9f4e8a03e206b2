// The CPU kernels for AVX-512 (F, BW, DQ, VL), with AVX2, FMA and F16C. Compiled with -mavx512*.
#include <immintrin.h>

#include "kernels.h"

namespace fastclip::cpu::avx512 {

constexpr int kWide = 8;
using vd = __m512d;
using vf = __m512;

static inline vd load_wide(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
static inline vd load_wide(const double* p) { return _mm512_loadu_pd(p); }
static inline vf load_bf16(const std::uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
static inline vf load_f16(const std::uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline void store_f16(std::uint16_t* p, vf values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
}
static inline void store_bf16(std::uint16_t* p, vf values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  const __m512i stored = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(stored));
}
static inline vd add_square(vd sum, vd x) { return _mm512_fmadd_pd(x, x, sum); }
static inline vf add_square(vf sum, vf x) { return _mm512_fmadd_ps(x, x, sum); }
static inline vd widen_low(vf values) { return _mm512_cvtps_pd(_mm512_castps512_ps256(values)); }
static inline vd widen_high(vf values) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(values, 1)); }

}  // namespace fastclip::cpu::avx512

#define FASTCLIP_ISA avx512
#include "kernels.inl"

namespace fastclip::cpu {
const Kernels& kernels_avx512() {
  static constexpr Kernels kKernels = avx512::table("avx512");
  return kKernels;
}
}  // namespace fastclip::cpu
