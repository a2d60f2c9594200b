#include "cache.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

namespace lstmx {
namespace {

constexpr size_t kSmallest = size_t{1} << 20;  // below it malloc keeps pages itself
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kMostHeld = size_t{1} << 30;

// Whole huge pages straight from the system, so that freed ones go straight back to it.
struct Block {
  char* data;
  size_t bytes;
};

char* map_pages(size_t bytes) {
  void* found =
      mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (found == MAP_FAILED) return nullptr;
  char* data = static_cast<char*>(found);
  const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(data) % kHugePage) % kHugePage;
  if (before > 0) munmap(data, before);
  munmap(data + before + bytes, kHugePage - before);
#if defined(MADV_HUGEPAGE)
  madvise(data + before, bytes, MADV_HUGEPAGE);  // a wish; nothing is lost if it is not granted
#endif
  return data + before;
}

void unmap(const Block& block) { munmap(block.data, block.bytes); }

class Store {
 public:
  // Never destroyed: tensors may outlive static objects.
  static Store& instance() {
    static Store* store = new Store;
    return *store;
  }

  Block take(size_t bytes) {
    bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    {
      const std::lock_guard lock(mutex_);
      // The smallest that will do, and of these the last used. Not much more than was asked for, or
      // small tensors would hold large blocks.
      auto best = blocks_.end();
      for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
        if (block->bytes >= bytes && block->bytes <= bytes + bytes / 4 &&
            (best == blocks_.end() || block->bytes <= best->bytes)) {
          best = block;
        }
      }
      if (best != blocks_.end()) {
        const Block block = *best;
        blocks_.erase(best);
        held_ -= block.bytes;
        return block;
      }
    }
    char* data = map_pages(bytes);
    if (data == nullptr) {
      clear();
      data = map_pages(bytes);
    }
    if (data == nullptr) throw std::bad_alloc();
    return {data, bytes};
  }

  // What was not used for longest makes room: shapes change, and nothing may wait for ever.
  void give_back(const Block& block) {
    std::vector<Block> evicted;
    {
      const std::lock_guard lock(mutex_);
      blocks_.push_back(block);
      held_ += block.bytes;
      auto kept = blocks_.begin();
      for (; held_ > limit_; ++kept) held_ -= kept->bytes;
      evicted.assign(blocks_.begin(), kept);
      blocks_.erase(blocks_.begin(), kept);
    }
    for (const auto& old : evicted) unmap(old);
  }

  int64_t held() {
    const std::lock_guard lock(mutex_);
    return static_cast<int64_t>(held_);
  }

  void clear() {
    std::vector<Block> blocks;
    {
      const std::lock_guard lock(mutex_);
      blocks.swap(blocks_);
      held_ = 0;
    }
    for (const auto& block : blocks) unmap(block);
  }

 private:
  Store() {
    const auto physical =
        static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
    limit_ = std::min(kMostHeld, physical / 8);
    // A child of fork must not find the lock taken by a thread that it does not have.
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] { instance().mutex_.unlock(); });
  }

  std::mutex mutex_;
  std::vector<Block> blocks_;  // the last used last
  size_t held_ = 0, limit_;
};

struct StoreAllocator final : c10::Allocator {
  static void give_back(void* context) {
    const std::unique_ptr<Block> block(static_cast<Block*>(context));
    Store::instance().give_back(*block);
  }

  c10::DataPtr allocate(size_t bytes) override {
    auto block = std::make_unique<Block>(Store::instance().take(bytes));
    char* data = block->data;
    return {data, block.release(), &give_back, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

}  // namespace

at::Tensor empty_cached(at::IntArrayRef size, const at::TensorOptions& options) {
  const auto& context = at::globalContext();
  // In that mode fresh memory is filled, so that what was not written shows.
  const bool filled =
      context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory();
  const auto bytes = static_cast<size_t>(c10::multiply_integers(size)) * options.dtype().itemsize();
  if (!options.device().is_cpu() || bytes < kSmallest || filled) return at::empty(size, options);
  static auto* allocator = new StoreAllocator;  // never destroyed, as the store
  return at::detail::empty_generic(size, allocator, c10::DispatchKeySet(c10::DispatchKey::CPU),
                                   c10::typeMetaToScalarType(options.dtype()), std::nullopt);
}

int64_t cached_bytes() { return Store::instance().held(); }
void empty_cache() { Store::instance().clear(); }

}  // namespace lstmx
