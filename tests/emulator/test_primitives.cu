// What csrc/cuda/device.cuh promises, one primitive at a time, on values for which every result is
// exact. Runs under the emulator, and built by nvcc on a GPU: both must say the same.
#include <algorithm>
#include <cmath>
#include <limits>

#include "check.h"
#include "cuda/device.cuh"
#include "philox.h"

using namespace lstmx;
using namespace lstmx::cuda;

namespace {

// Memory that host and device both see.
template <class T>
class Shared {
 public:
#if defined(LSTMX_EMULATED)
  explicit Shared(int count) : data_(new T[count]) {}
  ~Shared() { delete[] data_; }
#else
  explicit Shared(int count) {
    void* memory = nullptr;
    CHECK(cudaMallocManaged(&memory, count * sizeof(T)) == cudaSuccess);
    data_ = static_cast<T*>(memory);
  }
  ~Shared() { cudaFree(data_); }
#endif
  Shared(const Shared&) = delete;
  T* get() const { return data_; }
  T& operator[](int i) const { return data_[i]; }

 private:
  T* data_;
};

template <class Params>
void run(void (*kernel)(Params), const LaunchSize& size, const Params& params) {
  CHECK(launch(kernel, size, nullptr, params) == cudaSuccess);
#if !defined(LSTMX_EMULATED)
  CHECK(cudaDeviceSynchronize() == cudaSuccess);
#endif
}

// ---- Warp and block
// ------------------------------------------------------------------------------

struct WarpParams {
  int *from_three, *from_neighbour, *half, *reversed;
  unsigned *votes, *count;
};

LSTMX_KERNEL(64) warp_kernel(WarpParams p) {
  const int t = static_cast<int>(thread_index());
  int* shared = shared_memory<int>();
  p.from_three[t] = shuffle(100 + t, 3);
  p.from_neighbour[t] = shuffle_xor(100 + t, 1);
  p.votes[t] = vote(t % 3 == 0);
  p.half[t] = -1;
  if (lane_index() < 16) p.half[t] = shuffle_xor(t, 8, 0xFFFFu);
  sync_warp();
  shared[t] = t;
  sync_block();
  p.reversed[t] = shared[63 - t];
  atomic_add(p.count, 2);
}

}  // namespace

TEST(warp_and_block) {
  Shared<int> from_three(64), from_neighbour(64), half(64), reversed(64);
  Shared<unsigned> votes(64), count(1);
  count[0] = 1;
  run(warp_kernel, {1, 1, 64, 64 * sizeof(int)},
      WarpParams{from_three.get(), from_neighbour.get(), half.get(), reversed.get(), votes.get(),
                 count.get()});
  CHECK(count[0] == 129);
  for (int t = 0; t < 64; ++t) {
    const int warp = t / 32 * 32, lane = t % 32;
    CHECK(from_three[t] == 100 + warp + 3);
    CHECK(from_neighbour[t] == 100 + (t ^ 1));
    CHECK(half[t] == (lane < 16 ? (t ^ 8) : -1));
    CHECK(reversed[t] == 63 - t);
    unsigned expected = 0;
    for (int l = 0; l < 32; ++l) expected |= unsigned{(warp + l) % 3 == 0} << l;
    CHECK(votes[t] == expected);
  }
}

// ---- Asynchronous copies
// -------------------------------------------------------------------------

namespace {

struct CopyParams {
  const float* in;  // [2, 32, 4]
  float* out;       // [3, 32, 4]
};

LSTMX_KERNEL(32) copy_kernel(CopyParams p) {
  float* shared = shared_memory<float>();
  const int t = static_cast<int>(thread_index());
  for (int group = 0; group < 3; ++group) {
    cp_async16(shared + group * 128 + 4 * t, p.in + (group % 2) * 128 + 4 * t, group < 2);
    cp_async_commit();
  }
  const auto hand_on = [&](int group) {
    sync_block();  // read what a neighbour has copied
    for (int i = 0; i < 4; ++i) {
      p.out[group * 128 + 4 * t + i] = shared[group * 128 + 4 * ((t + 1) % 32) + i];
    }
  };
  cp_async_wait<2>();
  hand_on(0);
  cp_async_wait<0>();
  hand_on(1);
  hand_on(2);
}

}  // namespace

TEST(asynchronous_copies) {
  Shared<float> in(256), out(384);
  for (int i = 0; i < 256; ++i) in[i] = float(i);
  run(copy_kernel, {1, 1, 32, 384 * sizeof(float)}, CopyParams{in.get(), out.get()});
  for (int group = 0; group < 3; ++group) {
    for (int i = 0; i < 128; ++i) {
      const float copied = group < 2 ? float(group * 128 + (i + 4) % 128) : 0;  // invalid: zero
      CHECK(out[group * 128 + i] == copied);
    }
  }
}

