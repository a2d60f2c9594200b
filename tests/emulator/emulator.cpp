// Compiled without sanitizers' instrumentation even where kernels have it: all fibers touch the
// scheduler's data, and ThreadSanitizer, which takes each fiber for a thread, would see races. What
// it must know about order is told to it explicitly.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#if defined(EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(EMULATOR_TSAN)
#include <sanitizer/tsan_interface.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

Thread* self = nullptr;
Dim3 block_size, grid_size;

Options& options() {
  static Options instance;
  return instance;
}

namespace {

// ---- What the sanitizers are told ---------------------------------------------------------------

#if defined(EMULATOR_TSAN)
void order_before(void* point) { __tsan_release(point); }
void order_after(void* point) { __tsan_acquire(point); }
#else
void order_before(void*) {}
void order_after(void*) {}
#endif

// memcpy would be the sanitizers' own.
void copy_bytes(void* to, const void* from, size_t bytes) {
  auto* d = static_cast<volatile unsigned char*>(to);
  const auto* s = static_cast<const volatile unsigned char*>(from);
  for (size_t i = 0; i < bytes; ++i) d[i] = s[i];
}

// ---- Switching stacks ---------------------------------------------------------------------------

#if defined(__x86_64__)
// swapcontext makes two system calls; this keeps the registers that a call preserves, no more.
struct Context {
  void* stack_pointer;
};
extern "C" void lstmx_emulator_switch(void** from, void* to);
asm(R"(
.text
.type lstmx_emulator_switch,@function
lstmx_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size lstmx_emulator_switch,.-lstmx_emulator_switch
)");
void switch_context(Context& from, Context& to) {
  lstmx_emulator_switch(&from.stack_pointer, to.stack_pointer);
}
void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  // At a function's entry the ABI has the stack pointer 8 below a multiple of 16.
  auto top = (reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15};
  auto** slot = reinterpret_cast<void**>(top - 8);
  *slot = nullptr;
  *--slot = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--slot = nullptr;
  context.stack_pointer = slot;
}
#else
using Context = ucontext_t;
void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

// ---- State --------------------------------------------------------------------------------------

constexpr size_t kStackBytes = 256 * 1024;  // reserved; only what is touched costs memory
constexpr unsigned kStacksPerMapping = 64;
constexpr unsigned kMaxThreads = 1024, kMaxShared = 227 * 1024;
// Blocks of an ordinary launch may run in any order: so many threads are resident at a time. To
// ThreadSanitizer every one is a thread, and the cost of a barrier grows with their square.
constexpr unsigned kResidentThreads = kWeakMemory ? 2048 : 256;

// How far along each block's releases an observer has seen.
using Clock = std::vector<unsigned>;
void join(Clock& clock, const Clock& other) {
  if (clock.size() < other.size()) clock.resize(other.size());
  for (size_t i = 0; i < other.size(); ++i) clock[i] = std::max(clock[i], other[i]);
}
bool covers(const Clock& clock, unsigned block, unsigned release) {
  return block < clock.size() && clock[block] >= release;
}

// One store of two bytes of exchange memory.
struct Version {
  unsigned block, thread;
  unsigned release;  // by which of its block's releases it was published; 0: not yet
  bool synced;       // a block barrier came after it
  uint16_t value;
};
struct Stored {
  uintptr_t address;
  size_t version;
};

struct Barrier {
  unsigned generation = 0;
  unsigned arrived = 0;  // a count of threads, or a mask of lanes
  unsigned mask = 0;
  Site site;
  char order[2];  // of the even and odd generations, for ThreadSanitizer
};

constexpr size_t kSlotBytes = 48;
struct Warp {
  Barrier barriers[32];  // those under way have different masks
  unsigned live = 0;
  unsigned char in[32][kSlotBytes], out[32][kSlotBytes];
};

struct Block {
  Dim3 index;
  unsigned number = 0, live = 0;
  Barrier barrier;
  std::vector<Warp> warps;
  unsigned char* shared = nullptr;
  unsigned releases = 0;
  Clock seen;
  std::vector<Stored> synced_stores;
};

struct PendingCopy {
  void* to;
  unsigned bytes;
  unsigned char data[16];
};

