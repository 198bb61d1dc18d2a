// Where the places of a footprint lie: bordered maps, tiles of output pixels, and what tiles scatter back.
//
// Keys and values are copied into bordered maps, [channels][images stacked: batch × rows][columns], in which a place is
// the same distance from its centre for every pixel. A tile is LANES consecutive output pixels of the whole batch; where
// it crosses the end of a row it falls into segments, each loaded whole and blended.
#pragma once

#include "vector.h"
#include "workspace.h"

namespace {

inline int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Index of a bordered map's row or column in the map, or -1 where zeros lie: `reflect` is a triangle wave.
inline int64_t source_index(int64_t index, int64_t size, bool zeros) {
    if (index >= 0 && index < size) return index;
    if (zeros) return -1;
    int64_t period = larger(2 * (size - 1), 1);
    int64_t at = (index % period + period) % period;
    return smaller(at, period - at);
}

struct Footprint {
    int64_t batch, height, width, kernel, stride, dilation;
    bool zeros, interleaved = false;
    int64_t places, padding, rows, columns, pixels, bordered_height, bordered_width;
    int64_t plane, row;  // distance from a bordered channel to the next, and from a row to the next

    Footprint(int64_t batch, int64_t height, int64_t width, int64_t kernel, int64_t stride, int64_t dilation, bool zeros)
        : batch(batch), height(height), width(width), kernel(kernel), stride(stride), dilation(dilation), zeros(zeros) {
        places = kernel * kernel;
        padding = dilation * (kernel - 1) / 2;
        rows = (height + stride - 1) / stride;
        columns = (width + stride - 1) / stride;
        pixels = batch * rows * columns;
        bordered_height = (rows - 1) * stride + (kernel - 1) * dilation + 1;
        bordered_width = (columns - 1) * stride + (kernel - 1) * dilation + 1;
        // An odd number of cache lines spreads neighbouring channels over the cache.
        plane = rounded_up(batch * bordered_height * bordered_width, 16) | 16;
        row = bordered_width;
    }

    // Puts the same row of all channels side by side: a tile's footprints then lie in few pages, in the order of tiles.
    void interleave(int64_t channels) {
        interleaved = true;
        plane = bordered_width % 64 ? bordered_width : bordered_width + 4;
        row = channels * plane;
    }

    // Floats of `channels` bordered maps, with room to load a whole vector before and behind.
    int64_t bordered_size(int64_t channels) const { return stacked_size(channels, batch * bordered_height, plane); }
    int64_t stacked_size(int64_t channels, int64_t stacked_rows, int64_t plane) const {
        return (interleaved ? stacked_rows * row : channels * plane) + 2 * LANES;
    }
    int64_t tiles() const { return (pixels + LANES - 1) / LANES; }
};

// Distance of every place from the first one, in a bordered map of `row` columns.
inline void place_offsets(const Footprint &f, int64_t *offset) {
    for (int64_t y = 0; y < f.kernel; y++)
        for (int64_t x = 0; x < f.kernel; x++)
            offset[y * f.kernel + x] = y * f.dilation * f.row + x * f.dilation;
}

// Copies one image [height][width] into its bordered place.
inline void border(const Footprint &f, const float *image, const int64_t *columns, float *bordered) {
    int64_t inner_stop = smaller(f.padding + f.width, f.bordered_width);
    for (int64_t y = 0; y < f.bordered_height; y++) {
        int64_t row = source_index(y - f.padding, f.height, f.zeros);
        float *to = bordered + y * f.row;
        if (row < 0) {
            memset(to, 0, f.bordered_width * sizeof(float));
            continue;
        }
        const float *from = image + row * f.width;
        for (int64_t x = 0; x < f.padding; x++) to[x] = columns[x] < 0 ? 0.0f : from[columns[x]];
        memcpy(to + f.padding, from, (inner_stop - f.padding) * sizeof(float));
        for (int64_t x = inner_stop; x < f.bordered_width; x++) to[x] = columns[x] < 0 ? 0.0f : from[columns[x]];
    }
}

inline void source_columns(const Footprint &f, int64_t *columns) {
    for (int64_t x = 0; x < f.bordered_width; x++) columns[x] = source_index(x - f.padding, f.width, f.zeros);
}

// LANES consecutive output pixels; lanes behind the last pixel repeat it.
struct Tile {
    int64_t first;
    int count, segments;
    bool contiguous;           // all lanes lie one behind the other in one image's input map
    int64_t offset[LANES];     // of a segment's lane 0 in a bordered map
    Mask mask[LANES];          // a segment's lanes
    int64_t image[LANES], centre[LANES], output[LANES];  // of each lane: image, index in the input and output map

