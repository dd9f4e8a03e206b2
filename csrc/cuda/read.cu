// The one read: every gradient once, in one launch up to the coefficient.
#include "engine.h"
#include "stats.h"

namespace fastclip::cuda {
namespace {

struct Totals {
  double* totals;      // out, [4]: total_norm, clip_coef, nans, infs; null if not wanted
  float* narrow;       // out, [2]: total_norm in float32, found_inf
  const double* rows;  // in, [>= 3][count]
  std::int64_t count;
  double max_norm, eps;
};

struct ReadParams {
  ReadTable table;
  double* rows;        // out, [3 or 6][units of the whole list]; this launch's units begin here
  double* partials;    // workspace, [3 or 6][chunks of this launch], for the pieces of long units
  std::uint32_t* tickets;  // workspace, [2], 0 before and after: chunks taken, blocks done
  std::int64_t row_stride;
  double norm_type;
  Scalar divisor;      // of the norms: AMP's grad_scale
  bool extras;         // rows have all 6 fields
  Totals totals;       // of the whole list; only in its last launch
};
static_assert(sizeof(ReadParams) <= kParameterBytes);

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
  a.narrow[0] = narrowed(total_norm);
  a.narrow[1] = total.nans + total.infs > 0 ? 1.0f : 0.0f;
}

template <bool kAll>
__global__ void __launch_bounds__(kThreads, kAll ? 2 : 3) read_kernel(const __grid_constant__ ReadParams a) {
  FASTCLIP_SHARED(ReadShared, shared);
  Group block = whole_block(&shared.slots), warp = own_warp();
  const ReadTable& table = a.table;
  const std::uint32_t chunks = table.first_chunk[table.tensors];
  const double divisor = read_scalar(a.divisor);
  const bool extras = kAll && a.extras;
  const double p = kAll ? a.norm_type : 2.0;

  const auto store = [&](std::uint32_t tensor, std::uint32_t unit, std::uint32_t chunk, bool whole, const Stats& stats) {
    // one slot per chunk, joined below in index order: the same gradients give the same bits
    if (whole) store_row(a.rows + table.first_unit[tensor] + unit, a.row_stride, stats, extras, divisor, p);
    else store_row(a.partials + chunk, chunks, stats, extras, 1.0, p);
  };

  if (threadIdx.x == 0) {
    const std::uint32_t chunk = atomicAdd(&a.tickets[0], 1u);
    shared.next[0] = {chunk, chunk < chunks ? find(table, chunk, 0, table.tensors) : 0};
  }
  __syncthreads();
  for (int turn = 0;; turn ^= 1) {
    const std::uint32_t chunk = shared.next[turn].chunk, tensor = shared.next[turn].tensor;
    if (chunk >= chunks) break;
    if (threadIdx.x == 0) {  // what comes next is found while this one is read
      const std::uint32_t next = atomicAdd(&a.tickets[0], 1u);
      shared.next[turn ^ 1] = {next, next < chunks ? find(table, next, tensor, next - chunk) : 0};
    }
    const std::int64_t unit_size = table.unit_size[tensor];
    const std::uint32_t units = table.first_unit[tensor + 1] - table.first_unit[tensor];
    const DType dtype = table.dtype[tensor];
    const std::uint32_t element_bytes = bytes_of(dtype);
    const ChunkView view = view_of(cut_of(unit_size, units, element_bytes), unit_size, units, chunk - table.first_chunk[tensor]);
    const char* data = table.data[tensor] + (view.unit * unit_size + view.begin) * element_bytes;
    if (view.units == 1) {
      const Stats stats = stats_of<kAll>(block, dtype, data, view.unit_size, p);
      if (threadIdx.x == 0) store(tensor, view.unit, chunk, view.whole, stats);
      continue;
    }
    for (std::uint32_t k = threadIdx.x / kWarpSize; k < view.units; k += kWarps) {
      const Stats stats = stats_of<kAll>(warp, dtype, data + k * unit_size * element_bytes, view.unit_size, p);
      if (warp.rank == 0) store(tensor, view.unit + k, chunk, true, stats);
    }
    __syncthreads();  // as the sums of a whole block have: what was found above is there for all
  }

  // The last block to come here does the rest. Release: what this thread stored is visible before its ticket is;
  // each block's other writers are ordered before by the barrier above. Acquire: the loads that follow the ticket
  // come after it, and go past this multiprocessor's own cache.
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) shared.is_last = atomicAdd(&a.tickets[1], 1u) == gridDim.x - 1;
  __syncthreads();
  if (!shared.is_last) return;
  __threadfence();

