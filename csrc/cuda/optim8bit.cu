#include <cuda_runtime.h>

#include "kernels.h"
#include "palp_fast/blockwise.h"
#include "palp_fast/element.h"

namespace palp_fast::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = kLanes / kWarp;
constexpr int kRun = 4;  // consecutive elements of a thread
constexpr int kRuns = 2;
constexpr int kTile = kWarp * kRun * kRuns;  // elements of a warp at a time: one quantisation block of the usual size

// Tables of eight words: a warp's look-ups fall into one sector of the first cache.
__device__ const DynamicMap<true> kSignedMap;
__device__ const DynamicMap<false> kUnsignedMap;

template <typename Type>
__device__ bool aligned(const Type* address, size_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

// `count` <= kRun elements from `first` on, the rest 0.
__device__ void load_run(const void* data, DType dtype, int64_t first, int count, float (&out)[kRun]) {
  const float* floats = static_cast<const float*>(data) + first;
  if (count == kRun && dtype == DType::float32 && aligned(floats, sizeof(float4))) {
    const float4 run = *reinterpret_cast<const float4*>(floats);
    out[0] = run.x, out[1] = run.y, out[2] = run.z, out[3] = run.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) out[i] = i < count ? read_element<float>(data, dtype, first + i) : 0.0f;
}

__device__ void store_run(const float (&values)[kRun], void* data, DType dtype, int64_t first, int count) {
  float* floats = static_cast<float*>(data) + first;
  if (count == kRun && dtype == DType::float32 && aligned(floats, sizeof(float4))) {
    *reinterpret_cast<float4*>(floats) = make_float4(values[0], values[1], values[2], values[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if (i < count) write_element(ImageOut{data, dtype}, first + i, values[i]);
  }
}

template <bool Signed>
__device__ void load_codes(
    const uint8_t* codes, int count, const DynamicMap<Signed>& map, float scale, float (&out)[kRun]) {
  uint8_t run[kRun] = {};
  if (count == kRun && aligned(codes, kRun)) {
    const uchar4 four = *reinterpret_cast<const uchar4*>(codes);
    run[0] = four.x, run[1] = four.y, run[2] = four.z, run[3] = four.w;
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i) run[i] = i < count ? codes[i] : 0;
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) out[i] = i < count ? level_of(run[i], map) * scale : 0.0f;
}

template <bool Signed>
__device__ void store_codes(
    const float (&values)[kRun], float inverse, const DynamicMap<Signed>& map, int count, uint8_t* codes) {
  uint8_t run[kRun];
#pragma unroll
  for (int i = 0; i < kRun; ++i) run[i] = nearest_code(values[i] * inverse, map);
  if (count == kRun && aligned(codes, kRun)) {
    *reinterpret_cast<uchar4*>(codes) = make_uchar4(run[0], run[1], run[2], run[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if (i < count) codes[i] = run[i];
  }
}

// Of all threads of the warp. Magnitudes order as their bits.
__device__ float largest_of_warp(float value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}

// A thread's elements of a tile.
struct Moments {
  float first[kRuns][kRun], second[kRuns][kRun];
};

// The update of one tensor by the warps of a thread block.
template <typename UpdateRule>
struct Update {
  static constexpr bool kTwo = UpdateRule::kTwoMoments;

  const TensorRow& tensor;
  const GradientRow& gradient;
  const StepConstants& constants;
  float factor;
  int lane;

  __device__ int64_t run_at(int64_t tile, int run) const { return tile + (run * kWarp + lane) * kRun; }
  __device__ static int run_count(int64_t at, int64_t end) {
    return at >= end ? 0 : end - at < kRun ? int(end - at) : kRun;
  }

  __device__ void load_moments(int64_t tile, int64_t end, float first_scale, float second_scale, Moments& out) const {
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const int64_t at = run_at(tile, run);
      const int count = run_count(at, end);
      const uint8_t* codes = static_cast<const uint8_t*>(tensor.first) + at;
      load_codes(codes, count, kSignedMap, first_scale, out.first[run]);
      if (!kTwo) continue;
      codes = static_cast<const uint8_t*>(tensor.second) + at;
      load_codes(codes, count, kUnsignedMap, second_scale, out.second[run]);
    }
  }

  __device__ void step(int64_t tile, int64_t end, bool write, Moments& moments) const {
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const int64_t at = run_at(tile, run);
      const int count = run_count(at, end);
      const DType type = DType(tensor.types % 256);
      float grad[kRun], param[kRun];
      load_run(gradient.data, DType(gradient.dtype), at, count, grad);
      load_run(tensor.param, type, at, count, param);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        UpdateRule::apply(constants, grad[i] * factor, moments.first[run][i], moments.second[run][i], param[i]);
      }
      if (!write) continue;
      store_run(param, tensor.param, type, at, count);
      if (tensor.shadow) store_run(param, tensor.shadow, DType(tensor.types / 256), at, count);
    }
  }

  __device__ static float largest(const float (&values)[kRuns][kRun], float start) {
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) start = fmaxf(start, fabsf(values[run][i]));
    }
    return start;
  }

  __device__ void store_moments(
      int64_t tile, int64_t end, float first_inverse, float second_inverse, const Moments& moments) const {
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const int64_t at = run_at(tile, run);
      const int count = run_count(at, end);
      uint8_t* codes = static_cast<uint8_t*>(tensor.first) + at;
      store_codes(moments.first[run], first_inverse, kSignedMap, count, codes);
      if (!kTwo) continue;
      codes = static_cast<uint8_t*>(tensor.second) + at;
      store_codes(moments.second[run], second_inverse, kUnsignedMap, count, codes);
    }
  }

  // By one warp. The moments of a long block do not fit in registers: its first pass finds the scales, its second
  // computes them again.
  __device__ void quantised(int64_t block) const {
    const int64_t begin = block * tensor.block_size, end = smaller(begin + tensor.block_size, tensor.numel);
    const float old_first = tensor.first_scales[block];
    const float old_second = kTwo ? tensor.second_scales[block] : 0.0f;
    float first = 0, second = 0;  // the new scales
    const bool fits = end - begin <= kTile;
    for (int pass = fits ? 1 : 0; pass < 2; ++pass) {
      for (int64_t tile = begin; tile < end; tile += kTile) {
        Moments moments = {};
        load_moments(tile, end, old_first, old_second, moments);
        step(tile, end, pass == 1, moments);
        if (pass == 0 || fits) {
          first = largest_of_warp(largest(moments.first, first));
          if (kTwo) second = largest_of_warp(largest(moments.second, second));
        }
        if (pass == 1) store_moments(tile, end, inverse_of(first), inverse_of(second), moments);
      }
    }
    if (lane != 0) return;
    tensor.first_scales[block] = first;
    if (kTwo) tensor.second_scales[block] = second;
  }

  // By one warp: a tile of state in 32 bits.
  __device__ void plain(int64_t tile, int64_t end) const {
    Moments moments = {};
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const int64_t at = run_at(tile, run);
      load_run(tensor.first, DType::float32, at, run_count(at, end), moments.first[run]);
      if (kTwo) load_run(tensor.second, DType::float32, at, run_count(at, end), moments.second[run]);
    }
    step(tile, end, true, moments);
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const int64_t at = run_at(tile, run);
      store_run(moments.first[run], tensor.first, DType::float32, at, run_count(at, end));
      if (kTwo) store_run(moments.second[run], tensor.second, DType::float32, at, run_count(at, end));
    }
  }
};

