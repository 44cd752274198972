// Large pages under large results: the first write to a page is a fault, which takes longer than writing 4 KiB.
#pragma once

#include "../tensors.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace palp_fast::bindings {

// As out_of, before the first write. Advice only: where the system has no such pages nothing changes.
inline ImageOut large_out_of(const Tensor& tensor) {
  const ImageOut out = out_of(tensor);
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(out.data);
  const uintptr_t first = (start + kPage - 1) / kPage * kPage;
  const uintptr_t last = (start + uintptr_t(tensor.numel() * size_of(out.dtype))) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return out;
}

}  // namespace palp_fast::bindings
