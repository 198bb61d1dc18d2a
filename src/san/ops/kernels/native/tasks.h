// Who does which task of a parallel region: every thread has a run of them, and helps others when its own is done.
//
// Where tasks are numbered by the pixels that they are about, first image first, a thread reads mostly what it wrote
// itself in the kernel before: its caches have it, while fetching it from another core's costs as much as from memory
// where cores do not share a last-level cache. Which thread does a task changes no bit.
#pragma once

#include "entry.h"

namespace {

class Tasks {
public:
    // Built before the region, by one thread.
    Tasks(int64_t count, int64_t threads) : runs_(threads < MOST_RUNS ? threads : MOST_RUNS) {
        for (int64_t r = 0; r < runs_; r++) run_[r] = {count * r / runs_, count * (r + 1) / runs_};
    }

    // Calls `work` with each task's number; all threads of a team call it, and none waits at its end.
    template <typename Work>
    void each(const Work &work) {
        for (int64_t r = 0; r < runs_; r++) {
            Run &run = run_[(thread_number() + r) % runs_];
            for (int64_t task; (task = __atomic_fetch_add(&run.next, 1, __ATOMIC_RELAXED)) < run.stop;) work(task);
        }
    }

private:
    static constexpr int64_t MOST_RUNS = 64;
    // On cache lines of their own: threads count without disturbing each other.
    struct alignas(64) Run {
        int64_t next, stop;
    };
    int64_t runs_;
    Run run_[MOST_RUNS];
};

}  // namespace
