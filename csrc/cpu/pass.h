// What every pass of a team over its data needs: its share of the work and of the workspace.
#pragma once

#include <cstdint>

#include "team.h"
#include "vector.h"

namespace lstmx::LSTMX_ISA {

template <class T>
LSTMX_INLINE T* at(void* p, int64_t index) {
  return p ? static_cast<T*>(p) + index : nullptr;
}
template <class T>
LSTMX_INLINE const T* at(const void* p, int64_t index) {
  return p ? static_cast<const T*>(p) + index : nullptr;
}

template <class T>
constexpr int64_t padded(int64_t units) {
  return (units + Vec<T>::kLanes - 1) / Vec<T>::kLanes * Vec<T>::kLanes;
}

// Hands out pieces of the workspace; on a null base it only adds up their sizes.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    char* piece = base_ ? base_ + used_ : nullptr;
    used_ += (count * int64_t{sizeof(T)} + 63) / 64 * 64;
    return reinterpret_cast<T*>(piece);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Fetches elements into the second-level cache. How many lines they touch must not decide a branch:
// where rows are no whole lines, none could foresee it.
template <class T>
LSTMX_INLINE void fetch_run(const T* from, int64_t count) {
  const auto* bytes = reinterpret_cast<const char*>(from);
  const int64_t size = count * int64_t{sizeof(T)};
  for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(bytes + i, 0, 2);
  __builtin_prefetch(bytes + size - 1, 0, 2);
  asm volatile("");  // gcc leaves out calls of functions that only fetch
}

struct Range {
  int64_t begin, end;
};

constexpr Range share(int64_t count, int part, int parts) {
  return {count * part / parts, count * (part + 1) / parts};
}

// (i + rotation) mod count, of two numbers below it
constexpr int64_t rotated(int64_t i, int64_t rotation, int64_t count) {
  return i + rotation < count ? i + rotation : i + rotation - count;
}

// A pass is an object with run(member, team_size).
template <class Body>
LSTMX_INLINE void run(int threads, Body& body) {
  run_team(
      threads,
      [](void* context, int member, int team) { static_cast<Body*>(context)->run(member, team); },
      &body);
}

}  // namespace lstmx::LSTMX_ISA
