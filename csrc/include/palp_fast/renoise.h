// renoise: x_hat = ratio (x_t - s_t eps) + s_u noise (palp_fast/functional.py has the derivation).
#pragma once

#include "palp_fast/element.h"
#include "palp_fast/elementary.h"
#include "palp_fast/image.h"

namespace palp_fast {

struct RenoiseParams {
  Shape shape;  // of one copy
  ImageView x_t, eps_pred, noise;
  VectorView alpha_bar, alpha_bar_new;  // [B]; the second absent for u = t
  int64_t copies = 1;
  ImageOut out;  // [copies B, C, H, W]
};

struct RenoiseBackwardParams {
  Shape shape;     // of one copy
  ImageView grad;  // [copies B, C, H, W]
  VectorView alpha_bar, alpha_bar_new;
  int64_t copies = 1;
  ImageOut d_x_t, d_eps_pred, d_noise;  // [B, C, H, W]
};

// Of one sample: ratio = a_u / a_t.
template <typename Real>
struct RenoiseFactors {
  Real ratio, s_t, s_u;
  bool same;  // u = t

  PALP_INLINE RenoiseFactors(const VectorView& alpha_bar, const VectorView& alpha_bar_new, int64_t sample) {
    const Real old = read_vector<Real>(alpha_bar, sample, 1), fresh = read_vector<Real>(alpha_bar_new, sample, old);
    same = alpha_bar_new.data == nullptr;
    ratio = same ? Real(1) : square_root(fresh) / square_root(old);
    s_t = square_root(1 - old);
    s_u = square_root(1 - fresh);
  }

  // With u = t nothing is divided by a_t, which is small at large t.
  PALP_INLINE Real apply_same(Real x, Real eps, Real noise) const { return x + s_t * (noise - eps); }
  PALP_INLINE Real apply(Real x, Real eps, Real noise) const { return ratio * (x - s_t * eps) + s_u * noise; }
};

}  // namespace palp_fast
