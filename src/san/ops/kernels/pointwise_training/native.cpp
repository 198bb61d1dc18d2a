// Training of what surrounds attention: gradients of the products on the channel axis through pooling, ReLU and
// BatchNorm's scale, and the sums over a map that BatchNorm needs in both directions.
//
// Two passes give a product's gradients. One multiplies columns (pixels, of the whole batch) of the outputs' gradients
// by the transposed weights and routes the result back through the rectifier and the pooling, which it computes again
// from the input. The other owns a block of the weights' columns and runs over all pixels: the block's activations,
// with channels in lanes, times the outputs' gradients where they lie. Work is cut by the problem alone and summed in
// its order, so that the number of threads changes no bit. Maps are [batch][channels][height][width].

#include "../native/frame.h"
#include "../native/pointwise.h"
#include "../native/product.h"

namespace {

struct Arguments : Input {
    int64_t given[MAX_PRODUCTS];
    const float *weight[MAX_PRODUCTS], *output_gradient[MAX_PRODUCTS];
    // Results, each of which may be null.
    float *weight_gradient[MAX_PRODUCTS], *bias_gradient[MAX_PRODUCTS];
    float *gradient;  // at scale · input + shift, at the input where there is no scale, at the stem's image
    double *sums, *products;  // of the gradient at every channel, and of it times the input: [C], of a stem [C][K]

    int64_t depth() const { return given[0] + given[1] + given[2]; }
    bool wants_input() const { return gradient || sums || products; }
    bool wants_bias() const { return bias_gradient[0] || bias_gradient[1] || bias_gradient[2]; }
    bool wants_weight() const { return weight_gradient[0] || weight_gradient[1] || weight_gradient[2]; }
};

constexpr int64_t GROUP = 6, COLUMNS = GROUP * LANES;  // vectors and pixels that a panel's row holds at most
constexpr int64_t RUN = 128;                           // pixels that the weights' gradient takes at a time
constexpr int64_t MOST = COLUMNS > RUN ? COLUMNS : RUN;
constexpr int64_t BLOCK = TILE_VECTORS * LANES;  // columns of the weights that a task owns
constexpr int64_t ITEMS = 16;                    // tasks to aim at

// Where consecutive output pixels lie in a map: runs of one image, or, in the map that is pooled, of one row.
struct Pieces {
    struct Piece {
        int64_t image, offset, start, count;
    };
    int64_t count, vectors, floats, padded, number = 0;
    Piece piece[MOST];

    Pieces(const Footprint &f, int64_t first, int64_t count, bool pooled)
        : count(count), vectors((count + LANES - 1) / LANES) {
        int64_t size = f.rows * f.columns, run = pooled ? f.columns : size, scale = pooled ? 2 : 1;
        floats = scale * count;
        padded = scale * vectors * LANES;
        for (int64_t done = 0; done < count;) {
            int64_t image = (first + done) / size, pixel = (first + done) % size;
            int64_t length = smaller(count - done, run - pixel % run);
            int64_t offset = pooled ? 2 * (pixel / run * f.width + pixel % run) : pixel;
            piece[number++] = {image, offset, scale * done, scale * length};
            done += length;
        }
    }

    bool in_place() const { return number == 1 && floats == padded; }

    // The pixels of a channel, one behind the other and zeros up to a whole vector: where they are, or in `room`.
    const float *read(const float *channel, int64_t stride, float *room) const {
        if (in_place()) return channel + piece[0].image * stride + piece[0].offset;
        for (int64_t i = 0; i < number; i++) {
            const Piece &p = piece[i];
            memcpy(room + p.start, channel + p.image * stride + p.offset, p.count * sizeof(float));
        }
        memset(room + floats, 0, (padded - floats) * sizeof(float));
        return room;
    }

    // Asks for the pixels of a channel ahead of `read`: runs are too short for the processor to foresee them. Inlined,
    // because GCC drops calls of a function that does nothing but prefetch.
    template <int WRITTEN>
    __attribute__((always_inline)) void prefetch(const float *channel, int64_t stride) const {
        for (int64_t i = 0; i < number; i++)
            for (int64_t at = 0; at < piece[i].count; at += 16)
                __builtin_prefetch(channel + piece[i].image * stride + piece[i].offset + at, WRITTEN);
    }

    // Where to put the pixels of a channel before `write` brings them to their places.
    float *target(float *channel, int64_t stride, float *room) const {
        return in_place() ? channel + piece[0].image * stride + piece[0].offset : room;
    }