// ---- Matrices
// ------------------------------------------------------------------------------------

namespace {

LSTMX_HD float small_integer(int row, int column) { return float((row * 7 + column * 5) % 13 - 6); }

struct MmaParams {
  float* out;  // [3, 16, 8]: float16, bfloat16, TF32
};

// Fragments as PTX lays them out: A's registers hold rows g, g + 8 of the first half of k, then of
// the second; B's the two halves of k.
template <class T, class Mma>
LSTMX_DEVICE void mma_once(Mma mma, float* out) {
  constexpr int kPerRegister = 4 / sizeof(T), kHalf = 4 * kPerRegister;
  const int g = static_cast<int>(lane_index()) / 4, q = static_cast<int>(lane_index()) % 4;
  const auto pack = [&](auto value) {
    T elements[kPerRegister];
    for (int e = 0; e < kPerRegister; ++e) narrow(value(e), elements[e]);
    uint32_t bits;
    memcpy(&bits, elements, sizeof bits);
    return bits;
  };
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) {
    a[i] = pack([&](int e) {
      return small_integer(g + 8 * (i % 2), kHalf * (i / 2) + q * kPerRegister + e);
    });
  }
  for (int i = 0; i < 2; ++i) {
    b[i] = pack([&](int e) { return small_integer(kHalf * i + q * kPerRegister + e + 3, g); });
  }
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = float(g + i);
  mma(d, a, b);
  for (int i = 0; i < 4; ++i) out[(g + 8 * (i / 2)) * 8 + 2 * q + i % 2] = d[i];
}

LSTMX_KERNEL(32) mma_kernel(MmaParams p) {
  mma_once<Float16>([](auto& d, auto& a, auto& b) { mma_float16(d, a, b); }, p.out);
  mma_once<BFloat16>([](auto& d, auto& a, auto& b) { mma_bfloat16(d, a, b); }, p.out + 128);
  mma_once<float>([](auto& d, auto& a, auto& b) { mma_tf32(d, a, b); }, p.out + 256);
}

struct LoadParams {
  uint16_t* out;  // [lane, 12, 2]
};

LSTMX_KERNEL(32) load_kernel(LoadParams p) {
  uint16_t* shared = shared_memory<uint16_t>();  // four matrices, one after another
  const int lane = static_cast<int>(lane_index());
  for (int i = 0; i < 8; ++i) shared[lane * 8 + i] = static_cast<uint16_t>(lane * 8 + i);
  sync_block();
  uint32_t four[4], turned[4], two[2], two_turned[2];
  ldmatrix<4, false>(four, shared + lane * 8);
  ldmatrix<4, true>(turned, shared + lane * 8);
  ldmatrix<2, false>(two, shared + (lane % 16) * 8);
  ldmatrix<2, true>(two_turned, shared + (lane % 16) * 8);
  const auto write = [&](int i, uint32_t bits) {
    p.out[(lane * 12 + i) * 2] = static_cast<uint16_t>(bits);
    p.out[(lane * 12 + i) * 2 + 1] = static_cast<uint16_t>(bits >> 16);
  };
  for (int i = 0; i < 4; ++i) write(i, four[i]), write(4 + i, turned[i]);
  for (int i = 0; i < 2; ++i) write(8 + i, two[i]), write(10 + i, two_turned[i]);
}

}  // namespace

TEST(mma) {
  Shared<float> out(384);
  run(mma_kernel, {1, 1, 32}, MmaParams{out.get()});
  for (int type = 0; type < 3; ++type) {
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        float sum = float(row % 8 + row / 8 * 2 + column % 2);
        for (int k = 0; k < (type == 2 ? 8 : 16); ++k) {
          sum += small_integer(row, k) * small_integer(k + 3, column);
        }
        CHECK(out[type * 128 + row * 8 + column] == sum);
      }
    }
  }
}

TEST(ldmatrix) {
  Shared<uint16_t> out(32 * 24);
  run(load_kernel, {1, 1, 32, 256 * sizeof(uint16_t)}, LoadParams{out.get()});
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < 12; ++i) {
      const bool turned = (i >= 4 && i < 8) || i >= 10;
      const int matrix = i < 8 ? i % 4 : i % 2;
      for (int e = 0; e < 2; ++e) {
        const int row = turned ? 2 * q + e : g, column = turned ? g : 2 * q + e;
        CHECK(out[(lane * 12 + i) * 2 + e] == matrix * 64 + row * 8 + column);
      }
    }
  }
}

