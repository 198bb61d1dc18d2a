// Runs recorded kernel calls one after the other, so that nothing of Python stands between them.

#include <stdint.h>

namespace {

struct Step {
    int (*kernel)(const int64_t *arguments, int64_t count);
    int64_t first, count;  // the call's arguments among all
};

}  // namespace

// 0, or the code of the first call that failed and 256 times its number.
extern "C" __attribute__((visibility("default"))) int64_t san_run_sequence(const Step *steps, int64_t count,
                                                                           const int64_t *arguments) {
    for (int64_t i = 0; i < count; i++)
        if (int64_t code = steps[i].kernel(arguments + steps[i].first, steps[i].count)) return 256 * i + code;
    return 0;
}