    void write(float *channel, int64_t stride, const float *room) const {
        if (in_place()) return;
        for (int64_t i = 0; i < number; i++) {
            const Piece &p = piece[i];
            memcpy(channel + p.image * stride + p.offset, room + p.start, p.count * sizeof(float));
        }
    }
};

// Vectors a and b with lanes in turn, the first or the second half of them.
template <int half>
inline Vector woven(Vector a, Vector b) {
    struct InTurn {
        static constexpr int lane_of(int lane) { return (lane + half * LANES) / 2 + (lane & 1 ? LANES : 0); }
    };
    return shuffled<InTurn>(a, b);
}

// The input at some output pixels: one reading of every channel, or the four that pooling compares.
template <int READINGS>
struct Source {
    const Input &in;
    float *room, *images;  // images: [vectors][stem's channels][READINGS] vectors
    const Pieces *pieces = nullptr;
    const float *row[2] = {};

    explicit Source(const Input &in) : in(in) {}

    void lay_out(Workspace &space) {
        room = space.take<float>(4 * MOST);
        images = space.take<float>(MOST * in.stem_channels * READINGS);
    }

    void move(const Pieces &to) {
        pieces = &to;
        for (int64_t k = 0; k < in.stem_channels; k++) {
            open(k, in.stem_channels);
            for (int64_t v = 0; v < to.vectors; v++) {
                Vector x[READINGS];
                read(v, x);
                for (int i = 0; i < READINGS; i++) store(image(v, k) + i * LANES, x[i]);
            }
        }
    }

    float *image(int64_t v, int64_t k) const { return images + (v * in.stem_channels + k) * READINGS * LANES; }

    void open(int64_t channel, int64_t channels) {
        int64_t plane = in.height * in.width;
        const float *from = in.input + channel * plane;
        row[0] = pieces->read(from, channels * plane, room);
        if (READINGS == 4) row[1] = pieces->read(from + in.width, channels * plane, room + 2 * MOST);
    }

    void read(int64_t v, Vector *x) const {
        if (READINGS == 1) {
            x[0] = load(row[0] + v * LANES);
            return;
        }
        for (int y = 0; y < READINGS / 2; y++) {
            Vector low = load(row[y] + 2 * v * LANES), high = load(row[y] + (2 * v + 1) * LANES);
            x[2 * y] = every_second<0>(low, high);
            x[2 * y + 1] = every_second<1>(low, high);
        }
    }

    // What the rectifier is given, from readings of the opened channel.
    void normalise(int64_t c, const Vector *x, Vector *y) const {
        for (int i = 0; i < READINGS; i++) y[i] = in.scale ? x[i] * in.scale[c] + in.shift[c] : x[i];
    }

    // The same in the stem, from the image.
    void apply_stem(int64_t c, int64_t v, Vector *y) const {
        for (int i = 0; i < READINGS; i++) y[i] = broadcast(in.shift[c]);
        for (int64_t k = 0; k < in.stem_channels; k++)
            for (int i = 0; i < READINGS; i++)
                y[i] += load(image(v, k) + i * LANES) * in.stem_weight[c * in.stem_channels + k];
    }

    bool rectifies() const { return in.scale || in.stem_channels; }

    // A channel's activations, as the products have multiplied them.
    void activate(int64_t c, float *out) {
        if (!in.stem_channels) open(c, in.channels);
        for (int64_t v = 0; v < pieces->vectors; v++) {
            Vector x[READINGS], y[READINGS];
            if (in.stem_channels) {
                apply_stem(c, v, y);
            } else {
                read(v, x);
                normalise(c, x, y);
            }
            Vector top = READINGS == 4 ? largest(y) : y[0];
            store(out + v * LANES, rectifies() ? rectified(top) : top);
        }
    }
};

// A gradient at the values that were read, on its way into a map like the input's.
template <int READINGS>
struct Target {
    float *room = nullptr, *channel = nullptr;
    int64_t stride = 0, width = 0;
    const Pieces *pieces = nullptr;
    float *row[2] = {};

    void lay_out(Workspace &space) { room = space.take<float>(4 * MOST); }

    void open(const Pieces &to, float *map, int64_t number, int64_t channels, const Input &in) {
        pieces = &to;
        width = in.width;
        stride = channels * in.height * width;
        channel = map + number * in.height * width;
        row[0] = to.target(channel, stride, room);
        if (READINGS == 4) row[1] = to.target(channel + width, stride, room + 2 * MOST);
    }

    void set(int64_t v, const Vector *g) const {
        if (READINGS == 1) {
            store(row[0] + v * LANES, g[0]);
            return;
        }
        for (int y = 0; y < READINGS / 2; y++) {
            store(row[y] + 2 * v * LANES, woven<0>(g[2 * y], g[2 * y + 1]));
            store(row[y] + (2 * v + 1) * LANES, woven<1>(g[2 * y], g[2 * y + 1]));
        }
    }

