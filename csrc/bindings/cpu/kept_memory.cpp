#include "kept_memory.h"

namespace palp_fast::bindings {

Tensor result_of(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i > 1; --i) strides[i - 2] = strides[i - 1] * (sizes[i - 1] > 0 ? sizes[i - 1] : 1);
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides.data(), type, aoti_torch_device_type_cpu(), -1, &handle));
  return Tensor(handle);
}

namespace {

Tensor plain_image(const Shape& shape, ScalarType dtype, int64_t copies) {
  return result_of({copies * shape.batch, shape.channels, shape.height, shape.width}, dtype);
}

}  // namespace
}  // namespace palp_fast::bindings

#ifdef __linux__
#include <sys/mman.h>

#include <cstdlib>
#include <mutex>

// Of torch 2.11 and later; null before, since the reference is weak.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError torch_from_blob(
    void* data, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* out, int32_t layout, const uint8_t* metadata,
    int64_t metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace palp_fast::bindings {
namespace {

constexpr size_t kLeast = 64 << 10, kMost = 64 << 20;  // bytes: of one piece worth keeping, of all that are kept
constexpr size_t kLine = 64, kLargePage = 2 << 20;

void* fresh(size_t bytes) {
  const bool large = bytes >= kLargePage;
  const size_t alignment = large ? kLargePage : kLine, whole = (bytes + alignment - 1) / alignment * alignment;
  void* const data = std::aligned_alloc(alignment, whole);
  // Advice only: where the system has no large pages nothing changes.
  if (data && large) madvise(data, whole, MADV_HUGEPAGE);
  return data;
}

class Kept {
 public:
  void* take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (auto piece = pieces_.rbegin(); piece != pieces_.rend(); ++piece) {
        if (piece->bytes != bytes) continue;
        void* const data = piece->data;
        pieces_.erase(std::next(piece).base());
        total_ -= bytes;
        return data;
      }
    }
    return fresh(bytes);
  }

  // The oldest make room.
  void give(void* data, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    pieces_.push_back({data, bytes});
    total_ += bytes;
    while (total_ > kMost) {
      total_ -= pieces_.front().bytes;
      std::free(pieces_.front().data);
      pieces_.erase(pieces_.begin());
    }
  }

 private:
  struct Piece {
    void* data;
    size_t bytes;
  };
  std::mutex mutex_;
  std::vector<Piece> pieces_;
  size_t total_ = 0;
};

// Never destroyed: tensors may outlive this library's static objects.
Kept& kept() {
  static Kept& all = *new Kept;
  return all;
}

}  // namespace

Tensor result_image(const Shape& shape, ScalarType dtype, int64_t copies) {
  const size_t bytes = size_t(copies * shape.numel() * size_of(dtype_of(dtype, "result")));
  void* const data = torch_from_blob && bytes >= kLeast ? kept().take(bytes) : nullptr;
  if (!data) return plain_image(shape, dtype, copies);
  const int64_t sizes[] = {copies * shape.batch, shape.channels, shape.height, shape.width};
  const int64_t strides[] = {shape.image(), shape.height * shape.width, shape.width, 1};
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  const auto give = [](void* memory, void* size) { kept().give(memory, reinterpret_cast<size_t>(size)); };
  AtenTensorHandle handle;
  const AOTITorchError error = torch_from_blob(
      data, 4, sizes, strides, 0, type, aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr,
      0, give, reinterpret_cast<void*>(bytes));
  if (error == AOTI_TORCH_SUCCESS) return Tensor(handle);
  kept().give(data, bytes);
  return plain_image(shape, dtype, copies);
}

}  // namespace palp_fast::bindings

#else

namespace palp_fast::bindings {

Tensor result_image(const Shape& shape, ScalarType dtype, int64_t copies) {
  return plain_image(shape, dtype, copies);
}

}  // namespace palp_fast::bindings

#endif
