// The device as the kernels see it. The only file that knows whether nvcc compiles them for a GPU
// or a C++ compiler for the emulator of tests/emulator: everything that is not plain C++ is here.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#if defined(LSTMX_EMULATED)
#include "../cpu/half.h"
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "../cells/math.h"

namespace lstmx::cuda {

// ---- Storage types -----------------------------------------------------------------------------

#if defined(LSTMX_EMULATED)
using lstmx::BFloat16;
using lstmx::Float16;
#else
using BFloat16 = __nv_bfloat16;
using Float16 = __half;

LSTMX_HD float widen(float x) { return x; }
LSTMX_HD double widen(double x) { return x; }
LSTMX_HD float widen(BFloat16 x) { return __bfloat162float(x); }
LSTMX_HD float widen(Float16 x) { return __half2float(x); }

LSTMX_HD void narrow(float x, float& out) { out = x; }
LSTMX_HD void narrow(double x, double& out) { out = x; }
LSTMX_HD void narrow(float x, BFloat16& out) { out = __float2bfloat16_rn(x); }
LSTMX_HD void narrow(float x, Float16& out) { out = __float2half_rn(x); }
#endif

// The type that arithmetic on a storage type is done in.
template <class Storage>
using ComputeOf = std::conditional_t<std::is_same_v<Storage, double>, double, float>;

// ---- Kernels and their launch ------------------------------------------------------------------

struct LaunchSize {
  unsigned grid_x, grid_y;
  unsigned threads;
  size_t shared_bytes = 0;
  bool cooperative = false;  // all blocks are resident at once and may wait for each other
};

#if defined(LSTMX_EMULATED)

#define LSTMX_KERNEL(threads) inline void
#define LSTMX_DEVICE inline
#define LSTMX_UNROLL

template <class Params>
cudaError_t launch(void (*kernel)(Params), const LaunchSize& size, cudaStream_t,
                   const std::type_identity_t<Params>& params) {
  if (const cudaError_t injected = emulator::take_injected_error()) return injected;
  struct Context {
    void (*kernel)(Params);
    const Params& params;
  } context{kernel, params};
  emulator::launch(
      {size.grid_x, size.grid_y, 1}, {size.threads, 1, 1}, size.shared_bytes, size.cooperative,
      [](const void* c) {
        const auto* call = static_cast<const Context*>(c);
        call->kernel(call->params);
      },
      &context);
  return cudaSuccess;
}

#else

#define LSTMX_KERNEL(threads) __global__ void __launch_bounds__(threads)
#define LSTMX_DEVICE __device__ __forceinline__
#define LSTMX_UNROLL _Pragma("unroll")

// On the current device. Neither waits nor allocates, so a CUDA graph can capture it.
template <class Params>
cudaError_t launch(void (*kernel)(Params), const LaunchSize& size, cudaStream_t stream,
                   const std::type_identity_t<Params>& params) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (size.shared_bytes > kWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(size.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = size.cooperative;
  cudaLaunchConfig_t config{};
  config.gridDim = {size.grid_x, size.grid_y, 1};
  config.blockDim = {size.threads, 1, 1};
  config.dynamicSmemBytes = size.shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  Params copy = params;
  void* arguments[] = {&copy};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments);
}

#endif

// ---- Where a thread is -------------------------------------------------------------------------

#if defined(LSTMX_EMULATED)
LSTMX_DEVICE unsigned thread_index() { return emulator::self->thread.x; }
LSTMX_DEVICE unsigned block_x() { return emulator::self->block.x; }
LSTMX_DEVICE unsigned block_y() { return emulator::self->block.y; }
LSTMX_DEVICE unsigned block_threads() { return emulator::block_size.x; }
LSTMX_DEVICE unsigned grid_x() { return emulator::grid_size.x; }
LSTMX_DEVICE unsigned grid_y() { return emulator::grid_size.y; }
#else
LSTMX_DEVICE unsigned thread_index() { return threadIdx.x; }
LSTMX_DEVICE unsigned block_x() { return blockIdx.x; }
LSTMX_DEVICE unsigned block_y() { return blockIdx.y; }
LSTMX_DEVICE unsigned block_threads() { return blockDim.x; }
LSTMX_DEVICE unsigned grid_x() { return gridDim.x; }
LSTMX_DEVICE unsigned grid_y() { return gridDim.y; }
#endif
LSTMX_DEVICE unsigned lane_index() { return thread_index() % 32; }
LSTMX_DEVICE unsigned warp_index() { return thread_index() / 32; }

// ---- Block and warp ----------------------------------------------------------------------------

inline constexpr unsigned kAllLanes = 0xFFFFFFFFu;

#if defined(LSTMX_EMULATED)

using Site = emulator::Site;

// The block's dynamic shared memory, aligned to 16 bytes.
template <class T>
LSTMX_DEVICE T* shared_memory() {
  return reinterpret_cast<T*>(emulator::self->shared);
}

LSTMX_DEVICE void sync_block(Site site = Site::current()) { emulator::sync_block(site); }
LSTMX_DEVICE void sync_warp(unsigned mask = kAllLanes, Site site = Site::current()) {
  emulator::sync_warp(mask, site);
}
template <class T>
LSTMX_DEVICE T shuffle(T value, unsigned lane, unsigned mask = kAllLanes,
                       Site site = Site::current()) {
  emulator::shuffle(emulator::Shuffle::kIndex, mask, &value, sizeof value, lane, site);
  return value;
}
template <class T>
LSTMX_DEVICE T shuffle_xor(T value, unsigned lanes, unsigned mask = kAllLanes,
                           Site site = Site::current()) {
  emulator::shuffle(emulator::Shuffle::kXor, mask, &value, sizeof value, lanes, site);
  return value;
}
LSTMX_DEVICE unsigned vote(bool predicate, unsigned mask = kAllLanes, Site site = Site::current()) {
  return emulator::ballot(mask, predicate, site);
}
LSTMX_DEVICE unsigned atomic_add(unsigned* counter, unsigned value) {
  return __atomic_fetch_add(counter, value, __ATOMIC_RELAXED);
}
// Into the cache of the whole device.
LSTMX_DEVICE void prefetch(const void* p) {
  (void)*static_cast<const volatile char*>(p);  // an address that must exist, for the sanitizers
}

#else

template <class T>
LSTMX_DEVICE T* shared_memory() {
  extern __shared__ __align__(16) unsigned char lstmx_shared_memory[];
  return reinterpret_cast<T*>(lstmx_shared_memory);
}

LSTMX_DEVICE void sync_block() { __syncthreads(); }
LSTMX_DEVICE void sync_warp(unsigned mask = kAllLanes) { __syncwarp(mask); }
template <class T>
LSTMX_DEVICE T shuffle(T value, unsigned lane, unsigned mask = kAllLanes) {
  return __shfl_sync(mask, value, static_cast<int>(lane));
}
template <class T>
LSTMX_DEVICE T shuffle_xor(T value, unsigned lanes, unsigned mask = kAllLanes) {
  return __shfl_xor_sync(mask, value, static_cast<int>(lanes));
}
LSTMX_DEVICE unsigned vote(bool predicate, unsigned mask = kAllLanes) {
  return __ballot_sync(mask, predicate);
}
LSTMX_DEVICE unsigned atomic_add(unsigned* counter, unsigned value) {
  return atomicAdd(counter, value);
}
LSTMX_DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

#endif

// ---- Copies from global to shared memory that arrive at the wait --------------------------------

#if defined(LSTMX_EMULATED)

// 16 bytes, both ends aligned; zeros if not `valid`, and then nothing is read.
LSTMX_DEVICE void cp_async16(void* shared, const void* global, bool valid = true) {
  unsigned char data[16] = {};
  // In plain sight of the sanitizers; until the wait the destination holds garbage.
  for (int i = 0; i < 16; ++i) {
    if (valid) data[i] = static_cast<const unsigned char*>(global)[i];
    static_cast<unsigned char*>(shared)[i] = 0xFF;
  }
  emulator::cp_async(shared, data, sizeof data);
}
LSTMX_DEVICE void cp_async_commit() { emulator::cp_async_commit(); }
// Until at most kLeft of this thread's groups are under way.
template <int kLeft>
LSTMX_DEVICE void cp_async_wait() {
  emulator::cp_async_wait(kLeft);
}

#else

LSTMX_DEVICE unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}
LSTMX_DEVICE void cp_async16(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
LSTMX_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
LSTMX_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

#endif

// ---- Matrices in the registers of a warp --------------------------------------------------------

// d [16, 8] += a [16, k] b [k, 8], k = 16 for 16-bit types and 8 for TF32. Lane 4 g + q holds of d
// rows g and g + 8, columns 2 q and 2 q + 1; of a and b what PTX's mma.sync says.
#if defined(LSTMX_EMULATED)

LSTMX_DEVICE void mma_float16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              Site site = Site::current()) {
  emulator::mma(emulator::MmaType::kFloat16, d, a, b, site);
}
LSTMX_DEVICE void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                               Site site = Site::current()) {
  emulator::mma(emulator::MmaType::kBFloat16, d, a, b, site);
}
LSTMX_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                           Site site = Site::current()) {
  emulator::mma(emulator::MmaType::kTf32, d, a, b, site);
}
// To nearest, ties away from zero.
LSTMX_DEVICE uint32_t to_tf32(float x) { return (bit_cast<uint32_t>(x) + 0x1000u) & 0xFFFFE000u; }
// kCount 8 x 8 matrices of 16-bit values; lane 8 m + r names row r of matrix m (16 bytes in shared
// memory), and gets elements 2 q, 2 q + 1 of row g of each: of its transpose if kTranspose.
template <int kCount, bool kTranspose>
LSTMX_DEVICE void ldmatrix(uint32_t (&out)[kCount], const void* row, Site site = Site::current()) {
  uint32_t bits[4] = {};
  if (static_cast<int>(lane_index()) < 8 * kCount) {
    for (int i = 0; i < 4; ++i) bits[i] = static_cast<const uint32_t*>(row)[i];
  }
  emulator::ldmatrix(kCount, kTranspose, bits, out, site);
}

