// A team of threads that runs one function together, and its barrier.
#pragma once

#include <atomic>

namespace lstmx {

// A step of a small net takes microseconds, so a member that waits spins; but the cores may be
// shared, so it spins for a bounded time, then sleeps. While a member that it may be waiting for
// was last seen on its own core, it yields instead: spinning would only keep that one from running.
class Barrier {
 public:
  void wait(int team_size);

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> generation_{0};
  std::atomic<int> sleepers_{0};
};

// Calls body(context, member, team_size) once for each member, at the same time, in threads that
// treat denormals and rounding as the caller does. The team has at most `threads` members; fewer
// where the runtime grants fewer. It is the caller alone when already inside a parallel region, and
// for a while after a team took longer than its caller alone would have: where another process
// holds a core.
void run_team(int threads, void (*body)(void* context, int member, int team_size), void* context);

// For as long as it lives: if the calling thread's teams are given up at the moment, other OpenMP
// regions that it starts, as ATen's, have one thread as well.
class FollowTeams {
 public:
  FollowTeams();
  ~FollowTeams();
  FollowTeams(const FollowTeams&) = delete;
  FollowTeams& operator=(const FollowTeams&) = delete;

 private:
  int threads_before_ = 0;  // 0: nothing was changed
};

}  // namespace lstmx
