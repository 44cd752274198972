#include "blockwise_part.h"
#include "kernels.h"
#include "palp_fast/convert.h"

namespace palp_fast::cpu::PALP_LEVEL {
namespace {

constexpr int64_t kPart = 256;  // elements worked on at a time: what is kept of them stays in the first cache
constexpr int64_t kChunksPerTask = 8;

constexpr DynamicMap<true> kSignedMap;
constexpr DynamicMap<false> kUnsignedMap;

template <typename Stored>
const float* widen_part(const void* data, int64_t first, int64_t count, float* buffer) {
  const Stored* source = static_cast<const Stored*>(data) + first;
  for (int64_t i = 0; i < count; ++i) buffer[i] = float(widen(source[i]));
  return buffer;
}

// Some elements as float: in place where the tensor holds that, else in the buffer.
const float* load(const void* data, DType dtype, int64_t first, int64_t count, float* buffer) {
  switch (dtype) {
    case DType::float16: return widen_part<Half>(data, first, count, buffer);
    case DType::bfloat16: return widen_part<BFloat16>(data, first, count, buffer);
    case DType::float64: return widen_part<double>(data, first, count, buffer);
    default: return static_cast<const float*>(data) + first;
  }
}

template <typename Stored>
void round_part(const float* values, int64_t first, int64_t count, void* data) {
  Stored* out = static_cast<Stored*>(data) + first;
  for (int64_t i = 0; i < count; ++i) round_to(values[i], out[i]);
}

void store(const float* values, DType dtype, int64_t first, int64_t count, void* data) {
  switch (dtype) {
    case DType::float16: return round_part<Half>(values, first, count, data);
    case DType::bfloat16: return round_part<BFloat16>(values, first, count, data);
    case DType::float64: return round_part<double>(values, first, count, data);
    default: return round_part<float>(values, first, count, data);
  }
}

// Magnitudes order as their bits.
float largest_magnitude(float largest, const float* values, int64_t count) {
  int32_t bits = int32_t(float_bits(largest));
  for (int64_t i = 0; i < count; ++i) {
    const int32_t other = int32_t(float_bits(values[i]) & 0x7fffffffu);
    bits = bits > other ? bits : other;
  }
  return bits_float(uint32_t(bits));
}

struct Moments {
  float first[kPart], second[kPart];
};

// The update of one tensor.
template <typename UpdateRule>
class Update {
 public:
  Update(const StepParams& params, int64_t index)
      : tensor_(params.tensors[index]),
        gradient_(params.gradients[index]),
        constants_(params.constants[index]),
        factor_(params.verdict->factor) {}

  void quantised(int64_t block) const {
    const int64_t begin = block * tensor_.block_size, end = smaller(begin + tensor_.block_size, tensor_.numel);
    const float old_first = tensor_.first_scales[block];
    const float old_second = kTwo ? tensor_.second_scales[block] : 0.0f;
    float first = 0, second = 0;  // the new scales
    Moments moments;
    const bool whole = end - begin <= kPart;
    for (int64_t at = begin; at < end; at += kPart) {
      const int64_t count = smaller(kPart, end - at);
      load_moments(old_first, old_second, at, count, moments);
      step(at, count, whole, moments);
      first = largest_magnitude(first, moments.first, count);
      if (kTwo) second = largest_magnitude(second, moments.second, count);
    }
    for (int64_t at = begin; at < end; at += kPart) {
      const int64_t count = smaller(kPart, end - at);
      if (!whole) {  // the moments of a long block are not kept, but computed again
        load_moments(old_first, old_second, at, count, moments);
        step(at, count, true, moments);
      }
      quantise(kSignedMap, moments.first, first, count, codes(tensor_.first) + at);
      if (kTwo) quantise(kUnsignedMap, moments.second, second, count, codes(tensor_.second) + at);
    }
    tensor_.first_scales[block] = first;
    if (kTwo) tensor_.second_scales[block] = second;
  }

  void plain(int64_t begin, int64_t end) const {
    Moments moments;
    for (int64_t at = begin; at < end; at += kPart) {
      const size_t bytes = size_t(smaller(kPart, end - at)) * sizeof(float);
      std::memcpy(moments.first, floats(tensor_.first) + at, bytes);
      if (kTwo) std::memcpy(moments.second, floats(tensor_.second) + at, bytes);
      step(at, smaller(kPart, end - at), true, moments);
      std::memcpy(floats(tensor_.first) + at, moments.first, bytes);
      if (kTwo) std::memcpy(floats(tensor_.second) + at, moments.second, bytes);
    }
  }

