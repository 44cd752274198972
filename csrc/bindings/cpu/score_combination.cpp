// score_combination on the CPU for torch's dispatcher. Schema, shape function and autograd are in palp_fast/ops.py.
#include "../score_combination.h"

#include "../../cpu/kernels.h"
#include "kept_memory.h"

namespace palp_fast::bindings {
namespace {

using Results = std::tuple<Tensor, Tensor, Tensor>;

// Loss and stats from the sums of the tiles, added in order.
template <typename Real>
void finish(const ScoreParams<Real>& params, const std::vector<ScoreSums<double>>& tiles, Real* loss, Real* stats) {
  const int64_t count = cpu::tiles_per_image(params.shape);
  double total = 0;
  for (int64_t sample = 0; sample < params.shape.batch; ++sample) {
    ScoreSums<double> sum{};
    for (int64_t tile = 0; tile < count; ++tile) sum.add(tiles[sample * count + tile]);
    total += finish_sample(params, sum, sample, stats);
  }
  *loss = Real(total / score_numel(params.shape));
}

template <typename Real>
Real* values(const Tensor& tensor) {
  return static_cast<Real*>(tensor.mutable_data_ptr());
}

template <typename Real>
Results forward(const ScoreArguments& arguments) {
  const ScoreParams<Real> params = score_params<Real>(arguments);
  constexpr ScalarType dtype = scalar_type_of<Real>;
  const Tensor loss = result_of({}, dtype), stats = result_of({params.shape.batch, 3}, dtype);
  const Tensor gradient = result_image(params.shape, dtype);
  std::vector<ScoreSums<double>> tiles(params.shape.batch * cpu::tiles_per_image(params.shape));
  const auto& kernels = cpu::kernels().image<Real>();
  kernels.score_combination_fwd(params, values<Real>(gradient), tiles.data(), parallel_for);
  finish(params, tiles, values<Real>(loss), values<Real>(stats));
  return {loss, stats, gradient};
}

Results score_combination(
    const Tensor& pred, const Tensor& target, const std::vector<Tensor>& predictions,
    const std::vector<double>& factors, const OptionalTensor& coefficients, double residual_weight,
    const OptionalTensor& residual_scale, const OptionalTensor& sample_weight, const OptionalTensor& mask) {
  check_cpu(pred, "pred");
  const ScoreArguments arguments{
      pred, target, predictions, factors, coefficients, residual_weight, residual_scale, sample_weight, mask};
  return arguments.any_double() ? forward<double>(arguments) : forward<float>(arguments);
}

template <typename Real>
Tensor backward(const Tensor& grad_output, const Tensor& gradient, ScalarType dtype) {
  const Shape shape = shape_of(gradient, "gradient");
  const Real factor = read_vector<Real>(scalar_of(grad_output, gradient, "grad_output"), 0, 1);
  const Tensor out = result_image(shape, dtype);
  const ImageView view = view_of(gradient, gradient, shape, "gradient");
  cpu::kernels().image<Real>().score_combination_bwd(shape, view, factor, out_of(out), parallel_for);
  return out;
}

Tensor score_combination_bwd(const Tensor& grad_output, const Tensor& gradient, ScalarType dtype) {
  check_cpu(gradient, "gradient");
  return (any_double({&gradient}) ? backward<double> : backward<float>)(grad_output, gradient, dtype);
}

}  // namespace
}  // namespace palp_fast::bindings

STABLE_TORCH_LIBRARY_IMPL(palp_fast, CPU, library) {
  using namespace palp_fast::bindings;
  library.impl("score_combination", TORCH_BOX(&score_combination));
  library.impl("score_combination_bwd", TORCH_BOX(&score_combination_bwd));
}
