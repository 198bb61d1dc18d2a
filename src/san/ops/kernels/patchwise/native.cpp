// Patchwise attention on the CPU: δ with γ's first Linear, γ's last Linear with aggregation, and δ's moments.
//
// One column of a product is one pixel's footprint, so δ = [φ, ψ at every place] is wide, D = R (K + 1), but the layers
// behind it are maps of G channels, which are kept. δ itself is never whole: a block of its rows is gathered for some
// tiles, used while it is in the cache, and dropped. Backward gathers it again. A part of the rows (or of the groups)
// belongs to one thread, which therefore sums gradients of weights and keys without a second copy.
// Legend: R relation width, K places, D δ's width, G weight groups, T tiles of a panel [rows][T].

#include "../native/attention.h"
#include "../native/frame.h"
#include "../native/product.h"
#include "../native/rows.h"

namespace {

constexpr int64_t CHUNK = Cut::CHUNK, GROUP = 2 * TILE_VECTORS, MAX_SLICES = Cut::ITEMS;
// Rows of δ that are gathered at a time: their panel of one register tile of columns stays in the first-level cache.
constexpr int64_t BLOCK_ROWS = 98, MAP_ROWS = 16;

// Runs `work` in one block of memory, which its `lay_out` describes.
template <typename Work>
int run_in_block(Work &work) {
    Workspace count;
    work.lay_out(count);
    Block block(count.used());
    if (!block.start) return OUT_OF_MEMORY;
    Workspace space(block.start);
    work.lay_out(space);
    work.frame.prepare();
    work.run();
    return DONE;
}

// Tiles [first, stop), worked on together.
struct Chunk {
    int64_t first, count;

    // Chunk `index` of `chunks` equal ones of tiles [start, stop).
    Chunk(int64_t start, int64_t stop, int64_t index, int64_t chunks)
        : first(start + part_start(stop - start, index, chunks)),
          count(start + part_start(stop - start, index + 1, chunks) - first) {}

    static int64_t number(int64_t tiles, int64_t most) { return (tiles + most - 1) / most; }
};

inline void add(float *to, const float *from, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] += from[i];
}

inline float row_sum(const float *row, int64_t count) {
    Vector sum{};
    for (int64_t t = 0; t < count; t++) sum += load(row + t * LANES);
    return lane_sum(sum);
}

// Adds the panel [K][count] of tiles, times each of four or one rows of `factor` if there are any, to what the slice
// sums for as many channels, whose planes are `plane_stride` apart. `channels` is how many are left.
inline void give_back(const Frame &frame, RowSpans &spans, const Slice &slice, const Tile *tiles, int64_t count,
                      int64_t channels, const float *panel, const float *factor, float *plane, int64_t plane_stride) {
    const Footprint &f = frame.f;
    int64_t stride = count * LANES, first = tiles[0].first, stop = smaller(first + stride, f.pixels);
    if (f.stride == 1) {
        auto *add = !factor ? add_rows<1, false> : channels < 4 ? add_rows<1, true> : add_rows<4, true>;
        return add(f, spans, first, stop, panel, stride, factor, slice.row, plane, plane_stride);
    }
    for (int64_t c = 0; c < (channels < 4 ? 1 : 4); c++)
        for (int64_t j = 0; j < f.places; j++)
            for (int64_t t = 0; t < count; t++) {
                Vector x = load(panel + j * stride + t * LANES);
                if (factor) x *= load(factor + c * stride + t * LANES);
                scattered<0>(tiles[t], plane + c * plane_stride + slice.shift(f) + frame.offset[j], x);
            }
}

// out [columns][rows] from in [rows][in_stride].
inline void transpose(const float *in, int64_t in_stride, int64_t rows, int64_t columns, float *out) {
    for (int64_t c = 0; c < columns; c++)
        for (int64_t r = 0; r < rows; r++) out[c * rows + r] = in[r * in_stride + c];
}

// A map [B][channels][P] as panels of tiles, and back.
inline void load_panel(const Tile *tiles, int64_t count, const float *map, int64_t channels, int64_t size,
                       float *panel) {
    for (int64_t c = 0; c < channels; c++)
        for (int64_t t = 0; t < count; t++)
            store(panel + (c * count + t) * LANES, at_outputs(tiles[t], map + c * size, channels * size));
}

inline void store_panel(const Tile *tiles, int64_t count, const float *panel, int64_t channels, int64_t size,
                        float *map) {
    for (int64_t c = 0; c < channels; c++)
        for (int64_t t = 0; t < count; t++)
            set_outputs(tiles[t], map + c * size, channels * size, load(panel + (c * count + t) * LANES));
}

inline void construct(const Footprint &f, const Chunk &chunk, Tile *tiles) {
    for (int64_t t = 0; t < chunk.count; t++) tiles[t] = Tile(f, chunk.first + t);
}

struct HiddenArguments {
    Geometry geometry;
    int64_t query_channels, key_channels, given;  // R; R, or 0 for a layer on a map; rows of the weight [given][D]
    const float *query, *key, *scale, *shift, *weight, *bias;
    float *hidden;
    const float *gradient;
    float *query_gradient, *key_gradient, *scale_gradient, *shift_gradient, *weight_gradient, *bias_gradient;

    bool fits() const {
        return geometry.fits(query_channels, 1) && (key_channels == 0 || key_channels == query_channels) &&
               countable(given, query_channels + key_channels * geometry.kernel * geometry.kernel) &&
               countable(geometry.batch, given, geometry.height, geometry.width);
    }
};

