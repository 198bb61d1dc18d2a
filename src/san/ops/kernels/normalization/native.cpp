// BatchNorm on vectors of its channels, in double precision: from moments to scale and shift, alone or folded into the
// Linear before it, and back. A training step asks for this a hundred times, so each direction is one call.
//
// Behind a Linear y = W x + b the moments of y follow from those of x, mean m and co-deviations C: W m + b and
// diag(W C Wᵀ). The gradient that comes back through moments is slope · y + intercept at every sample y, and so
// Wᵀ(slope · y + intercept) at every sample x.

#include "../native/entry.h"
#include "../native/vector.h"
#include "../native/workspace.h"

namespace {

// What both directions know: the Linear, if there is one, and the moments of what enters it, else BatchNorm.
struct Source {
    int64_t channels, columns;       // columns of the Linear's weight, 0 without one
    int64_t count;                   // samples behind the moments, 0 where statistics are fixed
    const double *mean, *deviation;  // [channels] each; before a Linear [columns] and [columns][columns]
    const float *weight, *bias;      // the Linear's [channels][columns] and, if it has one, [channels]

    bool fits() const {
        if (columns < 0 || count < 0 || count > MAX_COUNT || !countable(channels, larger(1, columns))) return false;
        if (columns && !(weight && countable(columns, columns))) return false;
        return count == 0 || (mean && deviation);
    }

    double bias_of(int64_t c) const { return columns && bias ? bias[c] : 0; }

    double mean_of(int64_t c) const {
        if (!columns) return mean[c];
        double sum = bias_of(c);
        for (int64_t k = 0; k < columns; k++) sum += weight[c * columns + k] * mean[k];
        return sum;
    }

    // Row c of W C.
    void spread(int64_t c, double *row) const {
        memset(row, 0, columns * sizeof(double));
        for (int64_t d = 0; d < columns; d++) {
            double factor = weight[c * columns + d];
            for (int64_t k = 0; k < columns; k++) row[k] += factor * deviation[d * columns + k];
        }
    }

    double deviation_of(int64_t c, double *row) const {
        if (!columns) return deviation[c];
        spread(c, row);
        double sum = 0;
        for (int64_t k = 0; k < columns; k++) sum += row[k] * weight[c * columns + k];
        return sum < 0 ? 0 : sum;
    }
};

struct Arguments {
    int64_t threads;
    Source source;
    double eps, step;  // by how much the running averages move
    const float *weight, *bias;
    float *running_mean, *running_variance;  // the statistics where they are fixed; null: none to move
    double *statistics;                      // result: mean, 1/σ, scale, shift [4][channels]
    float *scale, *shift;                    // results: [channels] each, or the Linear's weight and bias, folded
};

// As torch.lerp.
inline void move(float &average, double to, float step) {
    float end = static_cast<float>(to), way = end - average;
    average = step < 0.5f ? average + step * way : end - way * (1 - step);
}

void normalise(const Arguments &a, int64_t c, double *row) {
    const Source &s = a.source;
    double mean, variance;
    if (s.count) {
        double deviation = s.deviation_of(c, row);
        mean = s.mean_of(c);
        variance = deviation / s.count;
        if (a.running_mean) {
            move(a.running_mean[c], mean, static_cast<float>(a.step));
            move(a.running_variance[c], deviation / larger(s.count - 1, 1), static_cast<float>(a.step));
        }
    } else {
        mean = a.running_mean[c];
        variance = a.running_variance[c];
    }
    double inverse = 1 / __builtin_sqrt(variance + a.eps), scale = inverse * (a.weight ? a.weight[c] : 1);
    double shift = (a.bias ? a.bias[c] : 0) - mean * scale, found[4] = {mean, inverse, scale, shift};
    for (int i = 0; i < 4; i++) a.statistics[i * s.channels + c] = found[i];
    a.shift[c] = static_cast<float>(shift + s.bias_of(c) * scale);
    if (!s.columns) a.scale[c] = static_cast<float>(scale);
    for (int64_t k = c * s.columns; k < (c + 1) * s.columns; k++) a.scale[k] = static_cast<float>(s.weight[k] * scale);
}

int fold(const Arguments &a) {
    const Source &s = a.source;
    if (!s.fits() || !a.statistics || !a.scale || !a.shift || !a.running_mean != !a.running_variance) return WRONG_SIZES;
    if (!s.count && !a.running_mean) return WRONG_SIZES;
    Block block(larger(1, s.columns) * sizeof(double));
    if (!block.start) return OUT_OF_MEMORY;
    for (int64_t c = 0; c < s.channels; c++) normalise(a, c, static_cast<double *>(block.start));
    return DONE;
}

struct BackwardArguments {
    int64_t threads;
    Source source;
    int64_t total;  // samples behind the statistics: more than the source's where processes share them
    const double *statistics;
    const double *of_scale, *of_shift;    // gradients: [channels] each, or at the folded weight and bias
    const double *all_scale, *all_shift;  // gradients at scale and shift from all processes; null: these are all
    // Results. Of BatchNorm's own parameters, of the Linear's if there is one, and what moments give to every sample of
    // the source: slope and intercept, [channels] each, before a Linear [columns][columns] and [columns].
    float *weight_gradient, *bias_gradient, *linear_weight_gradient, *linear_bias_gradient;
    double *slope, *intercept;
};

// What BatchNorm gives back at channel c: gradients at its weight and bias, and at y as slope · y + intercept.
struct Back {
    double weight, bias, scale, slope = 0, intercept = 0;

