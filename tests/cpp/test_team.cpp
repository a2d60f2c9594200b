// The team of threads and its barrier: order, late members, nesting, several at once, fork.
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <thread>

#include "check.h"
#include "cpu/team.h"

using namespace lstmx;
using namespace std::chrono_literals;

namespace {

// Calls body(member, team_size).
template <class Body>
void team(int threads, Body body) {
  run_team(
      threads,
      [](void* context, int member, int size) { (*static_cast<Body*>(context))(member, size); },
      &body);
}

// A team that had to wait for its members is given up for half a second at most.
template <class Condition>
bool eventually(Condition condition) {
  for (int i = 0; i < 200; ++i) {
    if (condition()) return true;
    std::this_thread::sleep_for(10ms);
  }
  return false;
}

// Each member writes, and reads what all others wrote before the barrier. Returns the team's size.
int exchange(int threads, int steps) {
  std::vector<int> written(static_cast<size_t>(threads));  // plain: a barrier must order it
  std::atomic<int> wrong{0}, team_size{0};
  Barrier barrier;
  team(threads, [&](int member, int size) {
    if (member == 0) team_size = size;
    for (int step = 1; step <= steps; ++step) {
      written[static_cast<size_t>(member)] = step;
      barrier.wait(size);
      for (int other = 0; other < size; ++other)
        wrong += written[static_cast<size_t>(other)] != step;
      barrier.wait(size);
    }
  });
  CHECK(wrong == 0);
  return team_size;
}

double thread_seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

}  // namespace

TEST(a_barrier_orders_what_members_write) {
  for (const int threads : {1, 2, 3}) {
    CHECK(eventually([&] { return exchange(threads, 100) == threads; }));
  }
}

TEST(more_threads_than_cores) {
  CHECK(eventually([] { return exchange(16, 20) == 16; }));
}

TEST(a_barrier_does_not_spin_for_long) {
  std::atomic<double> spent{1e9};
  const auto late_member = [&] {
    bool together = false;
    Barrier barrier;
    team(2, [&](int member, int size) {
      if (member == 1) std::this_thread::sleep_for(100ms);
      const double before = thread_seconds();
      barrier.wait(size);
      if (member == 0 && size == 2) spent = thread_seconds() - before, together = true;
    });
    return together;
  };
  CHECK(eventually(late_member));
  CHECK(spent < 0.02);
}

TEST(a_team_that_gains_nothing_is_left_alone_for_a_while) {
  CHECK(eventually([] { return exchange(2, 1) == 2; }));
  team(2, [](int member, int) {
    if (member == 1) std::this_thread::sleep_for(60ms);
  });
  CHECK(exchange(2, 1) == 1);
  CHECK(eventually([] { return exchange(2, 1) == 2; }));
}

TEST(inside_a_team_there_is_no_other) {
  std::atomic<int> calls{0}, members{0};
  team(3, [&](int, int size) {
    team(3, [&](int member, int inner) {
      ++calls;
      CHECK(size == 1 || (member == 0 && inner == 1));
    });
    ++members;
  });
  CHECK(calls == members || members == 1);
}

TEST(several_teams_at_once) {
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([] {
      for (int n = 0; n < 20; ++n) exchange(2, 20);
    });
  }
  for (auto& caller : callers) caller.join();
}

#if defined(__x86_64__)
TEST(members_treat_denormals_as_the_caller_does) {
  constexpr unsigned kFlush = 0x8040;  // results and operands
  const auto sees_denormals = [](int threads) {
    std::atomic<int> zeros{0}, size{0};
    team(threads, [&](int, int team_size) {
      volatile float small = std::numeric_limits<float>::min();
      volatile float half = small * 0.5f;
      zeros += half == 0, size = team_size;
    });
    CHECK(zeros == 0 || zeros == size);
    return zeros == 0;
  };
  const unsigned before = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(before | kFlush);
  CHECK(!sees_denormals(1) && !sees_denormals(3));
  __builtin_ia32_ldmxcsr(before & ~kFlush);
  CHECK(sees_denormals(1) && sees_denormals(3));
  __builtin_ia32_ldmxcsr(before);
}
#endif

TEST(after_fork) {
  CHECK(eventually([] { return exchange(3, 2) == 3; }));
  std::fflush(stdout);  // or the child has it to print as well
  const pid_t child = fork();
  if (child == 0) {
    alarm(30);  // rather than hang
    _exit(eventually([] { return exchange(3, 2) == 3; }) && failures == 0 ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  CHECK(eventually([] { return exchange(3, 2) == 3; }));
}
