// Reading and writing one element of a typed view: what a GPU thread does.
#pragma once

#include "palp_fast/convert.h"
#include "palp_fast/image.h"

namespace palp_fast {

template <typename Real>
PALP_INLINE Real read_element(const void* data, DType dtype, int64_t offset) {
  switch (dtype) {
    case DType::float16: return Real(widen(static_cast<const Half*>(data)[offset]));
    case DType::bfloat16: return Real(widen(static_cast<const BFloat16*>(data)[offset]));
    case DType::float64: return Real(static_cast<const double*>(data)[offset]);
    default: return Real(static_cast<const float*>(data)[offset]);
  }
}

template <typename Index>
PALP_INLINE int64_t strided_offset(const ImageView& view, const Shape& shape, Index index) {
  const Index width = Index(shape.width), height = Index(shape.height), line = index / width;
  const int64_t channel = line / height, row = line % height, column = index % width;
  return channel * view.channel_stride + row * view.row_stride + column * view.column_stride;
}

// Where element `index` (row-major in [C, H, W]) of a sample's image lies, in elements.
PALP_INLINE int64_t image_offset(const ImageView& view, const Shape& shape, int64_t sample, int64_t index) {
  const int64_t start = sample * view.batch_stride;
  if (view.image_is_contiguous(shape)) return start + index;
  // A division of 64 bits takes a GPU several times as long.
  if (shape.image() <= INT32_MAX) return start + strided_offset(view, shape, uint32_t(index));
  return start + strided_offset(view, shape, uint64_t(index));
}

template <typename Real>
PALP_INLINE Real read_image(const ImageView& view, const Shape& shape, int64_t sample, int64_t index) {
  return read_element<Real>(view.data, view.dtype, image_offset(view, shape, sample, index));
}

// The value of a sample, or `missing` where the vector is absent.
template <typename Real>
PALP_INLINE Real read_vector(const VectorView& view, int64_t sample, Real missing) {
  return view.data ? read_element<Real>(view.data, view.dtype, sample * view.stride) : missing;
}

template <typename Real>
PALP_INLINE Real read_table(const TableView& view, int64_t row, int64_t sample, Real missing) {
  const int64_t offset = row * view.row_stride + sample * view.column_stride;
  return view.data ? read_element<Real>(view.data, view.dtype, offset) : missing;
}

// Rounds to the type of `out` and writes element `index` of it.
template <typename Real>
PALP_INLINE void write_element(const ImageOut& out, int64_t index, Real value) {
  switch (out.dtype) {
    case DType::float16: return round_to(value, static_cast<Half*>(out.data)[index]);
    case DType::bfloat16: return round_to(value, static_cast<BFloat16*>(out.data)[index]);
    case DType::float64: return round_to(value, static_cast<double*>(out.data)[index]);
    default: return round_to(value, static_cast<float*>(out.data)[index]);
  }
}

}  // namespace palp_fast
