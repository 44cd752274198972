// Tiles: runs of consecutive elements of one image (row-major in [C, H, W]), small enough to stay in the first cache.
#pragma once

#include "kernels.h"
#include "palp_fast/convert.h"

namespace palp_fast::cpu::PALP_LEVEL {

constexpr int64_t kTilesPerTask = 8;

struct Tile {
  int64_t sample, first, count;  // elements first .. first + count - 1 of the image of `sample`
};

PALP_INLINE int64_t least(int64_t left, int64_t right) { return left < right ? left : right; }

template <typename Left, typename Right>
constexpr bool same_type = false;
template <typename Type>
constexpr bool same_type<Type, Type> = true;

// Runs body(tile, index) for every tile; indices count row-major in [B, tiles per image].
template <typename Body>
void for_each_tile(const Shape& shape, ParallelFor parallel, const Body& body) {
  struct Context {
    const Shape& shape;
    const Body& body;
    int64_t tiles;
  } context{shape, body, tiles_per_image(shape)};
  const int64_t total = shape.batch * context.tiles;
  if (total == 0) return;
  parallel(
      total, kTilesPerTask,
      [](int64_t begin, int64_t end, void* raw) {
        const Context& c = *static_cast<const Context*>(raw);
        for (int64_t index = begin; index < end; ++index) {
          const int64_t first = (index % c.tiles) * kTile;
          c.body(Tile{index / c.tiles, first, least(kTile, c.shape.image() - first)}, index);
        }
      },
      &context);
}

// Where the tile lies in an image without gaps.
template <typename Stored>
const Stored* start_of(const ImageView& view, Tile tile) {
  return static_cast<const Stored*>(view.data) + tile.sample * view.batch_stride + tile.first;
}

template <typename Stored, typename Real>
void load_contiguous(const Stored* source, int64_t count, Real* buffer) {
  for (int64_t i = 0; i < count; ++i) buffer[i] = Real(widen(source[i]));
}

// Row by row, whatever the strides.
template <typename Stored, typename Real>
void load_strided(const Stored* image, const ImageView& view, const Shape& shape, Tile tile, Real* buffer) {
  int64_t column = tile.first % shape.width;
  int64_t row = tile.first / shape.width % shape.height;
  int64_t channel = tile.first / shape.width / shape.height;
  for (int64_t done = 0; done < tile.count;) {
    const Stored* source =
        image + channel * view.channel_stride + row * view.row_stride + column * view.column_stride;
    const int64_t run = least(tile.count - done, shape.width - column);
    for (int64_t i = 0; i < run; ++i) buffer[done + i] = Real(widen(source[i * view.column_stride]));
    done += run;
    column = 0;
    if (++row < shape.height) continue;
    row = 0;
    ++channel;
  }
}

template <typename Stored, typename Real>
const Real* load_typed(const ImageView& view, const Shape& shape, Tile tile, Real* buffer) {
  if (!view.image_is_contiguous(shape)) {
    const Stored* image = static_cast<const Stored*>(view.data) + tile.sample * view.batch_stride;
    load_strided(image, view, shape, tile, buffer);
  } else if constexpr (same_type<Stored, Real>) {
    return start_of<Stored>(view, tile);
  } else {
    load_contiguous(start_of<Stored>(view, tile), tile.count, buffer);
  }
  return buffer;
}

// The tile as Real: in place where the tensor already holds that, else in the buffer of kTile elements.
template <typename Real>
const Real* load(const ImageView& view, const Shape& shape, Tile tile, Real* buffer) {
  switch (view.dtype) {
    case DType::float16: return load_typed<Half>(view, shape, tile, buffer);
    case DType::bfloat16: return load_typed<BFloat16>(view, shape, tile, buffer);
    case DType::float64: return load_typed<double>(view, shape, tile, buffer);
    default: return load_typed<float>(view, shape, tile, buffer);
  }
}

// Where to put the tile's results before `store`: in place where the tensor holds Real, else in the buffer.
template <typename Real>
Real* place(const ImageOut& out, const Shape& shape, Tile tile, int64_t sample, Real* buffer) {
  const DType real = same_type<Real, double> ? DType::float64 : DType::float32;
  return out.dtype == real ? static_cast<Real*>(out.data) + sample * shape.image() + tile.first : buffer;
}

template <typename Stored, typename Real>
void store_typed(const Real* values, int64_t count, void* data, int64_t offset) {
  Stored* out = static_cast<Stored*>(data) + offset;
  if constexpr (same_type<Stored, Real>) {
    if (values == out) return;
  }
  for (int64_t i = 0; i < count; ++i) round_to(values[i], out[i]);
}

// Writes the tile to a contiguous [.., C, H, W], as sample number `sample` of it.
template <typename Real>
void store(const Real* values, const ImageOut& out, const Shape& shape, Tile tile, int64_t sample) {
  const int64_t offset = sample * shape.image() + tile.first;
  switch (out.dtype) {
    case DType::float16: return store_typed<Half>(values, tile.count, out.data, offset);
    case DType::bfloat16: return store_typed<BFloat16>(values, tile.count, out.data, offset);
    case DType::float64: return store_typed<double>(values, tile.count, out.data, offset);
    default: return store_typed<float>(values, tile.count, out.data, offset);
  }
}

}  // namespace palp_fast::cpu::PALP_LEVEL