  // Units that were read in pieces: short ones are left to one warp each, long ones need the whole block.
  constexpr std::uint32_t kPiecesOfWarp = kThreads;
  const auto for_joins = [&](auto handle) {
    for (int j = 0; j < table.join_count; ++j) {
      const std::uint32_t tensor = table.joins[j], units = table.first_unit[tensor + 1] - table.first_unit[tensor];
      handle(tensor, units, (table.first_chunk[tensor + 1] - table.first_chunk[tensor]) / units);
    }
  };
  std::uint32_t turn = 0;
  for_joins([&](std::uint32_t tensor, std::uint32_t units, std::uint32_t pieces) {
    for (std::uint32_t unit = 0; unit < units; ++unit) {
      const std::uint32_t first = table.first_chunk[tensor] + unit * pieces;
      if (pieces > kPiecesOfWarp) {
        const Stats stats = join(block, a.partials + first, chunks, pieces, p, extras);
        if (threadIdx.x == 0) store(tensor, unit, 0, true, stats);
      } else if (turn++ % kWarps == threadIdx.x / kWarpSize) {
        const Stats stats = join(warp, a.partials + first, chunks, pieces, p, extras);
        if (warp.rank == 0) store(tensor, unit, 0, true, stats);
      }
    }
  });
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

__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ FinishParams a) {
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

__global__ void __launch_bounds__(kThreads) join_kernel(const __grid_constant__ JoinParams a) {
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

std::int64_t read_workspace_bytes(const Tensors& tensors, const std::vector<std::int64_t>& units, bool extras) {
  std::int64_t most = 0;
  for_launches<ReadTable>(tensors, units, [&](const ReadTable& table, std::int64_t, bool) {
    if (table.join_count > 0 && table.first_chunk[table.tensors] > most) most = table.first_chunk[table.tensors];
  });
  return kTicketBytes + most * (extras ? 6 : 3) * static_cast<std::int64_t>(sizeof(double));
}

void read(const Tensors& tensors, const std::vector<std::int64_t>& units, const ReadArguments& given, const Place& place) {
  const DeviceGuard guard(place.device);
  if (place.fresh_workspace) fill_zero(place.workspace, kTicketBytes, place.stream);
  std::int64_t rows = units.empty() ? static_cast<std::int64_t>(tensors.size()) : 0;
  for (const std::int64_t count : units) rows += count;
  const bool all = given.extras || given.norm_type != 2.0;
  const auto kernel = all ? read_kernel<true> : read_kernel<false>;
  bool finished = false;
  for_launches<ReadTable>(tensors, units, [&](const ReadTable& table, std::int64_t first_unit, bool is_last) {
    ReadParams params;
    params.table = table;
    params.rows = given.rows + first_unit;
    params.partials = reinterpret_cast<double*>(static_cast<char*>(place.workspace) + kTicketBytes);
    params.tickets = static_cast<std::uint32_t*>(place.workspace);
    params.row_stride = rows;
    params.norm_type = given.norm_type;
    params.divisor = given.divisor;
    params.extras = given.extras;
    params.totals = {is_last ? given.totals : nullptr, given.narrow, given.rows, rows, given.max_norm, given.eps};
    const int blocks = blocks_for(kernel, place.device, table.first_chunk[table.tensors]);
    launch(kernel, blocks, kThreads, place.stream, params, over("read", tensors.size()));
    finished = is_last;
  });
  if (!finished && given.totals != nullptr)
    finish(given.rows, rows, given.norm_type, given.max_norm, given.eps, given.totals, given.narrow, place);
}

void finish(const double* rows, std::int64_t count, double norm_type, double max_norm, double eps, double* totals,
            float* narrow, const Place& place) {
  const DeviceGuard guard(place.device);
  const FinishParams params{{totals, narrow, rows, count, max_norm, eps}, norm_type};
  launch(finish_kernel, 1, kThreads, place.stream, params, over("finish", static_cast<std::size_t>(count)));
}

void join(const double* unit_rows, const std::vector<std::int64_t>& units, double norm_type, double* rows, const Place& place) {
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

std::string why_unavailable() { return why_no_device(); }

bool is_capturing(void* stream) { return stream_is_capturing(stream); }

}  // namespace fastclip::cuda
