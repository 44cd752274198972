// score_combination on the CPU for torch's dispatcher. Schema, shape function and autograd are in palp_fast/ops.py.
#include <cmath>
#include <tuple>

#include "../../cpu/kernels.h"
#include "../tensors.h"

namespace palp_fast::bindings {
namespace {

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
    const std::vector<ScoreSums>& tiles, const ScoreParams<Real>& params, const Tensor& loss, const Tensor& stats) {
  const int64_t count = cpu::tiles_per_image(params.shape);
  const double image = double(std::max<int64_t>(params.shape.image(), 1));
  Real* row = static_cast<Real*>(stats.mutable_data_ptr());
  double total = 0;
  for (int64_t sample = 0; sample < params.shape.batch; ++sample, row += 3) {
    ScoreSums sum;
    for (int64_t tile = 0; tile < count; ++tile) sum += tiles[sample * count + tile];
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
  params.pred = view_of(pred, pred, params.shape, "pred");
  params.target = view_of(target, pred, params.shape, "target");
  std::vector<ImageView> views;
  for (const Tensor& prediction : predictions) {
    views.push_back(view_of(prediction, pred, params.shape, "predictions"));
  }
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
    mask_view = view_of(*mask, pred, params.shape, "mask", true);
    params.mask = &mask_view;
  }

  const ScalarType real = scalar_type_of<Real>;
  const Shape& s = params.shape;
  Tensor loss = empty_like_of(pred, {}, real), stats = empty_like_of(pred, {batch, 3}, real);
  Tensor gradient = empty_like_of(pred, {batch, s.channels, s.height, s.width}, real);
  std::vector<ScoreSums> tiles(batch * cpu::tiles_per_image(s));
  Real* values = static_cast<Real*>(gradient.mutable_data_ptr());
  cpu::kernels().image<Real>().score_combination_fwd(params, values, tiles.data(), parallel_for);
  write_results(tiles, params, loss, stats);
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
  cpu::kernels().image<Real>().score_combination_bwd(
      shape, view_of(gradient, gradient, shape, "gradient"), factor, out_of(out), parallel_for);
  return out;
}

Tensor score_combination_bwd(const Tensor& grad_output, const Tensor& gradient, ScalarType dtype) {
  return (any_double({&gradient}) ? score_backward<double> : score_backward<float>)(grad_output, gradient, dtype);
}

}  // namespace
}  // namespace palp_fast::bindings

STABLE_TORCH_LIBRARY_IMPL(palp_fast, CPU, library) {
  using namespace palp_fast::bindings;
  library.impl("score_combination", TORCH_BOX(&score_combination));
  library.impl("score_combination_bwd", TORCH_BOX(&score_combination_bwd));
}
