// recording(), record_begin(), record_call(), record_end() -> {"run": run(times), "profile": profile(times)}: see program.h.
#include "program.h"

#include <pthread.h>
#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace llmopt {
namespace {

// A call of a function that is not an op of ours, such as a kernel a compiler generated; its arguments are kept alive.
struct Call {
  tvm::ffi::Function function;
  std::vector<tvm::ffi::Any> args;
  std::vector<tvm::ffi::AnyView> views;
  std::exception_ptr error;

  void run() {
    tvm::ffi::Any result;
    try {
      function.CallPacked(views.data(), static_cast<int32_t>(views.size()), &result);
    } catch (...) {
      error = std::current_exception();
    }
  }
};

struct Step {
  std::string name;
  Task task;
  bool alone;  // the first thread's work: the others need not meet it before the next such step
};

struct Program {
  std::vector<Step> steps;
  std::vector<std::shared_ptr<Call>> calls;
  // no more than when any task was recorded: it may have sized its buffers by that
  int threads = omp_get_max_threads();

  // whether what follows may begin without a meeting
  bool goes_on(size_t i) const { return steps[i].alone && i + 1 < steps.size() && steps[i + 1].alone; }

  void run(int64_t times) const {
    run_team(threads, [&](const Team& team) {
      for (int64_t i = 0; i < times; ++i) {
        for (size_t s = 0; s < steps.size(); ++s) {
          steps[s].task(team);
          if (!goes_on(s)) team.sync();
        }
      }
    });
    rethrow();
  }

  // Runs it, and gives seconds of each step, the mean of all times, as the first thread sees them.
  std::vector<double> profile(int64_t times) const {
    using Clock = std::chrono::steady_clock;
    std::vector<double> seconds(steps.size());
    run_team(threads, [&](const Team& team) {
      Clock::time_point before = Clock::now();
      for (int64_t i = 0; i < times; ++i) {
        for (size_t s = 0; s < steps.size(); ++s) {
          steps[s].task(team);
          if (!goes_on(s)) team.sync();
          if (team.rank != 0) continue;
          const Clock::time_point now = Clock::now();
          seconds[s] += std::chrono::duration<double>(now - before).count() / times;
          before = now;
        }
      }
    });
    rethrow();
    return seconds;
  }

  void rethrow() const {
    std::exception_ptr first;
    for (const auto& call : calls) {
      const std::exception_ptr error = std::exchange(call->error, nullptr);
      if (error && !first) first = error;
    }
    if (first) std::rethrow_exception(first);
  }
};

thread_local std::unique_ptr<Program> current;

// One program at a time: two would fight over the same cores, and each would wait for threads the other has. Callers take
// turns, a run (one decode step) at a time.
std::mutex& turn() {
  static std::mutex mutex;
  return mutex;
}

// A fork waits for the program that runs, so that the child finds the turn free and what a step writes complete.
void before_fork() { turn().lock(); }
void after_fork() { turn().unlock(); }
void after_fork_in_child() {
  turn().unlock();
  pool_lost = true;
}
[[maybe_unused]] const int fork_handlers = pthread_atfork(before_fork, after_fork, after_fork_in_child);

void record_begin() {
  if (current) TVM_FFI_THROW(RuntimeError) << "record_begin: this thread is recording already";
  current = std::make_unique<Program>();
}

// The first thread will call it while the others wait: for work too small to share.
void record_call(tvm::ffi::String name, tvm::ffi::Function function, tvm::ffi::Array<tvm::ffi::Any> args) {
  if (!current) TVM_FFI_THROW(RuntimeError) << "record_call: nothing is being recorded";
  auto call = std::make_shared<Call>(Call{std::move(function), {args.begin(), args.end()}, {}, nullptr});
  call->views.assign(call->args.begin(), call->args.end());
  current->calls.push_back(call);
  const auto task = [call](const Team& team) {
    if (team.rank == 0) call->run();
  };
  current->steps.push_back({name, task, true});
}

tvm::ffi::Map<tvm::ffi::String, tvm::ffi::Function> record_end() {
  if (!current) TVM_FFI_THROW(RuntimeError) << "record_end: nothing is being recorded";
  std::shared_ptr<Program> program(std::move(current));
  auto run = tvm::ffi::Function::FromTyped([program](int64_t times) {
    const std::lock_guard<std::mutex> lock(turn());
    program->run(times);
  });
  auto profile = tvm::ffi::Function::FromTyped([program](int64_t times) {
    if (times < 1) TVM_FFI_THROW(ValueError) << "profile: expected times of 1 or more, got " << times;
    const std::lock_guard<std::mutex> lock(turn());
    const std::vector<double> seconds = program->profile(times);
    tvm::ffi::Array<tvm::ffi::Any> found;
    for (size_t s = 0; s < seconds.size(); ++s)
      found.push_back(tvm::ffi::Array<tvm::ffi::Any>{tvm::ffi::String(program->steps[s].name), seconds[s]});
    return found;
  });
  return {{"run", run}, {"profile", profile}};
}

// forgets what was recorded, after an error
void record_abort() { current.reset(); }

}  // namespace

bool recording() { return current != nullptr; }

void run_or_record(const char* op, Task task, int threads) {
  if (current) {
    current->threads = std::min(current->threads, omp_get_max_threads());
    current->steps.push_back({op, std::move(task), false});
  } else {
    run_team(threads, task);
  }
}

}  // namespace llmopt

TVM_FFI_DLL_EXPORT_TYPED_FUNC(recording, llmopt::recording);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(record_begin, llmopt::record_begin);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(record_call, llmopt::record_call);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(record_end, llmopt::record_end);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(record_abort, llmopt::record_abort);
