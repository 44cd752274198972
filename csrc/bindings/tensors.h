// From torch's stable tensors to the torch-free views of the kernels. Checks shapes, so that no call can read outside.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "palp_fast/image.h"

namespace palp_fast::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline bool any_double(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* tensor : tensors) {
    if (tensor->scalar_type() == ScalarType::Double) return true;
  }
  return false;
}

inline DType dtype_of(ScalarType type, const char* name) {
  switch (type) {
    case ScalarType::Half: return DType::float16;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Float: return DType::float32;
    case ScalarType::Double: return DType::float64;
    default: STD_TORCH_CHECK(false, name, ": allowed are float16, bfloat16, float32, float64");
  }
}

inline Shape shape_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 4, name, " has ", tensor.dim(), " dimensions: allowed is [B, C, H, W]");
  const auto sizes = tensor.sizes();
  return Shape{sizes[0], sizes[1], sizes[2], sizes[3]};
}

inline void check_device(const Tensor& tensor, const Tensor& first, const char* name) {
  STD_TORCH_CHECK(
      tensor.is_cpu() == first.is_cpu() && tensor.get_device_index() == first.get_device_index(), name,
      " is not on the device of the first argument");
}

inline void check_cpu(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " is not on the cpu");
}

// On the device of `first`. With `one_channel` the tensor has one, read for every channel.
inline ImageView view_of(
    const Tensor& tensor, const Tensor& first, const Shape& shape, const char* name, bool one_channel = false) {
  check_device(tensor, first, name);
  const Shape own = shape_of(tensor, name);
  const int64_t channels = one_channel ? 1 : shape.channels;
  STD_TORCH_CHECK(
      own.batch == shape.batch && own.channels == channels && own.height == shape.height && own.width == shape.width,
      name, " has shape [", own.batch, ", ", own.channels, ", ", own.height, ", ", own.width, "]: allowed is [",
      shape.batch, ", ", channels, ", ", shape.height, ", ", shape.width, "]");
  const auto strides = tensor.strides();
  return ImageView{
      tensor.const_data_ptr(), dtype_of(tensor.scalar_type(), name), strides[0], one_channel ? 0 : strides[1],
      strides[2], strides[3]};
}

inline VectorView vector_of(const Tensor& tensor, const Tensor& first, int64_t count, const char* name) {
  check_device(tensor, first, name);
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.sizes()[0] == count, name, ": allowed is a vector of ", count);
  return VectorView{tensor.const_data_ptr(), dtype_of(tensor.scalar_type(), name), tensor.strides()[0]};
}

inline TableView table_of(
    const Tensor& tensor, const Tensor& first, int64_t rows, int64_t columns, const char* name) {
  check_device(tensor, first, name);
  STD_TORCH_CHECK(
      tensor.dim() == 2 && tensor.sizes()[0] == rows && tensor.sizes()[1] == columns, name, ": allowed is [", rows,
      ", ", columns, "]");
  const auto strides = tensor.strides();
  return TableView{tensor.const_data_ptr(), dtype_of(tensor.scalar_type(), name), strides[0], strides[1]};
}

inline ImageOut out_of(const Tensor& tensor) {
  return ImageOut{tensor.mutable_data_ptr(), dtype_of(tensor.scalar_type(), "result")};
}

inline Tensor empty_like_of(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// [copies B, C, H, W], contiguous.
inline Tensor empty_image(const Tensor& like, const Shape& shape, ScalarType dtype, int64_t copies = 1) {
  return empty_like_of(like, {copies * shape.batch, shape.channels, shape.height, shape.width}, dtype);
}

template <typename Real>
constexpr ScalarType scalar_type_of = std::is_same_v<Real, double> ? ScalarType::Double : ScalarType::Float;

inline void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, body, context));
}

}  // namespace palp_fast::bindings
