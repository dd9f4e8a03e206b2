#include "engine.h"

#include <pthread.h>
#if defined(FASTCLIP_X86)
#include <cpuid.h>
#include <xmmintrin.h>
#endif

#include <atomic>
#include <cfenv>
#include <cmath>
#include <cstdint>

#include "../norms.h"

namespace fastclip::cpu {
namespace {

// ---- which instruction set ------------------------------------------------------------------------

std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> found;
#if defined(FASTCLIP_X86)
  __builtin_cpu_init();
  unsigned eax, ebx, ecx, edx;  // f16c has a name in newer compilers only; that the system saves AVX's registers avx2 says
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) found.push_back(&kernels_avx512());
  if (avx2) found.push_back(&kernels_avx2());
#endif
  found.push_back(&kernels_default());
  return found;
}

// AMD's cores fetch the eight streams by themselves: asked to, a measured EPYC read 16-bit numbers a quarter to a half
// slower. Intel's gain (bench/NOTES.md). No bit depends on it.
std::int64_t distance_to_fetch() {
#if defined(FASTCLIP_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_is("amd")) return 0;
#endif
  return 1024;
}

std::atomic<const Kernels*> chosen{nullptr};

const Kernels& kernels() {
  const Kernels* current = chosen.load(std::memory_order_acquire);
  if (current == nullptr) {
    current = runnable().front();
    chosen.store(current, std::memory_order_release);
  }
  return *current;
}

// ---- arithmetic -----------------------------------------------------------------------------------

// Subnormal numbers count and numbers are rounded to nearest for as long as it lives, in its thread. torch.set_flush_denormal
// speaks to one thread only: what came out would depend on which of them took a chunk.
class DefaultArithmetic {
 public:
#if defined(FASTCLIP_X86)  // one register, in 10 ns; the whole environment takes 500
  DefaultArithmetic() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultArithmetic() { _mm_setcsr(before_); }
#else
  DefaultArithmetic() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultArithmetic() { std::fesetenv(&before_); }
#endif
  DefaultArithmetic(const DefaultArithmetic&) = delete;

 private:
#if defined(FASTCLIP_X86)
  unsigned before_;
#else
  std::fenv_t before_;
#endif
};

// ---- threads --------------------------------------------------------------------------------------

// A forked child works on one thread: OpenMP would wait for threads that did not survive the fork.
std::atomic<bool> forked{false};
const int watch_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Up to this many elements in all one thread works alone: reading them takes about 50 us, and where
// another program holds a core, waiting for a second thread has taken milliseconds.
constexpr std::int64_t kSerialElements = 1 << 17;
// Short chunks are handed out in groups of at least so many elements, about one full chunk.
constexpr std::int64_t kGroupElements = 1 << 16;

// Calls work(index, chunk) for every chunk. Which thread takes which group is left to chance; no result
// depends on it.
template <class Work>
void for_chunks(const std::vector<Chunk>& chunks, int threads, const Work& work) {
  std::vector<std::int64_t> groups{0};
  std::int64_t total = 0, in_group = 0;
  for (std::size_t i = 0; i < chunks.size(); ++i) {
    total += chunks[i].size;
    in_group += chunks[i].size;
    if (in_group >= kGroupElements || i + 1 == chunks.size()) {
      groups.push_back(static_cast<std::int64_t>(i) + 1);
      in_group = 0;
    }
  }
  const std::int64_t count = static_cast<std::int64_t>(groups.size()) - 1;
  [[maybe_unused]] const int workers = total <= kSerialElements || forked || threads < 1 ? 1 : threads;
#pragma omp parallel num_threads(workers) if (workers > 1)
  {
    const DefaultArithmetic own;
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t g = 0; g < count; ++g)
      for (std::int64_t i = groups[g]; i < groups[g + 1]; ++i) work(i, chunks[i]);
  }
}

void* address(const TensorRef& tensor, const Chunk& chunk) {
  return static_cast<char*>(tensor.data) + chunk.begin * element_bytes(tensor.dtype);
}

