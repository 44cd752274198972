// renoise on the CPU for torch's dispatcher. Schema, shape function and autograd are in palp_fast/ops.py.
#include <cmath>
#include <tuple>

#include "../../cpu/kernels.h"
#include "../tensors.h"

namespace palp_fast::bindings {
namespace {

// Storage behind RenoiseFactors.
template <typename Real>
struct FactorValues {
  std::vector<Real> ratio, s_t, s_u;

  FactorValues(const Tensor& alpha_bar, const OptionalTensor& alpha_bar_new, int64_t batch) {
    const auto old = per_sample<Real>(alpha_bar, batch, 1, "alpha_bar");
    const auto fresh = per_sample<Real>(alpha_bar_new, batch, 1, "alpha_bar_new");
    for (int64_t i = 0; i < batch; ++i) {
      s_t.push_back(std::sqrt(1 - old[i]));
      s_u.push_back(alpha_bar_new ? std::sqrt(1 - fresh[i]) : s_t[i]);
      if (alpha_bar_new) ratio.push_back(std::sqrt(fresh[i]) / std::sqrt(old[i]));
    }
  }

  RenoiseFactors<Real> view() const { return {ratio.empty() ? nullptr : ratio.data(), s_t.data(), s_u.data()}; }
};

template <typename Real>
Tensor renoise_forward(
    const Tensor& x_t, const Tensor& eps_pred, const Tensor& noise, const Tensor& alpha_bar,
    const OptionalTensor& alpha_bar_new, int64_t copies, ScalarType dtype) {
  RenoiseParams<Real> params;
  params.shape = shape_of(x_t, "x_t");
  const Shape& s = params.shape;
  params.x_t = view_of(x_t, x_t, s, "x_t");
  params.eps_pred = view_of(eps_pred, x_t, s, "eps_pred");
  params.noise = view_of(noise, x_t, s, "noise");
  const FactorValues<Real> factors(alpha_bar, alpha_bar_new, s.batch);
  params.factors = factors.view();
  params.copies = copies;
  STD_TORCH_CHECK(copies >= 1, "copies=", copies, ": allowed is an int >= 1");
  Tensor out = empty_like_of(x_t, {copies * s.batch, s.channels, s.height, s.width}, dtype);
  params.out = out_of(out);
  cpu::kernels().image<Real>().renoise_fwd(params, parallel_for);
  return out;
}

Tensor renoise(
    const Tensor& x_t, const Tensor& eps_pred, const Tensor& noise, const Tensor& alpha_bar,
    const OptionalTensor& alpha_bar_new, int64_t copies, std::optional<ScalarType> dtype) {
  const auto forward = any_double({&x_t, &eps_pred, &noise}) ? renoise_forward<double> : renoise_forward<float>;
  return forward(x_t, eps_pred, noise, alpha_bar, alpha_bar_new, copies, dtype.value_or(x_t.scalar_type()));
}

template <typename Real>
std::tuple<Tensor, Tensor, Tensor> renoise_backward(
    const Tensor& grad, const Tensor& alpha_bar, const OptionalTensor& alpha_bar_new, int64_t copies,
    ScalarType x_dtype, ScalarType eps_dtype, ScalarType noise_dtype) {
  const Shape whole = shape_of(grad, "grad");
  STD_TORCH_CHECK(copies >= 1 && whole.batch % copies == 0, "copies=", copies, " does not divide ", whole.batch);
  RenoiseBackwardParams<Real> params;
  params.shape = whole;
  params.shape.batch = whole.batch / copies;
  params.grad = view_of(grad, grad, whole, "grad");
  const FactorValues<Real> factors(alpha_bar, alpha_bar_new, params.shape.batch);
  params.factors = factors.view();
  params.copies = copies;
  const std::vector<int64_t> sizes{params.shape.batch, whole.channels, whole.height, whole.width};
  Tensor d_x = empty_like_of(grad, sizes, x_dtype), d_eps = empty_like_of(grad, sizes, eps_dtype);
  Tensor d_noise = empty_like_of(grad, sizes, noise_dtype);
  params.d_x_t = out_of(d_x);
  params.d_eps_pred = out_of(d_eps);
  params.d_noise = out_of(d_noise);
  cpu::kernels().image<Real>().renoise_bwd(params, parallel_for);
  return {d_x, d_eps, d_noise};
}

std::tuple<Tensor, Tensor, Tensor> renoise_bwd(
    const Tensor& grad, const Tensor& alpha_bar, const OptionalTensor& alpha_bar_new, int64_t copies,
    ScalarType compute, ScalarType x_dtype, ScalarType eps_dtype, ScalarType noise_dtype) {
  const auto backward = compute == ScalarType::Double ? renoise_backward<double> : renoise_backward<float>;
  return backward(grad, alpha_bar, alpha_bar_new, copies, x_dtype, eps_dtype, noise_dtype);
}

}  // namespace
}  // namespace palp_fast::bindings

STABLE_TORCH_LIBRARY_IMPL(palp_fast, CPU, library) {
  using namespace palp_fast::bindings;
  library.impl("renoise", TORCH_BOX(&renoise));
  library.impl("renoise_bwd", TORCH_BOX(&renoise_bwd));
}
