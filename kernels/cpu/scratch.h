// Grow-only, 64-byte aligned scratch. One per thread and use (thread_local), so nothing is allocated in the steady state.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <new>

namespace llmopt {

class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // At least `bytes` bytes; contents are lost when it grows. The block is written only where the caller writes.
  unsigned char* get(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(64, size_);
      if (data_ == nullptr) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return static_cast<unsigned char*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace llmopt