// Calls write(dtype, data, size) for every chunk; which tensors did it write to?
template <class Write>
std::vector<bool> write_chunks(const Tensors& tensors, int threads, const Write& write) {
  const std::vector<Chunk> chunks = chunks_of(tensors);
  std::vector<char> chunk_written(chunks.size());
  for_chunks(chunks, threads, [&](std::int64_t i, const Chunk& chunk) {
    const TensorRef& tensor = tensors[chunk.tensor];
    chunk_written[i] = write(tensor.dtype, address(tensor, chunk), chunk.size);
  });
  std::vector<bool> written(tensors.size());
  for (std::size_t i = 0; i < chunks.size(); ++i)
    if (chunk_written[i]) written[chunks[i].tensor] = true;
  return written;
}

// ---- one chunk ------------------------------------------------------------------------------------

struct ChunkStats {
  double norm, max_abs, sum_abs;
  std::int64_t zeros, nans, infs;
};

// At or above this a plain sum of squares can be trusted: what the squares that underflowed, or were
// flushed to zero, could have added is below its own rounding. Squares of the other formats fit the
// type they are summed in, and can't underflow.
double least_trusted_sum(DType dtype) {
  switch (dtype) {
    // float64 in float64: at most 2^15 parts lose 2^-1022 each, 2^-1007 in all; 2^-57 of the sum.
    case DType::f64: case DType::c128: return 0x1p-950;
    // bfloat16 in float32: at most 2^17 elements lose 2^-126 each, 2^-109 in all; 2^-29 of the sum.
    case DType::bf16: return 0x1p-80;
    default: return 0.0;
  }
}
static_assert(kChunkBytes <= 1 << 18, "least_trusted_sum counts on it");

double norm_2(const Kernels& k, DType dtype, const void* data, std::int64_t size, double max_abs) {
  const double scale = unit_scale(max_abs, dtype == DType::bf16 ? kFloatExponents : kDoubleExponents);
  return saturate(std::sqrt(k.sum_squares(dtype, data, size, scale)) / scale);
}

double norm_p(const Kernels& k, DType dtype, const void* data, std::int64_t size, double p, const Survey& seen) {
  const double dominant = p > 0 ? seen.max_abs : seen.min_abs;
  if (dominant == 0.0 || dominant == kInf) return dominant;
  return saturate(dominant * std::pow(k.sum_powers(dtype, data, size, dominant, p), 1.0 / p));
}

double norm_of_survey(const Kernels& k, DType dtype, const void* data, std::int64_t size, double p, const Survey& seen) {
  if (p == 0.0) return static_cast<double>(size - seen.zeros);
  if (seen.nans > 0) return kNaN;
  if (p == kInf) return seen.max_abs;
  if (p == -kInf) return seen.min_abs;
  if (p > 0 && seen.infs > 0) return kInf;
  if (p == 1.0 && std::isfinite(seen.sum_abs)) return seen.sum_abs;
  if (p == 2.0) return seen.max_abs == 0.0 ? 0.0 : norm_2(k, dtype, data, size, seen.max_abs);
  return norm_p(k, dtype, data, size, p, seen);
}

ChunkStats stats_of(const Kernels& k, DType dtype, const void* data, std::int64_t size, double p, bool extras) {
  const double sum = p == 2.0 ? k.sum_squares(dtype, data, size, 1.0) : kNaN;
  const bool trusted = sum >= least_trusted_sum(dtype) && sum <= DBL_MAX;
  if (trusted && !extras) return {std::sqrt(sum), 0.0, 0.0, 0, 0, 0};
  // Most chunks of an embedding's gradient are zeros: they must not cost more than the others. A sum that is finite has
  // no NaN in it, one of whose codes is the negative zero of the other 8-bit formats.
  if (sum <= DBL_MAX && !extras && k.all_zero(dtype, data, size)) return {0.0, 0.0, 0.0, size, 0, 0};
  // The second look, while the chunk is in cache: tells NaN, Inf, overflow and underflow apart.
  const Survey seen = k.survey(dtype, data, size, extras || p == 1.0);
  const double norm = trusted ? std::sqrt(sum) : norm_of_survey(k, dtype, data, size, p, seen);
  return {norm, seen.max_abs, seen.sum_abs, seen.zeros, seen.nans, seen.infs};
}