    void close() const {
        pieces->write(channel, stride, row[0]);
        if (READINGS == 4) pieces->write(channel + width, stride, row[1]);
    }
};

// The gradient at what the rectifier was given: pooling hands it to the first of the largest.
template <int READINGS>
inline void route(const Vector *y, Vector gradient, bool rectifies, Vector *g) {
    if (READINGS == 1) {
        g[0] = rectifies ? passed(gradient, y[0]) : gradient;
        return;
    }
    Vector top = largest(y), rest = rectifies ? passed(gradient, top) : gradient;
    for (int i = 0; i < READINGS - 1; i++) {
        g[i] = y[i] == top ? rest : Vector{};
        rest = y[i] == top ? Vector{} : rest;
    }
    g[READINGS - 1] = rest;
}

// Adds the lane sums of `count` vectors of LANES to `to`; the vectors are used up.
inline void add_sums(Vector *part, int64_t count, double *to) {
    float sums[LANES];
    store(sums, lane_sums(part));
    for (int64_t i = 0; i < count; i++) to[i] += sums[i];
}

// One level of a transposition: exchanges the blocks of `distance` lanes beside the diagonal.
template <int distance>
inline void exchange(Vector *x) {
    struct Low {
        static constexpr int lane_of(int lane) { return lane & distance ? LANES + lane - distance : lane; }
    };
    struct High {
        static constexpr int lane_of(int lane) { return lane & distance ? LANES + lane : lane + distance; }
    };
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        if (i & distance) continue;
        Vector a = x[i], b = x[i + distance];
        x[i] = shuffled<Low>(a, b);
        x[i + distance] = shuffled<High>(a, b);
    }
    if constexpr (distance > 1) exchange<distance / 2>(x);
}

// out [LANES][out_stride] from in [LANES][in_stride], LANES columns of each.
inline void transpose_square(const float *in, int64_t in_stride, float *out, int64_t out_stride) {
    Vector x[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) x[i] = load(in + i * in_stride);
    exchange<LANES / 2>(x);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) store(out + i * out_stride, x[i]);
}

// out [columns][out_stride] from at most LANES rows of in [rows][in_stride].
inline void transpose_rows(const float *in, int64_t in_stride, int64_t rows, int64_t columns, float *out,
                           int64_t out_stride) {
    int64_t c = 0;
    if (rows == LANES)
        for (; c + LANES <= columns; c += LANES) transpose_square(in + c, in_stride, out + c * out_stride, out_stride);
    for (; c < columns; c++)
        for (int64_t r = 0; r < rows; r++) out[c * out_stride + r] = in[r * in_stride + c];
}

// How the pass for the input's gradient is cut: slices of the groups of columns, times chunks of the channels.
struct Cutting {
    int64_t depth, weight_stride, groups, slices, chunks, blocks, moments;

    Cutting(const Arguments &a, const Footprint &f) {
        depth = a.depth();
        // An odd number of cache lines spreads the rows of a register tile over the cache.
        weight_stride = rounded_up(depth, 16) | 16;
        groups = (f.tiles() + GROUP - 1) / GROUP;
        slices = smaller(groups, ITEMS);
        blocks = (a.channels + LANES - 1) / LANES;
        // All channels of a stem give to the same image.
        chunks = a.stem_channels ? 1 : smaller(blocks, (ITEMS + slices - 1) / slices);
        moments = 1 + larger(1, a.stem_channels);
    }
    // A slice's sums: [moments][channels], then those of the outputs' gradients [depth].
    int64_t totals(int64_t channels) const { return moments * channels + depth; }
};

// One thread's part in the input's gradient.
template <int READINGS>
struct InputGradient {
    const Arguments &a;
    const Footprint &f;
    const Cutting &cut;
    const float *weight = nullptr;  // transposed: [channels][weight_stride]
    float *panel = nullptr, *result = nullptr, *image_gradient = nullptr;
    double *totals = nullptr;
    Source<READINGS> source;
    Target<READINGS> target;
    Vector part[1 + MAX_STEM_CHANNELS][LANES];

    InputGradient(const Arguments &a, const Footprint &f, const Cutting &cut) : a(a), f(f), cut(cut), source(a) {}

    void lay_out(Workspace &space) {
        panel = space.take<float>(cut.depth * COLUMNS);
        result = space.take<float>(LANES * COLUMNS);
        image_gradient = space.take<float>(COLUMNS * a.stem_channels * READINGS);
        source.lay_out(space);
        target.lay_out(space);
    }

    // Copies the outputs' gradients of some columns, all products one below the other, and sums them up if asked.
    void pack(const Pieces &pieces, bool summed) const {
        int64_t size = f.rows * f.columns;
        float *to = panel;
        double *sums = totals + cut.moments * a.channels;
        for (int64_t n = 0; n < MAX_PRODUCTS; sums += a.given[n++])
            for (int64_t first = 0; first < a.given[n]; first += LANES) {
                int64_t rows = smaller(LANES, a.given[n] - first);
                Vector part[LANES] = {};
                for (int64_t r = 0; r < rows; r++, to += COLUMNS) {
                    const float *channel = a.output_gradient[n] + (first + r) * size;
                    const float *from = pieces.read(channel, a.given[n] * size, to);
                    for (int64_t v = 0; v < pieces.vectors; v++) {
                        part[r] += load(from + v * LANES);
                        store(to + v * LANES, load(from + v * LANES));
                    }
                }
                if (summed) add_sums(part, rows, sums + first);
            }
    }

