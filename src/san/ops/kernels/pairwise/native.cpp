// Pairwise attention on the CPU, fused: relation, γ, softmax and aggregation of a tile, nothing per pair in memory.
//
// Every row d of δ has one form, relu((right_d − minus_d) · factor_d + shift_d): minus and factor are vectors of a tile,
// right is a bordered map; so a difference is taken before it is scaled. BatchNorm arrives folded: into `scale` and
// `shift` of δ, and into the weights and biases of γ's layers. Backward recomputes a tile, so nothing is kept but the
// maps. Legend: D δ's width, R relation width, G weight groups.

#include "../native/attention.h"
#include "../native/frame.h"
#include "../native/product.h"

namespace {

constexpr int64_t MAX_LAYERS = 4;

struct Arguments {
    int64_t threads, batch, height, width, kernel, stride, dilation, zeros;
    int64_t relation, position_kind, relation_channels, value_channels, groups, layers;
    const float *query, *key, *value, *position, *scale, *shift;
    int64_t widths[MAX_LAYERS + 1];  // channels between γ's layers, δ's first
    const float *weight[MAX_LAYERS], *bias[MAX_LAYERS];
    // forward: output. backward: what follows it, gradients of everything, to which a call adds.
    float *output;
    const float *gradient;
    float *query_gradient, *key_gradient, *value_gradient, *position_gradient, *scale_gradient, *shift_gradient;
    float *weight_gradient[MAX_LAYERS], *bias_gradient[MAX_LAYERS];
    // moments and their backward: mean [D], deviations [D] or co-deviations [D][D], in double precision.
    double *mean, *deviation;
    const float *slope, *intercept;
};

enum Relation { SUBTRACTION, SUMMATION, HADAMARD, CONCATENATION, DOT };
enum Position { NO_POSITION, RELATIVE, ABSOLUTE };
// How a row of δ uses its left (centre) and right (place) channel.
enum Kind { DIFFERENCE, SUM, MULTIPLE, LEFT, RIGHT, INNER };

struct Row {
    Kind kind;
    int64_t left, right;  // channels: those of position follow the R of query and key
};

constexpr int64_t CHUNK = 6;  // places that go through γ at a time in forward

// One call: its shape, its bordered maps, and the rows of δ.
struct Problem {
    const Arguments &a;
    Footprint f;
    int64_t position_channels, key_channels, width;
    int64_t *offset = nullptr, *columns = nullptr;
    Row *rows = nullptr;
    float *key = nullptr, *value = nullptr;
    float *transposed[MAX_LAYERS] = {};

    explicit Problem(const Arguments &a)
        : a(a), f(a.batch, a.height, a.width, a.kernel, a.stride, a.dilation, a.zeros) {
        position_channels = a.position_kind == NO_POSITION ? 0 : 2;
        key_channels = a.relation_channels + position_channels;
        width = a.widths[0];
        f.interleave(channels());
    }

    // Of a bordered map: those of key, then position, then value.
    int64_t channels() const { return key_channels + (a.value ? a.value_channels : 0); }

    void lay_out(Workspace &space, bool backward) {
        offset = space.take<int64_t>(f.places);
        columns = space.take<int64_t>(f.bordered_width);
        rows = space.take<Row>(width);
        key = space.take<float>(f.bordered_size(channels())) + LANES;
        value = key + key_channels * f.plane;
        for (int64_t n = 0; backward && n < a.layers; n++)
            transposed[n] = space.take<float>(a.widths[n] * a.widths[n + 1]);
    }

    void prepare(bool backward) {
        place_offsets(f, offset);
        source_columns(f, columns);
        describe_rows();
        for (int64_t n = 0; backward && n < a.layers; n++)
            for (int64_t o = 0; o < a.widths[n + 1]; o++)
                for (int64_t d = 0; d < a.widths[n]; d++)
                    transposed[n][d * a.widths[n + 1] + o] = a.weight[n][o * a.widths[n] + d];
    }