    Tile() = default;
    Tile(const Footprint &f, int64_t index) : first(index * LANES) {
        count = static_cast<int>(smaller(LANES, f.pixels - first));
        segments = 0;
        int64_t size = f.rows * f.columns, expected = -1;
        int64_t number = first / size, row = first % size / f.columns, column = first % size % f.columns;
        for (int lane = 0; lane < LANES; lane++) {
            image[lane] = number;
            output[lane] = row * f.columns + column;
            centre[lane] = row * f.stride * f.width + column * f.stride;
            int64_t at = (number * f.bordered_height + row * f.stride) * f.row + column * f.stride;
            if (at != expected) {
                if (segments) mask[segments - 1] = without(mask[segments - 1], lanes_from(lane));
                offset[segments] = at - lane;
                mask[segments++] = lanes_from(lane);
            }
            expected = at + 1;
            if (lane >= count - 1) continue;
            if (++column < f.columns) continue;
            column = 0;
            if (++row < f.rows) continue;
            row = 0;
            number++;
        }
        contiguous = count == LANES && image[0] == image[LANES - 1] && f.stride == 1;
    }

    // Lanes that are pixels, as 1 and 0.
    Vector valid() const { return first_lanes(count); }
};

// Values of one place: `bordered` points at the place's distance from the first one, in one channel.
template <int SEGMENTS>
inline Vector gathered(const Tile &tile, const float *bordered) {
    Vector x = load(bordered + tile.offset[0]);
    int segments = SEGMENTS ? SEGMENTS : tile.segments;
    for (int s = 1; s < segments; s++) x = blended_load(x, tile.mask[s], bordered + tile.offset[s]);
    return x;
}

template <int SEGMENTS>
inline void scattered(const Tile &tile, float *bordered, Vector x) {
    if (SEGMENTS == 1) {
        store(bordered + tile.offset[0], load(bordered + tile.offset[0]) + x);
        return;
    }
    if (SEGMENTS > 1) return add_each_masked<SEGMENTS ? SEGMENTS : 1>(bordered, tile.offset, tile.mask, x);
    for (int s = 0; s < tile.segments; s++) add_masked(bordered + tile.offset[s], tile.mask[s], x);
}

// Calls a template on the number of segments, which the hot loops want to know; on 0 where lanes repeat a pixel, because
// segments that share a pixel must be scattered one after the other.
#define SAN_BY_SEGMENTS(tile, function, ...)                  \
    switch ((tile).count < LANES ? 0 : (tile).segments) {     \
    case 1: function<1>(__VA_ARGS__); break;                  \
    case 2: function<2>(__VA_ARGS__); break;                  \
    case 3: function<3>(__VA_ARGS__); break;                  \
    case 4: function<4>(__VA_ARGS__); break;                  \
    default: function<0>(__VA_ARGS__); break;                 \
    }

// A channel of an unbordered map at the centres of a tile; `stride` is the distance between images.
inline Vector at_centres(const Tile &tile, const float *channel, int64_t stride) {
    if (tile.contiguous) return load(channel + tile.image[0] * stride + tile.centre[0]);
    Vector x{};
    for (int lane = 0; lane < LANES; lane++) x[lane] = channel[tile.image[lane] * stride + tile.centre[lane]];
    return x;
}

inline void set_centres(const Tile &tile, float *channel, int64_t stride, Vector x) {
    if (tile.contiguous) {
        store(channel + tile.image[0] * stride + tile.centre[0], x);
        return;
    }
    for (int lane = 0; lane < tile.count; lane++) channel[tile.image[lane] * stride + tile.centre[lane]] = x[lane];
}

inline Vector at_outputs(const Tile &tile, const float *channel, int64_t stride) {
    if (tile.count == LANES && tile.image[0] == tile.image[LANES - 1])
        return load(channel + tile.image[0] * stride + tile.output[0]);
    Vector x{};
    for (int lane = 0; lane < tile.count; lane++) x[lane] = channel[tile.image[lane] * stride + tile.output[lane]];
    return x;
}

inline void set_outputs(const Tile &tile, float *channel, int64_t stride, Vector x) {
    if (tile.count == LANES && tile.image[0] == tile.image[LANES - 1]) {
        store(channel + tile.image[0] * stride + tile.output[0], x);
        return;
    }
    for (int lane = 0; lane < tile.count; lane++) channel[tile.image[lane] * stride + tile.output[lane]] = x[lane];
}

// A run of tiles whose sums one thread takes, and the stacked rows of bordered maps that they reach. The cut depends on
// the problem alone, and slices are added up in their order, so the number of threads changes no bit.
struct Slice {
    int64_t tile, tile_stop, row, row_stop, plane;

