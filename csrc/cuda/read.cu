// The one read: every gradient once, in one launch up to the coefficient.
#include "engine.h"
#include "stats.h"

namespace fastclip::cuda {
namespace {

struct Totals {
  double* totals;      // out, [4]: total_norm, clip_coef, nans, infs; null if not wanted
  float* heads;        // out, [2]: total_norm in float32, found_inf; may be null
  const double* rows;  // in, [>= 3][count]
  std::int64_t count;
  double max_norm, eps;
};

enum class Look { norms, all, penalised };  // norms: p is 2, no extras

template <class TableType>
struct ReadParams {
  TableType table;
  double* rows;            // out, [3 or 6][units of the whole list]; this launch's units begin here
  double* partials;        // workspace, [3 or 6][chunks of this launch], for the pieces of long units
  std::uint32_t* tickets;  // workspace, [2], 0 before and after: tickets drawn, blocks done
  std::int64_t row_stride;
  double norm_type;
  Scalar divisor;          // of the norms: AMP's grad_scale
  bool extras;             // rows have all 6 fields
  Totals totals;           // of the whole list; only in its last launch
};
static_assert(sizeof(ReadParams<TensorTable>) <= kParameterBytes);

// With a penalty, whose weights lie as their gradients do.
struct PenalisedParams : ReadParams<PairTable> {
  const char* weights[kPairTensors];  // null: the gradient is only read
  const double* strengths;            // [2][tensors of the whole list]: of the sign, of the weight; this launch's begin here
  double* weight_rows;                // out, [3][tensors of the whole list]; this launch's begin here
  double* weight_partials;            // workspace, [6][chunks of this launch]
};
static_assert(sizeof(PenalisedParams) <= kParameterBytes);

// A block at work.
struct ReadShared {
  BlockSlots slots;
  struct {
    std::uint32_t chunk, tensor;
  } next[2];
  bool is_last;
};

// float32's largest number stands for what lies past it: Inf always means that a gradient holds one.
__device__ float narrowed(double norm) {
  return norm > FLT_MAX && norm <= DBL_MAX ? FLT_MAX : static_cast<float>(norm);
}

__device__ void finish_totals(Group& block, const Totals& a, double p) {
  const Stats total = join(block, a.rows, a.count, a.count, p, false);
  if (block.rank != 0) return;
  const double total_norm = a.count > 0 ? total.norm : 0.0;
  a.totals[0] = total_norm;
  a.totals[1] = clip_coef(total_norm, a.max_norm, a.eps);
  a.totals[2] = total.nans;
  a.totals[3] = total.infs;
  if (a.heads == nullptr) return;
  a.heads[0] = narrowed(total_norm);
  a.heads[1] = total.nans + total.infs > 0 ? 1.0f : 0.0f;
}

__device__ void store_weight_row(double* rows, std::int64_t stride, const Stats& stats) {
  rows[0] = stats.norm;
  rows[stride] = stats.max_abs;
  rows[2 * stride] = stats.sum_abs;
}

// g = (g + of_sign * sign(w)) + of_weight * w in place; g is then visible to the whole group.
__device__ void penalise(Group& group, DType dtype, char* grads, const char* weights, std::uint32_t bytes, double of_sign,
                         double of_weight) {
  const std::uint32_t shift = misalignment(grads), weight_shift = misalignment(weights);
  visit(dtype, [&](const auto& format) {
    using Format = std::decay_t<decltype(format)>;
    if constexpr (Format::kBytes > 1) {
      using Part = typename Format::Part;
      const auto sign_part = static_cast<Part>(of_sign), weight_part = static_cast<Part>(of_weight);
      const auto sum = [&](const Vector& raw, const Vector& raw_weight) {
        Part g[Format::kReals], w[Format::kReals];
        format.decode(raw, g);
        format.decode(raw_weight, w);
#pragma unroll
        for (int k = 0; k < Format::kReals; ++k) {
          const Part sign = static_cast<Part>(w[k] > 0) - static_cast<Part>(w[k] < 0);
          g[k] = (g[k] + sign_part * sign) + weight_part * w[k];
        }
        return format.encode(g);
      };
      std::uint32_t at = 16 * group.rank;
      if (shift == 0 && weight_shift == 0) {
        constexpr int kInFlight = 2;  // pairs of loads, before the first store: the compiler can't tell that they may pass each other
        const std::uint32_t step = 16 * group.size;
#pragma unroll 1
        for (; at + (kInFlight - 1) * step + 16 <= bytes; at += kInFlight * step) {
          Vector g[kInFlight], w[kInFlight];
#pragma unroll
          for (int k = 0; k < kInFlight; ++k) {
            g[k] = *reinterpret_cast<const Vector*>(grads + at + k * step);
            w[k] = *reinterpret_cast<const Vector*>(weights + at + k * step);
          }
#pragma unroll
          for (int k = 0; k < kInFlight; ++k) *reinterpret_cast<Vector*>(grads + at + k * step) = sum(g[k], w[k]);
        }
      }
#pragma unroll 1
      for (; at < bytes; at += 16 * group.size) {
        const bool whole = at + 16 <= bytes;
        const std::uint32_t valid = whole ? 16 : bytes - at;
        const Vector g = whole && shift == 0 ? *reinterpret_cast<const Vector*>(grads + at) : load_bytes(grads + at, valid);
        const Vector w = whole ? load_vector(weights, at / 16, bytes, weight_shift) : load_bytes(weights + at, valid);
        if (whole && shift == 0) *reinterpret_cast<Vector*>(grads + at) = sum(g, w);
        else store_bytes(grads + at, sum(g, w), valid);
      }
    }
  });
  __syncthreads();
}

template <Look kLook, class Params>
__global__ void __launch_bounds__(kThreads, kLook == Look::norms ? 5 : 4) read_kernel(FASTCLIP_PARAMETERS(Params) a) {
  FASTCLIP_SHARED(ReadShared, shared);
  Group block = whole_block(&shared.slots), warp = own_warp();
  const auto& table = a.table;
  const std::uint32_t chunks = table.first_chunk[table.tensors];
  const bool extras = kLook != Look::norms && a.extras;
  const double p = kLook != Look::norms ? a.norm_type : 2.0;

  const auto store = [&](std::uint32_t tensor, std::uint32_t unit, std::uint32_t chunk, bool whole, const Stats& stats) {
    // one slot per chunk, joined below in index order: the same gradients give the same bits
    if (whole) store_row(a.rows + table.first_unit[tensor] + unit, a.row_stride, stats, extras, read_scalar(a.divisor), p);
    else store_row(a.partials + chunk, chunks, stats, extras, 1.0, p);
  };

  // Thread 0 takes chunks for its block. The first two are the block's by its number; from then on a ticket is drawn one
  // turn before its chunk is looked up, and that one before the chunk is read: no load waits for an answer.
  std::uint32_t drawn = gridDim.x + blockIdx.x;
  if (threadIdx.x == 0) shared.next[0] = {blockIdx.x, find(table, blockIdx.x, 0, table.tensors)};
  __syncthreads();
  for (int turn = 0;; turn ^= 1) {
    const std::uint32_t chunk = shared.next[turn].chunk, tensor = shared.next[turn].tensor;
    if (chunk >= chunks) break;
    if (threadIdx.x == 0) {
      shared.next[turn ^ 1] = {drawn, drawn < chunks ? find(table, drawn, tensor, drawn - chunk) : 0};
      if (drawn < chunks) drawn = 2 * gridDim.x + atomicAdd(&a.tickets[0], 1u);
    }
    const std::int64_t unit_bytes = table.unit_bytes[tensor];
    const std::uint32_t units = table.first_unit[tensor + 1] - table.first_unit[tensor];
    const DType dtype = table.dtype[tensor];
    const ChunkView view = view_of(cut_of(unit_bytes, units), unit_bytes, units, chunk - table.first_chunk[tensor]);
    const std::int64_t offset = view.unit * unit_bytes + view.begin;
    char* const data = table.data[tensor] + offset;
    if constexpr (kLook == Look::penalised) {
      if (a.weights[tensor] != nullptr) {
        const char* const weights = a.weights[tensor] + offset;
        const double of_sign = a.strengths[tensor], of_weight = a.strengths[a.row_stride + tensor];
        if (of_sign != 0.0 || of_weight != 0.0)
          penalise(block, dtype, data, weights, view.bytes, of_sign, of_weight);
        const Stats stats = stats_of<true, 1>(block, dtype, weights, view.bytes, 2.0);
        if (threadIdx.x == 0) {
          if (view.whole) store_weight_row(a.weight_rows + tensor, a.row_stride, stats);
          else store_row(a.weight_partials + chunk, chunks, stats, true, 1.0, 2.0);
        }
      }
    }
    // One unit, or a piece of one, is for the whole block; of several each warp takes its own. By value: a reference
    // to either would put both into local memory.
    const bool alone = view.units == 1;
    Group group = alone ? block : warp;
    for (std::uint32_t k = alone ? 0 : threadIdx.x / kWarpSize; k < view.units; k += kWarps) {
      const char* const unit = data + k * unit_bytes;
      Stats stats;
      if constexpr (kLook == Look::norms) stats = stats_of<false>(group, dtype, unit, view.bytes, p);
      else if constexpr (kLook == Look::all) stats = stats_of<true>(group, dtype, unit, view.bytes, p);
      else if (p == 2.0 && !extras) stats = stats_of<false>(group, dtype, unit, view.bytes, p);
      else stats = stats_of<true, 1>(group, dtype, unit, view.bytes, p);  // what was just written
      if (group.rank == 0) store(tensor, view.unit + k, chunk, view.whole, stats);
    }
    if (alone) block.phase = group.phase;
    else __syncthreads();  // as the sums of a whole block have: what was found above is there for all
  }

  // The last block to come here does the rest. Release: what this thread stored is visible before its ticket is;
  // each block's other writers are ordered before by the barrier. Acquire: the loads that follow the ticket come
  // after it, and go past this multiprocessor's own cache.
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) shared.is_last = atomicAdd(&a.tickets[1], 1u) == gridDim.x - 1;
  __syncthreads();
  if (!shared.is_last) return;
  __threadfence();

