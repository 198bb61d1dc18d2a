// Runs recorded kernel calls one after the other, so that nothing of Python stands between them.

#include <stdint.h>
#include <string.h>

#include "workspace.h"

namespace {

struct Step {
    int (*kernel)(const int64_t *arguments, int64_t count);
    int64_t first, count;  // the call's arguments among all
};

// An argument that counts from the beginning of one of the memories.
struct Place {
    int64_t argument, memory;
};

}  // namespace

// 0, or the code of the first call that failed and 256 times its number.
extern "C" __attribute__((visibility("default"))) int64_t san_run_sequence(const Step *steps, int64_t count,
                                                                           const int64_t *recorded, int64_t length,
                                                                           const Place *places, int64_t moved,
                                                                           const int64_t *memories) {
    // A copy, because other threads may repeat the same calls on other memories.
    Block block(length * sizeof(int64_t));
    if (!block.start) return 2;
    int64_t *arguments = static_cast<int64_t *>(block.start);
    memcpy(arguments, recorded, length * sizeof(int64_t));
    for (int64_t i = 0; i < moved; i++) arguments[places[i].argument] += memories[places[i].memory];
    for (int64_t i = 0; i < count; i++)
        if (int64_t code = steps[i].kernel(arguments + steps[i].first, steps[i].count)) return 256 * i + code;
    return 0;
}
