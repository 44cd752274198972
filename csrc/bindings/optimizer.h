// From lists of tensors to the tables of palp_fast/optimizer.h, which palp_fast/optim_table.py writes itself.
#pragma once

#include "palp_fast/optimizer.h"
#include "tensors.h"

namespace palp_fast::bindings {

struct StepTables {
  std::vector<TensorRow> tensors;
  std::vector<GradientRow> gradients;
  std::vector<int32_t> owner;

  // Takes `row` as the next tensor and cuts it into chunks. A gradient without elements is a missing one.
  void add(TensorRow row, const Tensor& grad) {
    const int64_t size = chunk_size(row.block_size);
    row.first_chunk = int64_t(owner.size());
    owner.insert(owner.end(), size_t((row.numel + size - 1) / size), int32_t(tensors.size()));
    tensors.push_back(row);
    const void* data = grad.numel() > 0 ? grad.const_data_ptr() : nullptr;
    gradients.push_back({data, int64_t(dtype_of(grad.scalar_type(), "grads"))});
  }
};

inline void check_contiguous(const Tensor& tensor, const Tensor& first, const char* name) {
  check_device(tensor, first, name);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous: allowed are contiguous tensors");
}

inline void check_state(
    const Tensor& tensor, const Tensor& first, int64_t numel, ScalarType dtype, const char* name, const char* allowed) {
  check_contiguous(tensor, first, name);
  STD_TORCH_CHECK(
      tensor.numel() == numel && tensor.scalar_type() == dtype, name, " has ", tensor.numel(),
      " elements, or another dtype: allowed is ", allowed, " with ", numel);
}

// A 0-d or one-element float32 tensor, or nothing.
inline const float* scalar_of(const OptionalTensor& tensor, const Tensor& first, const char* name) {
  if (!tensor) return nullptr;
  check_state(*tensor, first, 1, ScalarType::Float, name, "float32");
  return static_cast<const float*>(tensor->const_data_ptr());
}

inline StepTables gradient_tables(const std::vector<Tensor>& grads) {
  StepTables tables;
  for (const Tensor& grad : grads) {
    check_contiguous(grad, grads[0], "grads");
    TensorRow row{};
    row.numel = grad.numel();
    row.block_size = 1;
    tables.add(row, grad);
  }
  return tables;
}

// What adamw and lion are given. A moment is {codes [blocks, block_size], scales [blocks]} or {values [blocks,
// block_size]}; a shadow without elements is none.
struct StepLists {
  const std::vector<Tensor>&params, &grads, &shadows;
  const Tensor& steps;
  const std::vector<Tensor>&first, *second;  // second: null for Lion
  const Tensor &verdict, &group;
  int64_t block_size;
};

inline int64_t blocks_of(const Tensor& tensor, int64_t block_size) {
  return (tensor.numel() + block_size - 1) / block_size;
}

inline void check_moment(const std::vector<Tensor>& moment, const StepLists& lists, int64_t blocks, const char* name) {
  STD_TORCH_CHECK(moment.size() == 1 || moment.size() == 2, name, ": allowed are [codes, scales] or [values]");
  const bool quantised = moment.size() == 2;
  const ScalarType dtype = quantised ? ScalarType::Byte : ScalarType::Float;
  check_state(moment[0], lists.steps, blocks * lists.block_size, dtype, name, quantised ? "uint8" : "float32");
  if (quantised) check_state(moment[1], lists.steps, blocks, ScalarType::Float, name, "float32");
}

inline void check_lists(const StepLists& lists) {
  const size_t count = lists.params.size();
  const int64_t size = lists.block_size;
  STD_TORCH_CHECK(size > 0 && (size & (size - 1)) == 0, "block_size=", size, ": allowed is a power of two");
  STD_TORCH_CHECK(
      lists.grads.size() == count && (lists.shadows.empty() || lists.shadows.size() == count),
      "grads and shadows: allowed are ", count, " tensors, as params (or no shadows)");
  int64_t blocks = 0;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& param = lists.params[i];
    check_contiguous(param, lists.steps, "params");
    check_contiguous(lists.grads[i], lists.steps, "grads");
    const int64_t given = lists.grads[i].numel();
    STD_TORCH_CHECK(
        given == param.numel() || given == 0, "grads: one has ", given, " elements, allowed is ", param.numel());
    blocks += blocks_of(param, size);
    if (lists.shadows.empty() || lists.shadows[i].numel() == 0) continue;
    check_contiguous(lists.shadows[i], lists.steps, "shadows");
    STD_TORCH_CHECK(lists.shadows[i].numel() == param.numel(), "shadows: allowed are the shapes of params");
  }
  check_state(lists.steps, lists.steps, int64_t(count), ScalarType::Float, "steps", "float32");
  check_moment(lists.first, lists, blocks, "exp_avg");
  if (lists.second) check_moment(*lists.second, lists, blocks, "exp_avg_sq");
  STD_TORCH_CHECK(
      !lists.second || lists.second->size() == lists.first.size(), "exp_avg and exp_avg_sq: allowed is one form");
  check_state(lists.verdict, lists.steps, 2, ScalarType::Float, "verdict", "float32");
  check_state(lists.group, lists.steps, 5, ScalarType::Double, "group", "float64");
}

