#include "fibers.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fastclip::cuda {
namespace {

constexpr std::size_t kStackBytes = 256 << 10;  // touched pages only: instrumented frames are large
constexpr std::size_t kSharedBytes = 48 << 10;
constexpr int kWarpSize = 32;

// A place where fibers wait for each other, again and again.
struct Barrier {
  unsigned round = 0;
  int arrived = 0;
};

struct Block {
  Barrier barrier;
  int running;
  alignas(16) unsigned char shared[kSharedBytes];
};

struct Warp {
  Barrier barrier;
  std::uint64_t values[2][kWarpSize];  // of this exchange and of the next, which a fast lane may begin
};

struct Fiber {
  FiberView view;
  ucontext_t context;  // where it begins
  void* place[5];      // where it goes on
  bool begun = false;
  void* fake_stack = nullptr;  // AddressSanitizer's
  const unsigned* waits_for = nullptr;
  unsigned until_not = 0;
  bool done = false;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int lane = 0;
};

// A stack for each fiber, kept between grids.
class Stacks {
 public:
  void* operator[](std::size_t index) {
    while (stacks_.size() <= index) {
      void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      stacks_.push_back(memory);
    }
    return stacks_[index];
  }

 private:
  std::vector<void*> stacks_;
};

Stacks stacks;
std::vector<Fiber> fibers;
std::vector<std::size_t> order;  // of the turns
std::size_t turn = 0;            // index into `order`
std::size_t left = 0;            // fibers that aren't done
Fiber host;  // who called run_grid
void* host_fake_stack = nullptr;
const void* host_stack = nullptr;
std::size_t host_stack_bytes = 0;
std::uint64_t seed = 0;
bool idle = false;
std::mt19937_64 random_order;
const std::function<void()>* body = nullptr;

Fiber& running() { return fibers[order[turn]]; }

void leave_for([[maybe_unused]] void** keep, [[maybe_unused]] const void* stack, [[maybe_unused]] std::size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(keep, stack, bytes);
#endif
}

void arrived_from([[maybe_unused]] void* kept, [[maybe_unused]] bool from_host) {
#if defined(__SANITIZE_ADDRESS__)
  const void* stack = nullptr;
  std::size_t bytes = 0;
  __sanitizer_finish_switch_fiber(kept, &stack, &bytes);
  if (from_host && host_stack == nullptr) host_stack = stack, host_stack_bytes = bytes;
#endif
}

bool runs_warps() { return seed % 2 == 1; }

// Moves `turn` to a fiber that can go on. Where whole warps run, it is one of the same warp as long as there is one:
// so a warp gets as far ahead of the others as barriers let it.
void next_turn() {
  const std::size_t first = runs_warps() ? turn - turn % kWarpSize : turn + 1;
  for (std::size_t tried = 0; tried < order.size(); ++tried) {
    turn = (first + tried) % order.size();
    Fiber& candidate = running();
    if (!candidate.done && (candidate.waits_for == nullptr || *candidate.waits_for != candidate.until_not)) return;
  }
  std::abort();  // all wait for each other: a kernel whose threads don't all reach a barrier
}

// swapcontext would ask the kernel for the signal mask each time, which takes ten times as long; longjmp too is
// replaced by AddressSanitizer, by a function that clears its record of a whole stack. What the compiler itself jumps
// with is out of its sight, and the calls around each switch tell it all that it needs.
__attribute__((noinline, no_sanitize("address"))) void swap(Fiber& from, Fiber& to) {
  if (__builtin_setjmp(from.place) != 0) return;
  from.begun = true;
  if (to.begun) __builtin_longjmp(to.place, 1);
  setcontext(&to.context);
}

void switch_away(Fiber& from) {
  next_turn();
  Fiber& to = running();
  if (&to == &from) return;
  leave_for(from.done ? nullptr : &from.fake_stack, stacks[order[turn]], kStackBytes);
  swap(from, to);
  arrived_from(from.fake_stack, false);
}

void arrive(Barrier& barrier, int expected) {
  Fiber& self = running();
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.round;
    return;
  }
  self.until_not = barrier.round;
  self.waits_for = &barrier.round;
  switch_away(self);
  self.waits_for = nullptr;
}

void entry() {
  arrived_from(nullptr, turn == 0);
  (*body)();
  Fiber& self = running();
  self.done = true;
  --self.block->running;
  if (self.block->running > 0 && self.block->barrier.arrived == self.block->running) {
    self.block->barrier.arrived = 0;  // a thread that has returned counts as arrived
    ++self.block->barrier.round;
  }
  if (--left > 0) {
    switch_away(self);
  } else {
    leave_for(nullptr, host_stack, host_stack_bytes);
    swap(self, host);
  }
  std::abort();
}

void prepare(ucontext_t& context, void* stack) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
#if defined(__SANITIZE_ADDRESS__)
  // entry() never returns: what surrounds the variables of the one before is still marked
  constexpr std::size_t kFrames = 16 << 10;
  __asan_unpoison_memory_region(static_cast<char*>(stack) + kStackBytes - kFrames, kFrames);
#endif
}

}  // namespace

const FiberView& fiber() { return running().view; }

void* shared_memory(std::size_t bytes) {
  if (bytes > kSharedBytes) throw std::length_error("more shared memory than a block has");
  return running().block->shared;
}

void wait_for_block() { arrive(running().block->barrier, running().block->running); }

std::uint64_t exchange(std::uint64_t value, int lanes) {
  Fiber& self = running();
  auto& values = self.warp->values[self.warp->barrier.round % 2];
  values[self.lane] = value;
  arrive(self.warp->barrier, kWarpSize);
  return values[self.lane ^ lanes];
}

void let_others_run() {
  if (seed != 0) switch_away(running());
}

void set_order(std::uint64_t new_seed) {
  seed = new_seed;
  random_order.seed(new_seed);
}

void set_idle(bool is_idle) { idle = is_idle; }

void run_grid(int block_count, int threads, const std::function<void()>& of_body) {
  if (idle) return;
  if (threads % kWarpSize != 0) throw std::invalid_argument("a block must be whole warps");
  body = &of_body;
  const auto count = static_cast<std::size_t>(block_count) * threads;
  std::vector<Block> blocks(block_count);
  std::vector<Warp> warps(count / kWarpSize);
  fibers.assign(count, Fiber{});
  order.resize(count);
  for (Block& block : blocks) {
    block.running = threads;
    std::memset(block.shared, 0xff, sizeof block.shared);
  }
  for (std::size_t i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    fiber.view = {{static_cast<unsigned>(i % threads)}, {static_cast<unsigned>(i / threads)}, {static_cast<unsigned>(block_count)}};
    fiber.block = &blocks[i / threads];
    fiber.warp = &warps[i / kWarpSize];
    fiber.lane = static_cast<int>(i % kWarpSize);
    order[i] = i;
    prepare(fiber.context, stacks[i]);
  }
  if (runs_warps()) {
    std::vector<std::size_t> of_warps(warps.size());
    std::iota(of_warps.begin(), of_warps.end(), 0);
    std::shuffle(of_warps.begin(), of_warps.end(), random_order);
    for (std::size_t i = 0; i < count; ++i) order[i] = of_warps[i / kWarpSize] * kWarpSize + i % kWarpSize;
  } else if (seed != 0) {
    std::shuffle(order.begin(), order.end(), random_order);
  }
  turn = 0;
  left = count;
  host_stack = nullptr;
  leave_for(&host_fake_stack, stacks[order[0]], kStackBytes);
  swap(host, running());
  arrived_from(host_fake_stack, false);
}

}  // namespace fastclip::cuda