// Some consecutive rows of δ: of queries, or every place of some channels' keys.
struct Rows {
    bool query;
    int64_t channel, channels, first, count;
};

struct Relation {
    const HiddenArguments &a;
    const Frame &frame;
    int64_t places, width, channels_at_once, query_blocks;
    const float *key = nullptr;

    Relation(const HiddenArguments &a, const Frame &frame) : a(a), frame(frame), places(frame.f.places) {
        width = a.query_channels + a.key_channels * places;
        // No fewer than four blocks of keys, so that threads have blocks to share.
        channels_at_once = larger(1, smaller(BLOCK_ROWS / places, a.key_channels / 4));
        query_blocks = (a.query_channels + rows() - 1) / rows();
    }

    // Most rows of a block.
    int64_t rows() const { return a.key_channels ? channels_at_once * places : smaller(MAP_ROWS, a.query_channels); }
    int64_t blocks() const { return query_blocks + (a.key_channels + channels_at_once - 1) / channels_at_once; }

    Rows block(int64_t index) const {
        if (index < query_blocks) {
            int64_t first = index * rows(), count = smaller(rows(), a.query_channels - first);
            return {true, first, count, first, count};
        }
        int64_t channel = (index - query_blocks) * channels_at_once;
        int64_t channels = smaller(channels_at_once, a.key_channels - channel);
        return {false, channel, channels, a.query_channels + channel * places, channels * places};
    }

    Vector query(const Tile &tile, int64_t channel) const {
        int64_t size = frame.f.height * frame.f.width;
        return at_centres(tile, a.query + channel * size, a.query_channels * size);
    }

    // δ's rows of one tile, a panel's column.
    template <int SEGMENTS>
    void gather(const Tile &tile, const Rows &rows, float *out, int64_t stride) const {
        for (int64_t c = 0; c < rows.channels; c++) {
            const float *from = key + (rows.channel + c) * frame.f.plane;
            for (int64_t j = 0; j < places; j++, out += stride)
                store(out, gathered<SEGMENTS>(tile, from + frame.offset[j]));
        }
    }

    // relu(scale · δ + shift) of one tile.
    template <int SEGMENTS>
    void activate(const Tile &tile, const Rows &rows, float *out, int64_t stride) const {
        const float *scale = a.scale + rows.first, *shift = a.shift + rows.first;
        for (int64_t c = 0; c < rows.channels; c++) {
            const float *from = key + (rows.channel + c) * frame.f.plane;
            for (int64_t j = 0; j < places; j++, out += stride)
                store(out, rectified(gathered<SEGMENTS>(tile, from + frame.offset[j]) * *scale++ + *shift++));
        }
    }

    void gather_all(const Tile *tiles, int64_t count, const Rows &rows, float *out) const {
        for (int64_t t = 0; t < count; t++, out += LANES) {
            if (!rows.query) {
                SAN_BY_SEGMENTS(tiles[t], gather, tiles[t], rows, out, count * LANES);
                continue;
            }
            for (int64_t r = 0; r < rows.count; r++) store(out + r * count * LANES, query(tiles[t], rows.channel + r));
        }
    }

    void activate_all(const Tile *tiles, int64_t count, const Rows &rows, float *out) const {
        for (int64_t t = 0; t < count; t++, out += LANES) {
            if (!rows.query) {
                SAN_BY_SEGMENTS(tiles[t], activate, tiles[t], rows, out, count * LANES);
                continue;
            }
            for (int64_t r = 0; r < rows.count; r++) {
                Vector x = query(tiles[t], rows.channel + r) * a.scale[rows.first + r] + a.shift[rows.first + r];
                store(out + r * count * LANES, rectified(x));
            }
        }
    }
};

struct HiddenForward {
    const HiddenArguments &a;
    Frame frame;
    Relation relation;
    float *key = nullptr, *panels = nullptr;

    explicit HiddenForward(const HiddenArguments &a) : a(a), frame(a.geometry), relation(a, frame) {}

    int64_t panel_size() const { return (relation.rows() + a.given) * GROUP * LANES; }

    void lay_out(Workspace &space) {
        frame.lay_out(space);
        key = frame.take_bordered(space, a.key_channels);
        panels = space.take<float>(frame.threads * panel_size());
        relation.key = key;
    }

    void run() const {
        int64_t chunks = Chunk::number(frame.f.tiles(), GROUP);
        Tasks tasks(chunks, frame.threads);
#pragma omp parallel num_threads(frame.threads)
        {
            frame.fill(a.key, a.key_channels, key);
            tasks.each([&](int64_t i) { forward(Chunk(0, frame.f.tiles(), i, chunks)); });
        }
    }

    void forward(const Chunk &chunk) const {
        Tile tiles[GROUP];
        construct(frame.f, chunk, tiles);
        float *panel = panels + thread_number() * panel_size(), *hidden = panel + relation.rows() * GROUP * LANES;
        int64_t stride = chunk.count * LANES;
        for (int64_t b = 0; b < relation.blocks(); b++) {
            Rows rows = relation.block(b);
            relation.activate_all(tiles, chunk.count, rows, panel);
            Start start = b ? ADD : a.bias ? BIAS : ZERO;
            Product p{a.weight + rows.first, relation.width, a.bias, a.given, rows.count, start, PLAIN};
            product(p, panel, stride, hidden, stride, chunk.count);
        }
        store_panel(tiles, chunk.count, hidden, a.given, frame.f.rows * frame.f.columns, a.hidden);
    }
};

// Sums of one slice; the first slice's are the gradients themselves.
struct HiddenSums {
    Scatter key;
    float *scale, *shift, *weight, *bias;
};