// Where tensor number `index`, whose blocks begin at `block`, keeps a moment.
inline void place_moment(
    const std::vector<Tensor>& moment, int64_t block, int64_t block_size, void*& values, float*& scales) {
  const bool quantised = moment.size() == 2;
  const int64_t width = quantised ? 1 : int64_t(sizeof(float));
  values = static_cast<char*>(moment[0].mutable_data_ptr()) + block * block_size * width;
  scales = quantised ? static_cast<float*>(moment[1].mutable_data_ptr()) + block : nullptr;
}

inline StepTables step_tables(const StepLists& lists) {
  check_lists(lists);
  StepTables tables;
  int64_t block = 0;
  for (size_t i = 0; i < lists.params.size(); ++i) {
    const Tensor& param = lists.params[i];
    TensorRow row{};
    row.param = param.mutable_data_ptr();
    row.types = int64_t(dtype_of(param.scalar_type(), "params"));
    if (!lists.shadows.empty() && lists.shadows[i].numel() > 0) {
      row.shadow = lists.shadows[i].mutable_data_ptr();
      row.types += 256 * int64_t(dtype_of(lists.shadows[i].scalar_type(), "shadows"));
    }
    place_moment(lists.first, block, lists.block_size, row.first, row.first_scales);
    if (lists.second) place_moment(*lists.second, block, lists.block_size, row.second, row.second_scales);
    row.step = static_cast<float*>(lists.steps.mutable_data_ptr()) + i;
    row.numel = param.numel();
    row.block_size = lists.block_size;
    tables.add(row, lists.grads[i]);
    block += blocks_of(param, lists.block_size);
  }
  return tables;
}

// The tables that Python has written, and the workspace: verdict, ticket, constants, partial sums.
struct WrittenTables {
  const Tensor &tensors, &gradients, &groups, &owner, &work;

  int64_t tensor_count() const { return tensors.numel() / 12; }
  int64_t* words() const { return static_cast<int64_t*>(work.mutable_data_ptr()); }
  unsigned* ticket() const { return reinterpret_cast<unsigned*>(words() + 1); }
  double* partial() const { return reinterpret_cast<double*>(words() + 2 + 4 * tensor_count()); }

  void check() const {
    const int64_t count = tensor_count(), chunks = owner.numel();
    check_state(tensors, tensors, 12 * count, ScalarType::Long, "tensors", "int64 [tensors, 12]");
    check_state(gradients, tensors, 2 * count, ScalarType::Long, "gradients", "int64");
    check_state(groups, tensors, groups.numel() / 5 * 5, ScalarType::Double, "groups", "float64 [groups, 5]");
    check_state(owner, tensors, chunks, ScalarType::Int, "owner", "int32");
    check_state(work, tensors, 2 + 4 * count + chunks, ScalarType::Long, "work", "int64");
  }

  StepParams step(Rule rule) const {
    StepParams params;
    params.rule = rule;
    params.tensors = static_cast<const TensorRow*>(tensors.const_data_ptr());
    params.gradients = static_cast<const GradientRow*>(gradients.const_data_ptr());
    params.groups = static_cast<const GroupRow*>(groups.const_data_ptr());
    params.owner = static_cast<const int32_t*>(owner.const_data_ptr());
    params.tensor_count = tensor_count();
    params.chunk_count = owner.numel();
    params.verdict = reinterpret_cast<Verdict*>(words());
    params.constants = reinterpret_cast<StepConstants*>(words() + 2);
    return params;
  }

  NormParams norm(
      Rule rule, const Tensor& skipped, const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
      double max_norm, const Tensor& out) const {
    check();
    check_state(skipped, tensors, 1, ScalarType::Long, "skipped", "int64");
    NormParams params;
    params.step = step(rule);
    params.max_norm = max_norm;
    params.grad_scale = scalar_of(grad_scale, tensors, "grad_scale");
    params.found_inf = scalar_of(found_inf, tensors, "found_inf");
    params.partial = partial();
    params.norm = static_cast<float*>(out.mutable_data_ptr());
    params.skipped = static_cast<int64_t*>(skipped.mutable_data_ptr());
    return params;
  }
};

inline Rule rule_of(int64_t rule) {
  STD_TORCH_CHECK(rule == 0 || rule == 1, "rule=", rule, ": allowed are 0 (AdamW) and 1 (Lion)");
  return Rule(rule);
}

}  // namespace palp_fast::bindings
