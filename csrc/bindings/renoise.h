// Arguments of renoise, checked, as its kernels on every device take them.
#pragma once

#include "palp_fast/renoise.h"
#include "tensors.h"

namespace palp_fast::bindings {

inline void set_schedule(
    const Tensor& alpha_bar, const OptionalTensor& alpha_bar_new, const Tensor& first, int64_t batch, VectorView& old,
    VectorView& fresh) {
  old = vector_of(alpha_bar, first, batch, "alpha_bar");
  if (alpha_bar_new) fresh = vector_of(*alpha_bar_new, first, batch, "alpha_bar_new");
}

// All but the result.
inline RenoiseParams renoise_params(
    const Tensor& x_t, const Tensor& eps_pred, const Tensor& noise, const Tensor& alpha_bar,
    const OptionalTensor& alpha_bar_new, int64_t copies) {
  RenoiseParams params;
  params.shape = shape_of(x_t, "x_t");
  params.x_t = view_of(x_t, x_t, params.shape, "x_t");
  params.eps_pred = view_of(eps_pred, x_t, params.shape, "eps_pred");
  params.noise = view_of(noise, x_t, params.shape, "noise");
  set_schedule(alpha_bar, alpha_bar_new, x_t, params.shape.batch, params.alpha_bar, params.alpha_bar_new);
  STD_TORCH_CHECK(copies >= 1, "copies=", copies, ": allowed is an int >= 1");
  params.copies = copies;
  return params;
}

// All but the results.
inline RenoiseBackwardParams renoise_backward_params(
    const Tensor& grad, const Tensor& alpha_bar, const OptionalTensor& alpha_bar_new, int64_t copies) {
  const Shape whole = shape_of(grad, "grad");
  STD_TORCH_CHECK(copies >= 1 && whole.batch % copies == 0, "copies=", copies, " does not divide ", whole.batch);
  RenoiseBackwardParams params;
  params.shape = whole;
  params.shape.batch = whole.batch / copies;
  params.grad = view_of(grad, grad, whole, "grad");
  set_schedule(alpha_bar, alpha_bar_new, grad, params.shape.batch, params.alpha_bar, params.alpha_bar_new);
  params.copies = copies;
  return params;
}

}  // namespace palp_fast::bindings