    void describe_rows() {
        int64_t d = 0, width = a.relation_channels;
        if (a.relation == DOT) rows[d++] = {INNER, 0, 0};
        else if (a.relation == CONCATENATION) {
            for (int64_t c = 0; c < width; c++) rows[d++] = {LEFT, c, 0};
            for (int64_t c = 0; c < width; c++) rows[d++] = {RIGHT, 0, c};
        } else {
            Kind kind = a.relation == SUBTRACTION ? DIFFERENCE : a.relation == SUMMATION ? SUM : MULTIPLE;
            for (int64_t c = 0; c < width; c++) rows[d++] = {kind, c, c};
        }
        for (int64_t c = width; c < key_channels && a.position_kind == RELATIVE; c++) rows[d++] = {DIFFERENCE, c, c};
        for (int64_t c = width; c < key_channels && a.position_kind == ABSOLUTE; c++) rows[d++] = {LEFT, c, 0};
        for (int64_t c = width; c < key_channels && a.position_kind == ABSOLUTE; c++) rows[d++] = {RIGHT, 0, c};
    }

    // Fills the bordered maps, a plane at a time; all threads of a team call it.
    void fill() const {
        int64_t size = f.height * f.width;
#pragma omp for schedule(static)
        for (int64_t each = 0; each < channels() * f.batch; each++) {
            int64_t image = each / channels(), c = each % channels();
            const float *from;
            if (c < a.relation_channels) from = a.key + (image * a.relation_channels + c) * size;
            else if (c < key_channels) from = a.position + (c - a.relation_channels) * size;
            else from = a.value + (image * a.value_channels + c - key_channels) * size;
            border(f, from, columns, key + c * f.plane + image * f.bordered_height * f.row);
        }
    }

    Vector left(const Tile &tile, int64_t channel) const {
        int64_t size = f.height * f.width;
        if (channel < a.relation_channels)
            return at_centres(tile, a.query + channel * size, a.relation_channels * size);
        return at_centres(tile, a.position + (channel - a.relation_channels) * size, 0);
    }
};

// Buffers of one thread, and what it does with one tile.
struct Worker {
    const Problem &p;
    const Arguments &a;
    int64_t chunk, widest;
    float *centre = nullptr;               // query, then position, at the tile's centres
    float *minus = nullptr, *factor = nullptr;
    float *sum = nullptr, *factor_sum = nullptr;
    float *panel[MAX_LAYERS + 1] = {};     // what enters each layer of γ
    float *scores = nullptr, *score_gradient = nullptr;
    float *between = nullptr;              // a gradient between two layers
    float *query = nullptr;                // gradients of query and position at the centres
    float *inner = nullptr;
    float *output = nullptr;               // the output's gradient

    Worker(const Problem &p, bool whole) : p(p), a(p.a), chunk(whole ? p.f.places : smaller(CHUNK, p.f.places)) {
        widest = p.width;
        for (int64_t n = 1; n <= a.layers; n++) widest = larger(widest, a.widths[n]);
    }

    void lay_out(Workspace &space, bool backward) {
        centre = space.take<float>(p.key_channels * LANES);
        minus = space.take<float>(p.width * LANES);
        factor = space.take<float>(p.width * LANES);
        inner = space.take<float>(chunk * LANES);
        for (int64_t n = 0; n < larger(a.layers, 1); n++)
            panel[n] = space.take<float>(panel_rows(backward ? widest : a.widths[n]) * chunk * LANES);
        if (!a.value) return lay_out_gradients(space, backward);
        scores = space.take<float>(a.groups * p.f.places * LANES);
        if (backward) score_gradient = space.take<float>(panel_rows(a.groups) * p.f.places * LANES);
        lay_out_gradients(space, backward);
    }

    void lay_out_gradients(Workspace &space, bool backward) {
        if (!backward) return;
        between = space.take<float>(panel_rows(widest) * chunk * LANES);
        query = space.take<float>(p.key_channels * LANES);
        output = space.take<float>(a.value_channels * LANES);
        sum = space.take<float>(p.width * LANES);
        factor_sum = space.take<float>(p.width * LANES);
    }

    void start(const Tile &tile) {
        for (int64_t c = 0; c < p.key_channels; c++) store(centre + c * LANES, p.left(tile, c));
        for (int64_t d = 0; d < p.width; d++) {
            Row row = p.rows[d];
            float s = a.scale ? a.scale[d] : 1.0f;
            Vector x = load(centre + row.left * LANES);
            bool alone = row.kind == RIGHT || row.kind == INNER || row.kind == MULTIPLE;
            store(minus + d * LANES, alone ? Vector{} : row.kind == DIFFERENCE ? x : -x);
            store(factor + d * LANES, row.kind == MULTIPLE ? x * s : broadcast(row.kind == DIFFERENCE ? -s : s));
        }
    }

