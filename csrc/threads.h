// One function on several threads at once.
#pragma once

#if defined(_OPENMP) && !defined(__clang__)
#include <omp.h>
#else
#include <system_error>
#include <thread>
#include <vector>
#endif

namespace wanfast {

// Calls work(0) ... work(count - 1) or fewer of them, each on a thread of its own, and waits. `work` takes what there
// is to do from a common counter, and does not throw.
template <typename Work>
void on_threads(int count, const Work& work) {
#if defined(_OPENMP) && !defined(__clang__)
    // GCC's runtime is torch's too: its threads, which spin for a while after torch's own work, do this.
#pragma omp parallel num_threads(count)
    work(omp_get_thread_num());
#else
    std::vector<std::thread> helpers;
    helpers.reserve(static_cast<std::size_t>(count));
    try {
        for (int i = 1; i < count; ++i) helpers.emplace_back([&work, i] { work(i); });
    } catch (const std::system_error&) {
        // No further thread to be had: those there are do all of it.
    }
    work(0);
    for (std::thread& helper : helpers) helper.join();
#endif
}

}  // namespace wanfast
