// Memory that kernels work in: one block per call, taken from a pool that keeps blocks for the next call.
//
// Fresh large blocks cost more in page faults than the arithmetic that uses them. A block is laid out by running the
// same `take` calls twice: first to count, then to hand out.
#pragma once

#include <stddef.h>
#include <stdint.h>
#ifdef SAN_SANITIZE
#include <sanitizer/asan_interface.h>
#endif

// Defined once, in workspace.cpp. `san_acquire` gives null when memory is out.
extern "C" void *san_acquire(size_t bytes);
extern "C" void san_release(void *block);

namespace {

// With AddressSanitizer a gap follows every piece, which nobody may touch: a piece overrun is no block overrun.
#ifdef SAN_SANITIZE
constexpr size_t GAP_BYTES = 256;
inline void forbid(void *from, size_t bytes) { __asan_poison_memory_region(from, bytes); }
inline void allow(void *from, size_t bytes) { __asan_unpoison_memory_region(from, bytes); }
#else
constexpr size_t GAP_BYTES = 0;
inline void forbid(void *, size_t) {}
inline void allow(void *, size_t) {}
#endif

class Workspace {
public:
    explicit Workspace(void *base = nullptr) : base_(static_cast<char *>(base)) {}

    // Room for `count` items on a cache line of its own; null while counting.
    template <typename Item>
    Item *take(int64_t count) {
        size_t at = used_, bytes = static_cast<size_t>(count) * sizeof(Item);
        used_ += (bytes + 63) / 64 * 64 + GAP_BYTES;
        if (!base_) return nullptr;
        allow(base_ + at, bytes);
        forbid(base_ + at + bytes, used_ - at - bytes);
        return reinterpret_cast<Item *>(base_ + at);
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