 private:
  static constexpr bool kTwo = UpdateRule::kTwoMoments;

  static float* floats(void* data) { return static_cast<float*>(data); }
  static uint8_t* codes(void* data) { return static_cast<uint8_t*>(data); }

  void load_moments(float first_scale, float second_scale, int64_t at, int64_t count, Moments& moments) const {
    dequantise(kSignedMap, codes(tensor_.first) + at, first_scale, count, moments.first);
    if (kTwo) dequantise(kUnsignedMap, codes(tensor_.second) + at, second_scale, count, moments.second);
  }

  void step(int64_t at, int64_t count, bool write, Moments& moments) const {
    float grads[kPart], params[kPart], updated[kPart];
    const DType type = DType(tensor_.types % 256);
    const float* grad = load(gradient_.data, DType(gradient_.dtype), at, count, grads);
    const float* param = load(tensor_.param, type, at, count, params);
    const StepConstants constants = constants_;
    for (int64_t i = 0; i < count; ++i) {
      updated[i] = param[i];
      UpdateRule::apply(constants, grad[i] * factor_, moments.first[i], moments.second[i], updated[i]);
    }
    if (!write) return;
    store(updated, type, at, count, tensor_.param);
    if (tensor_.shadow) store(updated, DType(tensor_.types / 256), at, count, tensor_.shadow);
  }

  const TensorRow& tensor_;
  const GradientRow& gradient_;
  const StepConstants& constants_;
  float factor_;
};

template <typename UpdateRule>
void update_chunks(const StepParams& params, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const ChunkView chunk(params, index);
    const TensorRow& tensor = params.tensors[chunk.tensor];
    if (params.gradients[chunk.tensor].data == nullptr) continue;
    const Update<UpdateRule> update(params, chunk.tensor);
    if (tensor.first_scales == nullptr) {
      update.plain(chunk.begin, chunk.end);
    } else {
      for (int64_t at = chunk.begin; at < chunk.end; at += tensor.block_size) update.quantised(at / tensor.block_size);
    }
  }
}

double sum_lanes(double* lanes) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

double sum_of_squares(const GradientRow& gradient, const ChunkView& chunk) {
  double lanes[kLanes] = {};
  float buffer[kLanes];
  for (int64_t at = chunk.begin; at < chunk.end; at += kLanes) {
    const int64_t count = smaller(kLanes, chunk.end - at);
    const float* grad = load(gradient.data, DType(gradient.dtype), at, count, buffer);
    for (int64_t i = 0; i < count; ++i) lanes[i] += double(grad[i]) * double(grad[i]);
  }
  return sum_lanes(lanes);
}

void norm_chunks(const NormParams& params, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const ChunkView chunk(params.step, index);
    const GradientRow& gradient = params.step.gradients[chunk.tensor];
    params.partial[index] = gradient.data ? sum_of_squares(gradient, chunk) : 0.0;
  }
}

template <typename Params, void (*Body)(const Params&, int64_t, int64_t)>
void for_chunks(int64_t count, const Params& params, ParallelFor parallel) {
  if (count == 0) return;
  Params copy = params;
  parallel(
      count, kChunksPerTask,
      [](int64_t begin, int64_t end, void* raw) { Body(*static_cast<const Params*>(raw), begin, end); }, &copy);
}

}  // namespace

void gradient_norm(const NormParams& params, ParallelFor parallel) {
  const int64_t count = params.step.chunk_count;
  for_chunks<NormParams, norm_chunks>(count, params, parallel);
  double lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i % kLanes] += params.partial[i];
  *params.step.verdict = judge(sum_lanes(lanes), params);
}

void optimizer_update(const StepParams& params, ParallelFor parallel) {
  for (int64_t i = 0; i < params.tensor_count; ++i) begin_update(params, i);
  if (params.verdict->finite == 0) return;
  if (params.rule == Rule::adamw) {
    for_chunks<StepParams, update_chunks<AdamW>>(params.chunk_count, params, parallel);
  } else {
    for_chunks<StepParams, update_chunks<Lion>>(params.chunk_count, params, parallel);
  }
}

}  // namespace palp_fast::cpu::PALP_LEVEL
