// Two draws from N(0, 1) out of two random words, by Box-Muller in fp32.
#pragma once

#include "palp_fast/elementary.h"

namespace palp_fast {

struct NormalPair {
  float first, second;
};

PALP_INLINE NormalPair normal_pair(uint32_t first, uint32_t second) {
  // (word + 1/2) / 2^32 lies in (0, 1], so the logarithm is finite.
  const float uniform = float(first) * 0x1p-32f + 0x1p-33f;
  const float radius = square_root(-2.0f * log_of_fraction(uniform));
  const SinCos turn = sincos_of_turn(second);
  return {radius * turn.cos, radius * turn.sin};
}

}  // namespace palp_fast
