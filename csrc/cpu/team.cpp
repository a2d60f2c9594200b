#include "team.h"

#include <sched.h>

#ifdef _OPENMP
#include <omp.h>
#else
#include <thread>
#include <vector>
#endif

namespace lstmx {

void Barrier::wait(int team_size) {
  if (team_size == 1) return;
  const int generation = generation_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == team_size - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
    if (spins < 4000) {
#if defined(__x86_64__) || defined(__i386__)
      __builtin_ia32_pause();
#endif
    } else {
      sched_yield();
    }
  }
}

void run_team(int threads, void (*body)(void*, int, int), void* context) {
#ifdef _OPENMP
  if (threads > 1 && !omp_in_parallel()) {
#pragma omp parallel num_threads(threads)
    body(context, omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#else
  static thread_local bool in_team = false;
  if (threads > 1 && !in_team) {
    const auto join = [&](int member) {
      in_team = true;
      body(context, member, threads);
      in_team = false;
    };
    std::vector<std::thread> others;
    for (int member = 1; member < threads; ++member) others.emplace_back(join, member);
    join(0);
    for (auto& other : others) other.join();
    return;
  }
#endif
  body(context, 0, 1);
}

}  // namespace lstmx
