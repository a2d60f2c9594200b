// Philox against the known answers of Random123, and the rule of the mask.
#include "check.h"
#include "philox.h"

using namespace lstmx;

namespace {

void check_vector(const uint32_t (&counter)[4], uint64_t key, const uint32_t (&expected)[4]) {
  PhiloxBlock<uint32_t> block;
  for (int w = 0; w < 4; ++w) block.word[w] = counter[w];
  philox4x32_10(block, key);
  for (int w = 0; w < 4; ++w) CHECK(block.word[w] == expected[w]);
}

}  // namespace

TEST(known_answers) {
  check_vector({0, 0, 0, 0}, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  check_vector({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, 0xffffffffffffffff,
               {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  check_vector({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0x299f31d0a4093822,
               {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

TEST(blocks_count_past_32_bits) {
  const auto block = philox_counter(0x100000002);
  CHECK(block.word[0] == 2 && block.word[1] == 1 && block.word[2] == 0 && block.word[3] == 0);
}

TEST(the_mask_rule_at_its_ends) {
  const auto none = MaskRule::make(5, 0.0), all = MaskRule::make(5, 1.0);
  CHECK(none.keeps(0) && none.scale == 1);
  CHECK(!all.keeps(0xffffffff) && all.scale == 0);
  const auto half = MaskRule::make(-1, 0.5);
  CHECK(half.seed == ~uint64_t{0});
  CHECK(half.keeps(0x80000000) && !half.keeps(0x7fffffff) && half.scale == 2);
}
