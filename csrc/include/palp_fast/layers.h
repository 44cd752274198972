// The frozen layers around attention: group_norm_silu and geglu (palp_fast/reference says what they compute).
#pragma once

#include "palp_fast/image.h"

namespace palp_fast {

struct GroupNorm {
  Shape shape;
  int64_t groups = 1;
  VectorView weight, bias;  // [channels]; null data: 1 and 0
  bool silu = false;
};

// Strides of the results, which have no gaps.
struct ImageTarget {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t batch_stride = 0, channel_stride = 0, row_stride = 0, column_stride = 0;
};

// mean, rstd: [B, groups], written.
template <typename Real>
struct GroupNormParams {
  GroupNorm norm;
  ImageView x;
  double eps = 0;
  ImageTarget y;
  Real *mean = nullptr, *rstd = nullptr;
};

template <typename Real>
struct GroupNormBackwardParams {
  GroupNorm norm;
  ImageView grad, x;
  const Real *mean = nullptr, *rstd = nullptr;
  ImageTarget dx;
};

// x: [rows, 2 width], grad and y: [rows, width], all contiguous, of one dtype.
struct GegluParams {
  int64_t rows = 0, width = 0;
  DType dtype = DType::float32;
  const void *x = nullptr, *grad = nullptr;  // grad: of the backward pass alone
  void* out = nullptr;                       // y, or the gradient to x
};

}  // namespace palp_fast