#else

LSTMX_DEVICE void mma_float16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
LSTMX_DEVICE void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
LSTMX_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
LSTMX_DEVICE uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}
template <int kCount, bool kTranspose>
LSTMX_DEVICE void ldmatrix(uint32_t (&out)[kCount], const void* row) {
  const unsigned address = shared_address(row);
  if constexpr (kCount == 4 && !kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kCount == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (!kTranspose) {
    static_assert(kCount == 2);
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(address)
                 : "memory");
  } else {
    static_assert(kCount == 2);
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(address)
                 : "memory");
  }
}

#endif

// ---- Between the blocks of a cooperative launch -------------------------------------------------

// What blocks tell each other goes through memory that nobody can dereference: stored and loaded in
// units of 16 bits or more, ordered by release and acquire on a counter, never cached close to an
// SM.
template <class T>
class Exchange {
  static_assert(sizeof(T) % 2 == 0 && sizeof(T) <= 16);

 public:
  LSTMX_HD explicit Exchange(T* data) : data_(data) {}

#if defined(LSTMX_EMULATED)
  LSTMX_DEVICE void store(int64_t index, T value, Site site = Site::current()) const {
    if (emulator::kWeakMemory) {
      emulator::exchange_store(checked(index), &value, sizeof value, site);
    } else {
      data_[index] = value;
    }
  }
  LSTMX_DEVICE T load(int64_t index, Site site = Site::current()) const {
    if (!emulator::kWeakMemory) return data_[index];
    T value;
    emulator::exchange_load(checked(index), &value, sizeof value, site);
    return value;
  }