    Back(const BackwardArguments &a, int64_t c, double of_scale) : bias(a.of_shift[c]) {
        int64_t channels = a.source.channels;
        double mean = a.statistics[c], inverse = a.statistics[channels + c];
        scale = a.statistics[2 * channels + c];
        weight = inverse * (of_scale - mean * bias);
        if (!a.source.count) return;
        double all_shift = a.all_shift ? a.all_shift[c] : bias;
        double normalised = inverse * ((a.all_scale ? a.all_scale[c] : of_scale) - mean * all_shift);
        slope = -scale * inverse * normalised / a.total;
        intercept = -scale * all_shift / a.total - slope * mean;
    }
};

double scale_gradient(const BackwardArguments &a, int64_t c) {
    const Source &s = a.source;
    if (!s.columns) return a.of_scale[c];
    double sum = s.bias_of(c) * a.of_shift[c];
    for (int64_t k = c * s.columns; k < (c + 1) * s.columns; k++) sum += s.weight[k] * a.of_scale[k];
    return sum;
}

// The Linear's gradients: through what it was folded to, and Σ (slope · y + intercept) xᵀ over all samples.
void linear_gradient(const BackwardArguments &a, int64_t c, const Back &back, double *row) {
    const Source &s = a.source;
    double sum = 0;
    if (s.count) {
        sum = s.count * (back.slope * s.mean_of(c) + back.intercept);
        s.spread(c, row);
    }
    for (int64_t k = 0; k < s.columns; k++) {
        double moved = s.count ? back.slope * row[k] + sum * s.mean[k] : 0;
        a.linear_weight_gradient[c * s.columns + k] =
            static_cast<float>(back.scale * a.of_scale[c * s.columns + k] + moved);
    }
    if (a.linear_bias_gradient) a.linear_bias_gradient[c] = static_cast<float>(back.scale * back.bias + sum);
}

// Adds Wᵀ(slope · (W x + b) + intercept) of channel c, as slope and intercept of x.
void pass_on(const BackwardArguments &a, int64_t c, const Back &back) {
    const Source &s = a.source;
    const float *weight = s.weight + c * s.columns;
    double rest = back.slope * s.bias_of(c) + back.intercept;
    for (int64_t k = 0; k < s.columns; k++) {
        double factor = back.slope * weight[k];
        double *row = a.slope + k * s.columns;
        for (int64_t d = 0; d < s.columns; d++) row[d] += factor * weight[d];
        a.intercept[k] += rest * weight[k];
    }
}

bool fits(const BackwardArguments &a) {
    const Source &s = a.source;
    bool whole = a.statistics && a.of_scale && a.of_shift && a.weight_gradient && a.bias_gradient;
    bool linear = !s.columns || a.linear_weight_gradient;
    return s.fits() && a.total >= s.count && a.total <= MAX_COUNT && whole && linear &&
           !a.all_scale == !a.all_shift && !a.slope == !a.intercept;
}

int backward(const BackwardArguments &a) {
    const Source &s = a.source;
    if (!fits(a)) return WRONG_SIZES;
    Block block(larger(1, s.columns) * sizeof(double));
    if (!block.start) return OUT_OF_MEMORY;
    if (a.slope && s.columns) {
        memset(a.slope, 0, s.columns * s.columns * sizeof(double));
        memset(a.intercept, 0, s.columns * sizeof(double));
    }
    for (int64_t c = 0; c < s.channels; c++) {
        Back back(a, c, scale_gradient(a, c));
        a.weight_gradient[c] = static_cast<float>(back.weight);
        a.bias_gradient[c] = static_cast<float>(back.bias);
        if (s.columns) linear_gradient(a, c, back, static_cast<double *>(block.start));
        if (a.slope && s.columns) pass_on(a, c, back);
        if (a.slope && !s.columns) {
            a.slope[c] = back.slope;
            a.intercept[c] = back.intercept;
        }
    }
    return DONE;
}

}  // namespace

SAN_KERNEL(normalization_fold, Arguments, fold)
SAN_KERNEL(normalization_backward, BackwardArguments, backward)
