// Memory as vector instructions like it: aligned and in zeros, and for weights in huge pages.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

struct Free {
    void operator()(void *memory) const { free(memory); }
};

template <class T> using Memory = std::unique_ptr<T[], Free>;

template <class T> Memory<T> allocate(size_t count) {
    size_t bytes = (std::max<size_t>(count, 1) * sizeof(T) + 63) / 64 * 64;
    T *memory = (T *)aligned_alloc(64, bytes);
    if (!memory) throw std::bad_alloc();
    memset((void *)memory, 0, bytes);
    return Memory<T>(memory);
}

template <class T> Memory<T> copied(const T *from, size_t count) {
    if (!from) return nullptr;
    Memory<T> to = allocate<T>(count);
    memcpy(to.get(), from, count * sizeof(T));
    return to;
}

// Memory for weights, which is read from end to end again and again: side by side in huge pages where the system gives them, for the
// walk through small ones takes a third of the time. Given back as a whole.
class Weights {
  public:
    // What is asked for comes out of chunks of so many bytes; freed, the largest go back to the system.
    explicit Weights(size_t chunk = 32 << 20) : chunk_(chunk) {}

    // In zeros, aligned to 64 bytes.
    uint8_t *take(size_t bytes) {
        bytes = (bytes + 63) / 64 * 64;
        if (bytes > left_) {
            left_ = (std::max(bytes, chunk_) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
            next_ = (uint8_t *)aligned_alloc(HUGE_PAGE, left_);
            if (!next_) {
                left_ = 0;
                throw std::bad_alloc();
            }
            chunks_.emplace_back(next_);
#if defined(MADV_HUGEPAGE)
            madvise(next_, left_, MADV_HUGEPAGE);
#endif
        }
        uint8_t *taken = next_;
        next_ += bytes, left_ -= bytes;
        memset(taken, 0, bytes);
        return taken;
    }

  private:
    static constexpr size_t HUGE_PAGE = 2 << 20;
    size_t chunk_;
    std::vector<Memory<uint8_t>> chunks_;
    uint8_t *next_ = nullptr;
    size_t left_ = 0;
};
