// What surrounds attention: products on the channel axis, with BatchNorm, ReLU and pooling joined to their input, bias
// and residual to their output, so that a map is read once and written once.
//
// A group of columns (pixels, of the whole batch) is normalised, rectified and pooled into a panel in the core's cache,
// then multiplied by a chunk of the weight's rows. Maps are [batch][channels][height][width].

#include "../native/pointwise.h"
#include "../native/product.h"
#include "../native/tasks.h"

namespace {

struct Arguments : Input {
    // Several products of one input, as φ, ψ and β are; `residual` is added to the first.
    int64_t given[MAX_PRODUCTS];
    const float *weight[MAX_PRODUCTS], *bias[MAX_PRODUCTS];
    float *output[MAX_PRODUCTS];
    const float *residual;
};

constexpr int64_t MAX_GROUP = 24;  // vectors of a panel's row
constexpr int64_t AHEAD = 4;       // channels between the one being read and the one being fetched

// The 2×2 pixels that pooling compares, for a tile of pooled ones.
struct Reader {
    const Arguments &a;
    const Tile &tile;
    bool row;  // the pooled lanes lie in one row

    Reader(const Arguments &a, const Tile &tile) : a(a), tile(tile) {
        row = tile.count == LANES && tile.image[0] == tile.image[LANES - 1] &&
              tile.centre[LANES - 1] - tile.centre[0] == 2 * (LANES - 1);
    }

    void four(const float *channel, int64_t image_stride, Vector *x) const {
        for (int y = 0; y < 2; y++) {
            const float *from = channel + y * a.width;
            if (row) {
                two(from + tile.image[0] * image_stride + tile.centre[0], x + 2 * y);
                continue;
            }
            Vector even{}, odd{};
            for (int lane = 0; lane < LANES; lane++) {
                const float *at = from + tile.image[lane] * image_stride + tile.centre[lane];
                even[lane] = at[0];
                odd[lane] = at[1];
            }
            x[2 * y] = even;
            x[2 * y + 1] = odd;
        }
    }

    static void two(const float *from, Vector *x) {
        Vector low = load(from), high = load(from + LANES);
        x[0] = every_second<0>(low, high);
        x[1] = every_second<1>(low, high);
    }
};

// The stem: image → Linear with BatchNorm folded in → ReLU → pooling, pixel by pixel of the pooled map.
template <int CHANNELS, int READINGS>
void fill_stem(const Arguments &a, const Tile &tile, float *panel, int64_t stride) {
    int64_t size = a.height * a.width;
    Vector image[CHANNELS][READINGS];
    for (int k = 0; k < CHANNELS; k++) {
        const float *channel = a.input + k * size;
        if (READINGS == 4) Reader(a, tile).four(channel, CHANNELS * size, image[k]);
        else image[k][0] = at_centres(tile, channel, CHANNELS * size);
    }
    for (int64_t c = 0; c < a.channels; c++) {
        Vector sum[4];
#pragma GCC unroll 4
        for (int i = 0; i < READINGS; i++) {
            sum[i] = broadcast(a.shift[c]);
#pragma GCC unroll 4
            for (int k = 0; k < CHANNELS; k++) sum[i] += image[k][i] * a.stem_weight[c * CHANNELS + k];
        }
        store(panel + c * stride, rectified(READINGS == 4 ? largest(sum) : sum[0]));
    }
}

using FillStem = void (*)(const Arguments &, const Tile &, float *, int64_t);

FillStem stem_of(const Arguments &a) {
    constexpr FillStem pooled[] = {fill_stem<1, 4>, fill_stem<2, 4>, fill_stem<3, 4>, fill_stem<4, 4>};
    constexpr FillStem plain[] = {fill_stem<1, 1>, fill_stem<2, 1>, fill_stem<3, 1>, fill_stem<4, 1>};
    return (a.pooled ? pooled : plain)[a.stem_channels - 1];
}

// Columns of one task: up to `most` tiles, and whether their output lies one behind the other.
struct Group {
    int64_t first, count;
    bool contiguous;

