// The CPU kernels, written once and compiled once per instruction set.
//
// The including file defines FASTCLIP_ISA and, in that namespace, its vectors:
//   vd, kWide           double lanes and their number (2, 4 or 8)
//   vf                  2 * kWide float lanes
//   load_wide(p)        kWide floats or doubles -> vd
//   load_bf16(p), load_f16(p)   2 * kWide 16-bit numbers -> vf
//   widen_low(f), widen_high(f) the halves of vf -> vd
//   add_square(sum, x)  sum + x * x, for an x whose square is exact: fused where the set can
//   store_bf16(p, f), store_f16(p, f) vf -> 2 * kWide 16-bit numbers, rounded to nearest even; a NaN
//                       stays one (in bfloat16 it becomes 0x7fc0, as in torch: rounding could carry it to 0)
//
// What all kernels share stands here, the kernels in decode.inl, sums.inl, survey.inl, writes.inl
// and penalty.inl.
//
// Every sum runs over the same double lanes (64; 8 in penalty.inl) whatever the width of a vector, products of narrow
// types are exact in the wider one, and nothing else is fused: all instruction sets give the
// same bits. Nothing here calls an inline function of a header: see kernels.h.

#define FASTCLIP_INLINE __attribute__((always_inline))

namespace fastclip::cpu {
namespace FASTCLIP_ISA {

constexpr int kStreams = 8;
constexpr int kLanes = 8;                          // doubles per stream
constexpr int kVectors = kLanes / kWide;           // vectors per stream
constexpr int kPrefetchBytes = 512;
constexpr int kHalfLanes = 2 * kLanes;             // floats per stream, for 16-bit numbers
constexpr int kHalfVectors = kHalfLanes / (2 * kWide);
constexpr int kMaxFloatAdditions = 8;              // then float32 lanes are widened to float64
constexpr int kStep = 2 * kWide;                   // floats per vector
constexpr std::int64_t kBlock = 1024;              // elements decoded or looked at at a time, in registers and L1
static_assert(kLanes % kWide == 0 && kBlock % kLanes == 0);

// A chunk is read as kCount streams side by side, kPiece elements of each at a time: piece r of stream s begins at
// element r * step + s * apart. One stream alone stalls wherever the prefetcher has to start anew, at each 4 KiB page.
// Streams of less than a page are worse than none, as the prefetcher can follow none of them: a chunk that short is read
// in order, and so is what lies behind it, as units and often small tensors do. The gains are in bench/NOTES.md.
template <int kCount, int kPiece>
struct Streams {
  static constexpr std::int64_t kPage = 4096;
  std::int64_t rows, step, apart;

  Streams(std::int64_t size, std::size_t element_bytes) : rows(size / (kCount * kPiece)) {
    const bool in_order = size * static_cast<std::int64_t>(element_bytes) <= kStreams * kPage;
    step = in_order ? kCount * kPiece : kPiece;
    apart = in_order ? kPiece : rows * kPiece;
  }
  std::int64_t size() const { return rows * kCount * kPiece; }  // of all streams; fewer than kCount * kPiece are left over
};

struct F64 { using Storage = double; using Real = double; };
struct F32 { using Storage = float; using Real = float; };
struct Bf16 { using Storage = std::uint16_t; using Real = float; };
struct F16 { using Storage = std::uint16_t; using Real = float; };
struct C128 { using Storage = double; using Real = double; };
struct C64 { using Storage = float; using Real = double; };
template <int kExponentBits, bool kFnuz> struct F8 { using Storage = std::uint8_t; using Real = float; };

// As signed integers the bits of magnitudes are in order, with NaN above Inf.
template <class Value> struct BitsOf;
template <> struct BitsOf<std::uint16_t> {
  using type = std::int16_t;
  using Unsigned = std::uint16_t;
  static constexpr type kAbs = 0x7fff;
};
template <> struct BitsOf<float> {
  using type = std::int32_t;
  using Unsigned = std::uint32_t;
  static constexpr type kAbs = 0x7fffffff, kInf = 0x7f800000;
};
template <> struct BitsOf<double> {
  using type = std::int64_t;
  using Unsigned = std::uint64_t;
  static constexpr type kAbs = 0x7fffffffffffffff, kInf = 0x7ff0000000000000;
};

template <class Format> constexpr auto kInfBits = BitsOf<typename Format::Storage>::kInf;
template <> constexpr std::int16_t kInfBits<Bf16> = 0x7f80;
template <> constexpr std::int16_t kInfBits<F16> = 0x7c00;

template <int kValue>
struct Index {
  constexpr operator int() const { return kValue; }
};
template <int... kIndex> struct Indices {};
template <int kCount, int... kIndex> struct IndicesBelow : IndicesBelow<kCount - 1, kCount - 1, kIndex...> {};
template <int... kIndex> struct IndicesBelow<0, kIndex...> { using type = Indices<kIndex...>; };

template <class To, class From>
static inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <class Fn>
static auto visit(DType dtype, Fn fn) {
  switch (dtype) {
    case DType::f64: return fn(F64{});
    case DType::f32: return fn(F32{});
    case DType::bf16: return fn(Bf16{});
    case DType::f16: return fn(F16{});
    case DType::c128: return fn(C128{});
    case DType::c64: return fn(C64{});
    case DType::f8_e4m3fn: return fn(F8<4, false>{});
    case DType::f8_e4m3fnuz: return fn(F8<4, true>{});
    case DType::f8_e5m2: return fn(F8<5, false>{});
    default: return fn(F8<5, true>{});
  }
}

}  // namespace FASTCLIP_ISA
}  // namespace fastclip::cpu

#include "decode.inl"
#include "sums.inl"
#include "survey.inl"
#include "writes.inl"
#include "penalty.inl"

namespace fastclip::cpu::FASTCLIP_ISA {

static constexpr Kernels table(const char* name) {
  return {name, sum_squares, sum_powers, all_zero, survey, scale, clamp, zero_nonfinite, penalise};
}

}  // namespace fastclip::cpu::FASTCLIP_ISA

#undef FASTCLIP_INLINE