struct Fiber {
  Thread thread;
  Context context;
  char* stack = nullptr;
  unsigned number = 0;  // in its block
  Block* block = nullptr;
  Warp* warp = nullptr;
  bool done = false, spinning = false;
  const unsigned* waits_for = nullptr;  // runnable once *waits_for != waits_while
  unsigned waits_while = 0;
  Site site;
  std::vector<PendingCopy> copies;
  std::vector<size_t> groups;  // ends of the committed groups in copies
  Clock acquired;              // since the last block barrier
  std::vector<Stored> stores;  // since the last block barrier
  void* asan_fake_stack = nullptr;
  void* tsan_fiber = nullptr;

  bool runnable() const { return !done && !(waits_for && *waits_for == waits_while); }
};

struct Scheduler {
  Context main;
  Fiber* current = nullptr;
  void (*body)(const void*) = nullptr;
  const void* body_context = nullptr;
  std::vector<std::unique_ptr<Fiber>> pool;
  char* stacks = nullptr;
  std::string error;
  bool running = false;
  std::unordered_map<uintptr_t, std::vector<Version>> exchange;
  std::unordered_map<const unsigned*, Clock> counters;
  char start_order, end_order;
  void* asan_fake_stack = nullptr;
  const void* asan_bottom = nullptr;
  size_t asan_size = 0;
  void* tsan_fiber = nullptr;
};
Scheduler scheduler;

// ---- Switching fibers ---------------------------------------------------------------------------

void switch_to_main([[maybe_unused]] bool for_good = false) {
  Fiber* fiber = scheduler.current;
#if defined(EMULATOR_ASAN)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber->asan_fake_stack,
                                 scheduler.asan_bottom, scheduler.asan_size);
#endif
#if defined(EMULATOR_TSAN)
  __tsan_switch_to_fiber(scheduler.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  switch_context(fiber->context, scheduler.main);
#if defined(EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(fiber->asan_fake_stack, &scheduler.asan_bottom,
                                  &scheduler.asan_size);
#endif
}