struct HiddenBackward {
    const HiddenArguments &a;
    Frame frame;
    Relation relation;
    Cut cut;
    float *key = nullptr, *panels = nullptr;
    HiddenSums sums[MAX_SLICES];

    explicit HiddenBackward(const HiddenArguments &a)
        : a(a), frame(a.geometry), relation(a, frame), cut(frame.f, relation.blocks(), Cut::ITEMS) {}

    // Panels of one thread: δ raw, activated, its gradient; that of the hidden layer; a block of the weight.
    struct Buffers {
        float *raw, *active, *inner, *outer, *weight;
        RowSpans spans;
    };

    Buffers take_buffers(Workspace &space) const {
        int64_t rows = panel_rows(relation.rows()) * CHUNK * LANES, given = panel_rows(a.given) * CHUNK * LANES;
        Buffers b;
        b.raw = space.take<float>(rows);
        b.active = space.take<float>(rows);
        b.inner = space.take<float>(rows + 2 * LANES) + LANES;
        b.spans.lay_out(space, frame.f);
        b.outer = space.take<float>(given);
        b.weight = space.take<float>(relation.rows() * a.given);
        return b;
    }

    int64_t buffer_size() const {
        Workspace space;
        take_buffers(space);
        return static_cast<int64_t>(space.used() / sizeof(float));
    }

    void lay_out(Workspace &space) {
        frame.lay_out(space);
        key = frame.take_bordered(space, a.key_channels);
        panels = space.take<float>(frame.threads * buffer_size());
        relation.key = key;
        sums[0] = {{}, a.scale_gradient, a.shift_gradient, a.weight_gradient, a.bias_gradient};
        for (int64_t s = 0; s < cut.slices; s++) {
            if (s) {
                sums[s].scale = space.take<float>(relation.width);
                sums[s].shift = space.take<float>(relation.width);
                sums[s].weight = space.take<float>(a.given * relation.width);
                sums[s].bias = space.take<float>(a.given);
            }
            sums[s].key.lay_out(space, Slice(frame.f, s, cut.slices), a.key_channels);
        }
    }

    void run() const {
        Tasks items(cut.items(), frame.threads);
#pragma omp parallel num_threads(frame.threads)
        {
            frame.fill(a.key, a.key_channels, key);
            items.each([&](int64_t i) { backward(cut.part(i), cut.slice(i)); });
#pragma omp barrier
            Scatter keys[MAX_SLICES];
            for (int64_t s = 0; s < cut.slices; s++) keys[s] = sums[s].key;
            collect(frame, keys, cut.slices, a.key_channels, a.key_gradient);
#pragma omp for schedule(static)
            for (int64_t o = 0; o < a.given; o++)
                for (int64_t s = 1; s < cut.slices; s++) {
                    add(a.weight_gradient + o * relation.width, sums[s].weight + o * relation.width, relation.width);
                    a.bias_gradient[o] += sums[s].bias[o];
                }
        }
        for (int64_t s = 1; s < cut.slices; s++) {
            add(a.scale_gradient, sums[s].scale, relation.width);
            add(a.shift_gradient, sums[s].shift, relation.width);
        }
    }

    void backward(int64_t part, int64_t index) const {
        Slice slice(frame.f, index, cut.slices);
        const HiddenSums &to = sums[index];
        int64_t start = part_start(relation.blocks(), part, cut.parts);
        int64_t stop = part_start(relation.blocks(), part + 1, cut.parts);
        for (int64_t b = start; b < stop; b++) clear(relation.block(b), slice, index, to);
        if (part == 0) memset(to.bias, 0, a.given * sizeof(float));
        Workspace space(panels + thread_number() * buffer_size());
        Buffers buffers = take_buffers(space);
        Tile tiles[CHUNK];
        int64_t chunks = Chunk::number(slice.tile_stop - slice.tile, CHUNK);
        for (int64_t i = 0; i < chunks; i++) {
            Chunk chunk(slice.tile, slice.tile_stop, i, chunks);
            construct(frame.f, chunk, tiles);
            load_panel(tiles, chunk.count, a.gradient, a.given, frame.f.rows * frame.f.columns, buffers.outer);
            for (int64_t o = 0; part == 0 && o < a.given; o++)
                to.bias[o] += row_sum(buffers.outer + o * chunk.count * LANES, chunk.count);
            for (int64_t b = start; b < stop; b++)
                block_backward(relation.block(b), tiles, chunk.count, buffers, to, slice);
        }
    }

    void clear(const Rows &rows, const Slice &slice, int64_t index, const HiddenSums &to) const {
        for (int64_t c = 0; !rows.query && c < rows.channels; c++) to.key.clear(slice, rows.channel + c);
        if (index == 0) return;
        memset(to.scale + rows.first, 0, rows.count * sizeof(float));
        memset(to.shift + rows.first, 0, rows.count * sizeof(float));
        for (int64_t o = 0; o < a.given; o++)
            memset(to.weight + o * relation.width + rows.first, 0, rows.count * sizeof(float));
    }

