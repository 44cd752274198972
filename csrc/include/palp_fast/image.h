// How an operator sees its tensors, [B, C, H, W] and [B]: no torch types, so that any compiler can include it.
#pragma once

#include <cstdint>

#include "palp_fast/portable.h"

namespace palp_fast {

enum class DType { float16, bfloat16, float32, float64 };

PALP_INLINE int64_t size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

struct Shape {
  int64_t batch = 0, channels = 0, height = 0, width = 0;

  PALP_INLINE int64_t image() const { return channels * height * width; }
  PALP_INLINE int64_t numel() const { return batch * image(); }
};

// Read-only. Strides are in elements; a stride of 0 repeats the dimension (a mask over channels).
struct ImageView {
  const void* data = nullptr;
  DType dtype = DType::float32;
  int64_t batch_stride = 0, channel_stride = 0, row_stride = 0, column_stride = 0;

  PALP_INLINE bool image_is_contiguous(const Shape& shape) const {
    return column_stride == 1 && row_stride == shape.width && channel_stride == shape.height * shape.width;
  }
};

// One value per sample, in the memory of the device that reads it. The stride is in elements; null data means absent.
struct VectorView {
  const void* data = nullptr;
  DType dtype = DType::float32;
  int64_t stride = 0;
};

// [rows, B], as VectorView.
struct TableView {
  const void* data = nullptr;
  DType dtype = DType::float32;
  int64_t row_stride = 0, column_stride = 0;
};

// Written by the operator: contiguous.
struct ImageOut {
  void* data = nullptr;
  DType dtype = DType::float32;
};

}  // namespace palp_fast
