// Aggregation on the CPU by weights that lie in memory: value [B, C, H, W], weight [B, G, K, P], output [B, C, P].

#include "../native/attention.h"
#include "../native/frame.h"

namespace {

struct Arguments {
    Geometry geometry;
    int64_t channels, groups;
    const float *value, *weight;
    float *output;
    const float *gradient;
    float *value_gradient, *weight_gradient;

    bool fits() const { return geometry.fits(channels, groups) && channels % groups == 0; }
};

// Memory of a call: bordered maps, and every thread's weights of a tile, their gradients and the output's.
struct Plan {
    const Arguments &a;
    Frame frame;
    int64_t slices;
    float *value = nullptr, *panels = nullptr;
    Scatter sums[16];

    Plan(const Arguments &a, bool backward)
        : a(a), frame(a.geometry), slices(backward ? slice_count(frame.f) : 0) {}

    int64_t panel_size() const { return (2 * a.groups * frame.f.places + a.channels) * LANES; }

    void lay_out(Workspace &space) {
        frame.lay_out(space);
        value = frame.take_bordered(space, a.channels);
        panels = space.take<float>(frame.threads * panel_size());
        for (int64_t s = 0; s < slices; s++) sums[s].lay_out(space, Slice(frame.f, s, slices), a.channels);
    }

    float *panel() const { return panels + thread_number() * panel_size(); }

    void load_weights(const Tile &tile, float *weight) const {
        int64_t size = frame.f.rows * frame.f.columns, rows = a.groups * frame.f.places;
        for (int64_t r = 0; r < rows; r++)
            store(weight + r * LANES, at_outputs(tile, a.weight + r * size, rows * size));
    }
};

int forward(const Arguments &a) {
    if (!a.fits()) return WRONG_SIZES;
    Plan plan(a, false);
    Workspace count;
    plan.lay_out(count);
    Block block(count.used());
    if (!block.start) return OUT_OF_MEMORY;
    Workspace space(block.start);
    plan.lay_out(space);
    plan.frame.prepare();
    const Footprint &f = plan.frame.f;
    Aggregation aggregation{f, plan.frame.offset, plan.value, a.channels, a.groups};
    Tasks tiles(f.tiles(), plan.frame.threads);
#pragma omp parallel num_threads(plan.frame.threads)
    {
        plan.frame.fill(a.value, a.channels, plan.value);
        tiles.each([&](int64_t t) {
            Tile tile(f, t);
            plan.load_weights(tile, plan.panel());
            SAN_BY_SEGMENTS(tile, aggregation.forward, tile, plan.panel(), a.output);
        });
    }
    return DONE;
}

void tile_backward(const Plan &plan, const Aggregation &aggregation, int64_t index, const Slice &slice, float *sums) {
    const Arguments &a = plan.a;
    const Footprint &f = plan.frame.f;
    int64_t size = f.rows * f.columns, rows = a.groups * f.places;
    float *weight = plan.panel(), *gradient = weight + rows * LANES, *output = gradient + rows * LANES;
    Tile tile(f, index), target = within(tile, slice.shift(f));
    plan.load_weights(tile, weight);
    SAN_BY_SEGMENTS(tile, aggregation.backward, tile, target, weight, a.gradient, output, Scatter::stride(slice), sums,
                    gradient);
    for (int64_t r = 0; r < rows; r++)
        set_outputs(tile, a.weight_gradient + r * size, rows * size, load(gradient + r * LANES));
}

int backward(const Arguments &a) {
    if (!a.fits()) return WRONG_SIZES;
    Plan plan(a, true);
    Workspace count;
    plan.lay_out(count);
    Block block(count.used());
    if (!block.start) return OUT_OF_MEMORY;
    Workspace space(block.start);
    plan.lay_out(space);
    plan.frame.prepare();
    const Footprint &f = plan.frame.f;
    Aggregation aggregation{f, plan.frame.offset, plan.value, a.channels, a.groups};
    Tasks slices(plan.slices, plan.frame.threads);
#pragma omp parallel num_threads(plan.frame.threads)
    {
        plan.frame.fill(a.value, a.channels, plan.value);
        slices.each([&](int64_t s) {
            Slice slice(f, s, plan.slices);
            for (int64_t c = 0; c < a.channels; c++) plan.sums[s].clear(slice, c);
            for (int64_t t = slice.tile; t < slice.tile_stop; t++)
                tile_backward(plan, aggregation, t, slice, plan.sums[s].start);
        });
#pragma omp barrier
        collect(plan.frame, plan.sums, plan.slices, a.channels, a.value_gradient);
    }
    return DONE;
}

}  // namespace

SAN_KERNEL(aggregation_forward, Arguments, forward)
SAN_KERNEL(aggregation_backward, Arguments, backward)