    void block_backward(const Rows &rows, const Tile *tiles, int64_t count, Buffers &b, const HiddenSums &to,
                        const Slice &slice) const {
        int64_t stride = count * LANES;
        relation.gather_all(tiles, count, rows, b.raw);
        for (int64_t r = 0; r < rows.count; r++) {
            float s = a.scale[rows.first + r], t = a.shift[rows.first + r];
            for (int64_t i = r * stride; i < (r + 1) * stride; i += LANES)
                store(b.active + i, rectified(load(b.raw + i) * s + t));
        }
        outer(b.outer, stride, a.given, b.active, stride, rows.count, count, to.weight + rows.first, relation.width,
              false);
        transpose(a.weight + rows.first, relation.width, a.given, rows.count, b.weight);
        Product back{b.weight, a.given, nullptr, rows.count, a.given, ZERO, PLAIN};
        product(back, b.outer, stride, b.inner, stride, count);
        for (int64_t r = 0; r < rows.count; r++) row_backward(rows, r, stride, b, to);
        if (rows.query) return set_queries(rows, tiles, count, b.inner);
        for (int64_t c = 0; c < rows.channels; c++)
            give_back(frame, b.spans, slice, tiles, count, 1, b.inner + c * relation.places * stride, nullptr,
                      to.key.start + (rows.channel + c) * Scatter::stride(slice), 0);
    }

    // Through ReLU, scale and shift: the gradient at δ replaces that of its activation.
    void row_backward(const Rows &rows, int64_t r, int64_t stride, const Buffers &b, const HiddenSums &to) const {
        Vector slope{}, sum{};
        float s = a.scale[rows.first + r];
        for (int64_t i = r * stride; i < (r + 1) * stride; i += LANES) {
            Vector x = passed(load(b.inner + i), load(b.active + i));
            sum += x;
            slope += x * load(b.raw + i);
            store(b.inner + i, x * s);
        }
        to.scale[rows.first + r] += lane_sum(slope);
        to.shift[rows.first + r] += lane_sum(sum);
    }

    void set_queries(const Rows &rows, const Tile *tiles, int64_t count, const float *gradient) const {
        int64_t size = frame.f.height * frame.f.width;
        for (int64_t r = 0; r < rows.count; r++)
            for (int64_t t = 0; t < count; t++)
                set_centres(tiles[t], a.query_gradient + (rows.channel + r) * size, a.query_channels * size,
                            load(gradient + (r * count + t) * LANES));
    }
};

int hidden_forward(const HiddenArguments &a) {
    if (!a.fits()) return WRONG_SIZES;
    HiddenForward work(a);
    return run_in_block(work);
}

int hidden_backward(const HiddenArguments &a) {
    if (!a.fits()) return WRONG_SIZES;
    HiddenBackward work(a);
    return run_in_block(work);
}

struct OutputArguments {
    Geometry geometry;
    int64_t taken, groups, channels;  // the weight is [groups · K][taken]
    const float *hidden, *scale, *shift, *weight, *bias, *value;
    float *output;
    const float *gradient;
    float *hidden_gradient, *scale_gradient, *shift_gradient, *weight_gradient, *bias_gradient, *value_gradient;

    bool fits() const {
        return geometry.fits(channels, 1) && countable(geometry.batch, taken, geometry.height, geometry.width) &&
               countable(groups, geometry.kernel, geometry.kernel, taken) && channels % groups == 0;
    }
};

// What forward and backward share: the activated hidden layer, and one group's weights from it.
struct Output {
    const OutputArguments &a;
    Frame frame;
    int64_t places, size;
    float *value = nullptr;

    explicit Output(const OutputArguments &a)
        : a(a), frame(a.geometry), places(frame.f.places), size(frame.f.rows * frame.f.columns) {}

    void activate(const Tile *tiles, int64_t count, float *panel) const {
        load_panel(tiles, count, a.hidden, a.taken, size, panel);
        for (int64_t r = 0; r < a.taken; r++)
            for (int64_t i = r * count * LANES; i < (r + 1) * count * LANES; i += LANES)
                store(panel + i, rectified(load(panel + i) * a.scale[r] + a.shift[r]));
    }

    void weigh(int64_t g, const float *panel, int64_t count, float *weight) const {
        int64_t stride = count * LANES, row = g * places;
        const float *bias = a.bias ? a.bias + row : nullptr;
        Product p{a.weight + row * a.taken, a.taken, bias, places, a.taken, bias ? BIAS : ZERO, PLAIN};
        product(p, panel, stride, weight, stride, count);
    }

    Aggregation aggregation() const { return {frame.f, frame.offset, value, a.channels, a.groups}; }
};

struct OutputForward : Output {
    float *panels = nullptr;

    explicit OutputForward(const OutputArguments &a) : Output(a) {}

    int64_t panel_size() const { return (a.taken + places) * GROUP * LANES; }

    void lay_out(Workspace &space) {
        frame.lay_out(space);
        value = frame.take_bordered(space, a.channels);
        panels = space.take<float>(frame.threads * panel_size());
    }

    void run() const {
        int64_t chunks = Chunk::number(frame.f.tiles(), GROUP);
        Tasks tasks(chunks, frame.threads);
#pragma omp parallel num_threads(frame.threads)
        {
            frame.fill(a.value, a.channels, value);
            tasks.each([&](int64_t i) { forward(Chunk(0, frame.f.tiles(), i, chunks)); });
        }
    }

    void forward(const Chunk &chunk) const {
        Tile tiles[GROUP];
        construct(frame.f, chunk, tiles);
        float *panel = panels + thread_number() * panel_size(), *weight = panel + a.taken * GROUP * LANES;
        activate(tiles, chunk.count, panel);
        Aggregation step = aggregation();
        for (int64_t g = 0; g < a.groups; g++) {
            weigh(g, panel, chunk.count, weight);
            for (int64_t t = 0; t < chunk.count; t++)
                SAN_BY_SEGMENTS(tiles[t], step.forward_group, tiles[t], g, weight + t * LANES, chunk.count * LANES,
                                a.output);
        }
    }
};

// Sums of one slice; the first slice's are the gradients themselves.
struct OutputSums {
    Scatter value;
    float *weight, *bias;
};

