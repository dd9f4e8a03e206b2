// The CPU kernels in plain C++ with the compiler's 16-byte vectors: SSE2 on x86-64, NEON on aarch64.
// float16 is bit arithmetic here; it stays right where subnormal floats are flushed to zero.
#include "kernels.h"

namespace fastclip::cpu::baseline {

constexpr int kWide = 2;
typedef double vd __attribute__((vector_size(16)));
typedef float vf __attribute__((vector_size(16)));
typedef std::uint32_t vu __attribute__((vector_size(16)));
typedef std::uint16_t vh __attribute__((vector_size(8)));

static inline vd load_wide(const float* p) { return vd{p[0], p[1]}; }
static inline vd load_wide(const double* p) { return vd{p[0], p[1]}; }
static inline vu load_bits(const std::uint16_t* p) {
  vh bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return __builtin_convertvector(bits, vu);
}
static inline vf as_floats(vu bits) { return reinterpret_cast<vf>(bits); }
static inline vf load_bf16(const std::uint16_t* p) { return as_floats(load_bits(p) << 16); }

static inline vf load_f16(const std::uint16_t* p) {
  const vu half = load_bits(p);
  const vu magnitude = half & 0x7fff;
  const vu normal = (magnitude << 13) + (112u << 23);  // exponent bias 15 -> 127
  const vu special = normal + (112u << 23);            // Inf and NaN: exponent 143 -> 255
  // Subnormal: the mantissa as an integer below 2^10, times 2^-24; 0.5 + m * 2^-24 - 0.5 is exact.
  const vf subnormal = as_floats(magnitude | 0x3f000000u) - 0.5f;
  const vu is_special = reinterpret_cast<vu>(magnitude >= 0x7c00u);
  const vu is_subnormal = reinterpret_cast<vu>(magnitude < 0x0400u);
  const vu bits = (is_special & special) | (is_subnormal & reinterpret_cast<vu>(subnormal)) |
                  (~(is_special | is_subnormal) & normal);
  return as_floats(bits | (half & 0x8000) << 16);
}

static inline void store_f16(std::uint16_t* p, vf values) {
  for (int k = 0; k < 2 * kWide; ++k) {
    const float value = values[k];
    std::uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    const std::uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    std::uint32_t half;
    if (magnitude > 0x7f800000) {
      half = 0x7e00 | ((magnitude >> 13) & 0x3ff);  // NaN, made quiet, payload kept as F16C does
    } else if (magnitude >= 0x47800000) {
      half = 0x7c00;  // 65536 and above
    } else if (magnitude >= 0x38800000) {
      // Normal, rounded to nearest even; a carry out of 65504 rightly gives Inf.
      half = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    } else if (magnitude >= 0x33000000) {
      // Subnormal: the significand shifted to units of 2^-24, rounded to nearest even.
      const std::uint32_t shift = 126 - (magnitude >> 23);
      const std::uint32_t significand = (magnitude & 0x7fffff) | 0x800000;
      const std::uint32_t kept = significand >> shift, lost = significand & ((1u << shift) - 1), tie = 1u << (shift - 1);
      half = kept + (lost > tie || (lost == tie && (kept & 1)));
    } else {
      half = 0;
    }
    p[k] = static_cast<std::uint16_t>(sign | half);
  }
}

static inline void store_bf16(std::uint16_t* p, vf values) {
  const vu bits = reinterpret_cast<vu>(values);
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vu nan = reinterpret_cast<vu>(values != values);
  const vh stored = __builtin_convertvector((nan & 0x7fc0u) | (rounded & ~nan), vh);
  __builtin_memcpy(p, &stored, sizeof stored);
}

static inline vd add_square(vd sum, vd x) { return sum + x * x; }
static inline vf add_square(vf sum, vf x) { return sum + x * x; }
static inline vd widen_low(vf values) { return vd{values[0], values[1]}; }
static inline vd widen_high(vf values) { return vd{values[2], values[3]}; }

}  // namespace fastclip::cpu::baseline

#define FASTCLIP_ISA baseline
#include "kernels.inl"

namespace fastclip::cpu {
const Kernels& kernels_default() {
  static constexpr Kernels kKernels = baseline::table("default");
  return kKernels;
}
}  // namespace fastclip::cpu