    template <int SEGMENTS>
    void inner_products(const Tile &tile, int64_t first, int64_t count) {
        for (int64_t j = 0; j < count; j++) {
            Vector sum{};
            for (int64_t c = 0; c < a.relation_channels; c++)
                sum += load(centre + c * LANES) * gathered<SEGMENTS>(tile, p.key + c * p.f.plane + p.offset[first + j]);
            store(inner + j * LANES, sum);
        }
    }

    // scale · δ + shift of places [first, first + count), rectified or not, into the first panel.
    template <int SEGMENTS>
    void relate(const Tile &tile, int64_t first, int64_t count, bool rectify) {
        if (a.relation == DOT) inner_products<SEGMENTS>(tile, first, count);
        for (int64_t d = 0; d < p.width; d++) {
            Vector m = load(minus + d * LANES), k = load(factor + d * LANES);
            Vector t = broadcast(a.shift ? a.shift[d] : 0.0f);
            const float *plane = p.key + p.rows[d].right * p.f.plane;
            float *out = panel[0] + d * chunk * LANES;
            for (int64_t j = 0; j < count; j++) {
                Vector x = (right<SEGMENTS>(tile, d, plane, first + j, j) - m) * k + t;
                store(out + j * LANES, rectify ? rectified(x) : x);
            }
        }
    }

    template <int SEGMENTS>
    Vector right(const Tile &tile, int64_t d, const float *plane, int64_t place, int64_t j) const {
        if (p.rows[d].kind == LEFT) return Vector{};
        if (p.rows[d].kind == INNER) return load(inner + j * LANES);
        return gathered<SEGMENTS>(tile, plane + p.offset[place]);
    }

    Product layer(int64_t n, bool last) const {
        Start start = a.bias[n] ? BIAS : ZERO;
        return {a.weight[n], a.widths[n], a.bias[n], a.widths[n + 1], a.widths[n], start, last ? PLAIN : RELU};
    }

    // γ up to its last layer's input; the scores too when there is a value to aggregate.
    void map(int64_t first, int64_t count) {
        for (int64_t n = 0; n + 1 < a.layers; n++)
            product(layer(n, false), panel[n], chunk * LANES, panel[n + 1], chunk * LANES, count);
        if (!a.value) return;
        float *out = scores + first * LANES;
        int64_t stride = p.f.places * LANES, n = a.layers - 1;
        if (a.layers) product(layer(n, true), panel[n], chunk * LANES, out, stride, count);
        for (int64_t g = 0; !a.layers && g < a.groups; g++)
            memcpy(out + g * stride, panel[0] + g * chunk * LANES, count * VECTOR_BYTES);
    }

    template <int SEGMENTS>
    void recompute(const Tile &tile) {
        start(tile);
        for (int64_t first = 0; first < p.f.places; first += chunk) {
            int64_t count = smaller(chunk, p.f.places - first);
            relate<SEGMENTS>(tile, first, count, a.layers > 0);
            map(first, count);
        }
    }

    template <int SEGMENTS>
    void forward(const Tile &tile) {
        recompute<SEGMENTS>(tile);
        softmax(scores, a.groups, p.f.places);
        Aggregation{p.f, p.offset, p.value, a.value_channels, a.groups}.forward<SEGMENTS>(tile, scores, a.output);
    }

    // The gradient that enters a layer of γ, from that of its output; adds to the layer's own gradients.
    void layer_backward(int64_t n, const float *out, float *in, float *weight_gradient, float *bias_gradient) {
        int64_t stride = p.f.places * LANES, taken = a.widths[n], given = a.widths[n + 1];
        outer(out, stride, given, panel[n], stride, taken, p.f.places, weight_gradient, taken, false);
        for (int64_t o = 0; o < given; o++) {
            Vector sum{};
            for (int64_t j = 0; j < p.f.places; j++) sum += load(out + o * stride + j * LANES);
            bias_gradient[o] += lane_sum(sum);
        }
        Product back{p.transposed[n], given, nullptr, taken, given, ZERO, PLAIN};
        product(back, out, stride, in, stride, p.f.places);
        pass_rectifier(n, in);
    }

    void pass_rectifier(int64_t n, float *gradient) {
        for (int64_t i = 0; i < a.widths[n] * p.f.places; i++)
            store(gradient + i * LANES, passed(load(gradient + i * LANES), load(panel[n] + i * LANES)));
    }

