#include "kernels.h"
#include "launch.h"

namespace palp_fast::cuda {
namespace {

// One thread per four neighbouring elements of an image: all four words of one counter.
template <typename Real>
__global__ void __launch_bounds__(kThreads) add_noise_fwd_kernel(AddNoiseParams params, int64_t quads) {
  const Shape shape = params.shape;
  const int64_t thread = thread_index(), sample = thread / quads, quad = thread % quads;
  if (sample >= shape.batch) return;
  const PhiloxWords words = params.key.read().words(uint32_t(quad), sample);
  const NormalPair left = normal_pair(words.w0, words.w1), right = normal_pair(words.w2, words.w3);
  const float drawn[4] = {left.first, left.second, right.first, right.second};
  const Real alpha_bar = params.schedule.alpha_bar<Real>(sample);
  const Real a = square_root(alpha_bar), s = square_root(1 - alpha_bar);
  for (int i = 0; i < 4; ++i) {
    const int64_t element = 4 * quad + i;
    if (element >= shape.image()) break;
    const int64_t index = sample * shape.image() + element;
    write_element(params.noise, index, drawn[i]);
    const Real noise = read_element<Real>(params.noise.data, params.noise.dtype, index);
    write_element(params.x_t, index, a * read_image<Real>(params.x0, shape, sample, element) + s * noise);
  }
}

template <typename Real>
__global__ void __launch_bounds__(kThreads) add_noise_bwd_kernel(AddNoiseBackwardParams params) {
  const Shape shape = params.shape;
  const int64_t index = thread_index();
  if (index >= shape.numel()) return;
  const int64_t sample = index / shape.image(), element = index % shape.image();
  const Real a = square_root(params.schedule.alpha_bar<Real>(sample));
  write_element(params.d_x0, index, a * read_image<Real>(params.grad, shape, sample, element));
}

__global__ void __launch_bounds__(kThreads)
    philox_words_kernel(const int64_t* counters, const int64_t* key, int64_t count, int64_t* out) {
  const int64_t index = thread_index();
  if (index < count) philox_row(counters + 4 * index, key, out + 4 * index);
}

}  // namespace

template <typename Real>
cudaError_t add_noise_fwd(AddNoiseParams params, cudaStream_t stream) {
  if (params.shape.numel() == 0) return cudaSuccess;
  const int64_t quads = (params.shape.image() + 3) / 4;
  add_noise_fwd_kernel<Real><<<blocks_for(params.shape.batch * quads), kThreads, 0, stream>>>(params, quads);
  return cudaGetLastError();
}

template <typename Real>
cudaError_t add_noise_bwd(AddNoiseBackwardParams params, cudaStream_t stream) {
  if (params.shape.numel() == 0) return cudaSuccess;
  add_noise_bwd_kernel<Real><<<blocks_for(params.shape.numel()), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t philox_words(
    const int64_t* counters, const int64_t* key, int64_t count, int64_t* out, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  philox_words_kernel<<<blocks_for(count), kThreads, 0, stream>>>(counters, key, count, out);
  return cudaGetLastError();
}

template cudaError_t add_noise_fwd<float>(AddNoiseParams, cudaStream_t);
template cudaError_t add_noise_fwd<double>(AddNoiseParams, cudaStream_t);
template cudaError_t add_noise_bwd<float>(AddNoiseBackwardParams, cudaStream_t);
template cudaError_t add_noise_bwd<double>(AddNoiseBackwardParams, cudaStream_t);

}  // namespace palp_fast::cuda