    void channel(const Pieces &pieces, int64_t c, const float *given) {
        source.open(c, a.channels);
        if (a.gradient) target.open(pieces, a.gradient, c, a.channels, a);
        Vector sum{}, product{};
        for (int64_t v = 0; v < pieces.vectors; v++) {
            Vector x[READINGS], y[READINGS], g[READINGS];
            source.read(v, x);
            source.normalise(c, x, y);
            route<READINGS>(y, load(given + v * LANES), source.rectifies(), g);
            for (int i = 0; i < READINGS; i++) {
                sum += g[i];
                product += g[i] * x[i];
            }
            if (a.gradient) target.set(v, g);
        }
        if (a.gradient) target.close();
        part[0][c % LANES] = sum;
        part[1][c % LANES] = product;
    }

    void stem_channel(const Pieces &pieces, int64_t c, const float *given) {
        for (int64_t k = 0; k <= a.stem_channels; k++) part[k][c % LANES] = Vector{};
        const float *weight = a.stem_weight + c * a.stem_channels;
        for (int64_t v = 0; v < pieces.vectors; v++) {
            Vector y[READINGS], g[READINGS];
            source.apply_stem(c, v, y);
            route<READINGS>(y, load(given + v * LANES), true, g);
            for (int i = 0; i < READINGS; i++) part[0][c % LANES] += g[i];
            for (int64_t k = 0; k < a.stem_channels; k++) {
                const float *image = source.image(v, k);
                float *to = image_gradient + (image - source.images);
                for (int i = 0; i < READINGS; i++) {
                    part[1 + k][c % LANES] += g[i] * load(image + i * LANES);
                    if (a.gradient) store(to + i * LANES, load(to + i * LANES) + g[i] * weight[k]);
                }
            }
        }
    }

    void give_image(const Pieces &pieces) {
        for (int64_t k = 0; k < a.stem_channels; k++) {
            target.open(pieces, a.gradient, k, a.stem_channels, a);
            for (int64_t v = 0; v < pieces.vectors; v++) {
                const float *from = image_gradient + (v * a.stem_channels + k) * READINGS * LANES;
                Vector g[READINGS];
                for (int i = 0; i < READINGS; i++) g[i] = load(from + i * LANES);
                target.set(v, g);
            }
            target.close();
        }
    }

    // The rows that `block` reads and writes once its product is done.
    __attribute__((always_inline)) void prefetch(const Pieces &pieces, int64_t first, int64_t rows) const {
        int64_t plane = a.height * a.width, stride = a.channels * plane;
        for (int64_t c = first; c < first + rows; c++)
            for (int64_t at = c * plane; at <= c * plane + (READINGS / 4) * a.width; at += a.width) {
                pieces.prefetch<0>(a.input + at, stride);
                if (a.gradient) pieces.prefetch<1>(a.gradient + at, stride);
            }
    }

    // LANES channels, or the rest of them.
    void block(const Pieces &pieces, int64_t first) {
        int64_t rows = smaller(LANES, a.channels - first);
        if (!a.stem_channels) prefetch(pieces, first, rows);
        Product p{weight + first * cut.weight_stride, cut.weight_stride, nullptr, rows, cut.depth, ZERO, PLAIN};
        product(p, panel, COLUMNS, result, COLUMNS, pieces.vectors);
        for (int64_t r = 0; r < rows; r++) {
            if (a.stem_channels) stem_channel(pieces, first + r, result + r * COLUMNS);
            else channel(pieces, first + r, result + r * COLUMNS);
        }
        for (int64_t m = 0; m < cut.moments; m++) add_sums(part[m], rows, totals + m * a.channels + first);
    }

    void task(int64_t slice, int64_t chunk, double *slice_totals) {
        totals = slice_totals;
        int64_t start = part_start(cut.blocks, chunk, cut.chunks), stop = part_start(cut.blocks, chunk + 1, cut.chunks);
        for (int64_t m = 0; m < cut.moments; m++)
            for (int64_t c = start * LANES; c < smaller(stop * LANES, a.channels); c++) totals[m * a.channels + c] = 0;
        for (int64_t o = 0; chunk == 0 && o < cut.depth; o++) totals[cut.moments * a.channels + o] = 0;
        int64_t group = part_start(cut.groups, slice, cut.slices);
        for (; group < part_start(cut.groups, slice + 1, cut.slices); group++) {
            int64_t first = group * COLUMNS, count = smaller(COLUMNS, f.pixels - first);
            pack(Pieces(f, first, count, false), chunk == 0);
            if (!a.wants_input()) continue;
            Pieces pieces(f, first, count, READINGS == 4);
            if (a.stem_channels) source.move(pieces);
            else source.pieces = &pieces;
            memset(image_gradient, 0, COLUMNS * a.stem_channels * READINGS * sizeof(float));
            for (int64_t b = start; b < stop; b++) block(pieces, b * LANES);
            if (a.gradient) give_image(pieces);
        }
    }
};