  // Units that were read in pieces: few pieces are left to one warp, many need the whole block.
  constexpr std::uint32_t kPiecesOfWarp = 1024;
  std::uint32_t turn = 0;
  for (int j = 0; j < table.join_count; ++j) {
    const std::uint32_t tensor = table.joins[j], units = table.first_unit[tensor + 1] - table.first_unit[tensor];
    const std::uint32_t pieces = (table.first_chunk[tensor + 1] - table.first_chunk[tensor]) / units;
    for (std::uint32_t unit = 0; unit < units; ++unit) {
      const bool is_long = pieces > kPiecesOfWarp;
      if (!is_long && turn++ % kWarps != threadIdx.x / kWarpSize) continue;
      Group group = is_long ? block : warp;
      const std::uint32_t first = table.first_chunk[tensor] + unit * pieces;
      const Stats stats = join(group, a.partials + first, chunks, pieces, p, extras);
      if (group.rank == 0) store(tensor, unit, 0, true, stats);
      if constexpr (kLook == Look::penalised) {
        if (a.weights[tensor] != nullptr) {
          const Stats of_weight = join(group, a.weight_partials + first, chunks, pieces, 2.0, true);
          if (group.rank == 0) store_weight_row(a.weight_rows + tensor, a.row_stride, of_weight);
        }
      }
      if (is_long) block.phase = group.phase;
    }
  }
  if (threadIdx.x == 0) a.tickets[0] = a.tickets[1] = 0;
  if (a.totals.totals == nullptr) return;
  __threadfence();  // the rows above, for loads that go past the first-level cache
  __syncthreads();
  finish_totals(block, a.totals, p);
}

struct FinishParams {
  Totals totals;
  double norm_type;
};
static_assert(sizeof(FinishParams) <= kParameterBytes);

__global__ void __launch_bounds__(kThreads) finish_kernel(FASTCLIP_PARAMETERS(FinishParams) a) {
  FASTCLIP_SHARED(BlockSlots, slots);
  Group block = whole_block(&slots);
  finish_totals(block, a.totals, a.norm_type);
}

// Rows of units -> rows of tensors.
constexpr int kJoinTensors = (kParameterBytes - kOtherBytes) / 8;
struct JoinParams {
  const double* unit_rows;  // in, [3][unit_stride]; this launch's units begin here
  double* rows;             // out, [3][row_stride]; this launch's tensors begin here
  std::int64_t unit_stride, row_stride;
  double norm_type;
  std::int32_t tensors;
  std::int64_t first_unit[kJoinTensors + 1];
};
static_assert(sizeof(JoinParams) <= kParameterBytes);

__global__ void __launch_bounds__(kThreads, 4) join_kernel(FASTCLIP_PARAMETERS(JoinParams) a) {
  FASTCLIP_SHARED(BlockSlots, slots);
  Group block = whole_block(&slots);
  for (int tensor = blockIdx.x; tensor < a.tensors; tensor += gridDim.x) {
    const std::int64_t first = a.first_unit[tensor];
    const Stats stats = join(block, a.unit_rows + first, a.unit_stride, a.first_unit[tensor + 1] - first, a.norm_type, false);
    if (threadIdx.x == 0) {
      Stats row = stats;
      if (a.first_unit[tensor + 1] == first) row.norm = empty_norm(a.norm_type);
      store_row(a.rows + tensor, a.row_stride, row, false, 1.0, a.norm_type);
    }
  }
}

}  // namespace

