// What the attention kernels share: softmax over places, aggregation by weights, and its gradients, on one tile.
//
// Weights of a tile are [G][places] vectors; value channel c = m G + g uses the weights of group g.
#pragma once

#include "footprint.h"

namespace {

inline void softmax(float *scores, int64_t groups, int64_t places) {
    for (int64_t g = 0; g < groups; g++) {
        float *row = scores + g * places * LANES;
        Vector top = load(row), sum{};
        for (int64_t j = 1; j < places; j++) top = maximum(top, load(row + j * LANES));
        for (int64_t j = 0; j < places; j++) {
            Vector e = exponential(load(row + j * LANES) - top);
            sum += e;
            store(row + j * LANES, e);
        }
        Vector inverse = 1.0f / sum;
        for (int64_t j = 0; j < places; j++) store(row + j * LANES, load(row + j * LANES) * inverse);
    }
}

// Σ_j weight_j value_j of CHANNELS channels that share a group.
template <int SEGMENTS, int CHANNELS>
inline void aggregate_channels(const Tile &tile, const float *weight, int64_t weight_stride, int64_t places,
                               const int64_t *offset, const float *value, int64_t channel_stride, Vector *sum) {
    Vector part[CHANNELS] = {};
    for (int64_t j = 0; j < places; j++) {
        Vector w = load(weight + j * weight_stride);
        const float *at = value + offset[j];
#pragma GCC unroll 8
        for (int c = 0; c < CHANNELS; c++) part[c] += w * gathered<SEGMENTS>(tile, at + c * channel_stride);
    }
    for (int c = 0; c < CHANNELS; c++) sum[c] = part[c];
}

// Σ_c dy_c value_cj of CHANNELS channels that share a group, for every place; added unless `first`.
template <int SEGMENTS, int CHANNELS>
inline void compare_channels(const Tile &tile, int64_t places, const int64_t *offset, const float *value,
                             int64_t channel_stride, const float *output, int64_t output_stride, float *weight_gradient,
                             int64_t weight_stride, bool first) {
    Vector dy[CHANNELS];
    for (int c = 0; c < CHANNELS; c++) dy[c] = load(output + c * output_stride);
    for (int64_t j = 0; j < places; j++) {
        const float *at = value + offset[j];
        Vector sum[2] = {first ? Vector{} : load(weight_gradient + j * weight_stride)};
#pragma GCC unroll 8
        for (int c = 0; c < CHANNELS; c++) sum[c % 2] += dy[c] * gathered<SEGMENTS>(tile, at + c * channel_stride);
        store(weight_gradient + j * weight_stride, sum[0] + sum[1]);
    }
}

// What aggregation reads and writes: bordered value, and output [B][channels][rows·columns].
struct Aggregation {
    const Footprint &f;
    const int64_t *offset;
    const float *value;  // bordered, of all channels
    int64_t channels, groups;

    template <int SEGMENTS>
    void forward(const Tile &tile, const float *weight, float *output) const {
        for (int64_t g = 0; g < groups; g++)
            forward_group<SEGMENTS>(tile, g, weight + g * f.places * LANES, LANES, output);
    }

    // The channels of group g alone, from its weights at places, `weight_stride` apart.
    template <int SEGMENTS>
    void forward_group(const Tile &tile, int64_t g, const float *weight, int64_t weight_stride, float *output) const {
        int64_t size = f.rows * f.columns, share = channels / groups, next = groups * f.plane;
        for (int64_t m = 0; m < share;) {
            int64_t c = m * groups + g, step = share - m >= 8 ? 8 : share - m >= 4 ? 4 : 1;
            const float *from = value + c * f.plane;
            Vector sum[8];
            if (step == 8)
                aggregate_channels<SEGMENTS, 8>(tile, weight, weight_stride, f.places, offset, from, next, sum);
            else if (step == 4)
                aggregate_channels<SEGMENTS, 4>(tile, weight, weight_stride, f.places, offset, from, next, sum);
            else
                aggregate_channels<SEGMENTS, 1>(tile, weight, weight_stride, f.places, offset, from, next, sum);
            for (int64_t i = 0; i < step; i++)
                set_outputs(tile, output + (c + i * groups) * size, channels * size, sum[i]);
            m += step;
        }
    }

    // Adds to the value's gradient, a slice's bordered buffer, and gives the weights' gradient [G][places]. `output` is
    // room for [channels] vectors. Channels are the inner loop, because a place's values overlap the next place's: to
    // load what has just been stored, shifted, would wait for the store.
    template <int SEGMENTS>
    void backward(const Tile &tile, const Tile &target, const float *weight, const float *gradient, float *output,
                  int64_t target_plane, float *value_gradient, float *weight_gradient) const {
        int64_t size = f.rows * f.columns;
        for (int64_t c = 0; c < channels; c++)
            store(output + c * LANES, at_outputs(tile, gradient + c * size, channels * size));
        for (int64_t j = 0; j < f.places; j++)
            for (int64_t g = 0; g < groups; g++) {
                Vector w = load(weight + (g * f.places + j) * LANES), sum{};
                for (int64_t c = g; c < channels; c += groups) {
                    Vector dy = load(output + c * LANES);
                    sum += dy * gathered<SEGMENTS>(tile, value + c * f.plane + offset[j]);
                    scattered<SEGMENTS>(target, value_gradient + c * target_plane + offset[j], dy * w);
                }
                store(weight_gradient + (g * f.places + j) * LANES, sum);
            }
    }

    // The weights' gradient alone, of group g, whose output gradients are the `output_stride` apart rows of `output`.
    template <int SEGMENTS>
    void weight_gradients(const Tile &tile, int64_t g, const float *output, int64_t output_stride,
                          float *weight_gradient, int64_t weight_stride) const {
        int64_t share = channels / groups, next = groups * f.plane;
        for (int64_t m = 0; m < share;) {
            int64_t step = share - m >= 8 ? 8 : share - m >= 4 ? 4 : 1;
            const float *from = value + (m * groups + g) * f.plane, *dy = output + m * output_stride;
            auto *compare = step == 8   ? compare_channels<SEGMENTS, 8>
                            : step == 4 ? compare_channels<SEGMENTS, 4>
                                        : compare_channels<SEGMENTS, 1>;
            compare(tile, f.places, offset, from, next, dy, output_stride, weight_gradient, weight_stride, m == 0);
            m += step;
        }
    }
};

// The tile as a slice's buffers see it.
inline Tile within(const Tile &tile, int64_t shift) {
    Tile moved = tile;
    for (int s = 0; s < tile.segments; s++) moved.offset[s] += shift;
    return moved;
}

}  // namespace