    void softmax_backward() {
        for (int64_t g = 0; g < a.groups; g++) {
            float *weight = scores + g * p.f.places * LANES, *gradient = score_gradient + g * p.f.places * LANES;
            Vector sum{};
            for (int64_t j = 0; j < p.f.places; j++) sum += load(weight + j * LANES) * load(gradient + j * LANES);
            for (int64_t j = 0; j < p.f.places; j++)
                store(gradient + j * LANES, load(weight + j * LANES) * (load(gradient + j * LANES) - sum));
        }
    }
};

// Sums of one slice: bordered gradients of key, position and value, and those of all parameters.
struct Sums {
    const Problem *p;
    Slice slice;
    float *key = nullptr, *value = nullptr, *scale = nullptr, *shift = nullptr;
    float *weight[MAX_LAYERS] = {}, *bias[MAX_LAYERS] = {};

    Sums(const Problem &p, int64_t index, int64_t slices) : p(&p), slice(p.f, index, slices) {}

    void lay_out(Workspace &space) {
        const Arguments &a = p->a;
        key = space.take<float>(slice.size(p->f, p->channels())) + LANES;
        value = key + p->key_channels * p->f.plane;
        scale = space.take<float>(p->width);
        shift = space.take<float>(p->width);
        for (int64_t n = 0; n < a.layers; n++) {
            weight[n] = space.take<float>(a.widths[n] * a.widths[n + 1]);
            bias[n] = space.take<float>(a.widths[n + 1]);
        }
    }
};

// From the gradient of scale · δ + shift, a panel, to those of scale, shift, query, key and position.
template <int SEGMENTS>
void relation_backward(Worker &w, const Tile &tile, const Tile &target, const float *gradient, Sums &sums) {
    const Problem &p = w.p;
    int64_t stride = p.f.places * LANES;
    for (int64_t d = 0; d < p.width; d++) {
        const float *from = p.key + p.rows[d].right * p.f.plane;
        Vector sum{}, factor{}, minus = load(w.minus + d * LANES);
        for (int64_t j = 0; j < p.f.places; j++) {
            Vector x = load(gradient + d * stride + j * LANES);
            sum += x;
            factor += x * (w.right<SEGMENTS>(tile, d, from, j, j) - minus);
        }
        store(w.sum + d * LANES, sum);
        store(w.factor_sum + d * LANES, factor);
    }
    // Channels are the inner loop for the reason that Aggregation::backward gives.
    for (int64_t j = 0; j < p.f.places; j++)
        for (int64_t d = 0; d < p.width; d++)
            if (p.rows[d].kind != LEFT && p.rows[d].kind != INNER)
                scattered<SEGMENTS>(target, sums.key + p.rows[d].right * sums.slice.plane + p.offset[j],
                                    load(gradient + d * stride + j * LANES) * load(w.factor + d * LANES));
}

// δ = φᵀψ: its gradient reaches every channel of query and key.
template <int SEGMENTS>
void inner_backward(Worker &w, const Tile &tile, const Tile &target, const float *gradient, Sums &sums) {
    const Problem &p = w.p;
    Vector k = load(w.factor);
    for (int64_t c = 0; c < p.a.relation_channels; c++) {
        Vector q = load(w.centre + c * LANES), sum{};
        for (int64_t j = 0; j < p.f.places; j++) {
            Vector x = load(gradient + j * LANES) * k;
            sum += x * gathered<SEGMENTS>(tile, p.key + c * p.f.plane + p.offset[j]);
            scattered<SEGMENTS>(target, sums.key + c * sums.slice.plane + p.offset[j], x * q);
        }
        store(w.query + c * LANES, load(w.query + c * LANES) + sum);
    }
}

// Per-tile sums become gradients of query and position at the centres, and of scale and shift.
template <int SEGMENTS>
void centre_backward(Worker &w, const Tile &tile, const Tile &target, const float *gradient, Sums &sums) {
    const Problem &p = w.p;
    const Arguments &a = p.a;
    memset(w.query, 0, p.key_channels * VECTOR_BYTES);
    for (int64_t d = 0; d < p.width; d++) {
        Row row = p.rows[d];
        float s = a.scale ? a.scale[d] : 1.0f;
        Vector sum = load(w.sum + d * LANES), factor = load(w.factor_sum + d * LANES);
        Vector x = load(w.centre + row.left * LANES);
        Vector slope = row.kind == DIFFERENCE ? -factor : row.kind == MULTIPLE ? x * factor : factor;
        sums.scale[d] += lane_sum(slope);
        sums.shift[d] += lane_sum(sum);
        if (row.kind == RIGHT || row.kind == INNER) continue;
        float *q = w.query + row.left * LANES;
        store(q, load(q) + (row.kind == MULTIPLE ? factor : sum) * s);
    }
    if (a.relation == DOT) inner_backward<SEGMENTS>(w, tile, target, gradient, sums);
    int64_t size = p.f.height * p.f.width;
    for (int64_t c = 0; c < p.key_channels; c++) {
        bool position = c >= a.relation_channels;
        float *to = position ? a.position_gradient + (c - a.relation_channels) * size : a.query_gradient + c * size;
        int64_t stride = (position ? 2 : a.relation_channels) * size;
        set_centres(tile, to, stride, at_centres(tile, to, stride) + load(w.query + c * LANES));
    }
}

// Back through layers n, n - 1, …, 0 of γ; gives the gradient of the first panel. Gradients go by turns to a buffer of
// their own and to the panel of the layer before, which nothing needs any more.
const float *chain_backward(Worker &w, int64_t n, const float *gradient, Sums &sums) {
    for (; n >= 0; n--) {
        float *in = gradient == w.between ? w.panel[n + 1] : w.between;
        w.layer_backward(n, gradient, in, sums.weight[n], sums.bias[n]);
        gradient = in;
    }
    return gradient;
}

template <int SEGMENTS>
void tile_backward(Worker &w, const Tile &tile, Sums &sums) {
    const Problem &p = w.p;
    const Arguments &a = p.a;
    Tile target = within(tile, sums.slice.shift(p.f));
    w.recompute<SEGMENTS>(tile);
    softmax(w.scores, a.groups, p.f.places);
    Aggregation{p.f, p.offset, p.value, a.value_channels, a.groups}.backward<SEGMENTS>(
        tile, target, w.scores, a.gradient, w.output, sums.slice.plane, sums.value, w.score_gradient);
    w.softmax_backward();
    const float *gradient = w.score_gradient;
    gradient = chain_backward(w, a.layers - 1, gradient, sums);
    relation_backward<SEGMENTS>(w, tile, target, gradient, sums);
    centre_backward<SEGMENTS>(w, tile, target, gradient, sums);
}

// What a moments pass takes statistics of enters layer a.layers: δ itself for 0, else what the last hidden layer gives.
int64_t observed(const Arguments &a) { return larger(a.layers - 1, 0); }

// Gradient of moments: slope · x + intercept per sample, through all layers before.
template <int SEGMENTS>
void tile_moments_backward(Worker &w, const Tile &tile, Sums &sums) {
    const Problem &p = w.p;
    const Arguments &a = p.a;
    Tile target = within(tile, sums.slice.shift(p.f));
    w.recompute<SEGMENTS>(tile);
    int64_t n = observed(a), stride = p.f.places * LANES, width = a.widths[n];
    Vector valid = tile.valid();
    float *gradient = w.between;
    if (a.layers == 0) {
        for (int64_t d = 0; d < width; d++)
            for (int64_t j = 0; j < p.f.places; j++)
                store(gradient + d * stride + j * LANES,
                      load(w.panel[0] + d * stride + j * LANES) * a.slope[d] + a.intercept[d]);
    } else {
        Product back{a.slope, width, a.intercept, width, width, BIAS, PLAIN};
        product(back, w.panel[n], stride, gradient, stride, p.f.places);
        w.pass_rectifier(n, gradient);
    }
    for (int64_t i = 0; tile.count < LANES && i < width * p.f.places; i++)
        store(gradient + i * LANES, load(gradient + i * LANES) * valid);
    const float *first = chain_backward(w, n - 1, gradient, sums);
    relation_backward<SEGMENTS>(w, tile, target, first, sums);
    centre_backward<SEGMENTS>(w, tile, target, first, sums);
}

// Memory of a call: the problem's, every thread's, every slice's.
struct Plan {
    Problem problem;
    int64_t threads, slices;
    bool whole, backward;
    size_t shared = 0, per_thread = 0, per_slice = 0;

