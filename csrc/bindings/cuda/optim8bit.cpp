// The optimizer operators on CUDA for torch's dispatcher. Schemas are in palp_fast/ops_optim.py.
#include <cstring>
#include <tuple>

#include "../../cuda/kernels.h"
#include "../optimizer.h"
#include "stream.h"

namespace palp_fast::bindings {
namespace {

// Tables on the device, written by kernel arguments: tensors, gradients, owner, and the workspace.
class DeviceTables {
 public:
  DeviceTables(const StepTables& host, const Tensor& like, cudaStream_t stream)
      : count_(int64_t(host.tensors.size())), chunks_(int64_t(host.owner.size())) {
    std::vector<int64_t> words(static_cast<size_t>(work_at()));  // the ticket, the last of them, is 0
    std::memcpy(words.data(), host.tensors.data(), host.tensors.size() * sizeof(TensorRow));
    std::memcpy(words.data() + 12 * count_, host.gradients.data(), host.gradients.size() * sizeof(GradientRow));
    std::memcpy(words.data() + 14 * count_, host.owner.data(), host.owner.size() * sizeof(int32_t));
    memory_ = empty_like_of(like, {work_at() + 4 * count_ + chunks_}, ScalarType::Long);
    words_ = static_cast<int64_t*>(memory_->mutable_data_ptr());
    check_cuda(cuda::write_words(words.data(), work_at(), words_, stream), "write_words");
  }

  StepParams step(Rule rule, const Tensor& verdict) const {
    StepParams params;
    params.rule = rule;
    params.tensors = reinterpret_cast<const TensorRow*>(words_);
    params.gradients = reinterpret_cast<const GradientRow*>(words_ + 12 * count_);
    params.owner = reinterpret_cast<const int32_t*>(words_ + 14 * count_);
    params.tensor_count = count_;
    params.chunk_count = chunks_;
    params.verdict = static_cast<Verdict*>(verdict.mutable_data_ptr());
    params.constants = reinterpret_cast<StepConstants*>(words_ + work_at());
    return params;
  }

  unsigned* ticket() const { return reinterpret_cast<unsigned*>(words_ + work_at() - 1); }
  double* partial() const { return reinterpret_cast<double*>(words_ + work_at() + 4 * count_); }

 private:
  int64_t work_at() const { return 14 * count_ + (chunks_ + 1) / 2 + 1; }

  int64_t count_, chunks_;
  std::optional<Tensor> memory_;
  int64_t* words_;
};

std::tuple<Tensor, Tensor> grad_norm(
    const std::vector<Tensor>& grads, const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
    double max_norm) {
  STD_TORCH_CHECK(!grads.empty(), "grads: allowed is at least one tensor");
  const OnDeviceOf device(grads[0], "grads");
  const DeviceTables tables(gradient_tables(grads), grads[0], device.stream());
  Tensor norm = empty_like_of(grads[0], {}, ScalarType::Float);
  Tensor verdict = empty_like_of(grads[0], {2}, ScalarType::Float);
  NormParams params;
  params.step = tables.step(Rule::adamw, verdict);
  params.max_norm = max_norm;
  params.grad_scale = scalar_of(grad_scale, grads[0], "grad_scale");
  params.found_inf = scalar_of(found_inf, grads[0], "found_inf");
  params.partial = tables.partial();
  params.norm = static_cast<float*>(norm.mutable_data_ptr());
  check_cuda(cuda::gradient_norm(params, tables.ticket(), false, device.stream()), "grad_norm");
  return {norm, verdict};
}

void update(Rule rule, const StepLists& lists) {
  const OnDeviceOf device(lists.steps, "steps");
  const DeviceTables tables(step_tables(lists), lists.steps, device.stream());
  StepParams params = tables.step(rule, lists.verdict);
  params.groups = static_cast<const GroupRow*>(lists.group.const_data_ptr());
  check_cuda(cuda::optimizer_update(params, true, device.stream()), "optimizer_update");
}

void adamw(
    const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& shadows,
    const Tensor& steps, const std::vector<Tensor>& exp_avg, const std::vector<Tensor>& exp_avg_sq,
    const Tensor& verdict, const Tensor& group, int64_t block_size) {
  update(Rule::adamw, {params, grads, shadows, steps, exp_avg, &exp_avg_sq, verdict, group, block_size});
}

void lion(
    const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& shadows,
    const Tensor& steps, const std::vector<Tensor>& exp_avg, const Tensor& verdict, const Tensor& group,
    int64_t block_size) {
  update(Rule::lion, {params, grads, shadows, steps, exp_avg, nullptr, verdict, group, block_size});
}

Tensor optimizer_step(
    int64_t rule, const Tensor& tensors, const Tensor& gradients, const Tensor& groups, const Tensor& owner,
    const Tensor& work, const Tensor& skipped, const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
    double max_norm) {
  const OnDeviceOf device(tensors, "tensors");
  const WrittenTables tables{tensors, gradients, groups, owner, work};
  Tensor norm = empty_like_of(tensors, {}, ScalarType::Float);
  const NormParams params = tables.norm(rule_of(rule), skipped, grad_scale, found_inf, max_norm, norm);
  check_cuda(cuda::gradient_norm(params, tables.ticket(), true, device.stream()), "gradient_norm");
  check_cuda(cuda::optimizer_update(params.step, false, device.stream()), "optimizer_update");
  return norm;
}

void write_words(const Tensor& out, const std::vector<int64_t>& words) {
  const OnDeviceOf device(out, "out");
  check_state(out, out, int64_t(words.size()), ScalarType::Long, "out", "int64");
  int64_t* data = static_cast<int64_t*>(out.mutable_data_ptr());
  check_cuda(cuda::write_words(words.data(), int64_t(words.size()), data, device.stream()), "write_words");
}

}  // namespace
}  // namespace palp_fast::bindings

STABLE_TORCH_LIBRARY_IMPL(palp_fast, CUDA, library) {
  using namespace palp_fast::bindings;
  library.impl("grad_norm", TORCH_BOX(&grad_norm));
  library.impl("adamw", TORCH_BOX(&adamw));
  library.impl("lion", TORCH_BOX(&lion));
  library.impl("optimizer_step", TORCH_BOX(&optimizer_step));
  library.impl("write_words", TORCH_BOX(&write_words));
}
