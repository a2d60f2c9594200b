#include "cache.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <set>
#include <tuple>

namespace lstmx {
namespace {

constexpr size_t kSmallest = size_t{16} << 10;  // below it malloc is as good
constexpr size_t kGrain = size_t{4} << 10;
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kMostHeld = size_t{4} << 30;

// A part of the store's memory. Pieces are linked in the order of their addresses; no two
// neighbours are free and as cold as each other.
struct Piece {
  char* data;
  size_t bytes;
  Piece *before = nullptr, *after = nullptr;
  bool free = false;
  bool cold = false;  // free, and the system has its pages
};

size_t rounded(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

// One range of addresses, as large as memory itself, of which pages are taken as they are needed:
// in separate ranges, what is free would not join.
class Store {
 public:
  // Never destroyed: tensors may outlive static objects.
  static Store& instance() {
    static Store* store = new Store;
    return *store;
  }

  // Null if there is no room.
  Piece* take(size_t bytes) {
    bytes = rounded(bytes, kGrain);
    const std::lock_guard lock(mutex_);
    Piece* piece = find(bytes);
    if (piece && piece->bytes > bytes) {
      auto* rest = new Piece{piece->data + bytes, piece->bytes - bytes};
      rest->cold = piece->cold;
      link(piece, rest);
      piece->bytes = bytes;
      add(rest);
    }
    return piece;
  }

  void give_back(Piece* piece) {
    const std::lock_guard lock(mutex_);
    piece->cold = false;
    add(joined(piece));
    if (held_ > limit_) release();
  }

  int64_t held() {
    const std::lock_guard lock(mutex_);
    return static_cast<int64_t>(held_);
  }

  void clear() {
    const std::lock_guard lock(mutex_);
    release();
  }

 private:
  Store() {
    const auto physical =
        static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
    limit_ = std::min(kMostHeld, physical / 8);
    rlimit addresses{};
    getrlimit(RLIMIT_AS, &addresses);
    size_t size = physical;
    if (addresses.rlim_cur != RLIM_INFINITY) size = std::min<size_t>(size, addresses.rlim_cur / 4);
    void* found = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    // Where addresses alone count as memory there is no store.
    if (found != MAP_FAILED) top_ = static_cast<char*>(found), end_ = top_ + size;
    // A child of fork must not find the lock taken by a thread that it does not have.
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] { instance().mutex_.unlock(); });
  }

  Piece* find(size_t bytes) {
    Piece* piece = smallest(bytes);
    if (piece) return piece;
    // What was too small makes room, so that all there is stays near what is used at once.
    release();
    piece = smallest(bytes);
    return piece ? piece : newest(bytes);
  }

  // The smallest free one that is large enough, or null.
  Piece* smallest(size_t bytes) {
    const auto found = free_.lower_bound({bytes, nullptr, nullptr});
    if (found == free_.end()) return nullptr;
    Piece* piece = std::get<Piece*>(*found);
    remove(piece);
    return piece;
  }

  // Of new pages, or null.
  Piece* newest(size_t bytes) {
    const bool extends = last_ && last_->free;
    const size_t more = bytes - (extends ? last_->bytes : 0);
    if (static_cast<size_t>(end_ - top_) < more) return nullptr;
    if (extends) {
      remove(last_);
    } else {
      link(last_, new Piece{top_, 0});
    }
    last_->bytes += more;
    last_->cold = true;
    grow(more);
    return last_;
  }

  void grow(size_t bytes) {
    char* const from = top_;
    top_ += bytes;
#if defined(MADV_HUGEPAGE)
    // A wish; nothing is lost if it is not granted. Not for little: such pages would be half empty.
    if (bytes >= 2 * kHugePage) {
      const auto address = reinterpret_cast<uintptr_t>(from);
      const size_t lead = rounded(address, kHugePage) - address;
      madvise(from + lead, (bytes - lead) / kHugePage * kHugePage, MADV_HUGEPAGE);
    }
#endif
  }

  void link(Piece* before, Piece* piece) {
    piece->before = before;
    piece->after = before ? before->after : nullptr;
    if (before) before->after = piece;
    (piece->after ? piece->after->before : last_) = piece;
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
  // With its free neighbours, if as cold; none of them is among the free ones any more.
  Piece* joined(Piece* piece) {
    const auto joins = [&](const Piece* other) {
      return other && other->free && other->cold == piece->cold;
    };
    if (joins(piece->after)) join(piece, piece->after);
    if (joins(piece->before)) {
      Piece* before = piece->before;
      remove(before);
      join(before, piece);
      piece = before;
    }
    return piece;
  }
  // `first` becomes both. Only the second may be among the free ones.
  void join(Piece* first, Piece* second) {
    if (second->free) remove(second);
    first->bytes += second->bytes;
    first->after = second->after;
    (first->after ? first->after->before : last_) = first;
    delete second;
  }

  // Gives the pages of all that is free back to the system.
  void release() {
    for (Piece* piece = last_; piece; piece = piece->before) {
      if (!piece->free) continue;
      remove(piece);
      if (!piece->cold) madvise(piece->data, piece->bytes, MADV_DONTNEED);
      piece->cold = true;
      piece = joined(piece);
      add(piece);
    }
  }

  std::mutex mutex_;
  std::set<std::tuple<size_t, char*, Piece*>> free_;
  Piece* last_ = nullptr;
  char *top_ = nullptr, *end_ = nullptr;  // of the pieces, of the range
  size_t held_ = 0, limit_;               // bytes
};

struct StoreAllocator final : c10::Allocator {
  static void give_back(void* piece) { Store::instance().give_back(static_cast<Piece*>(piece)); }

  c10::DataPtr allocate(size_t bytes) override {
    Piece* piece = Store::instance().take(bytes);
    if (!piece) return c10::GetCPUAllocator()->allocate(bytes);
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