// ---- entries: derive, then launch -------------------------------------------------------------------

namespace {

// All but the table.
template <class TableType>
void fill(ReadParams<TableType>& params, std::int64_t first_unit, bool is_last, std::int64_t rows, const ReadArguments& given,
          const Place& place) {
  params.rows = given.rows + first_unit;
  params.partials = reinterpret_cast<double*>(static_cast<char*>(place.workspace) + kTicketBytes);
  params.tickets = static_cast<std::uint32_t*>(place.workspace);
  params.row_stride = rows;
  params.norm_type = given.norm_type;
  params.divisor = given.divisor;
  params.extras = given.extras;
  params.totals = {is_last ? given.totals : nullptr, given.heads, given.rows, rows, given.max_norm, given.eps};
}

template <Look kLook, class Params>
void launch_read(const Params& params, const Place& place, std::size_t tensors) {
  const auto kernel = read_kernel<kLook, Params>;
  const int blocks = blocks_for(kernel, place.device, params.table.first_chunk[params.table.tensors]);
  launch(kernel, blocks, kThreads, place.stream, params, over("read", tensors));
}

}  // namespace

std::int64_t read_workspace_bytes(const Tensors& tensors, const Units& units, bool extras, bool penalised) {
  std::int64_t chunks = 0;  // enough for all launches, each of which uses it anew
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const std::int64_t count = units.empty() ? 1 : units[i];
    if (count == 0) continue;
    const Cut cut = cut_of(tensors[i].size / count * bytes_of(tensors[i].dtype), static_cast<std::uint32_t>(count));
    chunks += cut.units_per_chunk > 0 ? count / cut.units_per_chunk + 1 : count * cut.pieces;
  }
  return kTicketBytes + chunks * ((extras ? 6 : 3) + (penalised ? 6 : 0)) * static_cast<std::int64_t>(sizeof(double));
}