    Plan(const Arguments &a, bool whole, bool backward)
        : problem(a), threads(larger(1, a.threads)), slices(slice_count(problem.f)), whole(whole), backward(backward) {
        Workspace space;
        problem.lay_out(space, backward);
        shared = space.used();
        Workspace thread;
        Worker(problem, whole).lay_out(thread, backward);
        per_thread = thread.used();
        for (int64_t i = 0; backward && i < slices; i++) {
            Workspace slice;
            Sums(problem, i, slices).lay_out(slice);
            per_slice = slice.used() > per_slice ? slice.used() : per_slice;
        }
    }

    size_t bytes(size_t more = 0) const { return shared + threads * per_thread + slices * (per_slice + more); }
    char *thread_start(void *block, int64_t thread) const {
        return static_cast<char *>(block) + shared + thread * per_thread;
    }
    char *slice_start(void *block, int64_t slice) const { return thread_start(block, threads) + slice * per_slice; }
    void start(void *block) {
        Workspace space(block);
        problem.lay_out(space, backward);
        problem.prepare(backward);
    }
};

// δ's width.
int64_t relation_width(const Arguments &a) {
    int64_t own = a.relation == DOT ? 1 : a.relation == CONCATENATION ? 2 * a.relation_channels : a.relation_channels;
    return own + (a.position_kind == NO_POSITION ? 0 : a.position_kind == RELATIVE ? 2 : 4);
}

bool fits(const Arguments &a) {
    const Geometry geometry{a.threads, a.batch, a.height, a.width, a.kernel, a.stride, a.dilation, a.zeros};
    int64_t value_channels = a.value ? a.value_channels : 1, groups = a.value ? a.groups : 1;
    if (!countable(a.relation_channels) || !countable(value_channels) || value_channels % larger(1, groups) ||
        !geometry.fits(a.relation_channels + 2 + value_channels, groups))
        return false;
    if (a.relation < SUBTRACTION || a.relation > DOT || a.position_kind < NO_POSITION || a.position_kind > ABSOLUTE)
        return false;
    if (a.layers < 0 || a.layers > MAX_LAYERS || a.widths[0] != relation_width(a)) return false;
    for (int64_t n = 0; n < a.layers; n++)
        if (!countable(a.widths[n], a.kernel, a.kernel) || !countable(a.widths[n], larger(1, a.widths[n + 1])))
            return false;
    // Moments take co-deviations of what enters the last layer, and know nothing of what that gives.
    if (!a.value && a.layers && !countable(a.widths[a.layers - 1], a.widths[a.layers - 1])) return false;
    return a.widths[a.layers] == (a.value ? a.groups : a.layers ? 0 : a.widths[0]);
}

int forward(const Arguments &a) {
    if (!fits(a) || !a.value) return WRONG_SIZES;
    Plan plan(a, false, false);
    Block block(plan.bytes());
    if (!block.start) return OUT_OF_MEMORY;
    plan.start(block.start);
    const Problem &p = plan.problem;
    Tasks tiles(p.f.tiles(), plan.threads);
#pragma omp parallel num_threads(plan.threads)
    {
        Worker worker(p, false);
        Workspace space(plan.thread_start(block.start, thread_number()));
        worker.lay_out(space, false);
        p.fill();
        tiles.each([&](int64_t t) {
            Tile tile(p.f, t);
            SAN_BY_SEGMENTS(tile, worker.forward, tile);
        });
    }
    return DONE;
}

void add(float *to, const float *from, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] += from[i];
}