// One thread block per chunk, one warp at a time per quantisation block.
template <typename UpdateRule>
__global__ void __launch_bounds__(kLanes, 2) update_kernel(StepParams params) {
  const ChunkView chunk(params, blockIdx.x);
  const TensorRow& tensor = params.tensors[chunk.tensor];
  const GradientRow& gradient = params.gradients[chunk.tensor];
  if (params.verdict->finite == 0 || gradient.data == nullptr) return;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const Update<UpdateRule> update{tensor, gradient, params.constants[chunk.tensor], params.verdict->factor, lane};
  const bool plain = tensor.first_scales == nullptr;
  const int64_t piece = plain ? kTile : tensor.block_size;
  for (int64_t at = chunk.begin + warp * piece; at < chunk.end; at += kWarps * piece) {
    if (plain) {
      update.plain(at, smaller(at + kTile, chunk.end));
    } else {
      update.quantised(at / piece);
    }
  }
}

// Leaves the sum of all lanes in lane 0.
__device__ void sum_lanes(double* lanes) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) lanes[threadIdx.x] += lanes[threadIdx.x + half];
  }
}

__device__ double chunk_lane(const StepParams& params, int64_t index) {
  const ChunkView chunk(params, index);
  const GradientRow& gradient = params.gradients[chunk.tensor];
  double sum = 0;
  if (gradient.data == nullptr) return sum;
#pragma unroll 4
  for (int64_t at = chunk.begin + threadIdx.x; at < chunk.end; at += kLanes) {
    const double value = read_element<float>(gradient.data, DType(gradient.dtype), at);
    sum += value * value;
  }
  return sum;
}