void switch_to(Fiber* fiber) {
  scheduler.current = fiber;
  self = &fiber->thread;
#if defined(EMULATOR_ASAN)
  __sanitizer_start_switch_fiber(&scheduler.asan_fake_stack, fiber->stack, kStackBytes);
#endif
#if defined(EMULATOR_TSAN)
  __tsan_switch_to_fiber(fiber->tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  switch_context(scheduler.main, fiber->context);
#if defined(EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(scheduler.asan_fake_stack, nullptr, nullptr);
#endif
}

std::string describe(const Fiber& fiber) {
  const auto& b = fiber.block->index;
  const auto* path = fiber.site.file_name();
  const auto* slash = std::strrchr(path, '/');
  char text[256];
  std::snprintf(text, sizeof text, "block (%u,%u,%u) thread %u at %s:%u", b.x, b.y, b.z,
                fiber.number, slash ? slash + 1 : path, fiber.site.line());
  return text;
}

// Ends the launch with an error; the fibers are never resumed.
[[noreturn]] void fail(std::string what, const Site& site) {
  Fiber& fiber = *scheduler.current;
  fiber.site = site;
  scheduler.error = std::move(what);  // this frame is left without destructors
  scheduler.error += ": " + describe(fiber);
  switch_to_main(/*for_good=*/true);
  std::abort();
}

void wait_while(const unsigned* value, unsigned old, const Site& site) {
  Fiber* fiber = scheduler.current;
  fiber->waits_for = value, fiber->waits_while = old, fiber->site = site;
  switch_to_main();
}

bool same_place(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::strcmp(a.file_name(), b.file_name()) == 0;
}

// All threads of the block know of each other's stores and acquisitions now.
void complete_block_barrier(Block& block) {
  block.barrier.arrived = 0;
  ++block.barrier.generation;
  if (!kWeakMemory) return;
  for (auto& fiber : scheduler.pool) {
    if (fiber->block != &block) continue;
    for (const auto& stored : fiber->stores) {
      scheduler.exchange[stored.address][stored.version].synced = true;
      block.synced_stores.push_back(stored);
    }
    fiber->stores.clear();
    join(block.seen, fiber->acquired);
    fiber->acquired.clear();
  }
}

constexpr const char* kExitedLane = "the mask of a warp collective names a lane that has exited";

void fiber_entry() {
#if defined(EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.asan_bottom, &scheduler.asan_size);
#endif
  order_after(&scheduler.start_order);
  scheduler.body(scheduler.body_context);
  Fiber* fiber = scheduler.current;
  if (!fiber->copies.empty()) fail("a thread ends with asynchronous copies under way", fiber->site);
  fiber->done = true;
  const unsigned lane_bit = 1u << fiber->thread.lane;
  fiber->warp->live &= ~lane_bit;
  for (const auto& barrier : fiber->warp->barriers) {
    if (barrier.arrived && barrier.mask & lane_bit) fail(kExitedLane, barrier.site);
  }
  order_before(&scheduler.end_order);
  // A barrier waits for the threads that are left.
  Block& block = *fiber->block;
  if (--block.live > 0 && block.barrier.arrived == block.live) complete_block_barrier(block);
  switch_to_main(/*for_good=*/true);
}

// ---- Scheduling ---------------------------------------------------------------------------------

// Runs the fiber once; whether that was more than another poll.
bool step(Fiber* fiber) {
  const bool polled_before = fiber->spinning;
  fiber->waits_for = nullptr, fiber->spinning = false;
  switch_to(fiber);
  if (!scheduler.error.empty()) throw Error(scheduler.error);
  return fiber->done || !fiber->spinning || !polled_before;
}

void throw_stuck(const std::vector<Fiber*>& fibers, const char* what) {
  std::string text = std::string(what) + ":";
  int listed = 0, left = 0;
  for (const Fiber* fiber : fibers) {
    if (fiber->done) continue;
    if (++left <= 8) text += "\n  " + describe(*fiber), ++listed;
  }
  if (left > listed) text += "\n  and " + std::to_string(left - listed) + " more";
  throw Error(text);
}

void run(const std::vector<Fiber*>& fibers, unsigned block_threads) {
  const auto& opts = options();
  std::vector<Fiber*> order = fibers;
  if (opts.order == Order::kReverse) std::reverse(order.begin(), order.end());
  std::mt19937 random(opts.seed);
  const auto all_done = [&] {
    return std::all_of(fibers.begin(), fibers.end(), [](auto* f) { return f->done; });
  };
  for (long idle = 0; !all_done();) {
    if (opts.order == Order::kRandom) std::shuffle(order.begin(), order.end(), random);
    bool any = false, progress = false;
    for (size_t i = 0; i < order.size();) {
      if (opts.order != Order::kSkew) {
        Fiber* fiber = order[i++];
        if (!fiber->runnable()) continue;
        any = true;
        progress |= step(fiber);
        continue;
      }
      for (bool more = true; more;) {
        more = false;
        for (size_t k = i; k < i + block_threads; ++k) {
          if (!order[k]->runnable()) continue;
          any = true;
          more |= step(order[k]);
        }
        progress |= more;
      }
      i += block_threads;
    }
    if (all_done()) break;
    if (!any) throw_stuck(fibers, "deadlock: these threads wait for ever");
    idle = progress ? 0 : idle + 1;
    if (idle > opts.spin_limit)
      throw_stuck(fibers, "livelock: these threads wait or poll for ever");
  }
}

Fiber* fiber_from_pool(size_t k) {
  auto& pool = scheduler.pool;
  if (k == pool.size()) {
    // One mapping for many stacks: the number of mappings is limited.
    if (k % kStacksPerMapping == 0) {
      void* p = mmap(nullptr, kStacksPerMapping * kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) throw std::bad_alloc();
      scheduler.stacks = static_cast<char*>(p);
    }
    pool.push_back(std::make_unique<Fiber>());
    pool.back()->stack = scheduler.stacks + k % kStacksPerMapping * kStackBytes;
#if defined(EMULATOR_TSAN)
    pool.back()->tsan_fiber = __tsan_create_fiber(0);
#endif
  }
  return pool[k].get();
}

// Brings the blocks [first, first + count) to life.
struct Residents {
  std::deque<Block> blocks;
  std::vector<Fiber*> fibers;

  Residents(unsigned first, unsigned count, size_t shared_bytes) {
    const unsigned threads = block_size.count();
    for (unsigned n = first; n < first + count; ++n) {
      Block& block = blocks.emplace_back();
      block.number = n;
      block.index = {n % grid_size.x, n / grid_size.x % grid_size.y, n / grid_size.x / grid_size.y};
      block.live = threads;
      block.warps.resize((threads + 31) / 32);
      if (shared_bytes > 0) {
        void* p = nullptr;
        if (posix_memalign(&p, 128, shared_bytes) != 0) throw std::bad_alloc();
        block.shared = static_cast<unsigned char*>(p);
        std::memset(block.shared, 0xFF, shared_bytes);  // not a number in every format
      }
      for (unsigned t = 0; t < threads; ++t) add(block, t);
    }
    order_before(&scheduler.start_order);
  }

  void add(Block& block, unsigned t) {
    Fiber* fiber = fiber_from_pool(fibers.size());
    const auto stack = fiber->stack;
    const auto tsan_fiber = fiber->tsan_fiber;
    *fiber = Fiber();
    fiber->stack = stack, fiber->tsan_fiber = tsan_fiber;
    fiber->number = t;
    fiber->block = &block;
    fiber->warp = &block.warps[t / 32];
    fiber->warp->live |= 1u << t % 32;
    fiber->thread = {
        {t % block_size.x, t / block_size.x % block_size.y, t / block_size.x / block_size.y},
        block.index,
        t % 32,
        block.shared};
#if defined(EMULATOR_ASAN)
    __asan_unpoison_memory_region(fiber->stack, kStackBytes);  // frames that never returned
#endif
    make_context(fiber->context, fiber->stack, kStackBytes, fiber_entry);
    fibers.push_back(fiber);
  }

  ~Residents() {
    order_after(&scheduler.end_order);
    for (Fiber* fiber : fibers) {
      fiber->block = nullptr;
    }
    for (auto& block : blocks) std::free(block.shared);
  }
};

struct RunningGuard {
  RunningGuard() {
    scheduler.running = true;
    scheduler.error.clear();
#if defined(EMULATOR_TSAN)
    scheduler.tsan_fiber = __tsan_get_current_fiber();
#endif
  }
  ~RunningGuard() {
    scheduler.running = false;
    scheduler.exchange.clear();
    scheduler.counters.clear();
    self = nullptr;
  }
};

}  // namespace