// 2-norm, largest and sum of the magnitudes of the weights of a chunk, `sums` being what their plain sums came to.
ChunkStats weight_stats(const Kernels& k, DType dtype, const void* weights, std::int64_t size, const WeightSums& sums) {
  if (sums.sum_squares >= least_trusted_sum(dtype) && sums.sum_squares <= DBL_MAX)
    return {std::sqrt(sums.sum_squares), sums.max_abs, sums.sum_abs, 0, 0, 0};
  return stats_of(k, dtype, weights, size, 2.0, true);
}

// The chunks of tensor `t`, from chunks[next] on, as one.
ChunkStats joined(const std::vector<Chunk>& chunks, const std::vector<ChunkStats>& partials, std::int64_t t, double p,
                  std::size_t& next, std::vector<double>& norms) {
  norms.clear();
  ChunkStats sum{empty_norm(p), 0.0, 0.0, 0, 0, 0};
  for (; next < chunks.size() && chunks[next].tensor == t; ++next) {
    const ChunkStats& part = partials[next];
    norms.push_back(part.norm);
    sum.sum_abs += part.sum_abs;
    sum.zeros += part.zeros;
    sum.nans += part.nans;
    sum.infs += part.infs;
    if (part.max_abs > sum.max_abs) sum.max_abs = part.max_abs;
  }
  if (norms.size() == 1) sum.norm = norms[0];
  if (norms.size() > 1) sum.norm = norm_of_norms(norms.data(), static_cast<std::int64_t>(norms.size()), p);
  if (sum.nans) sum.max_abs = sum.sum_abs = kNaN;
  return sum;
}

void fill_rows(const std::vector<Chunk>& chunks, const std::vector<ChunkStats>& partials, std::int64_t count, double p,
               bool extras, double* rows) {
  std::vector<double> norms;
  std::size_t next = 0;
  for (std::int64_t t = 0; t < count; ++t) {
    const ChunkStats sum = joined(chunks, partials, t, p, next, norms);
    rows[kNorm * count + t] = sum.norm;
    rows[kNans * count + t] = static_cast<double>(sum.nans);
    rows[kInfs * count + t] = static_cast<double>(sum.infs);
    if (!extras) continue;
    rows[kMaxAbs * count + t] = sum.max_abs;
    rows[kSumAbs * count + t] = sum.sum_abs;
    rows[kZeros * count + t] = static_cast<double>(sum.zeros);
  }
}

void fill_weight_rows(const std::vector<Chunk>& chunks, const std::vector<ChunkStats>& partials, std::int64_t count,
                      double* rows) {
  std::vector<double> norms;
  std::size_t next = 0;
  for (std::int64_t t = 0; t < count; ++t) {
    const ChunkStats sum = joined(chunks, partials, t, 2.0, next, norms);
    rows[kWeightNorm * count + t] = sum.norm;
    rows[kWeightMaxAbs * count + t] = sum.max_abs;
    rows[kWeightSumAbs * count + t] = sum.sum_abs;
  }
}

}  // namespace

const std::int64_t half_prefetch_bytes = distance_to_fetch();

std::vector<std::string> capabilities() {
  std::vector<std::string> names;
  for (const Kernels* k : runnable()) names.emplace_back(k->name);
  return names;
}

bool use_capability(const std::string& name) {
  for (const Kernels* k : runnable())
    if (name == k->name) {
      chosen.store(k, std::memory_order_release);
      return true;
    }
  return false;
}

std::string capability() { return kernels().name; }

void read(const Tensors& tensors, double norm_type, bool extras, double divisor, double* rows, int threads) {
  const DefaultArithmetic own;
  const std::vector<Chunk> chunks = chunks_of(tensors);
  std::vector<ChunkStats> partials(chunks.size());
  const Kernels& k = kernels();
  for_chunks(chunks, threads, [&](std::int64_t i, const Chunk& chunk) {
    const TensorRef& tensor = tensors[chunk.tensor];
    // one slot per chunk, joined below in index order: the same gradients give the same bits
    partials[i] = stats_of(k, tensor.dtype, address(tensor, chunk), chunk.size, norm_type, extras);
  });

  const auto count = static_cast<std::int64_t>(tensors.size());
  fill_rows(chunks, partials, count, norm_type, extras, rows);
  if (divisor == 1.0) return;
  for (const Field field : {kNorm, kMaxAbs, kSumAbs}) {
    if ((field == kNorm && norm_type == 0.0) || (field != kNorm && !extras)) continue;  // a count has no scale
    for (std::int64_t t = 0; t < count; ++t) rows[field * count + t] /= divisor;
  }
}

