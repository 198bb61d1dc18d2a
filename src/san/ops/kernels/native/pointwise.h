// What products on the channel axis and their gradients share: their input, and how pooling reads it.
#pragma once

#include "entry.h"
#include "footprint.h"

namespace {

constexpr int64_t MAX_PRODUCTS = 3, MAX_STEM_CHANNELS = 4;

// The map that products multiply: rectified and normalised, made from an image by the stem, or neither; then pooled.
struct Input {
    int64_t threads, batch, channels, height, width, pooled;
    int64_t stem_channels;  // 0, or the channels of the image from which the stem makes `channels`
    const float *input, *scale, *shift;  // no scale: the input as it is
    const float *stem_weight;            // [channels][stem_channels]

    // Whether there can be such a map, and products of it that give so many channels.
    bool fits(const int64_t *given) const {
        if (!input || stem_channels < 0 || stem_channels > MAX_STEM_CHANNELS) return false;
        if (stem_channels ? scale || !shift || !stem_weight : !scale != !shift) return false;
        if (pooled && (height < 2 || width < 2)) return false;
        int64_t all = 0;
        for (int64_t n = 0; n < MAX_PRODUCTS; n++) {
            if (given[n] < 0 || given[n] > MAX_COUNT) return false;
            all += given[n];
        }
        return given[0] > 0 && countable(all, channels) && countable(batch, channels, height, width) &&
               countable(batch, all, height, width);
    }
};

// The pixels that products run over: those of the input, or of the map that 2×2 pooling leaves.
inline Footprint pixels_of(const Input &a) {
    Footprint f(a.batch, a.height, a.width, 1, 1, 1, false);
    if (a.pooled) {
        f.stride = 2;
        f.rows = a.height / 2;
        f.columns = a.width / 2;
        f.pixels = f.batch * f.rows * f.columns;
    }
    return f;
}

template <int first>
inline Vector every_second(Vector a, Vector b) {
    struct Second {
        static constexpr int lane_of(int lane) { return 2 * lane + first; }
    };
    return shuffled<Second>(a, b);
}

// The larger of both, or a NaN of either.
inline Vector larger_or_nan(Vector a, Vector b) {
    Vector top = maximum(a, b);
    return a == a ? top : a;
}

// The largest of four values, or a NaN among them.
inline Vector largest(const Vector *x) {
    return larger_or_nan(larger_or_nan(x[0], x[1]), larger_or_nan(x[2], x[3]));
}

}  // namespace
