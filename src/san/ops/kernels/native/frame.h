// What a kernel that is called on maps starts from: the geometry as Python gives it, and how backward is cut into work.
#pragma once

#include "footprint.h"
#include "tasks.h"

namespace {

struct Geometry {
    int64_t threads, batch, height, width, kernel, stride, dilation, zeros;

    // Whether there can be maps of this many channels and their bordered copies, and attention of this many groups.
    bool fits(int64_t channels, int64_t groups) const {
        if (!countable(kernel, kernel) || !countable(dilation) || !countable(stride) || kernel % 2 == 0) return false;
        int64_t reach = (kernel - 1) * dilation;
        return countable(batch, channels, height, width) && countable(batch, groups, kernel, kernel, height, width) &&
               countable(batch, channels, height + reach, width + reach);
    }
};

struct Frame {
    Footprint f;
    int64_t threads;
    int64_t *offset = nullptr, *columns = nullptr;

    explicit Frame(const Geometry &g)
        : f(g.batch, g.height, g.width, g.kernel, g.stride, g.dilation, g.zeros), threads(larger(1, g.threads)) {}

    void lay_out(Workspace &space) {
        offset = space.take<int64_t>(f.places);
        columns = space.take<int64_t>(f.bordered_width);
    }

    void prepare() {
        place_offsets(f, offset);
        source_columns(f, columns);
    }

    float *take_bordered(Workspace &space, int64_t channels) const {
        return space.take<float>(f.bordered_size(channels)) + LANES;
    }

    // Copies a map [B][channels][height][width] into its borders, a plane at a time; all threads of a team call it. A
    // channel's images lie side by side, so one thread takes several: two would write to the same cache line.
    void fill(const float *map, int64_t channels, float *bordered) const {
        int64_t size = f.height * f.width, bordered_size = f.bordered_height * f.bordered_width;
#pragma omp for schedule(dynamic, 8)
        for (int64_t plane = 0; plane < channels * f.batch; plane++) {
            int64_t image = plane % f.batch, c = plane / f.batch;
            border(f, map + (image * channels + c) * size, columns, bordered + c * f.plane + image * bordered_size);
        }
    }
};

// Backward's work: parts of the channels times slices of the tiles. The cut depends on the problem alone, as slices do;
// who works on several tiles at a time takes CHUNK of them.
struct Cut {
    static constexpr int64_t ITEMS = 16, CHUNK = 24;
    int64_t parts, slices;

    Cut(const Footprint &f, int64_t channels, int64_t most_parts) : parts(smaller(channels, most_parts)) {
        slices = larger(1, smaller((ITEMS + parts - 1) / parts, f.tiles() / CHUNK));
    }

    int64_t items() const { return parts * slices; }
    int64_t part(int64_t item) const { return item % parts; }
    int64_t slice(int64_t item) const { return item / parts; }
};

// Where part `index` of `parts` equal ones of `count` starts.
inline int64_t part_start(int64_t count, int64_t index, int64_t parts) { return count * index / parts; }

// A slice's sums for the gradient of a map: every channel has a plane of its own, with room to store whole vectors
// before and behind, because the channels of one slice are summed by several threads.
struct Scatter {
    float *start = nullptr;

    static int64_t stride(const Slice &slice) { return slice.plane + 2 * LANES; }
    void lay_out(Workspace &space, const Slice &slice, int64_t channels) {
        start = space.take<float>(channels * stride(slice)) + LANES;
    }
    void clear(const Slice &slice, int64_t channel) const {
        memset(start - LANES + channel * stride(slice), 0, stride(slice) * sizeof(float));
    }
};

// Adds the slices' sums up, in their order, into the gradient [B][channels][height][width]; all threads call it.
inline void collect(const Frame &frame, const Scatter *sums, int64_t slices, int64_t channels, float *gradient) {
    const Footprint &f = frame.f;
#pragma omp for schedule(dynamic, 8)
    for (int64_t plane = 0; plane < channels * f.batch; plane++) {
        int64_t image = plane % f.batch, c = plane / f.batch;
        float *to = gradient + (image * channels + c) * f.height * f.width;
        for (int64_t s = 0; s < slices; s++) {
            Slice slice(f, s, slices);
            unborder(f, slice, sums[s].start + c * Scatter::stride(slice), image, frame.columns, to);
        }
    }
}

}  // namespace
