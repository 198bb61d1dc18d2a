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
#define SAN_KERNEL(kernel, Arguments, run)                                                       \
    extern "C" __attribute__((visibility("default"))) int SAN_NAME(kernel, SAN_INSTRUCTION_SET)( \
        const int64_t *arguments, int64_t count) {                                               \
        Arguments read;                                                                          \
        if (count * static_cast<int64_t>(sizeof(int64_t)) != static_cast<int64_t>(sizeof read))  \
            return WRONG_SIZES;                                                                  \
        memcpy(&read, arguments, sizeof read);                                                   \
        return run(read);                                                                        \
    }

namespace {

enum Outcome { DONE = 0, WRONG_SIZES = 1, OUT_OF_MEMORY = 2 };

inline int64_t thread_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

}  // namespace
