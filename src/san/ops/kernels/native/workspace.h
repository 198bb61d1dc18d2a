// Memory that kernels work in: one block per call, taken from a pool that keeps blocks for the next call.
//
// Fresh large blocks cost more in page faults than the arithmetic that uses them. A block is laid out by running the
// same `take` calls twice: first to count, then to hand out.
#pragma once

#include <stddef.h>
#include <stdint.h>

// Defined once, in workspace.cpp. `san_acquire` gives null when memory is out.
extern "C" void *san_acquire(size_t bytes);
extern "C" void san_release(void *block);

namespace {

class Workspace {
public:
    explicit Workspace(void *base = nullptr) : base_(static_cast<char *>(base)) {}

    // Room for `count` items on a cache line of its own; null while counting.
    template <typename Item>
    Item *take(int64_t count) {
        size_t at = used_;
        used_ += (static_cast<size_t>(count) * sizeof(Item) + 63) / 64 * 64;
        return base_ ? reinterpret_cast<Item *>(base_ + at) : nullptr;
    }
    size_t used() const { return used_; }

private:
    char *base_;
    size_t used_ = 0;
};

class Block {
public:
    explicit Block(size_t bytes) : start(san_acquire(bytes)) {}
    ~Block() {
        if (start) san_release(start);
    }
    Block(const Block &) = delete;
    Block &operator=(const Block &) = delete;
    void *const start;
};

}  // namespace