 private:
  // An access in plain sight of AddressSanitizer.
  LSTMX_DEVICE T* checked(int64_t index) const {
    (void)*reinterpret_cast<const volatile char*>(data_ + index);
    return data_ + index;
  }
#else
  LSTMX_DEVICE void store(int64_t index, T value) const { __stcg(data_ + index, value); }
  LSTMX_DEVICE T load(int64_t index) const { return __ldcg(data_ + index); }
#endif

 private:
  T* data_;
};

#if defined(LSTMX_EMULATED)

// Adds to the counter; whoever acquires it then sees what this thread stored, or saw, before.
LSTMX_DEVICE void red_release(unsigned* counter, unsigned value) {
  emulator::release(counter);
  __atomic_fetch_add(counter, value, __ATOMIC_RELEASE);
}
LSTMX_DEVICE unsigned load_acquire(const unsigned* counter) {
  const unsigned value = __atomic_load_n(counter, __ATOMIC_ACQUIRE);
  emulator::acquire(counter);
  return value;
}
LSTMX_DEVICE void poll_pause(Site site = Site::current()) { emulator::spin(site); }

#else

LSTMX_DEVICE void red_release(unsigned* counter, unsigned value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}
LSTMX_DEVICE unsigned load_acquire(const unsigned* counter) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}
LSTMX_DEVICE void poll_pause() { __nanosleep(20); }

#endif

// Waits for all blocks of a cooperative launch. `counter` starts at 0; `round` counts the calls,
// from 1 on.
LSTMX_DEVICE void sync_grid(unsigned* counter, unsigned round) {
  sync_block();
  if (thread_index() == 0) {
    red_release(counter, 1);
    while (load_acquire(counter) < round * grid_x() * grid_y()) poll_pause();
  }
  sync_block();
}

}  // namespace lstmx::cuda