// The weights of all products, transposed and side by side: [channels][stride]. All threads of a team call it.
void transpose_weights(const Arguments &a, float *out, int64_t stride) {
    int64_t tasks[MAX_PRODUCTS], all = 0;
    for (int64_t n = 0; n < MAX_PRODUCTS; n++) all += tasks[n] = (a.given[n] + LANES - 1) / LANES;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < all; task++) {
        int64_t n = 0, start = 0, index = task;
        for (; index >= tasks[n]; n++) {
            index -= tasks[n];
            start += a.given[n];
        }
        int64_t first = index * LANES, rows = smaller(LANES, a.given[n] - first);
        transpose_rows(a.weight[n] + first * a.channels, a.channels, rows, a.channels, out + start + first, stride);
    }
}

// Zeros in the last row and column that pooling of odd maps leaves out. All threads of a team call it.
void clear_rest(const Arguments &a) {
    int64_t channels = a.stem_channels ? a.stem_channels : a.channels;
    if (!a.gradient || !a.pooled || (a.height % 2 == 0 && a.width % 2 == 0)) return;
#pragma omp for schedule(static)
    for (int64_t plane = 0; plane < a.batch * channels; plane++) {
        float *map = a.gradient + plane * a.height * a.width;
        if (a.height % 2) memset(map + (a.height - 1) * a.width, 0, a.width * sizeof(float));
        for (int64_t row = 0; a.width % 2 && row < a.height; row++) map[row * a.width + a.width - 1] = 0;
    }
}

// Adds the slices' totals up, in their order.
void give_totals(const Arguments &a, const Cutting &cut, const double *totals) {
    int64_t step = cut.totals(a.channels), factors = cut.moments - 1;
    for (int64_t i = 0; i < step; i++) {
        double sum = 0;
        for (int64_t s = 0; s < cut.slices; s++) sum += totals[s * step + i];
        int64_t m = i / a.channels, c = i % a.channels, o = i - cut.moments * a.channels;
        if (o < 0) {
            if (m == 0 && a.sums) a.sums[c] = sum;
            if (m > 0 && a.products) a.products[c * factors + m - 1] = sum;
            continue;
        }
        int64_t n = 0;
        for (; o >= a.given[n]; n++) o -= a.given[n];
        if (a.bias_gradient[n]) a.bias_gradient[n][o] = static_cast<float>(sum);
    }
}

template <int READINGS>
int input_gradient(const Arguments &a, const Footprint &f) {
    Cutting cut(a, f);
    int64_t threads = larger(1, a.threads);
    Workspace sizes, own;
    sizes.take<float>(a.channels * cut.weight_stride);
    sizes.take<double>(cut.slices * cut.totals(a.channels));
    InputGradient<READINGS>(a, f, cut).lay_out(own);
    Block block(sizes.used() + threads * own.used());
    if (!block.start) return OUT_OF_MEMORY;
    Workspace space(block.start);
    float *weight = space.take<float>(a.channels * cut.weight_stride);
    double *totals = space.take<double>(cut.slices * cut.totals(a.channels));
    Tasks tasks(cut.slices * cut.chunks, threads);
#pragma omp parallel num_threads(threads)
    {
        Workspace room(static_cast<char *>(block.start) + sizes.used() + thread_number() * own.used());
        InputGradient<READINGS> work(a, f, cut);
        work.lay_out(room);
        work.weight = weight;
        if (a.wants_input()) transpose_weights(a, weight, cut.weight_stride);
        clear_rest(a);
        tasks.each([&](int64_t task) {
            int64_t slice = task / cut.chunks;
            work.task(slice, task % cut.chunks, totals + slice * cut.totals(a.channels));
        });
    }
    give_totals(a, cut, totals);
    return DONE;
}

// How the pass for the weights' gradient is cut: blocks of the weights' columns, times slices of the pixels' runs.
struct WeightCutting {
    int64_t depth, vectors, blocks, image_runs, runs, slices, room;

    WeightCutting(const Arguments &a, const Footprint &f) {
        int64_t size = f.rows * f.columns;
        depth = a.depth();
        vectors = (a.channels + LANES - 1) / LANES;
        blocks = (vectors + TILE_VECTORS - 1) / TILE_VECTORS;
        image_runs = (size + RUN - 1) / RUN;
        runs = a.batch * image_runs;
        // A slice's sums are read and written once for every run: four of them make the final sum cheap.
        slices = larger(1, smaller((ITEMS + blocks - 1) / blocks, runs / 4));
        room = depth * BLOCK;
    }
    // Runs are whole vectors, which are read where they lie, but for the last of an image.
    int64_t run_start(int64_t run, int64_t size) const {
        return smaller(size, LANES * part_start((size + LANES - 1) / LANES, run, image_runs));
    }
    // Sums are kept until all slices are done, or, of a single slice, given at once.
    int64_t rooms(int64_t threads) const { return slices > 1 ? blocks * slices : threads; }
};

