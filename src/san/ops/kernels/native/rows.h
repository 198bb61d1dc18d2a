// What places give back to a map, summed row by row of the map instead of place by place.
//
// Scattering adds a vector to the map for every place of every tile, most of them across cache lines and into what has
// just been stored. Here a vector of the map collects all places of a row of the footprint before it is stored once.
// It needs stride 1, and panels whose columns are consecutive output pixels.
#pragma once

#include "footprint.h"

namespace {

// Which lanes of each vector of a bordered row a place reaches, from the output columns [low, high) of a row.
class RowSpans {
public:
    void lay_out(Workspace &space, const Footprint &f) { spans_ = space.take<Span>(vectors(f) * f.kernel); }

    void fit(const Footprint &f, int64_t low, int64_t high) {
        if (low == low_ && high == high_) return;
        low_ = low;
        high_ = high;
        for (int64_t v = 0; v < vectors(f); v++)
            for (int64_t k = 0; k < f.kernel; k++) {
                int64_t shift = k * f.dilation - v * LANES;
                int64_t first = larger(0, low + shift), stop = smaller(LANES, high + shift);
                Span &span = spans_[v * f.kernel + k];
                span = {Mask{}, first < stop};
                if (span.any)
                    span.mask = without(lanes_from(static_cast<int>(first)), lanes_from(static_cast<int>(stop)));
            }
    }

    static int64_t vectors(const Footprint &f) { return (f.bordered_width + LANES - 1) / LANES; }

    struct Span {
        Mask mask;
        bool any;
    };
    const Span *of(const Footprint &f, int64_t vector) const { return spans_ + vector * f.kernel; }

private:
    Span *spans_ = nullptr;
    int64_t low_ = 0, high_ = -1;
};

// Output pixels [first, stop), which are columns 0, 1, … of a panel [places][stride]: adds its rows, times those of
// `factor` [CHANNELS][stride] if WEIGHTED, to bordered planes. `plane` is a slice's, whose first stacked row is `row`.
template <int CHANNELS, bool WEIGHTED>
void add_rows(const Footprint &f, RowSpans &spans, int64_t first, int64_t stop, const float *panel, int64_t stride,
              const float *factor, int64_t row, float *plane, int64_t plane_stride) {
    for (int64_t index = first / f.columns; index * f.columns < stop; index++) {
        int64_t start = index * f.columns, image = index / f.rows;
        spans.fit(f, larger(0, first - start), smaller(f.columns, stop - start));
        float *out = plane + (image * f.bordered_height + index - image * f.rows - row) * f.bordered_width;
        for (int64_t y = 0; y < f.kernel; y++, out += f.dilation * f.bordered_width)
            for (int64_t v = 0; v < RowSpans::vectors(f); v++) {
                const RowSpans::Span *span = spans.of(f, v);
                Vector sum[CHANNELS];
#pragma GCC unroll 4
                for (int c = 0; c < CHANNELS; c++) sum[c] = load(out + c * plane_stride + v * LANES);
                const float *from = panel + y * f.kernel * stride + start - first + v * LANES;
                int64_t at = start - first + v * LANES;
                for (int64_t x = 0; x < f.kernel; x++, from += stride - f.dilation, at -= f.dilation) {
                    if (!span[x].any) continue;
                    Vector w = blended_load(Vector{}, span[x].mask, from);
#pragma GCC unroll 4
                    for (int c = 0; c < CHANNELS; c++)
                        sum[c] += WEIGHTED ? w * blended_load(Vector{}, span[x].mask, factor + c * stride + at) : w;
                }
#pragma GCC unroll 4
                for (int c = 0; c < CHANNELS; c++) store(out + c * plane_stride + v * LANES, sum[c]);
            }
    }
}

}  // namespace
