// Threads that share the tasks of a step. They wait by spinning for as long as the next call of a step takes to come, then sleep.
#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

class Threads {
  public:
    explicit Threads(int count) {
        for (int index = 1; index < count; index++) workers_.emplace_back([this, index] { work(index); });
    }

    ~Threads() {
        ending_ = true;
        wake();
        for (std::thread &worker : workers_) worker.join();
    }

    int count() const { return (int)workers_.size() + 1; }

    // Call `task(context, number, thread)` for every number before `tasks`, and return when all are done.
    void run(int tasks, void (*task)(void *, int, int), void *context) {
        if (workers_.empty() || tasks < 2) {
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
        run(tasks, [](void *context, int number, int thread) { (*(F *)context)(number, thread); }, &body);
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
            if (ending_) return;
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

    static const int SPINS = 20000;
    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable condition_;
    std::atomic<unsigned> round_{0};
    std::atomic<int> next_{0}, busy_{0}, sleeping_{0};
    std::atomic<bool> ending_{false};
    void (*task_)(void *, int, int) = nullptr;
    void *context_ = nullptr;
    int tasks_ = 0;
};