// One thread's part in the weights' gradient.
template <int READINGS>
struct WeightGradient {
    const Arguments &a;
    const Footprint &f;
    const WeightCutting &cut;
    float *rows = nullptr, *panel = nullptr;  // activations: [LANES][RUN], and with channels in lanes [RUN][BLOCK]
    Source<READINGS> source;

    WeightGradient(const Arguments &a, const Footprint &f, const WeightCutting &cut)
        : a(a), f(f), cut(cut), source(a) {}

    void lay_out(Workspace &space) {
        rows = space.take<float>(LANES * RUN);
        panel = space.take<float>(RUN * BLOCK);
        source.lay_out(space);
    }

    int64_t first_vector(int64_t block) const { return part_start(cut.vectors, block, cut.blocks); }

    void fill(const Pieces &pieces, int64_t block) {
        if (a.stem_channels) source.move(pieces);
        else source.pieces = &pieces;
        for (int64_t v = first_vector(block); v < first_vector(block + 1); v++) {
            for (int64_t i = 0; i < LANES; i++) {
                if (v * LANES + i < a.channels) source.activate(v * LANES + i, rows + i * RUN);
                else memset(rows + i * RUN, 0, RUN * sizeof(float));
            }
            float *to = panel + (v - first_vector(block)) * LANES;
            for (int64_t t = 0; t < pieces.vectors; t++)
                transpose_square(rows + t * LANES, RUN, to + t * LANES * BLOCK, BLOCK);
        }
    }

    // The rows of the outputs' gradients are short parts of large maps, and asked for in advance; those of small maps
    // lie one behind the other, as the processor expects.
    void multiply(int64_t n, const float *factor, int64_t size, int64_t count, int64_t vectors, Start start,
                  float *out) {
        constexpr int64_t STEP = 4 * TILE_ROWS;
        for (int64_t row = 0; row < a.given[n]; row += STEP) {
            for (int64_t r = row + STEP; cut.image_runs > 2 && r < smaller(row + 2 * STEP, a.given[n]); r++)
                for (int64_t at = 0; at < count; at += 16) __builtin_prefetch(factor + r * size + at);
            Product p{factor + row * size, size, nullptr, smaller(STEP, a.given[n] - row), count, start, PLAIN};
            product(p, panel, BLOCK, out + row * BLOCK, BLOCK, vectors);
        }
    }

    __attribute__((always_inline)) void prefetch(const Pieces &pieces, int64_t block) const {
        int64_t plane = a.height * a.width, stop = smaller(a.channels, first_vector(block + 1) * LANES);
        for (int64_t c = first_vector(block) * LANES; c < stop; c++)
            for (int64_t at = c * plane; at <= c * plane + (READINGS / 4) * a.width; at += a.width)
                pieces.prefetch<0>(a.input + at, a.channels * plane);
    }

    Pieces pieces(int64_t run) const {
        int64_t size = f.rows * f.columns, first = cut.run_start(run % cut.image_runs, size);
        int64_t stop = cut.run_start(run % cut.image_runs + 1, size);
        return Pieces(f, run / cut.image_runs * size + first, stop - first, READINGS == 4);
    }

    void task(int64_t block, int64_t slice, float *sums) {
        int64_t size = f.rows * f.columns, start = part_start(cut.runs, slice, cut.slices);
        int64_t stop = part_start(cut.runs, slice + 1, cut.slices);
        for (int64_t run = start; run < stop; run++) {
            int64_t image = run / cut.image_runs, first = cut.run_start(run % cut.image_runs, size);
            Pieces columns = pieces(run);
            fill(columns, block);
            if (!a.stem_channels && run + 1 < stop) prefetch(pieces(run + 1), block);
            float *out = sums;
            for (int64_t n = 0; n < MAX_PRODUCTS; out += a.given[n++] * BLOCK) {
                const float *factor = a.output_gradient[n] + image * a.given[n] * size + first;
                if (a.weight_gradient[n])
                    multiply(n, factor, size, columns.count, first_vector(block + 1) - first_vector(block),
                             run == start ? ZERO : ADD, out);
            }
        }
    }

    // Adds the slices' sums up, in their order, into the columns of a block.
    void give(int64_t block, const float *sums, int64_t slices) const {
        int64_t first = first_vector(block) * LANES;
        int64_t count = smaller(first_vector(block + 1) * LANES, a.channels) - first;
        for (int64_t n = 0; n < MAX_PRODUCTS; sums += a.given[n++] * BLOCK)
            for (int64_t o = 0; a.weight_gradient[n] && o < a.given[n]; o++) {
                float *to = a.weight_gradient[n] + o * a.channels + first;
                memcpy(to, sums + o * BLOCK, count * sizeof(float));
                for (int64_t s = 1; s < slices; s++)
                    for (int64_t c = 0; c < count; c++) to[c] += sums[s * cut.room + o * BLOCK + c];
            }
    }
};