void launch(Dim3 grid, Dim3 block, size_t shared_bytes, bool cooperative, void (*body)(const void*),
            const void* context) {
  if (scheduler.running) throw Error("a kernel is launched from a kernel");
  if (grid.count() == 0 || block.count() == 0) throw Error("invalid configuration: an empty grid");
  if (grid.y > 65535 || grid.z > 65535) throw Error("invalid configuration: grid.y or z > 65535");
  if (block.count() > kMaxThreads) throw Error("invalid configuration: over 1024 threads a block");
  if (shared_bytes > kMaxShared) throw Error("invalid configuration: over 227 KB shared memory");
  const RunningGuard guard;
  grid_size = grid, block_size = block;
  scheduler.body = body, scheduler.body_context = context;
  const unsigned blocks = grid.count();
  const unsigned resident = cooperative ? blocks : std::max(1u, kResidentThreads / block.count());
  for (unsigned first = 0; first < blocks; first += resident) {
    Residents residents(first, std::min(resident, blocks - first), shared_bytes);
    run(residents.fibers, block.count());
  }
  for (const auto& [address, versions] : scheduler.exchange) {
    std::memcpy(reinterpret_cast<void*>(address), &versions.back().value, sizeof(uint16_t));
  }
}

// ---- Block and warp ----------------------------------------------------------------------------

