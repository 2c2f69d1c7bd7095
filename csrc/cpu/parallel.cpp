#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace dream::cpu {
namespace {

class Team {
 public:
  Team(int64_t tasks, const std::function<void(int, int64_t)>& body) : tasks_(tasks), body_(body) {}

  // To be called by each thread of the team; a thread that comes late finds nothing left to do.
  void work() {
    const int worker = workers_.fetch_add(1);
    try {
      for (int64_t task; (task = next_.fetch_add(1)) < tasks_;) body_(worker, task);
    } catch (...) {
      next_.store(tasks_);
      const std::lock_guard<std::mutex> lock(error_mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }

  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  const int64_t tasks_;
  const std::function<void(int, int64_t)>& body_;
  std::atomic<int> workers_{0};
  std::atomic<int64_t> next_{0};
  std::exception_ptr error_;
  std::mutex error_mutex_;
};

// What a compiler makes of `#pragma omp parallel`: runs the function on that many threads of the
// runtime's pool, fewer when it is already inside such a region.
using OpenMPParallel = void (*)(void (*function)(void*), void* data, unsigned threads,
                                unsigned flags);

OpenMPParallel find_openmp() {
#if defined(__unix__) || defined(__APPLE__)
  return reinterpret_cast<OpenMPParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
  return nullptr;
#endif
}

void run_on_new_threads(Team* team, int threads) {
  std::vector<std::thread> helpers;
  try {
    for (int i = 1; i < threads; ++i) helpers.emplace_back([team] { team->work(); });
  } catch (const std::system_error&) {
    // No more threads to be had: those that started do the work.
  }
  team->work();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace

void parallel_for(int64_t tasks, int threads,
                  const std::function<void(int worker, int64_t task)>& body) {
  static const OpenMPParallel openmp = find_openmp();
  Team team(tasks, body);
  threads = static_cast<int>(std::min<int64_t>(threads, tasks));
  if (threads <= 1) {
    team.work();
  } else if (openmp != nullptr) {
    openmp([](void* data) { static_cast<Team*>(data)->work(); }, &team,
           static_cast<unsigned>(threads), 0);
  } else {
    run_on_new_threads(&team, threads);
  }
  team.rethrow();
}

}  // namespace dream::cpu