// Adds all slices up, in their order, into the gradients' tensors.
void merge(const Problem &p, const Sums *sums, int64_t slices) {
    const Arguments &a = p.a;
    int64_t size = p.f.height * p.f.width;
#pragma omp for schedule(static)
    for (int64_t each = 0; each < p.channels() * p.f.batch; each++) {
        int64_t image = each / p.channels(), c = each % p.channels();
        float *to;
        if (c < a.relation_channels) to = a.key_gradient + (image * a.relation_channels + c) * size;
        else if (c < p.key_channels) to = a.position_gradient + (image * 2 + c - a.relation_channels) * size;
        else to = a.value_gradient + (image * a.value_channels + c - p.key_channels) * size;
        for (int64_t s = 0; s < slices; s++)
            unborder(p.f, sums[s].slice, sums[s].key + c * p.f.plane, image, p.columns, to);
    }
#pragma omp single
    for (int64_t s = 0; s < slices; s++) {
        add(a.scale_gradient, sums[s].scale, p.width);
        add(a.shift_gradient, sums[s].shift, p.width);
        for (int64_t n = 0; n < a.layers; n++) {
            add(a.weight_gradient[n], sums[s].weight[n], a.widths[n] * a.widths[n + 1]);
            add(a.bias_gradient[n], sums[s].bias[n], a.widths[n + 1]);
        }
    }
}

template <int SEGMENTS>
void step(Worker &w, const Tile &tile, Sums &sums, bool of_moments) {
    if (of_moments) tile_moments_backward<SEGMENTS>(w, tile, sums);
    else tile_backward<SEGMENTS>(w, tile, sums);
}