template <int READINGS>
int weight_gradient(const Arguments &a, const Footprint &f) {
    WeightCutting cut(a, f);
    int64_t threads = larger(1, a.threads), floats = cut.rooms(threads) * cut.room;
    Workspace sizes, own;
    sizes.take<float>(floats);
    WeightGradient<READINGS>(a, f, cut).lay_out(own);
    Block block(sizes.used() + threads * own.used());
    if (!block.start) return OUT_OF_MEMORY;
    float *sums = Workspace(block.start).take<float>(floats);
#pragma omp parallel num_threads(threads)
    {
        Workspace room(static_cast<char *>(block.start) + sizes.used() + thread_number() * own.used());
        WeightGradient<READINGS> work(a, f, cut);
        work.lay_out(room);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < cut.blocks * cut.slices; task++) {
            float *to = sums + (cut.slices > 1 ? task : thread_number()) * cut.room;
            work.task(task / cut.slices, task % cut.slices, to);
            if (cut.slices == 1) work.give(task, to, 1);
        }
        if (cut.slices > 1) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t b = 0; b < cut.blocks; b++) work.give(b, sums + b * cut.slices * cut.room, cut.slices);
        }
    }
    return DONE;
}

bool fits(const Arguments &a) {
    for (int64_t n = 0; n < MAX_PRODUCTS; n++)
        if (a.given[n] > 0 && !(a.weight[n] && a.output_gradient[n])) return false;
    return a.Input::fits(a.given);
}

int backward(const Arguments &a) {
    if (!fits(a)) return WRONG_SIZES;
    Footprint f = pixels_of(a);
    int outcome = DONE;
    if (a.wants_input() || a.wants_bias()) outcome = a.pooled ? input_gradient<4>(a, f) : input_gradient<1>(a, f);
    if (outcome == DONE && a.wants_weight()) outcome = a.pooled ? weight_gradient<4>(a, f) : weight_gradient<1>(a, f);
    return outcome;
}

// Mean of some rows of values, and their deviations from it multiplied pairwise and summed up.
template <int ROWS>
struct Moments {
    double count = 0, mean[ROWS] = {}, deviation[ROWS][ROWS] = {};

    void merge(const Moments &other) {
        if (other.count == 0) return;
        double all = count + other.count, distance[ROWS];
        for (int i = 0; i < ROWS; i++) distance[i] = other.mean[i] - mean[i];
        for (int i = 0; i < ROWS; i++) {
            mean[i] += distance[i] * other.count / all;
            for (int j = 0; j < ROWS; j++)
                deviation[i][j] += other.deviation[i][j] + distance[i] * distance[j] * count * other.count / all;
        }
        count = all;
    }
};

// Values at a time: twice read, they stay in the first-level cache, and their sums lose little in single precision.
constexpr int64_t CHUNK = 2048;

// Rows of `count` values each in `images` images, `stride` apart.
template <int ROWS>
struct Rows {
    const float *row[ROWS];
    int64_t images, stride, count;

    // Calls `use(index of a row, vector)`; lanes behind a row's end hold `rest[index]`.
    template <typename Use>
    void each(const float *rest, const Use &use) const {
        for (int64_t b = 0; b < images; b++)
            for (int64_t at = 0; at < count; at += LANES)
                for (int i = 0; i < ROWS; i++) use(i, part(row[i] + b * stride + at, count - at, rest[i]));
    }

private:
    static Vector part(const float *from, int64_t left, float rest) {
        if (left >= LANES) return load(from);
#if defined(__AVX512F__)
        return blended_load(broadcast(rest), without(lanes_from(0), lanes_from(static_cast<int>(left))), from);
#endif
        Vector x = broadcast(rest);
        for (int lane = 0; lane < left; lane++) x[lane] = from[lane];
        return x;
    }
};

// Moments of a chunk: deviations from a mean that is rounded, which their own sum then corrects.
template <int ROWS>
Moments<ROWS> chunk_moments(const Rows<ROWS> &rows) {
    Moments<ROWS> m;
    m.count = static_cast<double>(rows.images * rows.count);
    float centre[ROWS] = {};
    Vector sum[ROWS] = {}, rest[ROWS] = {}, square[ROWS][ROWS] = {}, d[ROWS];
    rows.each(centre, [&](int i, Vector x) { sum[i] += x; });
    for (int i = 0; i < ROWS; i++) centre[i] = lane_sum(sum[i]) / static_cast<float>(m.count);
    rows.each(centre, [&](int i, Vector x) {
        d[i] = x - centre[i];
        rest[i] += d[i];
        for (int j = 0; j <= i; j++) square[i][j] += d[i] * d[j];
    });
    double correction[ROWS];
    for (int i = 0; i < ROWS; i++) {
        correction[i] = lane_sum(rest[i]) / m.count;
        m.mean[i] = centre[i] + correction[i];
        for (int j = 0; j <= i; j++)
            m.deviation[i][j] = m.deviation[j][i] = lane_sum(square[i][j]) - correction[i] * correction[j] * m.count;
    }
    return m;
}

