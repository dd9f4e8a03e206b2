// Fibers: the threads of an emulated grid.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace fastclip::cuda {

struct Index {
  unsigned x;
};

// Where the running fiber stands.
struct FiberView {
  Index thread, block_index, grid;
};
const FiberView& fiber();

// The running block's shared memory, the same at each call, all bytes 0xff (as floats: NaN) before the first.
void* shared_memory(std::size_t bytes);

// __syncthreads: returns when every fiber of the block that still runs has called it.
void wait_for_block();
// __shfl_xor_sync over a whole warp.
std::uint64_t exchange(std::uint64_t value, int lanes);
// Another fiber may go on first; does nothing while they run in order.
void let_others_run();

// Runs body() in blocks * threads fibers, all blocks at the same time, to the end; not at all while set_idle(true).
void run_grid(int blocks, int threads, const std::function<void()>& body);

// 0: fibers go on in order. Else as this seed has it, anew at each grid: with an even one all in a random order, with an
// odd one warp by warp, each as far as it can.
void set_order(std::uint64_t seed);

// Grids don't run: what is left of a call is the host's work, to be timed.
void set_idle(bool is_idle);

}  // namespace fastclip::cuda