int backward_of(const Arguments &a, bool of_moments) {
    Plan plan(a, true, true);
    size_t extra = (sizeof(Sums) + 63) / 64 * 64;
    Block block(plan.bytes(extra));
    if (!block.start) return OUT_OF_MEMORY;
    plan.start(block.start);
    const Problem &p = plan.problem;
    Sums *sums = reinterpret_cast<Sums *>(plan.slice_start(block.start, plan.slices));
    Tasks slices(plan.slices, plan.threads);
#pragma omp parallel num_threads(plan.threads)
    {
        Worker worker(p, true);
        Workspace space(plan.thread_start(block.start, thread_number()));
        worker.lay_out(space, true);
        p.fill();
        slices.each([&](int64_t s) {
            Sums part(p, s, plan.slices);
            memset(plan.slice_start(block.start, s), 0, plan.per_slice);
            Workspace room(plan.slice_start(block.start, s));
            part.lay_out(room);
            for (int64_t t = part.slice.tile; t < part.slice.tile_stop; t++) {
                Tile tile(p.f, t);
                SAN_BY_SEGMENTS(tile, step, worker, tile, part, of_moments);
            }
            sums[s] = part;
        });
#pragma omp barrier
        merge(p, sums, plan.slices);
    }
    return DONE;
}

// Count, mean and (co-)deviations of one slice; `pilot` is subtracted first, so that large means cost no digits.
struct Statistics {
    double count = 0;
    double *mean = nullptr, *deviation = nullptr;
    float *pilot = nullptr;

    void lay_out(Workspace &space, int64_t width, bool square) {
        mean = space.take<double>(width);
        deviation = space.take<double>(square ? width * width : width);
        pilot = space.take<float>(width);
    }
};

// Chan's formula for the union of two samples; `square` for co-deviations.
void unite(Statistics &to, const Statistics &from, int64_t width, bool square) {
    double count = to.count + from.count, share = from.count / count, cross = to.count * share;
    for (int64_t i = 0; i < width; i++) {
        double step = from.mean[i] - to.mean[i];
        if (!square) to.deviation[i] += from.deviation[i] + cross * step * step;
        for (int64_t k = 0; square && k < width; k++)
            to.deviation[i * width + k] += from.deviation[i * width + k] + cross * step * (from.mean[k] - to.mean[k]);
    }
    for (int64_t i = 0; i < width; i++) to.mean[i] += share * (from.mean[i] - to.mean[i]);
    to.count = count;
}

// Σ x over places and valid lanes of a panel's row.
double row_total(const float *row, int64_t places, Vector valid) {
    Vector sum{};
    for (int64_t j = 0; j < places; j++) sum += load(row + j * LANES);
    return lane_sum(sum * valid);
}

// Moments of δ's rows on one tile, merged into the slice's.
void observe_rows(const Worker &w, const Tile &tile, Statistics &to) {
    int64_t places = w.p.f.places;
    double count = static_cast<double>(places) * tile.count, total = to.count + count;
    Vector valid = tile.valid();
    for (int64_t d = 0; d < w.p.width; d++) {
        const float *row = w.panel[0] + d * places * LANES;
        double mean = row_total(row, places, valid) / count, step = mean - to.mean[d];
        Vector centre = broadcast(static_cast<float>(mean)), squares{};
        for (int64_t j = 0; j < places; j++) {
            Vector x = load(row + j * LANES) - centre;
            squares += x * x;
        }
        // What rounding the mean to single precision added is taken off again.
        double rounding = mean - static_cast<double>(static_cast<float>(mean));
        double deviation = lane_sum(squares * valid) - count * rounding * rounding;
        to.deviation[d] += (deviation < 0 ? 0 : deviation) + to.count / total * count * step * step;
        to.mean[d] += count / total * step;
    }
    to.count = total;
}

// Sums of a tile's activations less the pilot, in `mean`, and of their products, in the upper part of `deviation`.
void observe_products(const Worker &w, const Tile &tile, Statistics &to) {
    int64_t places = w.p.f.places, n = observed(w.a), width = w.a.widths[n], stride = places * LANES;
    Vector valid = tile.valid();
    for (int64_t d = 0; d < width; d++) {
        float *row = w.panel[n] + d * stride;
        if (to.count == 0) to.pilot[d] = static_cast<float>(row_total(row, places, valid) / (places * tile.count));
        for (int64_t j = 0; j < places; j++) store(row + j * LANES, (load(row + j * LANES) - to.pilot[d]) * valid);
        to.mean[d] += row_total(row, places, valid);
    }
    outer(w.panel[n], stride, width, w.panel[n], stride, width, places, to.deviation, width, true);
    to.count += static_cast<double>(places) * tile.count;
}

