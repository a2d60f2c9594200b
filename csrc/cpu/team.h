// A team of threads that runs one function together, and its barrier.
#pragma once

#include <atomic>
#include <cstdint>

namespace lstmx {

// Spins briefly, then yields: a step of a small net takes microseconds, but the cores may be
// shared.
class Barrier {
 public:
  void wait(int team_size);

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> generation_{0};
};

// Calls body(context, member, team_size) once for each member, at the same time. The team has at
// most `threads` members; fewer where the runtime grants fewer or when already inside a team.
void run_team(int threads, void (*body)(void* context, int member, int team_size), void* context);

}  // namespace lstmx
