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
#include <mutex>
#include <new>
#include <set>
#include <tuple>

namespace lstmx {
namespace {

constexpr size_t kSmallest = size_t{16} << 10;  // below it malloc is as good
constexpr size_t kGrain = size_t{4} << 10;
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kMostHeld = size_t{4} << 30;

// A part of a segment, which is memory straight from the system. A segment's pieces are linked in
// the order of their addresses; no two neighbours are both free.
struct Piece {
  char* data;
  size_t bytes;
  Piece *before = nullptr, *after = nullptr;
  bool free = false;
  bool cold = false;  // free, and the system has its pages

  bool whole() const { return !before && !after; }
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
  // A wish; nothing is lost if it is not granted.
  if (bytes >= 2 * kHugePage) madvise(data + before, bytes, MADV_HUGEPAGE);
#endif
  return data + before;
}

size_t rounded(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

class Store {
 public:
  // Never destroyed: tensors may outlive static objects.
  static Store& instance() {
    static Store* store = new Store;
    return *store;
  }

  Piece* take(size_t bytes) {
    bytes = rounded(bytes, kGrain);
    const std::lock_guard lock(mutex_);
    Piece* piece = find(bytes);
    if (piece->bytes > bytes) {
      auto* rest = new Piece{piece->data + bytes, piece->bytes - bytes, piece, piece->after};
      rest->cold = piece->cold;
      if (rest->after) rest->after->before = rest;
      piece->after = rest, piece->bytes = bytes;
      add(rest);
    }
    return piece;
  }

  void give_back(Piece* piece) {
    const std::lock_guard lock(mutex_);
    piece->cold = false;
    if (piece->after && piece->after->free) join(piece, piece->after);
    if (piece->before && piece->before->free) {
      Piece* before = piece->before;
      remove(before);
      join(before, piece);
      piece = before;
    }
    add(piece);
    if (held_ > limit_) release_whole();
  }

  int64_t held() {
    const std::lock_guard lock(mutex_);
    return static_cast<int64_t>(held_);
  }

  void clear() {
    const std::lock_guard lock(mutex_);
    release_whole();
    // Segments that are in use in part keep their addresses.
    for (const auto& [bytes, data, piece] : free_) {
      madvise(data, bytes, MADV_DONTNEED);
      piece->cold = true;
    }
    held_ = 0;
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

  // The smallest free piece that is large enough.
  Piece* find(size_t bytes) {
    const auto found = free_.lower_bound({bytes, nullptr, nullptr});
    if (found != free_.end()) {
      Piece* piece = std::get<Piece*>(*found);
      remove(piece);
      return piece;
    }
    // What was too small makes room, so that all segments together stay near what is used at once.
    release_whole();
    // Small ones share a segment.
    const size_t size = std::max(rounded(bytes, 16 * kGrain), kHugePage);
    char* data = map_pages(size);
    if (data == nullptr) throw std::bad_alloc();
    auto* piece = new Piece{data, size};
    piece->cold = true;
    return piece;
  }

  void add(Piece* piece) {
    piece->free = true;
    free_.emplace(piece->bytes, piece->data, piece);
    if (!piece->cold) held_ += piece->bytes;
  }
  void remove(Piece* piece) {
    piece->free = false;
    free_.erase({piece->bytes, piece->data, piece});
    if (!piece->cold) held_ -= piece->bytes;
  }
  // `first` becomes both. Only the second may be among the free ones.
  void join(Piece* first, Piece* second) {
    if (second->free) remove(second);
    first->cold = first->cold && second->cold;
    first->bytes += second->bytes;
    first->after = second->after;
    if (first->after) first->after->before = first;
    delete second;
  }

  // Gives segments that are free as a whole back to the system.
  void release_whole() {
    for (auto it = free_.begin(); it != free_.end();) {
      Piece* piece = std::get<Piece*>(*it++);
      if (!piece->whole()) continue;
      remove(piece);
      munmap(piece->data, piece->bytes);
      delete piece;
    }
  }

  std::mutex mutex_;
  std::set<std::tuple<size_t, char*, Piece*>> free_;
  size_t held_ = 0, limit_;
};

struct StoreAllocator final : c10::Allocator {
  static void give_back(void* piece) { Store::instance().give_back(static_cast<Piece*>(piece)); }

  c10::DataPtr allocate(size_t bytes) override {
    Piece* piece = Store::instance().take(bytes);
    return {piece->data, piece, &give_back, c10::Device(c10::DeviceType::CPU)};
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