    Slice(const Footprint &f, int64_t index, int64_t slices) {
        tile = f.tiles() * index / slices;
        tile_stop = f.tiles() * (index + 1) / slices;
        int64_t size = f.rows * f.columns, last = smaller(tile_stop * LANES, f.pixels) - 1;
        row = stacked_row(f, tile * LANES / size, tile * LANES % size);
        row_stop = stacked_row(f, last / size, last % size) + (f.kernel - 1) * f.dilation + 1;
        plane = f.interleaved ? f.plane : rounded_up((row_stop - row) * f.bordered_width, 16) | 16;
    }

    int64_t size(const Footprint &f, int64_t channels) const { return f.stacked_size(channels, row_stop - row, plane); }
    // What turns an offset of the whole stack into one of this slice.
    int64_t shift(const Footprint &f) const { return -row * f.row; }

private:
    static int64_t stacked_row(const Footprint &f, int64_t image, int64_t pixel) {
        return image * f.bordered_height + pixel / f.columns * f.stride;
    }
};

inline int64_t slice_count(const Footprint &f) { return larger(1, smaller(16, f.tiles() / 2)); }

// Adds the part of a bordered image that a slice holds to the image [height][width].
inline void unborder(const Footprint &f, const Slice &slice, const float *bordered, int64_t image,
                     const int64_t *columns, float *to) {
    int64_t start = larger(slice.row, image * f.bordered_height);
    int64_t stop = smaller(slice.row_stop, (image + 1) * f.bordered_height);
    int64_t inner_stop = smaller(f.padding + f.width, f.bordered_width);
    for (int64_t stacked = start; stacked < stop; stacked++) {
        int64_t row = source_index(stacked - image * f.bordered_height - f.padding, f.height, f.zeros);
        if (row < 0) continue;
        const float *from = bordered + (stacked - slice.row) * f.row;
        float *sum = to + row * f.width;
        for (int64_t x = 0; x < inner_stop - f.padding; x++) sum[x] += from[x + f.padding];
        for (int64_t x = 0; x < f.padding; x++)
            if (columns[x] >= 0) sum[columns[x]] += from[x];
        for (int64_t x = inner_stop; x < f.bordered_width; x++)
            if (columns[x] >= 0) sum[columns[x]] += from[x];
    }
}

}  // namespace
