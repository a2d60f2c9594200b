// Runs CUDA kernels as plain C++ on one OS thread: one fiber per CUDA thread, so that a run is
// deterministic for a given schedule. Kernels reach it through csrc/cuda/device.cuh alone; what is
// and what is not modelled is in docs/emulator.md.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <stdexcept>
#include <type_traits>
#include <utility>

namespace emulator {

// Under ThreadSanitizer exchange memory is plain memory, and its races are for TSan to find.
#if defined(EMULATOR_TSAN)
inline constexpr bool kWeakMemory = false;
#else
inline constexpr bool kWeakMemory = true;
#endif

// In which order the threads of all resident blocks run. Skew lets one block run as far ahead of
// the others as synchronisation allows.
enum class Order { kForward, kReverse, kRandom, kSkew };

struct Options {
  Order order = Order::kForward;
  uint32_t seed = 0;
  // So many rounds in a row in which every runnable thread only polls are a livelock.
  long spin_limit = 1000;
  // A load of exchange memory that is not ordered after the last store is an error; otherwise it
  // sees the last value that it is ordered after.
  bool report_stale_loads = true;
};
Options& options();

// What a kernel did wrong. Thrown by launch(); the kernel is abandoned.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What the next launch returns instead of running.
inline cudaError_t injected_error = cudaSuccess;
inline cudaError_t take_injected_error() { return std::exchange(injected_error, cudaSuccess); }

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  unsigned count() const { return x * y * z; }
};

// The calling CUDA thread.
struct Thread {
  Dim3 thread, block;
  unsigned lane;
  unsigned char* shared;  // of exactly the size that the launch asked for, filled with 0xFF
};
extern Thread* self;
extern Dim3 block_size, grid_size;

using Site = std::source_location;

// Runs body(context) once per CUDA thread.
void launch(Dim3 grid, Dim3 block, size_t shared_bytes, bool cooperative,
            void (*body)(const void* context), const void* context);

// ---- Block and warp ----------------------------------------------------------------------------

void sync_block(const Site& site);
void sync_warp(unsigned mask, const Site& site);

enum class Shuffle { kIndex, kXor, kDown, kUp };
void shuffle(Shuffle kind, unsigned mask, void* value, size_t bytes, unsigned argument,
             const Site& site);
unsigned ballot(unsigned mask, bool predicate, const Site& site);

// d += a b on fragments laid out as PTX's mma.sync says. Products are exact, sums are rounded once.
enum class MmaType { kFloat16, kBFloat16, kTf32 };
void mma(MmaType type, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
         const Site& site);
// `row` is what lies at the address that this lane names; matrices <= 4 of 8 x 8 16-bit values.
void ldmatrix(int matrices, bool transpose, const uint32_t (&row)[4], uint32_t* out,
              const Site& site);

// ---- Asynchronous copies: the data arrives at the wait, until then the destination is garbage
// -----

void cp_async(void* to, const void* data, size_t bytes);
void cp_async_commit();
void cp_async_wait(int groups_left);

// ---- Exchange memory: what blocks of one launch tell each other ---------------------------------

void exchange_store(void* to, const void* value, size_t bytes, const Site& site);
void exchange_load(const void* from, void* value, size_t bytes, const Site& site);
// Makes this thread's stores, and those that a block barrier has ordered before, visible to whoever
// acquires the counter.
void release(const unsigned* counter);
void acquire(const unsigned* counter);
// Lets other threads run before a poll is repeated.
void spin(const Site& site);

}  // namespace emulator