struct OutputBackward : Output {
    // Every part writes the hidden layer's gradient anew, so there are only some.
    static constexpr int64_t PARTS = 8;
    Cut cut;
    float *panels = nullptr;
    float *hidden[PARTS];  // gradients of the activated hidden layer from the groups of each part
    OutputSums sums[MAX_SLICES];

    explicit OutputBackward(const OutputArguments &a) : Output(a), cut(frame.f, a.groups, PARTS) {}

    // Panels of one thread: the activated hidden layer and its gradient, a group's weights and their gradient, the
    // gradients of a group's outputs, its part of the weight.
    struct Buffers {
        float *active, *inner, *attention, *outer, *output, *weight;
        RowSpans spans;
    };

    Buffers take_buffers(Workspace &space) const {
        int64_t taken = panel_rows(a.taken) * CHUNK * LANES, rows = panel_rows(places) * CHUNK * LANES;
        Buffers b;
        b.active = space.take<float>(taken);
        b.inner = space.take<float>(taken);
        b.attention = space.take<float>(rows + 2 * LANES) + LANES;
        b.outer = space.take<float>(rows);
        b.output = space.take<float>((CHUNK * (a.channels / a.groups) + 2) * LANES) + LANES;
        b.spans.lay_out(space, frame.f);
        b.weight = space.take<float>(places * a.taken);
        return b;
    }

    int64_t buffer_size() const {
        Workspace space;
        take_buffers(space);
        return static_cast<int64_t>(space.used() / sizeof(float));
    }

    void lay_out(Workspace &space) {
        frame.lay_out(space);
        value = frame.take_bordered(space, a.channels);
        panels = space.take<float>(frame.threads * buffer_size());
        for (int64_t p = 0; p < cut.parts; p++) hidden[p] = space.take<float>(frame.f.batch * a.taken * size);
        sums[0] = {{}, a.weight_gradient, a.bias_gradient};
        for (int64_t s = 0; s < cut.slices; s++) {
            if (s) {
                sums[s].weight = space.take<float>(a.groups * places * a.taken);
                sums[s].bias = space.take<float>(a.groups * places);
            }
            sums[s].value.lay_out(space, Slice(frame.f, s, cut.slices), a.channels);
        }
    }

    void run() const {
        Tasks items(cut.items(), frame.threads);
#pragma omp parallel num_threads(frame.threads)
        {
            frame.fill(a.value, a.channels, value);
            items.each([&](int64_t i) { backward(cut.part(i), cut.slice(i)); });
#pragma omp barrier
            Scatter values[MAX_SLICES];
            for (int64_t s = 0; s < cut.slices; s++) values[s] = sums[s].value;
            collect(frame, values, cut.slices, a.channels, a.value_gradient);
#pragma omp for schedule(static)
            for (int64_t r = 0; r < a.groups * places; r++)
                for (int64_t s = 1; s < cut.slices; s++) {
                    add(a.weight_gradient + r * a.taken, sums[s].weight + r * a.taken, a.taken);
                    a.bias_gradient[r] += sums[s].bias[r];
                }
#pragma omp for schedule(static)
            for (int64_t c = 0; c < a.taken; c++) hidden_backward(c);
        }
    }

    void backward(int64_t part, int64_t index) const {
        Slice slice(frame.f, index, cut.slices);
        int64_t start = part_start(a.groups, part, cut.parts), stop = part_start(a.groups, part + 1, cut.parts);
        for (int64_t g = start; g < stop; g++) clear(g, slice, index);
        Workspace space(panels + thread_number() * buffer_size());
        Buffers buffers = take_buffers(space);
        Tile tiles[CHUNK];
        int64_t chunks = Chunk::number(slice.tile_stop - slice.tile, CHUNK);
        for (int64_t i = 0; i < chunks; i++) {
            Chunk chunk(slice.tile, slice.tile_stop, i, chunks);
            construct(frame.f, chunk, tiles);
            activate(tiles, chunk.count, buffers.active);
            for (int64_t g = start; g < stop; g++)
                group_backward(g, g == start, tiles, chunk.count, buffers, sums[index], slice);
            store_panel(tiles, chunk.count, buffers.inner, a.taken, size, hidden[part]);
        }
    }

    void clear(int64_t g, const Slice &slice, int64_t index) const {
        for (int64_t c = g; c < a.channels; c += a.groups) sums[index].value.clear(slice, c);
        if (index == 0) return;
        memset(sums[index].weight + g * places * a.taken, 0, places * a.taken * sizeof(float));
        memset(sums[index].bias + g * places, 0, places * sizeof(float));
    }

    void group_backward(int64_t g, bool first, const Tile *tiles, int64_t count, Buffers &b, const OutputSums &to,
                        const Slice &slice) const {
        int64_t stride = count * LANES, row = g * places;
        weigh(g, b.active, count, b.attention);
        aggregation_backward(g, tiles, count, b, to, slice);
        outer(b.outer, stride, places, b.active, stride, a.taken, count, to.weight + row * a.taken, a.taken, false);
        for (int64_t j = 0; j < places; j++) to.bias[row + j] += row_sum(b.outer + j * stride, count);
        transpose(a.weight + row * a.taken, a.taken, places, a.taken, b.weight);
        Product back{b.weight, places, nullptr, a.taken, places, first ? ZERO : ADD, PLAIN};
        product(back, b.outer, stride, b.inner, stride, count);
    }

