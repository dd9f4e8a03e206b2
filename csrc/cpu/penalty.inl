// Adds a weight penalty to gradients, and sums up the weights on the way. A part of kernels.inl.

namespace fastclip::cpu {
namespace FASTCLIP_ISA {

static inline vd load_as(F64, const double* x) {
  vd values;
  __builtin_memcpy(&values, x, sizeof values);
  return values;
}
static inline vf load_as(F32, const float* x) {
  vf values;
  __builtin_memcpy(&values, x, sizeof values);
  return values;
}
static inline vf load_as(Bf16, const std::uint16_t* x) { return load_bf16(x); }
static inline vf load_as(F16, const std::uint16_t* x) { return load_f16(x); }
static inline void store_as(F64, double* x, vd values) { __builtin_memcpy(x, &values, sizeof values); }
static inline void store_as(F32, float* x, vf values) { __builtin_memcpy(x, &values, sizeof values); }
static inline void store_as(Bf16, std::uint16_t* x, vf values) { store_bf16(x, values); }
static inline void store_as(F16, std::uint16_t* x, vf values) { store_f16(x, values); }

// One row of 8 double lanes for each sum: memory is slower than the chain of additions. At most 2^13 of them
// on one lane. `largest`: bits of |w|, whose order as integers is that of the magnitudes.
template <class Real>
struct WeightLanes {
  typedef typename BitsOf<Real>::type Bits __attribute__((vector_size(8 * kWide)));
  vd abs[kVectors], squares[kVectors];
  Bits largest;
};

// kAt: place of the vector in its row of kHalfLanes floats or kLanes doubles.
template <int kAt>
FASTCLIP_INLINE static inline void add_magnitudes(vf magnitudes, Index<kAt>, WeightLanes<float>& lanes) {
  const vd low = widen_low(magnitudes), high = widen_high(magnitudes);
  lanes.abs[(2 * kAt) % kVectors] += low;
  lanes.squares[(2 * kAt) % kVectors] += low * low;
  lanes.abs[(2 * kAt + 1) % kVectors] += high;
  lanes.squares[(2 * kAt + 1) % kVectors] += high * high;
}
template <int kAt>
FASTCLIP_INLINE static inline void add_magnitudes(vd magnitudes, Index<kAt>, WeightLanes<double>& lanes) {
  lanes.abs[kAt] += magnitudes;
  lanes.squares[kAt] += magnitudes * magnitudes;
}
template <int kAt>
FASTCLIP_INLINE static inline void add_widened(vf sums, Index<kAt>, vd (&lanes)[kVectors]) {
  lanes[(2 * kAt) % kVectors] += widen_low(sums);
  lanes[(2 * kAt + 1) % kVectors] += widen_high(sums);
}
static_assert(kWriteStreams <= kMaxFloatAdditions);

// Gradients and weights are read as a few streams each, and all load before any stores, as in map_vectors.
template <class Format, class Real>
static WeightSums penalise_vectors(Format format, typename Format::Storage* grads, const typename Format::Storage* weights,
                                   std::int64_t size, Real of_sign, Real of_weight) {
  using Storage = typename Format::Storage;
  using Vector = decltype(load_as(format, grads));
  using Layout = BitsOf<Real>;
  using Bits = typename Layout::type;
  typedef Bits Lanes __attribute__((vector_size(8 * kWide)));
  constexpr int kCount = sizeof(Vector) / sizeof(Real);
  constexpr int kRow = sizeof(Real) == 8 ? kLanes : kHalfLanes;
  constexpr bool kHalf = sizeof(Storage) == 2;  // summed over the streams in float32, and widened then

  const Lanes strength = Lanes{} + bit_cast<Bits>(of_sign);
  WeightLanes<Real> lanes = {};
  // One row of each stream, which lie `apart` elements apart.
  const auto add_rows = [&](Storage* g, const Storage* w, std::int64_t apart) FASTCLIP_INLINE {
    Vector sums[kWriteStreams][kRow / kCount], abs[kRow / kCount] = {}, squares[kRow / kCount] = {};
    unrolled<kWriteStreams>([&](auto s) FASTCLIP_INLINE {
      unrolled<kRow / kCount>([&](auto v) FASTCLIP_INLINE {
        const std::int64_t at = s * apart + v * kCount;
        const Vector weight = load_as(format, w + at), grad = load_as(format, g + at);
        const Lanes bits = reinterpret_cast<Lanes>(weight), magnitudes = bits & Layout::kAbs;
        // masks, not ?: on vectors: see count_bits
        const Lanes sign_term = (strength ^ (bits & ~Layout::kAbs)) & reinterpret_cast<Lanes>(weight != Vector{});
        sums[s][v] = (grad + reinterpret_cast<Vector>(sign_term)) + weight * of_weight;
        const Lanes higher = magnitudes > lanes.largest;
        lanes.largest = (magnitudes & higher) | (lanes.largest & ~higher);
        const Vector sizes = reinterpret_cast<Vector>(magnitudes);
        if constexpr (kHalf) {
          abs[v] += sizes;
          squares[v] += sizes * sizes;
        } else {
          add_magnitudes(sizes, v, lanes);
        }
      });
    });
    if constexpr (kHalf)
      unrolled<kRow / kCount>([&](auto v) FASTCLIP_INLINE {
        add_widened(abs[v], v, lanes.abs);
        add_widened(squares[v], v, lanes.squares);
      });
    unrolled<kWriteStreams>([&](auto s) FASTCLIP_INLINE {
      unrolled<kRow / kCount>([&](auto v) FASTCLIP_INLINE { store_as(format, g + s * apart + v * kCount, sums[s][v]); });
    });
  };

  const Streams<kWriteStreams, kRow> streams(size, sizeof *grads);
  for (std::int64_t row = 0; row < streams.rows; ++row)
    add_rows(grads + row * streams.step, weights + row * streams.step, streams.apart);
  if (const std::int64_t done = streams.size(); done < size) {
    const std::size_t bytes = (size - done) * sizeof(Storage);
    Storage tail[kWriteStreams * kRow] = {}, tail_weights[kWriteStreams * kRow] = {};
    __builtin_memcpy(tail, grads + done, bytes);
    __builtin_memcpy(tail_weights, weights + done, bytes);
    add_rows(tail, tail_weights, kRow);
    __builtin_memcpy(grads + done, tail, bytes);
  }
  Bits largest = 0;
  for (int k = 0; k < kCount; ++k) largest = lanes.largest[k] > largest ? lanes.largest[k] : largest;
  return {sum_of_lanes(lanes.squares), static_cast<double>(bit_cast<Real>(largest)), sum_of_lanes(lanes.abs)};
}

static WeightSums penalise(DType dtype, void* grads, const void* weights, std::int64_t size, double of_sign, double of_weight) {
  return visit(dtype, [&](auto format) -> WeightSums {
    using Format = decltype(format);
    using Storage = typename Format::Storage;
    using Real = typename Format::Real;
    if constexpr (kParts<Format> == 2 || sizeof(Storage) == 1) {
      return {};  // refused at the border
    } else {
      return penalise_vectors(format, static_cast<Storage*>(grads), static_cast<const Storage*>(weights), size,
                              static_cast<Real>(of_sign), static_cast<Real>(of_weight));
    }
  });
}

}  // namespace FASTCLIP_ISA
}  // namespace fastclip::cpu
