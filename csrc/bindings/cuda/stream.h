// Where a CUDA kernel runs: on the tensor's device and torch's current stream there.
#pragma once

#include <cuda_runtime_api.h>

#ifdef _WIN32
#include <windows.h>
#else
#include <dlfcn.h>
#endif

#include "../tensors.h"

namespace palp_fast::bindings {

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// By name at run time, so that this library loads beside a torch without CUDA, too.
inline cudaStream_t current_stream(int32_t device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
#ifdef _WIN32
  static const auto getter = reinterpret_cast<Getter>(GetProcAddress(GetModuleHandleA("torch_cuda.dll"), kName));
#else
  // Python loads torch's libraries without making their symbols global, so the one that has it is asked by name.
  static const auto getter = [] {
    void* const torch = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Getter>(torch ? dlsym(torch, kName) : nullptr);
  }();
#endif
  STD_TORCH_CHECK(getter, "this torch has no ", kName, ": it is a build without CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(getter(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Makes the tensor's device current while it lives.
class OnDeviceOf {
 public:
  OnDeviceOf(const Tensor& tensor, const char* name) : device_(tensor.get_device_index()) {
    STD_TORCH_CHECK(tensor.is_cuda(), name, " is not on a cuda device");
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != device_) check_cuda(cudaSetDevice(device_), "cudaSetDevice");
  }
  ~OnDeviceOf() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  OnDeviceOf(const OnDeviceOf&) = delete;
  OnDeviceOf& operator=(const OnDeviceOf&) = delete;

  cudaStream_t stream() const { return current_stream(device_); }

 private:
  int device_, previous_ = 0;
};

}  // namespace palp_fast::bindings