// From sums around the pilot to mean and co-deviations around it.
void conclude_products(Statistics &of, int64_t width) {
    for (int64_t i = 0; i < width; i++)
        for (int64_t k = i; k < width; k++) {
            double centred = of.deviation[i * width + k] - of.mean[i] * of.mean[k] / of.count;
            of.deviation[i * width + k] = of.deviation[k * width + i] = centred;
        }
    for (int64_t i = 0; i < width; i++) of.mean[i] = of.pilot[i] + of.mean[i] / of.count;
}

template <int SEGMENTS>
void observe(Worker &w, const Tile &tile, Statistics &to) {
    w.recompute<SEGMENTS>(tile);
    if (w.a.layers == 0) observe_rows(w, tile, to);
    else observe_products(w, tile, to);
}

int moments(const Arguments &a) {
    if (!fits(a) || a.value) return WRONG_SIZES;
    Plan plan(a, true, false);
    bool square = a.layers > 0;
    int64_t width = a.widths[observed(a)];
    Workspace one;
    Statistics().lay_out(one, width, square);
    Block block(plan.bytes(one.used() + sizeof(Statistics)));
    if (!block.start) return OUT_OF_MEMORY;
    plan.start(block.start);
    const Problem &p = plan.problem;
    char *room = plan.thread_start(block.start, plan.threads);
    Statistics *found = reinterpret_cast<Statistics *>(room + plan.slices * one.used());
    memset(room, 0, plan.slices * one.used());
    Tasks slices(plan.slices, plan.threads);
#pragma omp parallel num_threads(plan.threads)
    {
        Worker worker(p, true);
        Workspace space(plan.thread_start(block.start, thread_number()));
        worker.lay_out(space, false);
        p.fill();
        slices.each([&](int64_t s) {
            Slice slice(p.f, s, plan.slices);
            Statistics part;
            Workspace own(room + s * one.used());
            part.lay_out(own, width, square);
            for (int64_t t = slice.tile; t < slice.tile_stop; t++) {
                Tile tile(p.f, t);
                SAN_BY_SEGMENTS(tile, observe, worker, tile, part);
            }
            if (square) conclude_products(part, width);
            found[s] = part;
        });
    }
    for (int64_t s = 1; s < plan.slices; s++) unite(found[0], found[s], width, square);
    memcpy(a.mean, found[0].mean, width * sizeof(double));
    memcpy(a.deviation, found[0].deviation, width * (square ? width : 1) * sizeof(double));
    return DONE;
}

int backward(const Arguments &a) {
    if (!fits(a) || !a.value) return WRONG_SIZES;
    return backward_of(a, false);
}

int moments_backward(const Arguments &a) {
    if (!fits(a) || a.value) return WRONG_SIZES;
    return backward_of(a, true);
}

struct PositionArguments {
    int64_t threads, height, width;
    const float *weight, *bias;  // [2][2], and [2] or null
    float *map;                  // [2][height][width]
};

// weight · coordinates + bias; coordinates run from −1 to 1, x first.
int position_map(const PositionArguments &a) {
    if (!countable(a.height, a.width, 2) || !a.weight || !a.map) return WRONG_SIZES;
    float x_step = 2.0f / larger(a.width - 1, 1), y_step = 2.0f / larger(a.height - 1, 1);
    float *to = a.map;
    for (int64_t c = 0; c < 2; c++)
        for (int64_t y = 0; y < a.height; y++) {
            float start = a.weight[2 * c + 1] * (y * y_step - 1.0f) + (a.bias ? a.bias[c] : 0.0f);
            for (int64_t x = 0; x < a.width; x++) *to++ = a.weight[2 * c] * (x * x_step - 1.0f) + start;
        }
    return DONE;
}

}  // namespace

SAN_KERNEL(position_map, PositionArguments, position_map)
SAN_KERNEL(pairwise_forward, Arguments, forward)
SAN_KERNEL(pairwise_backward, Arguments, backward)
SAN_KERNEL(pairwise_moments, Arguments, moments)
SAN_KERNEL(pairwise_moments_backward, Arguments, moments_backward)