void read(const Tensors& tensors, const Units& units, const ReadArguments& given, const Place& place) {
  const DeviceGuard guard(place.device);
  if (place.fresh_workspace) fill_zero(place.workspace, kTicketBytes, place.stream);
  std::int64_t rows = units.empty() ? static_cast<std::int64_t>(tensors.size()) : 0;
  for (const std::int64_t count : units) rows += count;
  bool finished = false;
  ReadParams<TensorTable> params;
  for_launches(params.table, tensors, units, [&](std::int64_t first_unit, bool is_last) {
    fill(params, first_unit, is_last, rows, given, place);
    if (given.extras || given.norm_type != 2.0) launch_read<Look::all>(params, place, tensors.size());
    else launch_read<Look::norms>(params, place, tensors.size());
    finished = is_last;
  });
  if (!finished && given.totals != nullptr)
    finish(given.rows, rows, given.norm_type, given.max_norm, given.eps, given.totals, given.heads, place);
}

void read_penalised(const Tensors& grads, const Tensors& weights, const double* strengths, const ReadArguments& given,
                    double* weight_rows, const Place& place) {
  const DeviceGuard guard(place.device);
  if (place.fresh_workspace) fill_zero(place.workspace, kTicketBytes, place.stream);
  const auto rows = static_cast<std::int64_t>(grads.size());
  PenalisedParams params;
  const PairTable& table = params.table;
  for_launches(params.table, grads, {}, [&](std::int64_t first, bool is_last) {
    fill(params, first, is_last, rows, given, place);
    for (int i = 0; i < table.tensors; ++i) {
      const bool apart = weights[first + i].size != grads[first + i].size, empty = grads[first + i].size == 0;
      // nothing has no address, but a row to fill: any will do
      params.weights[i] = apart ? nullptr : static_cast<const char*>(empty ? weight_rows : weights[first + i].data);
    }
    params.strengths = strengths + first;
    params.weight_rows = weight_rows + first;
    params.weight_partials = params.partials + (given.extras ? 6 : 3) * table.first_chunk[table.tensors];
    launch_read<Look::penalised>(params, place, grads.size());
  });
}

void finish(const double* rows, std::int64_t count, double norm_type, double max_norm, double eps, double* totals,
            float* heads, const Place& place) {
  const DeviceGuard guard(place.device);
  const FinishParams params{{totals, heads, rows, count, max_norm, eps}, norm_type};
  launch(finish_kernel, 1, kThreads, place.stream, params, over("finish", static_cast<std::size_t>(count)));
}

void join(const double* unit_rows, const Units& units, double norm_type, double* rows, const Place& place) {
  const DeviceGuard guard(place.device);
  const auto tensors = static_cast<std::int64_t>(units.size());
  std::int64_t all_units = 0, before = 0;
  for (const std::int64_t count : units) all_units += count;
  for (std::int64_t first = 0; first < tensors; first += kJoinTensors) {
    JoinParams params{unit_rows + before, rows + first, all_units, tensors, norm_type, 0, {0}};
    for (; params.tensors < kJoinTensors && first + params.tensors < tensors; ++params.tensors)
      params.first_unit[params.tensors + 1] = params.first_unit[params.tensors] + units[first + params.tensors];
    before += params.first_unit[params.tensors];
    launch(join_kernel, blocks_for(join_kernel, place.device, params.tensors), kThreads, place.stream, params,
           over("join", units.size()));
  }
}

int parameter_bytes() { return kParameterBytes; }

std::string why_unavailable() { return why_no_device(); }

bool is_capturing(int device, void* stream) {
  const DeviceGuard guard(device);
  return stream_is_capturing(stream);
}

}  // namespace fastclip::cuda
