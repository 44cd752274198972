// score_combination on CUDA for torch's dispatcher. Schema, shape function and autograd are in palp_fast/ops.py.
#include "../score_combination.h"

#include "../../cuda/kernels.h"
#include "stream.h"

namespace palp_fast::bindings {
namespace {

using Results = std::tuple<Tensor, Tensor, Tensor>;

template <typename Real>
Real* values(const Tensor& tensor) {
  return static_cast<Real*>(tensor.mutable_data_ptr());
}

template <typename Real>
Results forward(const ScoreArguments& arguments, const OnDeviceOf& device) {
  const ScoreParams<Real> params = score_params<Real>(arguments);
  constexpr ScalarType dtype = scalar_type_of<Real>;
  const Tensor loss = empty_like_of(arguments.pred, {}, dtype);
  const Tensor stats = empty_like_of(arguments.pred, {params.shape.batch, 3}, dtype);
  const Tensor gradient = empty_image(arguments.pred, params.shape, dtype);
  const int64_t sums = params.shape.batch * cuda::score_tiles(params.shape) * cuda::kSumsPerTile;
  const Tensor workspace = empty_like_of(arguments.pred, {sums}, ScalarType::Double);
  const cuda::ScoreOut<Real> results{
      values<Real>(loss), values<Real>(stats), values<Real>(gradient),
      static_cast<double*>(workspace.mutable_data_ptr())};
  check_cuda(cuda::score_combination_fwd(params, results, device.stream()), "score_combination");
  return {loss, stats, gradient};
}

Results score_combination(
    const Tensor& pred, const Tensor& target, const std::vector<Tensor>& predictions,
    const std::vector<double>& factors, const OptionalTensor& coefficients, double residual_weight,
    const OptionalTensor& residual_scale, const OptionalTensor& sample_weight, const OptionalTensor& mask) {
  const OnDeviceOf device(pred, "pred");
  const ScoreArguments arguments{
      pred, target, predictions, factors, coefficients, residual_weight, residual_scale, sample_weight, mask};
  return arguments.any_double() ? forward<double>(arguments, device) : forward<float>(arguments, device);
}

Tensor score_combination_bwd(const Tensor& grad_output, const Tensor& gradient, ScalarType dtype) {
  const OnDeviceOf device(gradient, "gradient");
  const Shape shape = shape_of(gradient, "gradient");
  const ImageView view = view_of(gradient, gradient, shape, "gradient");
  const VectorView upstream = scalar_of(grad_output, gradient, "grad_output");
  const Tensor out = empty_image(gradient, shape, dtype);
  const bool wide = any_double({&gradient});
  const auto launch = wide ? cuda::score_combination_bwd<double> : cuda::score_combination_bwd<float>;
  check_cuda(launch(shape, view, upstream, out_of(out), device.stream()), "score_combination_bwd");
  return out;
}

}  // namespace
}  // namespace palp_fast::bindings

STABLE_TORCH_LIBRARY_IMPL(palp_fast, CUDA, library) {
  using namespace palp_fast::bindings;
  library.impl("score_combination", TORCH_BOX(&score_combination));
  library.impl("score_combination_bwd", TORCH_BOX(&score_combination_bwd));
}