// ---- Conversions
// ---------------------------------------------------------------------------------

namespace {

struct ConvertParams {
  int count;
  const float* in;
  float *bfloat16, *float16;
  uint32_t* tf32;
};

LSTMX_KERNEL(32) convert_kernel(ConvertParams p) {
  for (int i = static_cast<int>(thread_index()); i < p.count; i += 32) {
    BFloat16 b;
    Float16 h;
    narrow(p.in[i], b);
    narrow(p.in[i], h);
    p.bfloat16[i] = widen(b), p.float16[i] = widen(h);
    p.tf32[i] = to_tf32(p.in[i]);
  }
}

}  // namespace

TEST(conversions) {
  struct Row {
    float in, bfloat16, float16;
    uint32_t tf32;
  };
  constexpr float inf = std::numeric_limits<float>::infinity();
  const Row rows[] = {
      {1.0f, 1.0f, 1.0f, 0x3F800000u},
      {1.00390625f, 1.0f, 1.00390625f, 0x3F808000u},  // a tie of bfloat16 goes to even
      {1.01171875f, 1.015625f, 1.01171875f, 0x3F818000u},
      {65504.0f, 65536.0f, 65504.0f, 0x477FE000u},
      {65520.0f, 65536.0f, inf, 0x47800000u},  // overflow of float16; TF32 ties go away
      {-65519.0f, -65536.0f, -65504.0f, 0xC77FE000u},
      {5.9604645e-8f, 5.9604645e-8f, 5.9604645e-8f, 0x33800000u},  // float16's least
      {2.9802322e-8f, 2.9802322e-8f, 0.0f, 0x33000000u},
      {-0.0f, -0.0f, -0.0f, 0x80000000u},
      {inf, inf, inf, 0x7F800000u},
  };
  constexpr int count = sizeof rows / sizeof rows[0];
  Shared<float> in(count + 1), bfloat16(count + 1), float16(count + 1);
  Shared<uint32_t> tf32(count + 1);
  for (int i = 0; i < count; ++i) in[i] = rows[i].in;
  in[count] = std::numeric_limits<float>::quiet_NaN();
  run(convert_kernel, {1, 1, 32},
      ConvertParams{count + 1, in.get(), bfloat16.get(), float16.get(), tf32.get()});
  for (int i = 0; i < count; ++i) {
    CHECK(bfloat16[i] == rows[i].bfloat16);
    CHECK(float16[i] == rows[i].float16);
    CHECK(std::signbit(float16[i]) == std::signbit(rows[i].float16));
    CHECK(tf32[i] == rows[i].tf32);
  }
  CHECK(std::isnan(bfloat16[count]));
  CHECK(std::isnan(float16[count]));
}

// ---- Between blocks
// ------------------------------------------------------------------------------

namespace {

constexpr int kRing = 6, kRounds = 4;

struct RingParams {
  float* memory;  // [kRounds + 1, kRing, 32]
  unsigned* counter;
};

// Every block adds 1 to what its neighbour wrote in the round before.
LSTMX_KERNEL(32) ring_kernel(RingParams p) {
  const Exchange<float> memory(p.memory);
  const int lane = static_cast<int>(lane_index()), block = static_cast<int>(block_x());
  for (int round = 0; round <= kRounds; ++round) {
    float value = float(100 * block + lane);
    if (round > 0) {
      value = 1 + memory.load(((round - 1) * kRing + (block + 1) % kRing) * 32 + 31 - lane);
    }
    memory.store((round * kRing + block) * 32 + lane, value);
    sync_grid(p.counter, static_cast<unsigned>(round + 1));
  }
}

}  // namespace

TEST(blocks_hand_on_values) {
  Shared<float> memory((kRounds + 1) * kRing * 32);
  Shared<unsigned> counter(1);
  counter[0] = 0;
  LaunchSize size = {kRing, 1, 32};
  size.cooperative = true;
  run(ring_kernel, size, RingParams{memory.get(), counter.get()});
  CHECK(counter[0] == kRing * (kRounds + 1));
  for (int block = 0; block < kRing; ++block) {
    for (int lane = 0; lane < 32; ++lane) {
      const float first = float(100 * ((block + kRounds) % kRing) + lane);  // turned round evenly
      CHECK(memory[(kRounds * kRing + block) * 32 + lane] == first + kRounds);
    }
  }
}
