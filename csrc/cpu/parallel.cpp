#include "parallel.h"

#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace dream::cpu {

void parallel_for(int64_t tasks, int threads,
                  const std::function<void(int worker, int64_t task)>& body) {
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  const auto work = [&](int worker) {
    try {
      for (int64_t task; (task = next.fetch_add(1)) < tasks;) body(worker, task);
    } catch (...) {
      next.store(tasks);
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  };
  std::vector<std::thread> helpers;
  try {
    for (int worker = 1; worker < threads && worker < tasks; ++worker) {
      helpers.emplace_back(work, worker);
    }
  } catch (const std::system_error&) {
    // No more threads to be had: those that started do the work.
  }
  work(0);
  for (std::thread& helper : helpers) helper.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace dream::cpu