    // From the output's gradients to those of the group's weights and values.
    void aggregation_backward(int64_t g, const Tile *tiles, int64_t count, Buffers &b, const OutputSums &to,
                              const Slice &slice) const {
        Aggregation step = aggregation();
        int64_t share = a.channels / a.groups, stride = count * LANES, plane = Scatter::stride(slice);
        for (int64_t m = 0; m < share; m++)
            for (int64_t t = 0; t < count; t++)
                store(b.output + m * stride + t * LANES,
                      at_outputs(tiles[t], a.gradient + (m * a.groups + g) * size, a.channels * size));
        for (int64_t t = 0; t < count; t++)
            SAN_BY_SEGMENTS(tiles[t], step.weight_gradients, tiles[t], g, b.output + t * LANES, stride,
                            b.outer + t * LANES, stride);
        float *sums = to.value.start + g * plane;
        for (int64_t m = 0; m < share; m += m + 4 <= share ? 4 : 1)
            give_back(frame, b.spans, slice, tiles, count, share - m, b.attention, b.output + m * stride,
                      sums + m * a.groups * plane, a.groups * plane);
    }

    // Adds the parts' gradients up and takes them through ReLU, scale and shift.
    void hidden_backward(int64_t c) const {
        float scale = a.scale[c], shift = a.shift[c], slope = 0, sum = 0;
        for (int64_t image = 0; image < frame.f.batch; image++) {
            int64_t at = (image * a.taken + c) * size;
            Vector slopes{}, sums{};
            int64_t i = 0;
            for (; i + LANES <= size; i += LANES) {
                Vector x = load(a.hidden + at + i), total = load(hidden[0] + at + i);
                for (int64_t p = 1; p < cut.parts; p++) total += load(hidden[p] + at + i);
                total = passed(total, x * scale + shift);
                slopes += total * x;
                sums += total;
                store(a.hidden_gradient + at + i, total * scale);
            }
            slope += lane_sum(slopes);
            sum += lane_sum(sums);
            for (; i < size; i++) {
                float x = a.hidden[at + i], total = hidden[0][at + i];
                for (int64_t p = 1; p < cut.parts; p++) total += hidden[p][at + i];
                total = x * scale + shift <= 0 ? 0 : total;
                slope += total * x;
                sum += total;
                a.hidden_gradient[at + i] = total * scale;
            }
        }
        a.scale_gradient[c] = slope;
        a.shift_gradient[c] = sum;
    }
};

int output_forward(const OutputArguments &a) {
    if (!a.fits()) return WRONG_SIZES;
    OutputForward work(a);
    return run_in_block(work);
}

int output_backward(const OutputArguments &a) {
    if (!a.fits()) return WRONG_SIZES;
    OutputBackward work(a);
    return run_in_block(work);
}

struct MomentsArguments {
    Geometry geometry;
    int64_t query_channels, key_channels;  // R; R, or 0 for moments of a map
    const float *query, *key;
    double *mean, *deviation;
    const double *slope, *intercept;
    float *query_gradient, *key_gradient;  // to which the backward adds

    bool fits() const {
        return geometry.fits(query_channels, 1) && (key_channels == 0 || key_channels == query_channels);
    }
};

// Sum and squares of x − pilot, in four chains, because a sum waits for the one before.
inline void observe_run(const float *from, int64_t count, int64_t stride, double pilot, double &sum, double &squares) {
    double sums[4] = {}, products[4] = {};
    for (int64_t i = 0; i < count; i += 4)
#pragma GCC unroll 4
        for (int64_t k = 0; k < 4; k++) {
            double x = i + k < count ? from[(i + k) * stride] - pilot : 0;
            sums[k] += x;
            products[k] += x * x;
        }
    sum += (sums[0] + sums[1]) + (sums[2] + sums[3]);
    squares += (products[0] + products[1]) + (products[2] + products[3]);
}

// A place's samples are the bordered key seen through a window that every place shifts, so sums over windows give the
// moments of all places for little more than one look at the map. They are taken around a pilot, in double precision.
struct Moments {
    const MomentsArguments &a;
    Frame frame;
    int64_t width;
    double *rows = nullptr;  // of one channel and thread: sum and squares of every bordered row and place of a row
    float *key = nullptr;

    explicit Moments(const MomentsArguments &a)
        : a(a), frame(a.geometry), width(a.query_channels + a.key_channels * frame.f.places) {}

    int64_t rows_size() const { return frame.f.bordered_height * frame.f.kernel * 2; }

    void lay_out(Workspace &space) {
        frame.lay_out(space);
        rows = space.take<double>(frame.threads * rows_size());
        key = frame.take_bordered(space, a.key_channels);
    }

    void run() const {
#pragma omp parallel num_threads(frame.threads)
        {
            frame.fill(a.key, a.key_channels, key);
#pragma omp for schedule(dynamic, 1)
            for (int64_t c = 0; c < a.query_channels; c++) {
                observe_queries(c);
                if (c < a.key_channels) observe_keys(c, rows + thread_number() * rows_size());
            }
        }
    }

    void conclude(int64_t row, double pilot, double sum, double squares) const {
        double count = static_cast<double>(frame.f.pixels), deviation = squares - sum * sum / count;
        a.mean[row] = pilot + sum / count;
        a.deviation[row] = deviation < 0 ? 0 : deviation;
    }

    void observe_queries(int64_t c) const {
        const Footprint &f = frame.f;
        double pilot = a.query[c * f.height * f.width], sum = 0, squares = 0;
        for (int64_t image = 0; image < f.batch; image++)
            for (int64_t y = 0; y < f.rows; y++) {
                const float *row = a.query + ((image * a.query_channels + c) * f.height + y * f.stride) * f.width;
                observe_run(row, f.columns, f.stride, pilot, sum, squares);
            }
        conclude(c, pilot, sum, squares);
    }

