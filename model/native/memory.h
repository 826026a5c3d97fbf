// Memory as vector instructions like it: aligned, in zeros, and in huge pages where it is much.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

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
