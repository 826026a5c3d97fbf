// Threads that share the tasks of a step. They wait by spinning for as long as the next call of a step takes to come, then sleep.
#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <pthread.h>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// They are never ended: the process ends with them.
class Threads {
  public:
    explicit Threads(int count) {
        for (int index = 1; index < count; index++) workers_.emplace_back([this, index] { work(index); });
    }

    int count() const { return (int)workers_.size() + 1; }

    // Call `task(context, number, thread)` for every number before `tasks`, and return when all are done. Where the workers
    // are busy for somebody else, or were left behind by a fork, the caller computes alone.
    void run(int tasks, void (*task)(void *, int, int), void *context) {
        bool alone = workers_.empty() || tasks < 2 || forks() != forks_;
        std::unique_lock<std::mutex> mine(in_use_, std::defer_lock);
        if (alone || !mine.try_lock()) {
            for (int number = 0; number < tasks; number++) task(context, number, 0);
            return;
        }
        task_ = task, context_ = context, tasks_ = tasks;
        next_.store(0, std::memory_order_relaxed);
        busy_.store((int)workers_.size(), std::memory_order_relaxed);
        wake();
        take(0);
        for (int turns = 0; busy_.load(std::memory_order_acquire); turns++) pause(turns);
    }

    template <class F> void each(int tasks, F &&body) {
        using Body = std::remove_reference_t<F>;
        run(tasks, [](void *context, int number, int thread) { (*(Body *)context)(number, thread); }, (void *)&body);
    }

  private:
    void wake() {
        {
            // Whoever is about to sleep looks at the round once more under this lock.
            std::lock_guard<std::mutex> lock(mutex_);
            round_.fetch_add(1, std::memory_order_release);
        }
        if (sleeping_.load()) condition_.notify_all();
    }

    void take(int thread) {
        for (int number; (number = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) task_(context_, number, thread);
    }

    void work(int thread) {
        unsigned seen = 0;
        while (true) {
            for (int turns = 0; turns < SPINS && round_.load(std::memory_order_acquire) == seen; turns++) pause(turns);
            if (round_.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> lock(mutex_);
                sleeping_++;
                condition_.wait(lock, [&] { return round_.load(std::memory_order_acquire) != seen; });
                sleeping_--;
            }
            seen++;
            take(thread);
            busy_.fetch_sub(1, std::memory_order_release);
        }
    }

    static void pause(int turns) {
        // A core that somebody else waits for is given up.
        if (turns % 64 == 63) std::this_thread::yield();
#if defined(__x86_64__)
        else _mm_pause();
#endif
    }

    // How often the process is the child of a fork since the first threads were started.
    static int forks() { return counted_forks().load(std::memory_order_relaxed); }

    static std::atomic<int> &counted_forks() {
        static std::atomic<int> count{0};
        static int registered = pthread_atfork(nullptr, nullptr, [] { counted_forks()++; });
        (void)registered;
        return count;
    }

    static const int SPINS = 20000;
    std::vector<std::thread> workers_;
    std::mutex mutex_, in_use_;
    int forks_ = forks();
    std::condition_variable condition_;
    std::atomic<unsigned> round_{0};
    std::atomic<int> next_{0}, busy_{0}, sleeping_{0};
    void (*task_)(void *, int, int) = nullptr;
    void *context_ = nullptr;
    int tasks_ = 0;
};
