// Registers the CPU kernels with torch's dispatcher. Schemas, shape functions and autograd are in palp_fast/ops.py.
#include <cmath>
#include <tuple>

#include "../cpu/kernels.h"
#include "tensors.h"

namespace palp_fast::bindings {
namespace {

using OptionalTensor = std::optional<Tensor>;

bool any_double(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* tensor : tensors) {
    if (tensor->scalar_type() == ScalarType::Double) return true;
  }
  return false;
}

template <typename Real>
std::vector<Real> read_coefficients(const Tensor& tensor, int64_t terms, int64_t batch) {
  STD_TORCH_CHECK(
      tensor.dim() == 2 && tensor.sizes()[0] == terms && tensor.sizes()[1] == batch && tensor.is_cpu(),
      "coefficients: allowed is [", terms, ", ", batch, "] on the cpu");
  std::vector<Real> values(terms * batch);
  for (int64_t term = 0; term < terms; ++term) {
    read_row(
        tensor, term * tensor.strides()[0], batch, tensor.strides()[1], values.data() + term * batch, "coefficients");
  }
  return values;
}

template <typename Real>
void write_results(
    const std::vector<ScoreSums>& sums, const ScoreParams<Real>& params, const Tensor& loss, const Tensor& stats) {
  const double image = double(std::max<int64_t>(params.shape.image(), 1));
  Real* row = static_cast<Real*>(stats.mutable_data_ptr());
  double total = 0;
  for (int64_t sample = 0; sample < params.shape.batch; ++sample, row += 3) {
    const ScoreSums& sum = sums[sample];
    row[0] = Real(sum.squares / image);
    row[1] = Real(std::sqrt(sum.residual / image));
    row[2] = Real(std::sqrt(sum.gradient / image));
    total += params.sample_weight[sample] * (sum.squares - params.residual_weight[sample] * sum.product);
  }
  *static_cast<Real*>(loss.mutable_data_ptr()) = Real(total / double(std::max<int64_t>(params.shape.numel(), 1)));
}

template <typename Real>
std::tuple<Tensor, Tensor, Tensor> score_forward(
    const Tensor& pred, const Tensor& target, const std::vector<Tensor>& predictions, const Tensor& coefficients,
    double residual_weight, const OptionalTensor& residual_scale, const OptionalTensor& sample_weight,
    const OptionalTensor& mask) {
  ScoreParams<Real> params;
  params.shape = shape_of(pred, "pred");
  const int64_t batch = params.shape.batch;
  params.pred = view_of(pred, params.shape, "pred");
  params.target = view_of(target, params.shape, "target");
  std::vector<ImageView> views;
  for (const Tensor& prediction : predictions) views.push_back(view_of(prediction, params.shape, "predictions"));
  params.predictions = views.data();
  params.terms = int64_t(views.size());
  const auto factors = read_coefficients<Real>(coefficients, params.terms, batch);
  auto weights = per_sample<Real>(residual_scale, batch, 1, "residual_scale");
  for (Real& weight : weights) weight *= Real(residual_weight);
  const auto sample_weights = per_sample<Real>(sample_weight, batch, 1, "sample_weight");
  params.coefficients = factors.data();
  params.residual_weight = weights.data();
  params.sample_weight = sample_weights.data();
  ImageView mask_view;
  if (mask) {
    mask_view = view_of(*mask, params.shape, "mask", true);
    params.mask = &mask_view;
  }

  const ScalarType real = scalar_type_of<Real>;
  const Shape& s = params.shape;
  Tensor loss = empty_like_of(pred, {}, real), stats = empty_like_of(pred, {batch, 3}, real);
  Tensor gradient = empty_like_of(pred, {batch, s.channels, s.height, s.width}, real);
  std::vector<ScoreSums> sums(batch);
  cpu::score_combination_fwd(params, static_cast<Real*>(gradient.mutable_data_ptr()), sums.data(), parallel_for);
  write_results(sums, params, loss, stats);
  return {loss, stats, gradient};
}

std::tuple<Tensor, Tensor, Tensor> score_combination(
    const Tensor& pred, const Tensor& target, const std::vector<Tensor>& predictions, const Tensor& coefficients,
    double residual_weight, const OptionalTensor& residual_scale, const OptionalTensor& sample_weight,
    const OptionalTensor& mask) {
  bool wide = any_double({&pred, &target});
  for (const Tensor& prediction : predictions) wide = wide || any_double({&prediction});
  const auto forward = wide ? score_forward<double> : score_forward<float>;
  return forward(pred, target, predictions, coefficients, residual_weight, residual_scale, sample_weight, mask);
}

template <typename Real>
Tensor score_backward(const Tensor& grad_output, const Tensor& gradient, ScalarType dtype) {
  const Shape shape = shape_of(gradient, "gradient");
  Real factor;
  STD_TORCH_CHECK(grad_output.numel() == 1 && grad_output.is_cpu(), "grad_output: allowed is a scalar on the cpu");
  read_row(grad_output, 0, 1, 1, &factor, "grad_output");
  factor /= Real(std::max<int64_t>(shape.numel(), 1));
  Tensor out = empty_like_of(gradient, {shape.batch, shape.channels, shape.height, shape.width}, dtype);
  cpu::score_combination_bwd(shape, view_of(gradient, shape, "gradient"), factor, out_of(out), parallel_for);
  return out;
}

Tensor score_combination_bwd(const Tensor& grad_output, const Tensor& gradient, ScalarType dtype) {
  return (any_double({&gradient}) ? score_backward<double> : score_backward<float>)(grad_output, gradient, dtype);
}

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
  params.x_t = view_of(x_t, s, "x_t");
  params.eps_pred = view_of(eps_pred, s, "eps_pred");
  params.noise = view_of(noise, s, "noise");
  const FactorValues<Real> factors(alpha_bar, alpha_bar_new, s.batch);
  params.factors = factors.view();
  params.copies = copies;
  STD_TORCH_CHECK(copies >= 1, "copies=", copies, ": allowed is an int >= 1");
  Tensor out = empty_like_of(x_t, {copies * s.batch, s.channels, s.height, s.width}, dtype);
  params.out = out_of(out);
  cpu::renoise_fwd(params, parallel_for);
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
  params.grad = view_of(grad, whole, "grad");
  const FactorValues<Real> factors(alpha_bar, alpha_bar_new, params.shape.batch);
  params.factors = factors.view();
  params.copies = copies;
  const std::vector<int64_t> sizes{params.shape.batch, whole.channels, whole.height, whole.width};
  Tensor d_x = empty_like_of(grad, sizes, x_dtype), d_eps = empty_like_of(grad, sizes, eps_dtype);
  Tensor d_noise = empty_like_of(grad, sizes, noise_dtype);
  params.d_x_t = out_of(d_x);
  params.d_eps_pred = out_of(d_eps);
  params.d_noise = out_of(d_noise);
  cpu::renoise_bwd(params, parallel_for);
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
  library.impl("score_combination", TORCH_BOX(&score_combination));
  library.impl("score_combination_bwd", TORCH_BOX(&score_combination_bwd));
  library.impl("renoise", TORCH_BOX(&renoise));
  library.impl("renoise_bwd", TORCH_BOX(&renoise_bwd));
}