void sync_block(const Site& site) {
  Block& block = *scheduler.current->block;
  Barrier& barrier = block.barrier;
  if (barrier.arrived > 0 && !same_place(barrier.site, site)) {
    fail("divergence: threads of one block meet in different block barriers", site);
  }
  barrier.site = site;
  const unsigned generation = barrier.generation;
  char* order = &barrier.order[generation & 1];
  order_before(order);
  if (++barrier.arrived == block.live) {
    complete_block_barrier(block);
  } else {
    wait_while(&barrier.generation, generation, site);
  }
  order_after(order);
}

namespace {

using Slots = unsigned char[32][kSlotBytes];

// The collective of that mask that is under way, or a free place for it: while some lanes wait for
// the whole warp, others may still have something to do among themselves.
Barrier& barrier_of(Warp& warp, unsigned mask) {
  Barrier* free = nullptr;
  for (auto& barrier : warp.barriers) {
    if (barrier.arrived == 0) {
      if (free == nullptr) free = &barrier;
    } else if (barrier.mask == mask) {
      return barrier;
    }
  }
  return *free;  // each of 32 lanes waits in one at most
}

// Waits for all lanes of the mask. The last one to arrive calls compute() with what each lane
// brought; then every lane takes its result. Orders no memory, as on the device.
template <class Compute>
void warp_collective(unsigned mask, const void* in, size_t in_bytes, void* out, size_t out_bytes,
                     const Site& site, Compute compute) {
  Fiber* fiber = scheduler.current;
  Warp& warp = *fiber->warp;
  const unsigned lane = fiber->thread.lane;
  if (!(mask >> lane & 1u)) fail("the mask of a warp collective lacks the calling lane", site);
  if (mask & ~warp.live) fail(kExitedLane, site);
  Barrier& barrier = barrier_of(warp, mask);
  if (barrier.arrived && !same_place(barrier.site, site)) {
    fail("divergence: lanes of one warp meet in different collectives", site);
  }
  barrier.mask = mask, barrier.site = site;
  copy_bytes(warp.in[lane], in, in_bytes);
  barrier.arrived |= 1u << lane;
  if (barrier.arrived == mask) {
    compute(warp.in, warp.out);
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    wait_while(&barrier.generation, barrier.generation, site);
  }
  copy_bytes(out, warp.out[lane], out_bytes);
}

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float value = exponent == 0    ? std::ldexp(float(fraction), -24)
                : exponent == 31 ? (fraction ? NAN : INFINITY)
                                 : std::ldexp(float(fraction + 1024), exponent - 25);
  return bits & 0x8000 ? -value : value;
}

float from_bits(uint32_t bits) {
  float value;
  copy_bytes(&value, &bits, sizeof value);
  return value;
}

struct Fragments {
  float d[4];
  uint32_t a[4], b[2];
};

double element(MmaType type, const uint32_t* registers, int k) {
  if (type == MmaType::kTf32) return from_bits(registers[k] & 0xFFFFE000u);  // the rest is ignored
  const auto bits = static_cast<uint16_t>(registers[k / 2] >> 16 * (k % 2));
  return type == MmaType::kFloat16 ? half_to_float(bits) : from_bits(uint32_t{bits} << 16);
}

// One lane's 2 x 2 results of m16n8: rows g, g + 8 and columns 2 q, 2 q + 1 for lane 4 g + q.
void mma_lane(MmaType type, unsigned lane, const Slots& in, float (&d)[4]) {
  const auto fragments = [&](unsigned l) { return reinterpret_cast<const Fragments*>(in[l]); };
  const bool tf32 = type == MmaType::kTf32;
  const unsigned g = lane / 4, q = lane % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row_half = i / 2, column = 2 * q + i % 2;
    double sum = fragments(lane)->d[i];
    // k runs over what each of four lanes holds: registers of A alternate between the row halves.
    for (unsigned k4 = 0; k4 < 4; ++k4) {
      const auto* a = fragments(4 * g + k4)->a;
      const auto* b = fragments(4 * column + k4)->b;
      for (unsigned half = 0; half < 2; ++half) {
        const uint32_t* a_register = a + 2 * half + row_half;
        for (int e = 0; e < (tf32 ? 1 : 2); ++e) {
          sum += element(type, a_register, e) * element(type, b + half, e);
        }
      }
    }
    d[i] = static_cast<float>(sum);
  }
}

}  // namespace

