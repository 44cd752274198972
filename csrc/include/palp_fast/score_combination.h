// score_combination: reconstruction loss and alignment residual (palp_fast/functional.py has the formula).
#pragma once

#include "palp_fast/image.h"

namespace palp_fast {

// Real: float, or double where any image is double. Pointers are to host memory of B or K B values.
template <typename Real>
struct ScoreParams {
  Shape shape;
  ImageView pred, target;
  const ImageView* predictions = nullptr;
  int64_t terms = 0;
  const Real* coefficients = nullptr;   // [terms, B]
  const Real* residual_weight = nullptr;  // [B]: lambda c_b
  const Real* sample_weight = nullptr;  // [B]
  const ImageView* mask = nullptr;      // null: 1 everywhere
};

// Per sample, over its image: what loss and statistics are made of.
struct ScoreSums {
  double squares = 0;   // mask (pred - target)^2
  double residual = 0;  // r^2
  double gradient = 0;  // (2 mask (pred - target) - lambda c r)^2
  double product = 0;   // r pred

  PALP_INLINE void operator+=(const ScoreSums& other) {
    squares += other.squares;
    residual += other.residual;
    gradient += other.gradient;
    product += other.product;
  }
};

}  // namespace palp_fast
