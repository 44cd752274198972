// renoise: x_hat = ratio (x_t - s_t eps) + s_u noise (palp_fast/functional.py has the derivation).
#pragma once

#include "palp_fast/image.h"

namespace palp_fast {

// Per-sample factors [B] in host memory. ratio = a_u / a_t, or null for u = t: then x_t + s_t (noise - eps).
template <typename Real>
struct RenoiseFactors {
  const Real* ratio = nullptr;
  const Real* s_t = nullptr;
  const Real* s_u = nullptr;
};

template <typename Real>
struct RenoiseParams {
  Shape shape;  // of one copy
  ImageView x_t, eps_pred, noise;
  RenoiseFactors<Real> factors;
  int64_t copies = 1;
  ImageOut out;  // [copies B, C, H, W]
};

template <typename Real>
struct RenoiseBackwardParams {
  Shape shape;  // of one copy
  ImageView grad;  // [copies B, C, H, W]
  RenoiseFactors<Real> factors;
  int64_t copies = 1;
  ImageOut d_x_t, d_eps_pred, d_noise;  // [B, C, H, W]
};

}  // namespace palp_fast