void sync_warp(unsigned mask, const Site& site) {
  Warp& warp = *scheduler.current->warp;
  Barrier& barrier = barrier_of(warp, mask);
  char* order = &barrier.order[barrier.generation & 1];
  order_before(order);
  warp_collective(mask, nullptr, 0, nullptr, 0, site, [](const Slots&, Slots&) {});
  order_after(order);
}

void shuffle(Shuffle kind, unsigned mask, void* value, size_t bytes, unsigned argument,
             const Site& site) {
  const unsigned lane = scheduler.current->thread.lane;
  unsigned source = lane;
  if (kind == Shuffle::kIndex) source = argument % 32;
  if (kind == Shuffle::kXor) source = (lane ^ argument) % 32;
  if (kind == Shuffle::kDown && lane + argument < 32) source = lane + argument;
  if (kind == Shuffle::kUp && lane >= argument) source = lane - argument;
  if (!(mask >> source & 1u)) fail("a shuffle reads a lane that is not in its mask", site);
  // Every lane brings its value; the last one hands out all of them at once.
  struct {
    unsigned source, bytes;
    unsigned char value[16];
  } operand{source, static_cast<unsigned>(bytes), {}};
  copy_bytes(operand.value, value, bytes);
  warp_collective(
      mask, &operand, sizeof operand, value, bytes, site, [mask](const Slots& in, Slots& out) {
        for (unsigned l = 0; l < 32; ++l) {
          if (!(mask >> l & 1u)) continue;
          const auto* mine = reinterpret_cast<const decltype(operand)*>(in[l]);
          const auto* theirs = reinterpret_cast<const decltype(operand)*>(in[mine->source]);
          copy_bytes(out[l], theirs->value, mine->bytes);
        }
      });
}

unsigned ballot(unsigned mask, bool predicate, const Site& site) {
  unsigned result = 0;
  warp_collective(mask, &predicate, sizeof predicate, &result, sizeof result, site,
                  [mask](const Slots& in, Slots& out) {
                    unsigned votes = 0;
                    for (unsigned l = 0; l < 32; ++l) {
                      if (mask >> l & 1u && in[l][0]) votes |= 1u << l;
                    }
                    for (auto& slot : out) copy_bytes(slot, &votes, sizeof votes);
                  });
  return result;
}

void mma(MmaType type, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
         const Site& site) {
  Fragments operands;
  copy_bytes(operands.d, d, sizeof d);
  copy_bytes(operands.a, a, sizeof a);
  copy_bytes(operands.b, b, sizeof b);
  warp_collective(kAllLanes, &operands, sizeof operands, d, sizeof d, site,
                  [type](const Slots& in, Slots& out) {
                    for (unsigned l = 0; l < 32; ++l) {
                      float result[4];
                      mma_lane(type, l, in, result);
                      copy_bytes(out[l], result, sizeof result);
                    }
                  });
}

void ldmatrix(int matrices, bool transpose, const uint32_t (&row)[4], uint32_t* out,
              const Site& site) {
  warp_collective(
      kAllLanes, row, sizeof row, out, sizeof(uint32_t) * matrices, site,
      [=](const Slots& in, Slots& slots) {
        const auto value = [&](int matrix, unsigned r, unsigned c) {
          return reinterpret_cast<const uint16_t*>(in[8 * matrix + r])[transpose ? 0 : c];
        };
        for (unsigned l = 0; l < 32; ++l) {
          for (int m = 0; m < matrices; ++m) {
            uint16_t pair[2];
            for (unsigned e = 0; e < 2; ++e) {
              const unsigned r = l / 4, c = 2 * (l % 4) + e;
              pair[e] =
                  transpose ? reinterpret_cast<const uint16_t*>(in[8 * m + c])[r] : value(m, r, c);
            }
            copy_bytes(slots[l] + sizeof pair * m, pair, sizeof pair);
          }
        }
      });
}

// ---- Asynchronous copies -----------------------------------------------------------------------

void cp_async(void* to, const void* data, size_t bytes) {
  PendingCopy copy{to, static_cast<unsigned>(bytes), {}};
  copy_bytes(copy.data, data, bytes);
  scheduler.current->copies.push_back(copy);
}

