#include "team.h"

#include <time.h>

#include <algorithm>
#include <chrono>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#else
#include <thread>
#include <vector>
#endif
#if defined(__linux__)
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lstmx {
namespace {

using Clock = std::chrono::steady_clock;

// ---- The machine -------------------------------------------------------------------------------

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

// Of the calling thread.
Clock::duration cpu_time() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return std::chrono::seconds(t.tv_sec) + std::chrono::nanoseconds(t.tv_nsec);
}

// Flags for denormals and rounding, which each thread has for itself.
#if defined(__x86_64__)
using FloatMode = unsigned;
FloatMode float_mode() { return _mm_getcsr(); }
void set_float_mode(FloatMode mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
using FloatMode = uint64_t;
FloatMode float_mode() {
  FloatMode mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
void set_float_mode(FloatMode mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
using FloatMode = int;
FloatMode float_mode() { return 0; }
void set_float_mode(FloatMode) {}
#endif

// std::atomic::wait would do, but libstdc++ yields before it sleeps, and whoever yields on a core
// that is shared with another process gets it back a whole time slice later.
#if defined(__linux__)
void sleep_while(std::atomic<int>& word, int value) {
  static_assert(sizeof(std::atomic<int>) == sizeof(int));
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}
void wake_all(std::atomic<int>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}
int current_core() { return sched_getcpu(); }
void yield() { sched_yield(); }
#else
void sleep_while(std::atomic<int>& word, int value) { word.wait(value); }
void wake_all(std::atomic<int>& word) { word.notify_all(); }
int current_core() { return -1; }  // unknown
void yield() {}
#endif

// ---- The members of a team ---------------------------------------------------------------------

constexpr int kPauses = 4000;  // some 50 to 200 microseconds
constexpr int kYields = 1000;
constexpr int kPausesPerLook = 64;

struct Crew {
  static constexpr int kWatched = 64;  // the cores of any more are not watched

  std::atomic<int> core[kWatched];  // where each member was last seen; -1 if never
  Clock::duration waited{0};        // the time that member 0 has spent in barriers

  Crew() {
    for (auto& c : core) c.store(-1, std::memory_order_relaxed);
  }

  // Notes where the calling member is, and tells whether any other was last seen there too.
  bool shares_core(int member, int team_size) {
    const int mine = current_core(), watched = std::min(team_size, kWatched);
    if (mine < 0) return false;
    if (member < kWatched && core[member].load(std::memory_order_relaxed) != mine) {
      core[member].store(mine, std::memory_order_relaxed);
    }
    for (int other = 0; other < watched; ++other) {
      if (other != member && core[other].load(std::memory_order_relaxed) == mine) return true;
    }
    return false;
  }
};

thread_local Crew* current_crew = nullptr;
thread_local int current_member = 0;

bool shares_core(int team_size) {
  return current_crew && current_crew->shares_core(current_member, team_size);
}

// A team is no gain where another process holds one of its cores for whole time slices. Which cores
// a process gets changes, so it is tried again, after pauses that grow with each disappointment.
// Judged over many calls: it takes some milliseconds until the system has spread threads that
// slept.
class Experience {
 public:
  bool prefers_one(Clock::time_point now) const { return now < alone_until_; }

  // `worked`: the time of one of the members, all of which did as much.
  void note(Clock::time_point end, Clock::duration elapsed, Clock::duration worked, int size) {
    elapsed_ += elapsed, alone_ += size * worked;
    if (elapsed_ < kWindow) return;
    if (elapsed_ > alone_ + alone_ / 8) {
      alone_until_ = end + pause_;
      pause_ = std::min<Clock::duration>(2 * pause_, kLongest);
    } else {
      pause_ = std::max<Clock::duration>(pause_ / 2, kShortest);
    }
    elapsed_ = alone_ = Clock::duration{0};
  }

 private:
  static constexpr std::chrono::milliseconds kWindow{20}, kShortest{80}, kLongest{640};

  Clock::time_point alone_until_{};
  Clock::duration pause_ = kShortest;
  Clock::duration elapsed_{0}, alone_{0};  // of this window: of the team, of one for all members
};

struct Leader {
  Crew crew;
  Experience experience;
};

Leader& leader() {
  static thread_local Leader of_this_thread;
  return of_this_thread;
}

struct Region {
  void (*body)(void*, int, int);
  void* context;
  FloatMode mode;
  Crew& crew;
  Barrier end{};  // the runtime's own would spin while a member on the same core wants to run
  int size = 1;
  Clock::duration worked{0};  // by member 0: without its waits, and without other threads' turns

  void join(int member, int team_size) {
    const auto start = Clock::now();
    const auto cpu_start = member == 0 ? cpu_time() : Clock::duration{0};
    const FloatMode before = float_mode();
    set_float_mode(mode);
    current_crew = &crew, current_member = member;
    body(context, member, team_size);
    end.wait(team_size);
    current_crew = nullptr;
    set_float_mode(before);
    if (member > 0) return;
    size = team_size;
    worked = std::min(Clock::now() - start - crew.waited, cpu_time() - cpu_start);
  }
};

#if defined(_OPENMP) && defined(__GNUC__) && !defined(__clang__)
// GCC's runtime does not know of fork: the first region of a child would wait for ever for threads
// that only the parent has. So a thread that forks dismisses its own first; regions to come, in the
// parent and in the child, get new ones.
[[maybe_unused]] const int fork_is_safe =
    pthread_atfork([] { omp_pause_resource_all(omp_pause_soft); }, nullptr, nullptr);
#endif

bool in_parallel_region() {
#if defined(_OPENMP)
  return omp_in_parallel();
#else
  return current_crew != nullptr;
#endif
}

}  // namespace

void Barrier::wait(int team_size) {
  if (team_size == 1) return;
  const int generation = generation_.load(std::memory_order_acquire);
  bool together = shares_core(team_size);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == team_size - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    // In one order with the sleepers' count: either it is seen here, or the new generation there.
    generation_.store(generation + 1);
    if (sleepers_.load() > 0) wake_all(generation_);
    return;
  }
  const auto done = [&] { return generation_.load(std::memory_order_acquire) != generation; };
  for (int i = 0; i < kPausesPerLook && !together; ++i) {
    if (done()) return;
    pause();
  }

  const auto start = Clock::now();
  int pauses = 0, yields = 0;
  while (!done() && pauses < kPauses && yields < kYields) {
    if (together) {
      yield(), ++yields;
    } else {
      for (int i = 0; i < kPausesPerLook && !done(); ++i) pause(), ++pauses;
    }
    together = shares_core(team_size);
  }
  if (!done()) {
    sleepers_.fetch_add(1);
    while (generation_.load() == generation) sleep_while(generation_, generation);
    sleepers_.fetch_sub(1);
    shares_core(team_size);  // it may have woken on another core
  }
  if (current_crew && current_member == 0) current_crew->waited += Clock::now() - start;
}

void run_team(int threads, void (*body)(void*, int, int), void* context) {
  if (threads <= 1 || in_parallel_region()) return body(context, 0, 1);
  auto& [crew, experience] = leader();
  const auto start = Clock::now();
  if (experience.prefers_one(start)) return body(context, 0, 1);

  crew.waited = Clock::duration{0};
  Region region{body, context, float_mode(), crew};
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  region.join(omp_get_thread_num(), omp_get_num_threads());
#else
  std::vector<std::thread> others;
  for (int member = 1; member < threads; ++member) {
    others.emplace_back([&region, member, threads] { region.join(member, threads); });
  }
  region.join(0, threads);
  for (auto& other : others) other.join();
#endif
  const auto end = Clock::now();
  experience.note(end, end - start, region.worked, region.size);
}

FollowTeams::FollowTeams() {
#if defined(_OPENMP)
  if (leader().experience.prefers_one(Clock::now())) {
    threads_before_ = omp_get_max_threads();
    omp_set_num_threads(1);
  }
#endif
}

FollowTeams::~FollowTeams() {
#if defined(_OPENMP)
  if (threads_before_ > 0) omp_set_num_threads(threads_before_);
#endif
}

}  // namespace lstmx
