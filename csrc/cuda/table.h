// The tensor table as it travels to a kernel: by value, in the kernel's parameters. Nothing is uploaded, nothing
// can go stale, and a CUDA graph keeps its own copy.
//
// A tensor consists of units of equal size that follow each other in memory: rows or filters, for rules that look
// at those; one unit, the tensor itself, for all others. Blocks take chunks: a long unit is cut into several
// chunks, and several short units make one. Borders depend on sizes and dtypes only.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "formats.h"

namespace fastclip::cuda {

// Four or five blocks of this size, of a read, share a multiprocessor: while one joins its sums and turns to its next
// chunk, the others keep the memory busy. Of blocks twice as large it would be two.
constexpr int kThreads = 128;
constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;

// 64 KiB, 32 loads of 16 bytes for each thread: what comes before and after them is short beside them, and a second
// look finds the chunk in the caches.
constexpr std::uint32_t kChunkBytes = 1 << 16;
// Up to this size a unit is left to one warp, and a chunk is made of several.
constexpr std::uint32_t kUnitBytesOfWarp = kChunkBytes / 8;

constexpr int kOtherBytes = 160;  // of a kernel's parameters, beside the table

template <int kCapacity>
struct Table {
  static constexpr int kTensors = kCapacity;
  char* data[kTensors];                      // first byte of each tensor
  std::int64_t unit_bytes[kTensors];
  std::uint32_t first_chunk[kTensors + 1];   // of this launch
  std::uint32_t first_unit[kTensors + 1];    // of this launch
  std::uint16_t joins[kTensors];             // tensors whose units are cut into several chunks
  DType dtype[kTensors];
  std::int32_t tensors, join_count;
};
// 27 bytes a tensor; a multiple of 8 keeps the arrays aligned.
constexpr int kTableTensors = (kParameterBytes - kOtherBytes) / 27 / 8 * 8;
using TensorTable = Table<kTableTensors>;
static_assert(sizeof(TensorTable) <= kParameterBytes - kOtherBytes);
// Beside it the address of each weight.
constexpr int kPairTensors = (kParameterBytes - kOtherBytes) / 35 / 8 * 8;
using PairTable = Table<kPairTensors>;
static_assert(sizeof(PairTable) + 8 * kPairTensors <= kParameterBytes - kOtherBytes);

// What one chunk covers.
struct ChunkView {
  std::uint32_t unit;   // its first unit within the tensor
  std::uint32_t units;  // 1 for a piece of a unit
  std::int64_t begin;   // bytes before it in its first unit
  std::uint32_t bytes;  // of each of its units that it covers
  bool whole;           // whether it covers its units to their ends
};

// How a tensor is cut.
struct Cut {
  std::uint32_t units_per_chunk;  // 0: a unit is cut into pieces
  std::uint32_t pieces;           // of each unit, in that case
};

__host__ __device__ inline Cut cut_of(std::int64_t unit_bytes, std::uint32_t units) {
  if (units > 1 && unit_bytes <= kUnitBytesOfWarp) {
    const std::uint32_t fit = kChunkBytes / static_cast<std::uint32_t>(unit_bytes > 0 ? unit_bytes : 1);
    return {fit / kWarps * kWarps, 0};
  }
  const std::int64_t pieces = (unit_bytes + kChunkBytes - 1) / kChunkBytes;
  return {0, static_cast<std::uint32_t>(pieces > 0 ? pieces : 1)};
}

__host__ __device__ inline ChunkView view_of(const Cut& cut, std::int64_t unit_bytes, std::uint32_t units, std::uint32_t chunk) {
  if (cut.units_per_chunk > 0) {
    const std::uint32_t first = chunk * cut.units_per_chunk, left = units - first;
    return {first, left < cut.units_per_chunk ? left : cut.units_per_chunk, 0, static_cast<std::uint32_t>(unit_bytes), true};
  }
  const std::uint32_t unit = units == 1 ? 0 : chunk / cut.pieces;
  const std::int64_t begin = static_cast<std::int64_t>(chunk - unit * cut.pieces) * kChunkBytes, left = unit_bytes - begin;
  return {unit, 1, begin, left < kChunkBytes ? static_cast<std::uint32_t>(left) : kChunkBytes, cut.pieces == 1};
}

// The tensor that a chunk belongs to, at or after `tensor`, which is at most `ahead` behind: each has a chunk. Of a long
// tensor it is mostly the same one, and among tensors of one chunk each the furthest: those are tried first.
template <class Table>
__device__ std::uint32_t find(const Table& table, std::uint32_t chunk, std::uint32_t tensor, std::uint32_t ahead) {
  std::uint32_t low = tensor, high = tensor + ahead;  // it lies in [low, high]
  const auto last = static_cast<std::uint32_t>(table.tensors) - 1;
  if (high > last) high = last;
  if (table.first_chunk[low + 1] > chunk) return low;
  if (table.first_chunk[high] <= chunk) return high;
  while (low < high) {
    const std::uint32_t middle = (low + high + 1) / 2;
    if (table.first_chunk[middle] <= chunk) low = middle;
    else high = middle - 1;
  }
  return low;
}

// ---- on the host -----------------------------------------------------------------------------------

// Cuts a list into launches: fills `table`, where it lies in the kernel's parameters, and calls launch(units before it,
// whether it is the last). A tensor without a unit is left out, so the list may be empty, and then nothing is called.
template <class Table, class Launch>
void for_launches(Table& table, const Tensors& tensors, const std::vector<std::int64_t>& units, Launch launch) {
  constexpr std::uint64_t kMost = 0xffffffffu;
  const auto units_of = [&](std::size_t i) { return units.empty() ? 1 : units[i]; };
  std::size_t last = tensors.size();  // after the last one that has a unit
  while (last > 0 && units_of(last - 1) == 0) --last;
  std::size_t i = 0;
  for (std::int64_t unit = 0; i < last;) {
    table.tensors = table.join_count = 0;
    table.first_chunk[0] = table.first_unit[0] = 0;
    const std::int64_t first_unit = unit;
    for (; i < last && table.tensors < Table::kTensors; ++i) {
      const std::int64_t count = units_of(i);
      if (count == 0) continue;
      const std::int64_t unit_bytes = tensors[i].size / count * bytes_of(tensors[i].dtype);
      const Cut cut = cut_of(unit_bytes, static_cast<std::uint32_t>(count));
      const std::uint64_t chunks = cut.units_per_chunk > 0 ? (count + cut.units_per_chunk - 1) / cut.units_per_chunk
                                                           : static_cast<std::uint64_t>(count) * cut.pieces;
      const int at = table.tensors;
      if (table.first_chunk[at] + chunks > kMost || table.first_unit[at] + static_cast<std::uint64_t>(count) > kMost) {
        if (at == 0) throw std::length_error("a tensor of more than 2^32 chunks or units");
        break;
      }
      table.data[at] = static_cast<char*>(tensors[i].data);
      table.unit_bytes[at] = unit_bytes;
      table.dtype[at] = tensors[i].dtype;
      table.first_chunk[at + 1] = table.first_chunk[at] + static_cast<std::uint32_t>(chunks);
      table.first_unit[at + 1] = table.first_unit[at] + static_cast<std::uint32_t>(count);
      if (cut.units_per_chunk == 0 && cut.pieces > 1) table.joins[table.join_count++] = static_cast<std::uint16_t>(at);
      table.tensors = at + 1;
      unit += count;
    }
    launch(first_unit, i == last);
  }
}

// As many blocks as run at the same time, or fewer where there are fewer chunks. Asked once for each device.
template <class Kernel>
int blocks_for(Kernel* kernel, int device, std::int64_t chunks) {
  static std::map<std::pair<Kernel*, int>, int> known;
  int& resident = known[{kernel, device}];
  if (resident == 0) resident = resident_blocks(kernel, kThreads);
  return static_cast<int>(chunks < resident ? chunks : resident);
}

inline std::string over(const char* kernel, std::size_t tensors) {
  return std::string("fastclip's ") + kernel + " kernel over " + std::to_string(tensors) + " tensors";
}

}  // namespace fastclip::cuda
