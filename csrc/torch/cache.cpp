#include "cache.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>

namespace lstmx {
namespace {

constexpr size_t kSmallest = size_t{1} << 20;  // below it malloc keeps pages itself
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kMostHeld = size_t{1} << 30;

struct Block {
  void* data;
  size_t bytes;
};

class Store {
 public:
  // Never destroyed: tensors may outlive static objects.
  static Store& instance() {
    static Store* store = new Store;
    return *store;
  }

  Block* take(size_t bytes) {
    bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    {
      const std::lock_guard lock(mutex_);
      // Not much more than was asked for, or small tensors would hold large blocks.
      const auto found = blocks_.lower_bound(bytes);
      if (found != blocks_.end() && found->first <= bytes + bytes / 4) {
        Block* block = found->second;
        blocks_.erase(found);
        held_ -= block->bytes;
        return block;
      }
    }
    void* data = std::aligned_alloc(kHugePage, bytes);
    if (data == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    madvise(data, bytes, MADV_HUGEPAGE);  // a wish; nothing is lost if it is not granted
#endif
    return new Block{data, bytes};
  }

  void give_back(Block* block) {
    {
      const std::lock_guard lock(mutex_);
      if (held_ + block->bytes <= limit_) {
        blocks_.emplace(block->bytes, block);
        held_ += block->bytes;
        return;
      }
    }
    free_block(block);
  }

  int64_t held() {
    const std::lock_guard lock(mutex_);
    return static_cast<int64_t>(held_);
  }

  void clear() {
    std::multimap<size_t, Block*> blocks;
    {
      const std::lock_guard lock(mutex_);
      blocks.swap(blocks_);
      held_ = 0;
    }
    for (const auto& [bytes, block] : blocks) free_block(block);
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

  static void free_block(Block* block) {
    std::free(block->data);
    delete block;
  }

  std::mutex mutex_;
  std::multimap<size_t, Block*> blocks_;  // by size
  size_t held_ = 0, limit_;
};

struct StoreAllocator final : c10::Allocator {
  static void give_back(void* block) { Store::instance().give_back(static_cast<Block*>(block)); }

  c10::DataPtr allocate(size_t bytes) override {
    Block* block = Store::instance().take(bytes);
    return {block->data, block, &give_back, c10::Device(c10::DeviceType::CPU)};
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
  static StoreAllocator allocator;
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::CPU),
                                   c10::typeMetaToScalarType(options.dtype()), std::nullopt);
}

int64_t cached_bytes() { return Store::instance().held(); }
void empty_cache() { Store::instance().clear(); }

}  // namespace lstmx