__device__ void begin_updates(const StepParams& params) {
  for (int64_t i = threadIdx.x; i < params.tensor_count; i += kLanes) begin_update(params, i);
}

// One thread block per chunk; the one that finishes last adds their sums, in order, and judges.
__global__ void __launch_bounds__(kLanes) norm_kernel(NormParams params, unsigned* ticket, bool begin) {
  __shared__ double lanes[kLanes];
  __shared__ bool last;
  const int64_t count = params.step.chunk_count;
  lanes[threadIdx.x] = blockIdx.x < count ? chunk_lane(params.step, blockIdx.x) : 0.0;
  sum_lanes(lanes);
  if (threadIdx.x == 0) {
    if (blockIdx.x < count) params.partial[blockIdx.x] = lanes[0];
    __threadfence();
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kLanes) sum += __ldcg(params.partial + i);
  lanes[threadIdx.x] = sum;
  sum_lanes(lanes);
  if (threadIdx.x == 0) {
    *params.step.verdict = judge(lanes[0], params);
    *ticket = 0;
  }
  __syncthreads();
  if (begin) begin_updates(params.step);
}

__global__ void __launch_bounds__(kLanes) begin_kernel(StepParams params) { begin_updates(params); }

constexpr int kWords = 480;  // they fit in a kernel's arguments

struct Words {
  int64_t word[kWords];
};

__global__ void __launch_bounds__(kWords) write_kernel(Words words, int count, int64_t* out) {
  if (int(threadIdx.x) < count) out[threadIdx.x] = words.word[threadIdx.x];
}

}  // namespace

cudaError_t gradient_norm(const NormParams& params, unsigned* ticket, bool begin, cudaStream_t stream) {
  const unsigned blocks = params.step.chunk_count > 0 ? unsigned(params.step.chunk_count) : 1;
  norm_kernel<<<blocks, kLanes, 0, stream>>>(params, ticket, begin);
  return cudaGetLastError();
}

cudaError_t optimizer_update(const StepParams& params, bool begin, cudaStream_t stream) {
  if (params.chunk_count == 0) return cudaSuccess;
  if (begin) begin_kernel<<<1, kLanes, 0, stream>>>(params);
  const auto kernel = params.rule == Rule::adamw ? update_kernel<AdamW> : update_kernel<Lion>;
  kernel<<<unsigned(params.chunk_count), kLanes, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t write_words(const int64_t* words, int64_t count, int64_t* out, cudaStream_t stream) {
  for (int64_t first = 0; first < count; first += kWords) {
    Words part;
    const int size = int(smaller(kWords, count - first));
    for (int i = 0; i < size; ++i) part.word[i] = words[first + i];
    write_kernel<<<1, kWords, 0, stream>>>(part, size, out + first);
  }
  return cudaGetLastError();
}

}  // namespace palp_fast::cuda