void cp_async_commit() {
  Fiber* fiber = scheduler.current;
  fiber->groups.push_back(fiber->copies.size());
}

void cp_async_wait(int groups_left) {
  Fiber* fiber = scheduler.current;
  auto& groups = fiber->groups;
  if (static_cast<int>(groups.size()) <= groups_left) return;
  const size_t finished = groups.size() - groups_left, end = groups[finished - 1];
  for (size_t i = 0; i < end; ++i) {
    copy_bytes(fiber->copies[i].to, fiber->copies[i].data, fiber->copies[i].bytes);
  }
  fiber->copies.erase(fiber->copies.begin(), fiber->copies.begin() + end);
  groups.erase(groups.begin(), groups.begin() + finished);
  for (auto& group : groups) group -= end;
}

// ---- Exchange memory ---------------------------------------------------------------------------

void exchange_store(void* to, const void* value, size_t bytes, const Site& site) {
  const auto address = reinterpret_cast<uintptr_t>(to);
  if (address % 2 || bytes % 2) fail("exchange memory is stored in units of two bytes", site);
  Fiber* fiber = scheduler.current;
  for (size_t i = 0; i < bytes; i += 2) {
    uint16_t half;
    copy_bytes(&half, static_cast<const char*>(value) + i, 2);
    auto& versions = scheduler.exchange[address + i];
    fiber->stores.push_back({address + i, versions.size()});
    versions.push_back({fiber->block->number, fiber->number, 0, false, half});
  }
}

void exchange_load(const void* from, void* value, size_t bytes, const Site& site) {
  const auto address = reinterpret_cast<uintptr_t>(from);
  if (address % 2 || bytes % 2) fail("exchange memory is loaded in units of two bytes", site);
  const Fiber& fiber = *scheduler.current;
  const Block& block = *fiber.block;
  const auto visible = [&](const Version& v) {
    if (v.block == block.number) return v.synced || v.thread == fiber.number;
    return v.release > 0 &&
           (covers(block.seen, v.block, v.release) || covers(fiber.acquired, v.block, v.release));
  };
  for (size_t i = 0; i < bytes; i += 2) {
    auto* to = static_cast<char*>(value) + i;
    copy_bytes(to, reinterpret_cast<const void*>(address + i), 2);
    const auto found = scheduler.exchange.find(address + i);
    if (found == scheduler.exchange.end()) continue;
    const auto& versions = found->second;
    if (options().report_stale_loads && !visible(versions.back())) {
      const auto& last = versions.back();
      fail("a load of exchange memory is not ordered after the store by thread " +
               std::to_string(last.thread) + " of block " + std::to_string(last.block) +
               (last.release || last.block == block.number ? " (it was published; no acquire or "
                                                             "block barrier leads here)"
                                                           : " (it was not published)"),
           site);
    }
    const auto seen = std::find_if(versions.rbegin(), versions.rend(), visible);
    if (seen != versions.rend()) copy_bytes(to, &seen->value, 2);
  }
}

void release(const unsigned* counter) {
  if (!kWeakMemory) return;
  Fiber* fiber = scheduler.current;
  Block& block = *fiber->block;
  ++block.releases;
  for (auto* stores : {&fiber->stores, &block.synced_stores}) {
    for (const auto& stored : *stores) {
      scheduler.exchange[stored.address][stored.version].release = block.releases;
    }
  }
  block.synced_stores.clear();
  // fiber->stores stay: other threads of the block see them only after a barrier.
  Clock& clock = scheduler.counters[counter];
  join(clock, block.seen);
  join(clock, fiber->acquired);
  if (clock.size() <= block.number) clock.resize(block.number + 1);
  clock[block.number] = block.releases;
}

void acquire(const unsigned* counter) {
  if (!kWeakMemory) return;
  const auto found = scheduler.counters.find(counter);
  if (found != scheduler.counters.end()) join(scheduler.current->acquired, found->second);
}

void spin(const Site& site) {
  Fiber* fiber = scheduler.current;
  fiber->spinning = true, fiber->site = site;
  switch_to_main();
}

}  // namespace emulator
