// The pool behind workspace.h: compiled once, shared by all instruction sets and threads.

#include "workspace.h"

#include <stdlib.h>

extern "C" {

__attribute__((visibility("default"))) int64_t san_native_bytes(void);
__attribute__((visibility("default"))) void san_release_memory(void);

}

namespace {

// Blocks carry their size in a cache line before them.
struct Header {
    size_t bytes;
    Header *next;
    char rest[48];
};
static_assert(sizeof(Header) == 64, "keeps blocks on cache lines");

#ifdef SAN_SANITIZE
// Every call gets a fresh block that ends where its last piece does.
constexpr size_t KEPT_BYTES = 0, STEP_BYTES = 64;
#else
// What is idle counts among what a network keeps for backward, so a block far larger than recent calls wanted goes.
constexpr size_t KEPT_BYTES = size_t(32) << 20, STEP_BYTES = 4096;
#endif
Header *idle = nullptr;
size_t idle_bytes = 0, total_bytes = 0;
bool taken = false;

// The most that the last WINDOW to 2 · WINDOW calls wanted.
constexpr int WINDOW = 16;
size_t wanted_lately = 0, wanted_before = 0;
int calls_lately = 0;

void note(size_t bytes) {
    if (++calls_lately > WINDOW) {
        wanted_before = wanted_lately;
        wanted_lately = 0;
        calls_lately = 1;
    }
    if (bytes > wanted_lately) wanted_lately = bytes;
}

bool is_oversized(size_t bytes) { return bytes > 2 * (wanted_lately > wanted_before ? wanted_lately : wanted_before); }

struct Lock {
    Lock() {
        while (__atomic_test_and_set(&taken, __ATOMIC_ACQUIRE)) {
        }
    }
    ~Lock() { __atomic_clear(&taken, __ATOMIC_RELEASE); }
};

Header *unlinked(Header **place) {
    Header *block = *place;
    *place = block->next;
    idle_bytes -= block->bytes;
    return block;
}

// The smallest idle block that fits; or none, and the largest of those too small gives way to the one that will be made,
// so that calls which come one after the other keep one block alone.
Header *reused(size_t bytes, Header **outgrown) {
    Header **best = nullptr, **largest = nullptr;
    for (Header **each = &idle; *each; each = &(*each)->next) {
        if ((*each)->bytes >= bytes && (!best || (*each)->bytes < (*best)->bytes)) best = each;
        if (!largest || (*each)->bytes > (*largest)->bytes) largest = each;
    }
    if (best) return unlinked(best);
    *outgrown = largest ? unlinked(largest) : nullptr;
    if (*outgrown) total_bytes -= (*outgrown)->bytes;
    return nullptr;
}

}  // namespace

void *san_acquire(size_t bytes) {
    Header *outgrown = nullptr;
    {
        Lock lock;
        note(bytes);
        if (Header *block = reused(bytes, &outgrown)) return block + 1;
    }
    free(outgrown);
    bytes = (bytes + STEP_BYTES - 1) / STEP_BYTES * STEP_BYTES;
    Header *block = static_cast<Header *>(aligned_alloc(64, bytes + sizeof(Header)));
    if (!block) return nullptr;
    block->bytes = bytes;
    forbid(block, sizeof(Header));
    Lock lock;
    total_bytes += bytes;
    return block + 1;
}

void san_release(void *start) {
    Header *block = static_cast<Header *>(start) - 1;
    allow(block, sizeof(Header));
    {
        Lock lock;
        if (idle_bytes + block->bytes <= KEPT_BYTES && !is_oversized(block->bytes)) {
            block->next = idle;
            idle = block;
            idle_bytes += block->bytes;
            return;
        }
        total_bytes -= block->bytes;
    }
    free(block);
}

int64_t san_native_bytes(void) {
    Lock lock;
    return static_cast<int64_t>(total_bytes);
}

void san_release_memory(void) {
    Lock lock;
    while (idle) {
        Header *next = idle->next;
        total_bytes -= idle->bytes;
        free(idle);
        idle = next;
    }
    idle_bytes = 0;
}