    void observe_keys(int64_t c, double *row_sums) const {
        const Footprint &f = frame.f;
        const float *plane = key + c * f.plane;
        double pilot = plane_mean(plane);
        double *mean = a.mean + a.query_channels + c * f.places;
        double *deviation = a.deviation + a.query_channels + c * f.places;
        for (int64_t j = 0; j < f.places; j++) mean[j] = deviation[j] = 0;
        for (int64_t image = 0; image < f.batch; image++) {
            for (int64_t y = 0; y < f.bordered_height; y++)
                observe_row(plane + (image * f.bordered_height + y) * f.bordered_width, pilot,
                            row_sums + y * f.kernel * 2);
            for (int64_t i = 0; i < f.kernel; i++)
                for (int64_t y = 0; y < f.rows; y++) {
                    const double *from = row_sums + (i * f.dilation + y * f.stride) * f.kernel * 2;
                    for (int64_t k = 0; k < f.kernel; k++) {
                        mean[i * f.kernel + k] += from[2 * k];
                        deviation[i * f.kernel + k] += from[2 * k + 1];
                    }
                }
        }
        for (int64_t j = 0; j < f.places; j++)
            conclude(a.query_channels + c * f.places + j, pilot, mean[j], deviation[j]);
    }

    // Of the first image: near enough to every window's mean, whatever a few pixels hold.
    double plane_mean(const float *plane) const {
        const Footprint &f = frame.f;
        double sum = 0, squares = 0;
        for (int64_t y = 0; y < f.bordered_height; y++)
            observe_run(plane + y * f.bordered_width, f.bordered_width, 1, 0, sum, squares);
        return sum / (f.bordered_height * f.bordered_width);
    }

    // Sum and squares of one bordered row through the windows of its k places.
    void observe_row(const float *row, double pilot, double *out) const {
        const Footprint &f = frame.f;
        for (int64_t k = 0; k < f.kernel; k++) {
            const float *from = row + k * f.dilation;
            double sum = 0, squares = 0;
            if (k == 0 || f.stride > 1 || f.columns <= 2 * f.dilation) {
                observe_run(from, f.columns, f.stride, pilot, sum, squares);
            } else {
                // The window before, less what it leaves behind, and what comes in.
                sum = out[2 * k - 2];
                squares = out[2 * k - 1];
                for (int64_t x = -f.dilation; x < 0; x++) {
                    double gone = from[x] - pilot, come = from[x + f.columns] - pilot;
                    sum += come - gone;
                    squares += come * come - gone * gone;
                }
            }
            out[2 * k] = sum;
            out[2 * k + 1] = squares;
        }
    }
};

// Every sample x of row d has the gradient slope_d x + intercept_d; a key is a sample of all places that see it.
struct MomentsBackward {
    const MomentsArguments &a;
    Frame frame;
    float *key = nullptr;
    double *lines = nullptr;
    Scatter sums;

    explicit MomentsBackward(const MomentsArguments &a) : a(a), frame(a.geometry) {}

    int64_t lines_size() const { return 2 * frame.f.bordered_width; }

    void lay_out(Workspace &space) {
        frame.lay_out(space);
        key = frame.take_bordered(space, a.key_channels);
        lines = space.take<double>(frame.threads * lines_size());
        sums.lay_out(space, Slice(frame.f, 0, 1), a.key_channels);
    }

    void run() const {
#pragma omp parallel num_threads(frame.threads)
        {
            frame.fill(a.key, a.key_channels, key);
#pragma omp for schedule(dynamic, 1)
            for (int64_t c = 0; c < a.query_channels; c++) {
                query_backward(c);
                if (c < a.key_channels) key_backward(c, lines + thread_number() * lines_size());
            }
            collect(frame, &sums, 1, a.key_channels, a.key_gradient);
        }
    }

    void query_backward(int64_t c) const {
        const Footprint &f = frame.f;
        for (int64_t image = 0; image < f.batch; image++)
            for (int64_t y = 0; y < f.rows; y++) {
                int64_t at = ((image * a.query_channels + c) * f.height + y * f.stride) * f.width;
                for (int64_t x = 0; x < f.columns; x++)
                    a.query_gradient[at + x * f.stride] +=
                        static_cast<float>(a.slope[c] * a.query[at + x * f.stride] + a.intercept[c]);
            }
    }

    void key_backward(int64_t c, double *slope) const {
        const Footprint &f = frame.f;
        double *intercept = slope + f.bordered_width;
        const Slice slice(f, 0, 1);
        for (int64_t y = 0; y < f.bordered_height; y++) {
            sum_places(c, y, slope, intercept);
            for (int64_t image = 0; image < f.batch; image++) {
                int64_t at = (image * f.bordered_height + y) * f.bordered_width;
                const float *from = key + c * f.plane + at;
                float *to = sums.start + c * Scatter::stride(slice) + at;
                for (int64_t x = 0; x < f.bordered_width; x++)
                    to[x] = static_cast<float>(slope[x] * from[x] + intercept[x]);
            }
        }
    }

