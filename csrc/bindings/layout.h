// Image tensors [B, C, ...] of any number of dimensions as [B, C, H, W], and results laid out like them.
#pragma once

#include "tensors.h"

namespace palp_fast::bindings {

// As palp_fast/reference/layout.py has it: whether the channels are neighbours in memory.
inline bool channels_last(const Tensor& x) {
  return x.dim() > 2 && x.sizes()[1] > 1 && x.strides()[1] == 1 && !x.is_contiguous();
}

// As there: of the size of x, without gaps, channels-last if x is, else contiguous.
inline Tensor empty_in_layout_of(const Tensor& x) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  if (!channels_last(x)) return empty_like_of(x, sizes, x.scalar_type());
  sizes.push_back(sizes[1]);
  sizes.erase(sizes.begin() + 1);
  Tensor made = empty_like_of(x, sizes, x.scalar_type());
  for (int64_t dim = made.dim() - 1; dim > 1; --dim) made = torch::stable::transpose(made, dim, dim - 1);
  return made;
}

// At most four dimensions; x itself where it has no more.
inline Tensor as_image(const Tensor& x) { return x.dim() > 4 ? torch::stable::flatten(x, 3, -1) : x; }

inline Shape image_shape(const Tensor& x) {
  const auto sizes = x.sizes();
  const int64_t dims = x.dim();
  return {sizes[0], sizes[1], dims > 3 ? sizes[2] : 1, dims > 3 ? sizes[3] : dims > 2 ? sizes[2] : 1};
}

// View: ImageView or ImageTarget. x: of at most four dimensions.
template <typename View, typename Data>
View image_view(const Tensor& x, Data data, const char* name) {
  const auto strides = x.strides();
  const int64_t dims = x.dim(), column = dims > 2 ? strides[dims - 1] : 1;
  return View{data, dtype_of(x.scalar_type(), name), strides[0], strides[1], dims > 3 ? strides[2] : 0, column};
}

}  // namespace palp_fast::bindings
