// group_norm_silu on the CPU for torch's dispatcher. Schema, shape function and autograd are in palp_fast/ops.
#include <tuple>

#include "../../cpu/kernels.h"
#include "../layout.h"

namespace palp_fast::bindings {
namespace {

VectorView optional_vector(const OptionalTensor& tensor, const Tensor& x, int64_t count, const char* name) {
  return tensor ? vector_of(*tensor, x, count, name) : VectorView{};
}

GroupNorm norm_of(
    const Tensor& x, int64_t groups, const OptionalTensor& weight, const OptionalTensor& bias, bool silu) {
  STD_TORCH_CHECK(x.dim() > 1, "x has ", x.dim(), " dimensions: allowed is [B, C, ...]");
  GroupNorm norm;
  norm.shape = image_shape(x);
  const int64_t channels = norm.shape.channels;
  STD_TORCH_CHECK(groups > 0 && channels % groups == 0, "groups=", groups, ": allowed are divisors of ", channels);
  norm.groups = groups;
  norm.weight = optional_vector(weight, x, channels, "weight");
  norm.bias = optional_vector(bias, x, channels, "bias");
  norm.silu = silu;
  return norm;
}

// Checks that statistics are [B, groups] of Real, contiguous.
template <typename Real>
const Real* statistics_of(const Tensor& tensor, const GroupNorm& norm, const char* name) {
  const bool fits = tensor.dim() == 2 && tensor.sizes()[0] == norm.shape.batch && tensor.sizes()[1] == norm.groups;
  STD_TORCH_CHECK(fits && tensor.is_contiguous(), name, ": allowed is a contiguous [B, groups]");
  STD_TORCH_CHECK(tensor.scalar_type() == scalar_type_of<Real>, name, " has another dtype than the forward pass gave");
  check_cpu(tensor, name);
  return static_cast<const Real*>(tensor.const_data_ptr());
}

template <typename Real>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& given, const GroupNorm& norm, double eps) {
  const Tensor x = as_image(given), y = empty_in_layout_of(given);
  const std::vector<int64_t> sizes{norm.shape.batch, norm.groups};
  const Tensor mean = empty_like_of(x, sizes, scalar_type_of<Real>);
  const Tensor rstd = empty_like_of(x, sizes, scalar_type_of<Real>);
  GroupNormParams<Real> params{norm, image_view<ImageView>(x, x.const_data_ptr(), "x"), eps, {}, nullptr, nullptr};
  params.y = image_view<ImageTarget>(as_image(y), y.mutable_data_ptr(), "y");
  params.mean = static_cast<Real*>(mean.mutable_data_ptr());
  params.rstd = static_cast<Real*>(rstd.mutable_data_ptr());
  cpu::kernels().image<Real>().group_norm_fwd(params, parallel_for);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(
    const Tensor& x, int64_t groups, const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool silu) {
  check_cpu(x, "x");
  const GroupNorm norm = norm_of(as_image(x), groups, weight, bias, silu);
  return any_double({&x}) ? forward<double>(x, norm, eps) : forward<float>(x, norm, eps);
}

template <typename Real>
Tensor backward(
    const Tensor& grad, const Tensor& given, const GroupNorm& norm, const Tensor& mean, const Tensor& rstd) {
  const Tensor g = as_image(grad), x = as_image(given), dx = empty_in_layout_of(given);
  GroupNormBackwardParams<Real> params{norm, {}, {}, nullptr, nullptr, {}};
  params.grad = image_view<ImageView>(g, g.const_data_ptr(), "grad");
  params.x = image_view<ImageView>(x, x.const_data_ptr(), "x");
  params.mean = statistics_of<Real>(mean, norm, "mean");
  params.rstd = statistics_of<Real>(rstd, norm, "rstd");
  params.dx = image_view<ImageTarget>(as_image(dx), dx.mutable_data_ptr(), "dx");
  cpu::kernels().image<Real>().group_norm_bwd(params, parallel_for);
  return dx;
}

bool same_sizes(const Tensor& left, const Tensor& right) {
  const auto a = left.sizes(), b = right.sizes();
  return std::vector<int64_t>(a.begin(), a.end()) == std::vector<int64_t>(b.begin(), b.end());
}

Tensor group_norm_silu_bwd(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight,
    const OptionalTensor& bias, bool silu) {
  check_cpu(x, "x");
  check_cpu(grad, "grad");
  STD_TORCH_CHECK(same_sizes(grad, x), "grad has another shape than x");
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "grad: allowed is the dtype of x");
  STD_TORCH_CHECK(mean.dim() == 2, "mean: allowed is [B, groups]");
  const GroupNorm norm = norm_of(as_image(x), mean.sizes()[1], weight, bias, silu);
  return any_double({&x}) ? backward<double>(grad, x, norm, mean, rstd) : backward<float>(grad, x, norm, mean, rstd);
}

}  // namespace
}  // namespace palp_fast::bindings

STABLE_TORCH_LIBRARY_IMPL(palp_fast, CPU, library) {
  using namespace palp_fast::bindings;
  library.impl("group_norm_silu", TORCH_BOX(&group_norm_silu));
  library.impl("group_norm_silu_bwd", TORCH_BOX(&group_norm_silu_bwd));
}