// Moments of rows of any size: of small maps several images are a chunk, of large ones parts of one.
template <int ROWS>
Moments<ROWS> row_moments(Rows<ROWS> rows) {
    Moments<ROWS> all;
    int64_t images = larger(1, CHUNK / rows.count), chunks = (rows.count + CHUNK - 1) / CHUNK;
    for (int64_t b = 0; b < rows.images; b += images)
        for (int64_t i = 0; i < chunks; i++) {
            Rows<ROWS> chunk = rows;
            int64_t first = part_start(rows.count, i, chunks);
            for (int k = 0; k < ROWS; k++) chunk.row[k] += b * rows.stride + first;
            chunk.images = smaller(images, rows.images - b);
            chunk.count = part_start(rows.count, i + 1, chunks) - first;
            all.merge(chunk_moments(chunk));
        }
    return all;
}

struct MomentArguments {
    int64_t threads, batch, channels, size;
    const float *input;
    double *mean, *deviation;

    bool fits() const { return countable(batch, channels, size) && input && mean && deviation; }
};

int channel_moments(const MomentArguments &a) {
    if (!a.fits()) return WRONG_SIZES;
#pragma omp parallel for schedule(static) num_threads(larger(1, a.threads))
    for (int64_t c = 0; c < a.channels; c++) {
        Moments<1> m = row_moments(Rows<1>{{a.input + c * a.size}, a.batch, a.channels * a.size, a.size});
        a.mean[c] = m.mean[0];
        a.deviation[c] = m.deviation[0][0];
    }
    return DONE;
}

// Moments of pixels, whose channels vary together.
template <int ROWS>
int pixel_moments(const MomentArguments &a) {
    Block block(a.batch * sizeof(Moments<ROWS>));
    Moments<ROWS> *each = static_cast<Moments<ROWS> *>(block.start), all;
    if (!each) return OUT_OF_MEMORY;
#pragma omp parallel for schedule(dynamic, 1) num_threads(larger(1, a.threads))
    for (int64_t b = 0; b < a.batch; b++) {
        Rows<ROWS> rows{{}, 1, 0, a.size};
        for (int k = 0; k < ROWS; k++) rows.row[k] = a.input + (b * ROWS + k) * a.size;
        each[b] = row_moments(rows);
    }
    for (int64_t b = 0; b < a.batch; b++) all.merge(each[b]);
    memcpy(a.mean, all.mean, sizeof all.mean);
    memcpy(a.deviation, all.deviation, sizeof all.deviation);
    return DONE;
}

int image_moments(const MomentArguments &a) {
    if (!a.fits()) return WRONG_SIZES;
    switch (a.channels) {
    case 1: return pixel_moments<1>(a);
    case 2: return pixel_moments<2>(a);
    case 3: return pixel_moments<3>(a);
    case 4: return pixel_moments<4>(a);
    default: return WRONG_SIZES;
    }
}

// BatchNorm's gradient at its input, once its sums are known: A · gradient + B · input + C of every channel.
struct NormArguments {
    int64_t threads, batch, channels, size;
    float *gradient;  // overwritten
    const float *input, *a, *b, *c, *residual;

    bool fits() const { return countable(batch, channels, size) && gradient && input && a && b && c; }
};

template <bool RESIDUAL>
void norm_plane(const NormArguments &n, int64_t plane) {
    int64_t channel = plane % n.channels, start = plane * n.size, i = 0;
    float a = n.a[channel], b = n.b[channel], c = n.c[channel], *gradient = n.gradient + start;
    const float *x = n.input + start, *residual = RESIDUAL ? n.residual + start : nullptr;
    for (; i + LANES <= n.size; i += LANES) {
        Vector y = load(gradient + i) * a + (load(x + i) * b + c);
        store(gradient + i, RESIDUAL ? y + load(residual + i) : y);
    }
    for (; i < n.size; i++) gradient[i] = gradient[i] * a + (x[i] * b + c) + (RESIDUAL ? residual[i] : 0);
}

int norm_input_gradient(const NormArguments &n) {
    if (!n.fits()) return WRONG_SIZES;
#pragma omp parallel for schedule(static) num_threads(larger(1, n.threads))
    for (int64_t plane = 0; plane < n.batch * n.channels; plane++) {
        if (n.residual) norm_plane<true>(n, plane);
        else norm_plane<false>(n, plane);
    }
    return DONE;
}

}  // namespace

SAN_KERNEL(pointwise_backward, Arguments, backward)
SAN_KERNEL(channel_moments, MomentArguments, channel_moments)
SAN_KERNEL(image_moments, MomentArguments, image_moments)
SAN_KERNEL(norm_input_gradient, NormArguments, norm_input_gradient)
