// One vector of floats, as wide as the instruction set that a file is compiled for, and what the kernels do with it.
//
// GCC's vector extensions carry the arithmetic; intrinsics appear only where the compiler misses an instruction.
// Everything is in an anonymous namespace: the same source is compiled several times, and nothing may be shared.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int VECTOR_BYTES = LANES * 4;

typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t Integers __attribute__((vector_size(VECTOR_BYTES)));
typedef float Unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

inline Vector load(const float *from) { return *reinterpret_cast<const Unaligned *>(from); }
inline void store(float *to, Vector x) { *reinterpret_cast<Unaligned *>(to) = x; }
inline Vector broadcast(float x) { return x - Vector{}; }

// The larger of both; where either is NaN, the second: so maximum(bound, x) hands NaN on.
inline Vector maximum(Vector bound, Vector x) {
#if defined(__AVX512F__)
    return _mm512_max_ps(bound, x);
#elif defined(__AVX__)
    return _mm256_max_ps(bound, x);
#else
    return bound > x ? bound : x;
#endif
}

inline Vector rectified(Vector x) { return maximum(Vector{}, x); }

// The gradient, or 0 where the activation was rectified; a NaN was not.
inline Vector passed(Vector gradient, Vector activation) { return activation <= 0 ? Vector{} : gradient; }

template <int... lane>
struct LaneNumbers {};
template <int count, int... lane>
struct LanesBelow : LanesBelow<count - 1, count - 1, lane...> {};
template <int... lane>
struct LanesBelow<0, lane...> {
    typedef LaneNumbers<lane...> Type;
};

template <typename From, int... lane>
inline Vector shuffled(Vector a, Vector b, LaneNumbers<lane...>) {
#if __has_builtin(__builtin_shufflevector)
    return __builtin_shufflevector(a, b, From::lane_of(lane)...);
#else
    return __builtin_shuffle(a, b, Integers{From::lane_of(lane)...});
#endif
}

// Lane l is lane `From::lane_of(l)` of a and b, counted through both.
template <typename From>
inline Vector shuffled(Vector a, Vector b) {
    return shuffled<From>(a, b, typename LanesBelow<LANES>::Type());
}

#if defined(__AVX512F__)
typedef __mmask16 Mask;
inline Mask lanes_from(int first) { return static_cast<Mask>(0xffffu << first); }
inline Vector blended_load(Vector otherwise, Mask mask, const float *from) {
    return _mm512_mask_loadu_ps(otherwise, mask, from);
}
inline void add_masked(float *to, Mask mask, Vector x) {
    _mm512_mask_storeu_ps(to, mask, _mm512_mask_loadu_ps(Vector{}, mask, to) + x);
}
// Adds x under several disjoint masks. All loads come first: a load waits for a masked store that it may overlap.
template <int COUNT>
inline void add_each_masked(float *to, const int64_t *offset, const Mask *mask, Vector x) {
    Vector sum[COUNT];
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; i++) sum[i] = load(to + offset[i]) + x;
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; i++) _mm512_mask_storeu_ps(to + offset[i], mask[i], sum[i]);
}
inline Mask without(Mask a, Mask b) { return a & ~b; }
#else
typedef Integers Mask;
inline Integers lane_numbers() {
    Integers number{};
    for (int lane = 0; lane < LANES; lane++) number[lane] = lane;
    return number;
}
inline Mask lanes_from(int first) { return lane_numbers() >= first; }
inline Vector blended_load(Vector otherwise, Mask mask, const float *from) { return mask ? load(from) : otherwise; }
inline void add_masked(float *to, Mask mask, Vector x) { store(to, load(to) + (mask ? x : Vector{})); }
template <int COUNT>
inline void add_each_masked(float *to, const int64_t *offset, const Mask *mask, Vector x) {
    for (int i = 0; i < COUNT; i++) add_masked(to + offset[i], mask[i], x);
}
inline Mask without(Mask a, Mask b) { return a & ~b; }
#endif

// Lane l is 1 for l < count, else 0.
inline Vector first_lanes(int count) {
    Vector x{};
    for (int lane = 0; lane < count; lane++) x[lane] = 1.0f;
    return x;
}

// Swaps neighbouring groups of `distance` lanes between two vectors and adds: one level of a transposed sum.
template <int distance>
inline Vector folded(Vector a, Vector b) {
    struct Kept {
        static constexpr int lane_of(int lane) { return lane + (lane & distance ? LANES : 0); }
    };
    struct Swapped {
        static constexpr int lane_of(int lane) { return (lane ^ distance) + (lane & distance ? LANES : 0); }
    };
    return shuffled<Kept>(a, b) + shuffled<Swapped>(a, b);
}

template <int distance>
inline void fold(Vector *x) {
    for (int i = 0; i < distance; i++) x[i] = folded<distance>(x[i], x[i + distance]);
    if constexpr (distance > 1) fold<distance / 2>(x);
}

// Lane l of the result is the sum over all lanes of x[l]; x is used up.
inline Vector lane_sums(Vector *x) {
    fold<LANES / 2>(x);
    return x[0];
}

inline float lane_sum(Vector x) {
    float part[LANES];
    store(part, x);
    for (int half = LANES / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++) part[lane] += part[lane + half];
    return part[0];
}

// e^x for x <= 0, to 2 units in the last place; 0 below -87.3. Cody and Waite's reduction by ln 2, then a polynomial.
inline Vector exponential(Vector x) {
    Vector bounded = maximum(broadcast(-87.3f), x);
    Vector rounder = broadcast(12582912.0f);
    Vector power = (bounded * 1.44269504f + rounder) - rounder;
    Vector rest = bounded - power * 0.693359375f + power * 2.12194440e-4f;
    Vector y = broadcast(1.9875691500e-4f);
    y = y * rest + 1.3981999507e-3f;
    y = y * rest + 8.3334519073e-3f;
    y = y * rest + 4.1665795894e-2f;
    y = y * rest + 1.6666665459e-1f;
    y = y * rest + 5.0000001201e-1f;
    y = y * (rest * rest) + rest + 1.0f;
    Integers exponent = (__builtin_convertvector(power, Integers) + 127) << 23;
    Vector scaled = y * (Vector)exponent;
    return x < -87.3f ? Vector{} : scaled;
}

}  // namespace
