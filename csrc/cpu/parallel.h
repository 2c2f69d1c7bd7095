// Work sharing between threads.
#pragma once

#include <cstdint>
#include <functional>

namespace dream::cpu {

// Calls `body(worker, task)` once for each task in [0, tasks), on up to `threads` workers, the
// calling thread among them. Tasks are handed out as workers become free, so a task must not depend
// on which worker runs it. Rethrows the first exception of a body.
//
// The threads are those of the OpenMP runtime that PyTorch brought into the process: its idle
// threads keep a core busy for milliseconds after every operator, waiting for the next one, and
// threads beside them would have to share it. Where there is no such runtime, threads are started
// for the call.
void parallel_for(int64_t tasks, int threads,
                  const std::function<void(int worker, int64_t task)>& body);

}  // namespace dream::cpu
