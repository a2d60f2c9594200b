// The whole test framework: TEST(name) { CHECK(...); } in any number, and one main.
#pragma once

#include <cmath>
#include <cstdio>
#include <vector>

struct TestCase {
  const char* name;
  void (*run)();
};

inline std::vector<TestCase>& all_tests() {
  static std::vector<TestCase> tests;
  return tests;
}

inline int failures = 0;

#define TEST(name)                                      \
  static void name();                                   \
  [[maybe_unused]] static const bool name##_is_listed = \
      (all_tests().push_back({#name, name}), true);     \
  static void name()

#define CHECK(condition)                                                        \
  do {                                                                          \
    if (!(condition)) {                                                         \
      std::printf("%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition); \
      ++failures;                                                               \
    }                                                                           \
  } while (false)

#define CHECK_NEAR(a, b, tolerance)                                                       \
  do {                                                                                    \
    const double a_ = (a), b_ = (b);                                                      \
    if (!(std::fabs(a_ - b_) <= (tolerance))) {                                           \
      std::printf("%s:%d: %s = %.17g, %s = %.17g\n", __FILE__, __LINE__, #a, a_, #b, b_); \
      ++failures;                                                                         \
    }                                                                                     \
  } while (false)

// With any argument the first test that fails is the last.
int main(int argc, char**) {
  for (const auto& test : all_tests()) {
    const int before = failures;
    test.run();
    std::printf("%s %s\n", failures == before ? "ok    " : "FAILED", test.name);
    if (failures > before && argc > 1) break;
  }
  return failures == 0 ? 0 : 1;
}
