// The optimizer operators on the CPU for torch's dispatcher. Schemas are in palp_fast/ops_optim.py.
#include <tuple>

#include "../../cpu/kernels.h"
#include "../optimizer.h"

namespace palp_fast::bindings {
namespace {

const cpu::OptimizerKernels& optimizer() { return cpu::kernels().optimizer; }

std::tuple<Tensor, Tensor> grad_norm(
    const std::vector<Tensor>& grads, const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
    double max_norm) {
  STD_TORCH_CHECK(!grads.empty(), "grads: allowed is at least one tensor");
  const StepTables tables = gradient_tables(grads);
  Tensor norm = empty_like_of(grads[0], {}, ScalarType::Float);
  Tensor verdict = empty_like_of(grads[0], {2}, ScalarType::Float);
  std::vector<double> partial(tables.owner.size());
  NormParams params;
  params.step.tensors = tables.tensors.data();
  params.step.gradients = tables.gradients.data();
  params.step.owner = tables.owner.data();
  params.step.chunk_count = int64_t(tables.owner.size());
  params.step.verdict = static_cast<Verdict*>(verdict.mutable_data_ptr());
  params.max_norm = max_norm;
  params.grad_scale = scalar_of(grad_scale, grads[0], "grad_scale");
  params.found_inf = scalar_of(found_inf, grads[0], "found_inf");
  params.partial = partial.data();
  params.norm = static_cast<float*>(norm.mutable_data_ptr());
  optimizer().gradient_norm(params, parallel_for);
  return {norm, verdict};
}

void update(Rule rule, const StepLists& lists) {
  const StepTables tables = step_tables(lists);
  std::vector<StepConstants> constants(tables.tensors.size());
  StepParams params;
  params.rule = rule;
  params.tensors = tables.tensors.data();
  params.gradients = tables.gradients.data();
  params.groups = static_cast<const GroupRow*>(lists.group.const_data_ptr());
  params.owner = tables.owner.data();
  params.tensor_count = int64_t(tables.tensors.size());
  params.chunk_count = int64_t(tables.owner.size());
  params.verdict = static_cast<Verdict*>(lists.verdict.mutable_data_ptr());
  params.constants = constants.data();
  optimizer().optimizer_update(params, parallel_for);
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
  const WrittenTables tables{tensors, gradients, groups, owner, work};
  Tensor norm = empty_like_of(tensors, {}, ScalarType::Float);
  const NormParams params = tables.norm(rule_of(rule), skipped, grad_scale, found_inf, max_norm, norm);
  optimizer().gradient_norm(params, parallel_for);
  optimizer().optimizer_update(params.step, parallel_for);
  return norm;
}

void write_words(const Tensor& out, const std::vector<int64_t>& words) {
  check_state(out, out, int64_t(words.size()), ScalarType::Long, "out", "int64");
  std::memcpy(out.mutable_data_ptr(), words.data(), words.size() * sizeof(int64_t));
}

}  // namespace
}  // namespace palp_fast::bindings

STABLE_TORCH_LIBRARY_IMPL(palp_fast, CPU, library) {
  using namespace palp_fast::bindings;
  library.impl("grad_norm", TORCH_BOX(&grad_norm));
  library.impl("adamw", TORCH_BOX(&adamw));
  library.impl("lion", TORCH_BOX(&lion));
  library.impl("optimizer_step", TORCH_BOX(&optimizer_step));
  library.impl("write_words", TORCH_BOX(&write_words));
}
