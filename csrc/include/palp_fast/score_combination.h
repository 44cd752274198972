// score_combination: reconstruction loss and alignment residual (palp_fast/functional.py has the formula).
#pragma once

#include "palp_fast/element.h"
#include "palp_fast/elementary.h"
#include "palp_fast/image.h"

namespace palp_fast {

constexpr int64_t kMostTerms = 8;  // predictions that one call combines

// Real: float, or double where any image is double.
template <typename Real>
struct ScoreParams {
  Shape shape;
  ImageView pred, target, mask;  // mask [B, 1, H, W]; absent: 1 everywhere
  ImageView predictions[kMostTerms];
  int64_t terms = 0;
  Real factors[kMostTerms] = {};  // of each prediction, times its coefficient
  TableView coefficients;         // [terms, B]; absent: 1
  Real residual_weight = 1;
  VectorView residual_scale, sample_weight;  // [B]; absent: 1
};

template <typename Real>
PALP_INLINE Real score_coefficient(const ScoreParams<Real>& params, int64_t term, int64_t sample) {
  return params.factors[term] * read_table<Real>(params.coefficients, term, sample, 1);
}

// lambda c_b
template <typename Real>
PALP_INLINE Real score_pull(const ScoreParams<Real>& params, int64_t sample) {
  return params.residual_weight * read_vector<Real>(params.residual_scale, sample, 1);
}

template <typename Real>
PALP_INLINE Real score_weight(const ScoreParams<Real>& params, int64_t sample) {
  return read_vector<Real>(params.sample_weight, sample, 1);
}

// Over a part of one image: what loss and statistics are made of.
template <typename Sum>
struct ScoreSums {
  Sum squares;   // mask (pred - target)^2
  Sum residual;  // r^2
  Sum gradient;  // (2 mask (pred - target) - lambda c r)^2
  Sum product;   // r pred

  template <typename Other>
  PALP_INLINE void add(const ScoreSums<Other>& other) {
    squares += other.squares;
    residual += other.residual;
    gradient += other.gradient;
    product += other.product;
  }
};

template <typename Real>
struct ScoreElement {
  Real gradient;  // 2 mask (pred - target) - pull r
  ScoreSums<Real> sums;

  PALP_INLINE ScoreElement(Real pred, Real target, Real mask, Real residual, Real pull) {
    const Real error = pred - target;
    gradient = mask * (2 * error) - pull * residual;
    sums = {mask * (error * error), residual * residual, gradient * gradient, residual * pred};
  }
};

// Writes the sample's row of stats [B, 3]; returns what it adds to the loss times numel.
template <typename Real>
PALP_INLINE double finish_sample(
    const ScoreParams<Real>& params, const ScoreSums<double>& sum, int64_t sample, Real* stats) {
  const double image = params.shape.image() > 0 ? double(params.shape.image()) : 1.0;
  stats[3 * sample] = Real(sum.squares / image);
  stats[3 * sample + 1] = Real(square_root(sum.residual / image));
  stats[3 * sample + 2] = Real(square_root(sum.gradient / image));
  return score_weight(params, sample) * (sum.squares - score_pull(params, sample) * sum.product);
}

// The divisor of the loss; 1 for an empty batch.
PALP_INLINE double score_numel(const Shape& shape) { return shape.numel() > 0 ? double(shape.numel()) : 1.0; }

// What the gradient of an element of the sample is multiplied by.
template <typename Real>
PALP_INLINE Real score_share(const ScoreParams<Real>& params, int64_t sample) {
  return score_weight(params, sample) / Real(score_numel(params.shape));
}

}  // namespace palp_fast
