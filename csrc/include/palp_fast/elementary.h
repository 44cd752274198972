// Elementary functions that give the same bits on every device.
#pragma once

#include <math.h>

#include "palp_fast/portable.h"

namespace palp_fast {

PALP_INLINE float square_root(float value) { return sqrtf(value); }
PALP_INLINE double square_root(double value) { return sqrt(value); }

}  // namespace palp_fast