    Group(const Footprint &f, int64_t index, int64_t most) : first(index * most) {
        count = smaller(most, f.tiles() - first);
        int64_t start = first * LANES, stop = (first + count) * LANES, size = f.rows * f.columns;
        contiguous = stop <= f.pixels && start / size == (stop - 1) / size;
    }
};

// As many vectors as leave a panel in the core's second cache; long runs of a channel are what memory is quick at.
int64_t group_size(const Arguments &a) { return larger(6, smaller(24, 4096 / larger(a.channels, 1) / 3 * 3)); }

inline Vector normalised(const Arguments &a, Vector x, int64_t c) {
    return a.scale ? rectified(x * a.scale[c] + a.shift[c]) : x;
}

// A vector of pooled pixels of channel c; the first row of their pixels starts at `from`, the second `next` behind it.
inline Vector pool_vector(const Arguments &a, int64_t c, const float *from, int64_t next) {
    Vector four[4];
    Reader::two(from, four);
    Reader::two(from + next, four + 2);
    for (int i = 0; a.scale && i < 4; i++) four[i] = four[i] * a.scale[c] + a.shift[c];
    return a.scale ? rectified(largest(four)) : largest(four);
}

// `count` pooled pixels of channel c that lie in one row, whose first pixels are at `from`. Whole vectors are written:
// those that follow overwrite what is too much.
void pool_row(const Arguments &a, int64_t c, const float *from, int64_t count, float *out) {
    const float *stop = a.input + a.batch * a.channels * a.height * a.width;
    for (int64_t i = 0; i < count; i += LANES, from += 2 * LANES) {
        if (from + a.width + 2 * LANES <= stop) {
            store(out + i, pool_vector(a, c, from, a.width));
            continue;
        }
        // Behind the last pixels the map ends.
        float last[4 * LANES] = {};
        int64_t left = 2 * smaller(LANES, count - i);
        memcpy(last, from, left * sizeof(float));
        memcpy(last + 2 * LANES, from + a.width, left * sizeof(float));
        store(out + i, pool_vector(a, c, last, 2 * LANES));
    }
}

// Channels are the outer loop: a group's pixels of one channel lie side by side, those of the next far away.
void fill_pooled(const Arguments &a, const Footprint &f, const Group &group, float *panel, int64_t stride) {
    int64_t size = f.rows * f.columns, first = group.first * LANES;
    int64_t stop = smaller(first + group.count * LANES, f.pixels);
    for (int64_t c = 0; c < a.channels; c++)
        for (int64_t pixel = first, count; pixel < stop; pixel += count) {
            int64_t row = pixel % size / f.columns, column = pixel % f.columns;
            count = smaller(f.columns - column, stop - pixel);
            const float *channel = a.input + (pixel / size * a.channels + c) * a.height * a.width;
            pool_row(a, c, channel + 2 * (row * a.width + column), count, panel + c * stride + pixel - first);
        }
}

void fill_plain(const Arguments &a, const Tile *tiles, const Group &group, float *panel, int64_t stride) {
    int64_t size = a.height * a.width;
    const float *next = a.input + tiles[0].image[0] * a.channels * size + tiles[0].centre[0];
    for (int64_t c = 0; c < a.channels; c++) {
        for (int64_t v = 0; c + AHEAD < a.channels && group.contiguous && v < group.count; v++)
            __builtin_prefetch(next + (c + AHEAD) * size + v * LANES);
        for (int64_t v = 0; v < group.count; v++) {
            Vector x = at_centres(tiles[v], a.input + c * size, a.channels * size);
            store(panel + c * stride + v * LANES, normalised(a, x, c));
        }
    }
}

void fill(const Arguments &a, const Footprint &f, const Group &group, float *panel, int64_t stride) {
    if (a.pooled && !a.stem_channels) return fill_pooled(a, f, group, panel, stride);
    Tile tiles[MAX_GROUP];
    for (int64_t v = 0; v < group.count; v++) tiles[v] = Tile(f, group.first + v);
    if (!a.stem_channels) return fill_plain(a, tiles, group, panel, stride);
    FillStem stem = stem_of(a);
    for (int64_t v = 0; v < group.count; v++) stem(a, tiles[v], panel + v * LANES, stride);
}

// Rows [row, row + rows) of product `n` for one group's columns.
void multiply(const Arguments &a, const Footprint &f, const Group &group, const float *panel, int64_t n, int64_t row,
              int64_t rows, int64_t stride, float *room) {
    int64_t size = f.rows * f.columns, at = group.first * LANES, image_stride = a.given[n] * size;
    const float *residual = n == 0 ? a.residual : nullptr, *bias = a.bias[n];
    Product p{a.weight[n] + row * a.channels, a.channels, bias ? bias + row : nullptr, rows, a.channels,
              bias ? BIAS : ZERO, PLAIN};
    if (group.contiguous) {
        float *out = a.output[n] + (at / size * a.given[n] + row) * size + at % size;
        p.far = true;
        if (residual) {
            p.start = bias ? BIAS_AND_ADD : ADD;
            p.added = residual - a.output[n];
        }
        product(p, panel, stride, out, size, group.count);
        return;
    }
    product(p, panel, stride, room, stride, group.count);
    for (int64_t v = 0; v < group.count; v++) {
        Tile tile(f, group.first + v);
        for (int64_t r = 0; r < rows; r++) {
            Vector x = load(room + r * stride + v * LANES);
            int64_t channel = (row + r) * size;
            if (residual) x += at_outputs(tile, residual + channel, image_stride);
            set_outputs(tile, a.output[n] + channel, image_stride, x);
        }
    }
}

// Rows [row, stop) of all products, one behind the other.
void multiply_all(const Arguments &a, const Footprint &f, const Group &group, const float *panel, int64_t row,
                  int64_t stop, int64_t stride, float *room) {
    for (int64_t n = 0, start = 0; n < MAX_PRODUCTS; start += a.given[n++]) {
        int64_t first = larger(row, start), last = smaller(stop, start + a.given[n]);
        if (first < last) multiply(a, f, group, panel, n, first - start, last - first, stride, room);
    }
}

// Rows of a task: all of them, unless that leaves threads without work.
int64_t chunk_rows(int64_t rows, int64_t threads, int64_t groups) {
    int64_t chunks = larger(1, (8 * threads + groups - 1) / groups);
    return larger(64, rounded_up((rows + chunks - 1) / chunks, TILE_ROWS));
}

bool fits(const Arguments &a) {
    for (int64_t n = 0; n < MAX_PRODUCTS; n++)
        if (a.given[n] > 0 && !(a.weight[n] && a.output[n])) return false;
    return a.Input::fits(a.given);
}

int forward(const Arguments &a) {
    if (!fits(a)) return WRONG_SIZES;
    Footprint f = pixels_of(a);
    int64_t given = a.given[0] + a.given[1] + a.given[2], threads = larger(1, a.threads);
    int64_t most = group_size(a), stride = most * LANES;
    int64_t groups = (f.tiles() + most - 1) / most, rows = chunk_rows(given, threads, groups);
    int64_t chunks = (given + rows - 1) / rows;
    Workspace sizes;
    sizes.take<float>(a.channels * stride + LANES);
    sizes.take<float>(rows * stride);
    Block block(threads * sizes.used());
    if (!block.start) return OUT_OF_MEMORY;
    Tasks tasks(groups * chunks, threads);
#pragma omp parallel num_threads(threads)
    {
        Workspace space(static_cast<char *>(block.start) + thread_number() * sizes.used());
        float *panel = space.take<float>(a.channels * stride + LANES), *room = space.take<float>(rows * stride);
        int64_t filled = -1;
        tasks.each([&](int64_t task) {
            Group group(f, task / chunks, most);
            if (filled != task / chunks) fill(a, f, group, panel, stride);
            filled = task / chunks;
            int64_t row = task % chunks * rows;
            multiply_all(a, f, group, panel, row, smaller(given, row + rows), stride, room);
        });
    }
    return DONE;
}

// BatchNorm with fixed statistics, folded: into scale and shift, or into the weight and bias of the Linear before it.
struct Norm {
    int64_t channels;
    const float *weight, *bias, *mean, *variance;
    double eps;
    int64_t columns;  // of the Linear's weight, 0 without one
    const float *linear_weight, *linear_bias;
    float *scale, *shift;  // results: [channels] each, or [channels][columns] and [channels]
};

constexpr int64_t MAX_NORMS = 6;
struct NormArguments {
    int64_t threads;
    Norm norm[MAX_NORMS];  // those of 0 channels are left out
};

bool fits(const Norm &n) {
    if (n.channels == 0) return true;
    if (n.columns < 0 || !countable(n.channels, larger(1, n.columns))) return false;
    return n.mean && n.variance && n.scale && n.shift && (n.columns == 0 || n.linear_weight);
}

int fold(const NormArguments &a) {
    for (const Norm &n : a.norm)
        if (!fits(n)) return WRONG_SIZES;
    for (const Norm &n : a.norm)
        for (int64_t c = 0; c < n.channels; c++) {
            double s = (n.weight ? n.weight[c] : 1.0) / __builtin_sqrt(n.variance[c] + n.eps);
            double t = (n.bias ? n.bias[c] : 0.0) - n.mean[c] * s;
            float scale = static_cast<float>(s);
            if (n.columns && n.linear_bias) t += n.linear_bias[c] * s;
            for (int64_t d = 0; d < n.columns; d++) n.scale[c * n.columns + d] = n.linear_weight[c * n.columns + d] * scale;
            if (!n.columns) n.scale[c] = scale;
            n.shift[c] = static_cast<float>(t);
        }
    return DONE;
}

}  // namespace

SAN_KERNEL(pointwise_forward, Arguments, forward)
SAN_KERNEL(fold, NormArguments, fold)