void read_penalised(const Tensors& grads, const Tensors& weights, const double* strengths, double norm_type, bool extras,
                    double* rows, double* weight_rows, int threads) {
  const DefaultArithmetic own;
  const auto count = static_cast<std::int64_t>(grads.size());
  const std::vector<Chunk> chunks = chunks_of(grads);
  std::vector<ChunkStats> partials(chunks.size()), weight_partials(chunks.size());
  const Kernels& k = kernels();
  for_chunks(chunks, threads, [&](std::int64_t i, const Chunk& chunk) {
    const TensorRef &grad = grads[chunk.tensor], &weight = weights[chunk.tensor];
    void* const data = address(grad, chunk);
    if (weight.size > 0) {
      const void* const of = address(weight, chunk);
      const double of_sign = strengths[chunk.tensor], of_weight = strengths[count + chunk.tensor];
      if (of_sign != 0.0 || of_weight != 0.0) {
        const WeightSums sums = k.penalise(grad.dtype, data, of, chunk.size, of_sign, of_weight);
        weight_partials[i] = weight_stats(k, grad.dtype, of, chunk.size, sums);
      } else {
        weight_partials[i] = stats_of(k, grad.dtype, of, chunk.size, 2.0, true);
      }
    }
    // what was just written is still in cache
    partials[i] = stats_of(k, grad.dtype, data, chunk.size, norm_type, extras);
  });
  fill_rows(chunks, partials, count, norm_type, extras, rows);
  fill_weight_rows(chunks, weight_partials, count, weight_rows);
}

void finish(const double* rows, std::int64_t count, double norm_type, double max_norm, double eps, double* totals) {
  const DefaultArithmetic own;
  double nans = 0.0, infs = 0.0;
  for (std::int64_t t = 0; t < count; ++t) {
    nans += rows[kNans * count + t];
    infs += rows[kInfs * count + t];
  }
  const double total_norm = count ? norm_of_norms(rows + kNorm * count, count, norm_type) : 0.0;
  totals[kTotalNorm] = total_norm;
  totals[kClipCoef] = clip_coef(total_norm, max_norm, eps);
  totals[kTotalNans] = nans;
  totals[kTotalInfs] = infs;
}

void join(const double* unit_rows, const std::vector<std::int64_t>& counts, double norm_type, double* rows) {
  const DefaultArithmetic own;
  const auto tensors = static_cast<std::int64_t>(counts.size());
  std::int64_t units = 0;
  for (const std::int64_t count : counts) units += count;
  const double* at = unit_rows;
  for (std::int64_t t = 0; t < tensors; at += counts[t], ++t) {
    rows[kNorm * tensors + t] = counts[t] ? norm_of_norms(at, counts[t], norm_type) : empty_norm(norm_type);
    for (const Field field : {kNans, kInfs}) {
      double sum = 0.0;
      for (std::int64_t i = 0; i < counts[t]; ++i) sum += at[field * units + i];
      rows[field * tensors + t] = sum;
    }
  }
}

void scale(const Tensors& tensors, const double* factors, int threads) {
  const Kernels& k = kernels();
  for_chunks(chunks_of(tensors), threads, [&](std::int64_t, const Chunk& chunk) {
    const TensorRef& tensor = tensors[chunk.tensor];
    if (factors[chunk.tensor] != 1.0) k.scale(tensor.dtype, address(tensor, chunk), chunk.size, factors[chunk.tensor]);
  });
}

void scale(const Tensors& tensors, double factor, int threads) {
  const std::vector<double> factors(tensors.size(), factor);
  scale(tensors, factors.data(), threads);
}

std::vector<bool> clamp(const Tensors& tensors, double bound, int threads) {
  const Kernels& k = kernels();
  return write_chunks(tensors, threads, [&](DType dtype, void* data, std::int64_t size) {
    return k.clamp(dtype, data, size, bound);
  });
}

std::vector<bool> zero_nonfinite(const Tensors& tensors, int threads) {
  return write_chunks(tensors, threads, kernels().zero_nonfinite);
}

}  // namespace fastclip::cpu
