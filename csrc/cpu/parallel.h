// Work sharing with plain threads.
#pragma once

#include <cstdint>
#include <functional>

namespace dream::cpu {

// Calls `body(worker, task)` once for each task in [0, tasks), on up to `threads` workers, the
// calling thread being worker 0. Tasks are handed out as workers become free, so a task must not
// depend on which worker runs it. Threads live for one call: a pool would not survive fork(), and
// starting them costs tens of microseconds. Rethrows the first exception of a body.
void parallel_for(int64_t tasks, int threads,
                  const std::function<void(int worker, int64_t task)>& body);

}  // namespace dream::cpu