    // Sums of slope and intercept over the places that see each column of bordered row y.
    void sum_places(int64_t c, int64_t y, double *slope, double *intercept) const {
        const Footprint &f = frame.f;
        memset(slope, 0, lines_size() * sizeof(double));
        for (int64_t k = 0; k < f.kernel; k++) {
            double of_slope = 0, of_intercept = 0;
            for (int64_t i = 0; i < f.kernel; i++) {
                int64_t row = y - i * f.dilation, d = a.query_channels + c * f.places + i * f.kernel + k;
                if (row < 0 || row % f.stride || row / f.stride >= f.rows) continue;
                of_slope += a.slope[d];
                of_intercept += a.intercept[d];
            }
            for (int64_t x = 0; x < f.columns; x++) {
                slope[k * f.dilation + x * f.stride] += of_slope;
                intercept[k * f.dilation + x * f.stride] += of_intercept;
            }
        }
    }
};

int moments(const MomentsArguments &a) {
    if (!a.fits()) return WRONG_SIZES;
    Moments work(a);
    return run_in_block(work);
}

int moments_backward(const MomentsArguments &a) {
    if (!a.fits()) return WRONG_SIZES;
    MomentsBackward work(a);
    return run_in_block(work);
}

struct StarArguments {
    Geometry geometry;
    int64_t relation_channels;
    const float *query, *key;
    float *relations;  // [B][K][P]
    const float *gradient;
    float *query_gradient, *key_gradient;

    bool fits() const { return geometry.fits(relation_channels, 1); }
};

// δ_j = φᵀψ_j, so narrow that it is kept as a map.
struct Star {
    const StarArguments &a;
    Frame frame;
    bool gradients;
    float *key = nullptr, *panels = nullptr;
    Scatter sums;

    Star(const StarArguments &a, bool gradients) : a(a), frame(a.geometry), gradients(gradients) {}

    int64_t size() const { return frame.f.rows * frame.f.columns; }
    int64_t panel_size() const { return frame.f.places * (gradients ? frame.f.tiles() : 1) * LANES; }

    void lay_out(Workspace &space) {
        frame.lay_out(space);
        key = frame.take_bordered(space, a.relation_channels);
        panels = space.take<float>((gradients ? 1 : frame.threads) * panel_size());
        if (gradients) sums.lay_out(space, Slice(frame.f, 0, 1), a.relation_channels);
    }

    void run() const {
#pragma omp parallel num_threads(frame.threads)
        {
            frame.fill(a.key, a.relation_channels, key);
#pragma omp for schedule(dynamic, 2)
            for (int64_t t = 0; t < frame.f.tiles(); t++) {
                Tile tile(frame.f, t);
                if (gradients) load_panel(&tile, 1, a.gradient, frame.f.places, size(), gradient(t));
                else SAN_BY_SEGMENTS(tile, forward, tile, panels + thread_number() * panel_size());
            }
            if (gradients) backward();
        }
    }

    float *gradient(int64_t tile) const { return panels + tile * frame.f.places * LANES; }

    Vector query(const Tile &tile, int64_t channel) const {
        int64_t map = frame.f.height * frame.f.width;
        return at_centres(tile, a.query + channel * map, a.relation_channels * map);
    }

    template <int SEGMENTS>
    void forward(const Tile &tile, float *panel) const {
        memset(panel, 0, panel_size() * sizeof(float));
        for (int64_t c = 0; c < a.relation_channels; c++) {
            Vector q = query(tile, c);
            for (int64_t j = 0; j < frame.f.places; j++) {
                Vector k = gathered<SEGMENTS>(tile, key + c * frame.f.plane + frame.offset[j]);
                store(panel + j * LANES, load(panel + j * LANES) + q * k);
            }
        }
        store_panel(&tile, 1, panel, frame.f.places, size(), a.relations);
    }

    // A channel at a time; all threads of a team call it.
    void backward() const {
        const Slice slice(frame.f, 0, 1);
#pragma omp for schedule(dynamic, 1)
        for (int64_t c = 0; c < a.relation_channels; c++) {
            sums.clear(slice, c);
            for (int64_t t = 0; t < frame.f.tiles(); t++) {
                Tile tile(frame.f, t);
                SAN_BY_SEGMENTS(tile, tile_backward, tile, c, gradient(t), sums.start + c * Scatter::stride(slice));
            }
        }
        collect(frame, &sums, 1, a.relation_channels, a.key_gradient);
    }

    template <int SEGMENTS>
    void tile_backward(const Tile &tile, int64_t c, const float *gradient, float *to) const {
        int64_t map = frame.f.height * frame.f.width;
        Vector q = query(tile, c), sum{};
        for (int64_t j = 0; j < frame.f.places; j++) {
            Vector x = load(gradient + j * LANES);
            sum += x * gathered<SEGMENTS>(tile, key + c * frame.f.plane + frame.offset[j]);
            scattered<SEGMENTS>(tile, to + frame.offset[j], x * q);
        }
        set_centres(tile, a.query_gradient + c * map, a.relation_channels * map, sum);
    }
};

int star_forward(const StarArguments &a) {
    if (!a.fits()) return WRONG_SIZES;
    Star work(a, false);
    return run_in_block(work);
}

int star_backward(const StarArguments &a) {
    if (!a.fits()) return WRONG_SIZES;
    Star work(a, true);
    return run_in_block(work);
}

}  // namespace

SAN_KERNEL(patchwise_hidden, HiddenArguments, hidden_forward)
SAN_KERNEL(patchwise_hidden_backward, HiddenArguments, hidden_backward)
SAN_KERNEL(patchwise_output, OutputArguments, output_forward)
SAN_KERNEL(patchwise_output_backward, OutputArguments, output_backward)
SAN_KERNEL(patchwise_moments, MomentsArguments, moments)
SAN_KERNEL(patchwise_moments_backward, MomentsArguments, moments_backward)
SAN_KERNEL(patchwise_star, StarArguments, star_forward)
SAN_KERNEL(patchwise_star_backward, StarArguments, star_backward)
