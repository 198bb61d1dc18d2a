// How Python calls a kernel: an array of 64-bit integers, which are numbers and addresses, read into a struct.
#pragma once

#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define SAN_JOIN(a, b) a##_##b
#define SAN_NAME(kernel, set) SAN_JOIN(san_##kernel, set)

// Defines `int san_<kernel>_<instruction set>(const int64_t *arguments, int64_t count)` around `run(const Arguments &)`.
// The number of threads is the first argument of every kernel.
#define SAN_KERNEL(kernel, Arguments, run)                                                       \
    extern "C" __attribute__((visibility("default"))) int SAN_NAME(kernel, SAN_INSTRUCTION_SET)( \
        const int64_t *arguments, int64_t count) {                                               \
        Arguments read;                                                                          \
        if (count != static_cast<int64_t>(sizeof read / sizeof(int64_t))) return WRONG_SIZES;    \
        memcpy(&read, arguments, sizeof read);                                                   \
        return arguments[0] > 0 && arguments[0] <= MAX_THREADS ? run(read) : WRONG_SIZES;        \
    }

namespace {

static_assert(sizeof(void *) == sizeof(int64_t), "arguments hold addresses in 64 bits");

enum Outcome { DONE = 0, WRONG_SIZES = 1, OUT_OF_MEMORY = 2 };

// Sizes are checked before anything is computed from them. A tensor or buffer of them holds at most MAX_COUNT items:
// then no sum of such counts, in bytes and for all threads, leaves 64 bits.
constexpr int64_t MAX_COUNT = int64_t(1) << 40, MAX_THREADS = 1024;

// Whether there can be a tensor of these sizes, none of them 0.
template <typename... Sizes>
inline bool countable(Sizes... sizes) {
    int64_t count = 1;
    return ((sizes > 0 && !__builtin_mul_overflow(count, sizes, &count) && count <= MAX_COUNT) && ...);
}

inline int64_t thread_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

}  // namespace
