// Kernels with one bug each, to see that it is reported: planted_bugs NAME. The name `none` runs
// the same kernels without their bugs. Which build must report what is in CMakeLists.txt.
#include <cmath>
#include <cstdio>
#include <string_view>
#include <vector>

#include "cuda/device.cuh"

using namespace lstmx::cuda;

namespace {

struct Params {
  std::string_view bug;
  float* out;
  unsigned* counter;
  bool has(std::string_view name) const { return bug == name; }
};
constexpr int kThreads = 64, kBlocks = 3;

// Neighbours trade values through shared memory.
void trade(Params p) {
  float* shared = shared_memory<float>();
  const unsigned t = thread_index();
  shared[t] = float(t);
  if (p.has("diverging-barrier")) {
    if (t < 32) {
      sync_block();
    } else {
      sync_block();
    }
  } else if (!p.has("missing-block-barrier")) {
    sync_block();
  }
  p.out[t] = shared[(t + 32) % kThreads];
}
float traded(int, int t) { return float((t + 32) % kThreads); }

// ... by asynchronous copies.
void copy(Params p) {
  float* shared = shared_memory<float>();
  const unsigned t = thread_index();
  if (t < kThreads / 4) cp_async16(shared + 4 * t, p.out + 4 * t);
  cp_async_commit();
  if (!p.has("missing-wait")) cp_async_wait<0>();
  sync_block();
  const float value = shared[kThreads - 1 - t];
  cp_async_wait<0>();
  sync_block();
  p.out[t] = value;
}
float copied(int, int t) { return float(kThreads - 1 - t); }

// ... by a shuffle of the first half of each warp.
void half_shuffle(Params p) {
  p.out[thread_index()] = 0;
  if (lane_index() < 16) {
    const unsigned mask = p.has("wrong-mask") ? kAllLanes : 0xFFFFu;
    p.out[thread_index()] = shuffle_xor(float(thread_index()), 1, mask);
  }
}
float shuffled(int, int t) { return t % 32 < 16 ? float(t ^ 1) : 0; }

// Every block writes, then reads what the next one wrote.
void exchange(Params p) {
  const Exchange<float> memory(p.out);
  const unsigned t = thread_index();
  memory.store(block_x() * kThreads + t, float(block_x() * kThreads + t));
  if (p.has("missing-grid-barrier")) {
    sync_block();
  } else {
    if (!p.has("publish-before-block-barrier")) sync_block();
    if (t == 0) {
      if (p.has("missing-release")) {
        atomic_add(p.counter, 1);
      } else {
        red_release(p.counter, 1);
      }
    }
    if (p.has("publish-before-block-barrier")) sync_block();
    if (t == 0) {
      const unsigned all = p.has("deadlock") ? kBlocks + 1 : kBlocks;
      const auto count = [&] {
        return p.has("missing-acquire") ? atomic_add(p.counter, 0) : load_acquire(p.counter);
      };
      while (count() < all) poll_pause();
    }
    sync_block();
  }
  const float value = memory.load((block_x() + 1) % kBlocks * kThreads + t);
  memory.store((kBlocks + block_x()) * kThreads + t, value);
}
float exchanged(int block, int t) {
  return float((block < kBlocks ? block : (block + 1) % kBlocks) * kThreads + t);
}

// Whether the result was right in every schedule.
bool run(std::string_view bug, void (*kernel)(Params), int blocks, int values,
         float (*expected)(int block, int t)) {
  using emulator::Order;
  for (const auto order : {Order::kForward, Order::kReverse, Order::kRandom, Order::kSkew}) {
    emulator::options().order = order;
    std::vector<float> out(static_cast<size_t>(values));
    for (int i = 0; i < values; ++i) out[static_cast<size_t>(i)] = float(i);
    unsigned counter = 0;
    const size_t missing = bug == "short-shared-memory" ? 4 : 0;
    launch(kernel,
           {static_cast<unsigned>(blocks), 1, kThreads, kThreads * sizeof(float) - missing, true},
           nullptr, Params{bug, out.data(), &counter});
    for (int i = 0; i < values; ++i) {
      const float value = out[static_cast<size_t>(i)];
      if (!(value == expected(i / kThreads, i % kThreads))) {
        std::printf("wrong result: %g at %d\n", value, i);
        return false;
      }
    }
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view bug = argc > 1 ? argv[1] : "none";
  try {
    const bool right = run(bug, trade, 1, kThreads, traded) &&
                       run(bug, copy, 1, kThreads, copied) &&
                       run(bug, half_shuffle, 1, kThreads, shuffled) &&
                       run(bug, exchange, kBlocks, 2 * kBlocks * kThreads, exchanged);
    if (!right) return 1;
  } catch (const emulator::Error& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  std::puts("nothing to report");
  return 0;
}
