// geglu on the CPU for torch's dispatcher. Schema, shape function and autograd are in palp_fast/ops.
#include "../../cpu/kernels.h"
#include "../tensors.h"

namespace palp_fast::bindings {
namespace {

// grad: null in the forward pass.
Tensor run(const Tensor& given, const Tensor* grad) {
  check_cpu(given, "x");
  const int64_t dims = given.dim();
  STD_TORCH_CHECK(dims > 0 && given.sizes()[dims - 1] % 2 == 0, "x: allowed is [..., 2 d]");
  const Tensor x = torch::stable::contiguous(given);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  GegluParams params;
  params.dtype = dtype_of(x.scalar_type(), "x");
  params.width = sizes.back() / 2;
  params.rows = params.width ? x.numel() / sizes.back() : 0;
  params.x = x.const_data_ptr();
  if (!grad) sizes.back() = params.width;
  const Tensor out = empty_like_of(x, sizes, x.scalar_type());
  params.out = out.mutable_data_ptr();
  if (grad) {
    STD_TORCH_CHECK(grad->is_cpu() && grad->scalar_type() == x.scalar_type(), "grad: allowed is the dtype of x");
    STD_TORCH_CHECK(2 * grad->numel() == x.numel(), "grad: allowed is [..., d]");
    params.grad = grad->const_data_ptr();
  }
  cpu::kernels().geglu(params, parallel_for);
  return out;
}

Tensor geglu(const Tensor& x) { return run(x, nullptr); }

Tensor geglu_bwd(const Tensor& grad, const Tensor& x) {
  const Tensor dense = torch::stable::contiguous(grad);
  return run(x, &dense);
}

}  // namespace
}  // namespace palp_fast::bindings

STABLE_TORCH_LIBRARY_IMPL(palp_fast, CPU, library) {
  using namespace palp_fast::bindings;
  library.impl("geglu", TORCH_BOX(&geglu));
  library.impl("geglu_bwd", TORCH_BOX(&geglu_bwd));
}
