// Ops run at once, or are recorded and run again and again as one: a decode step becomes a single call.
//
// An op checks its tensors, builds a task that holds their addresses, and hands it to run_or_record(). While a program is
// being recorded on this thread the task is only kept. A recorded task reads what changes between runs (tokens, positions,
// lengths) from the tensors it was given; whoever records keeps all of them alive and in place. record_call() adds a
// function from outside between them, with a name: native code, for one that takes Python's lock could wait for a fork
// that waits for it.
#pragma once
#include <functional>

#include "team.h"

namespace llmopt {

using Task = std::function<void(const Team&)>;

// true while this thread records
bool recording();

// Runs the task on up to `threads` threads, or keeps it under the op's name, a string constant.
void run_or_record(const char* op, Task task, int threads);

}  // namespace llmopt
