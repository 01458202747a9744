// exponential_noise: what torch's generator gives as exponential values, drawn in blocks of its twister.
#include "exponential_noise.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "program.h"
#include "tensor_check.h"

namespace llmopt {
namespace {

// states that are made at once: they stay in a core's cache
constexpr int64_t kStates = 32;

// torch.Generator.get_state() of a CPU generator, as far as it matters here
struct TorchState {
  static constexpr int64_t kBytes = 5056, kLeft = 8, kNext = 16, kWords = 24;
  uint32_t words[kTwisterWords];
  int64_t left;  // words of this state that have not been given yet

  explicit TorchState(const uint8_t* bytes) {
    int32_t count;
    std::memcpy(&count, bytes + kLeft, 4);
    left = count - 1;
    for (int i = 0; i < kTwisterWords; ++i) std::memcpy(&words[i], bytes + kWords + 8 * i, 4);
  }
  void store(uint8_t* bytes) const {
    const auto count = static_cast<int32_t>(left + 1);
    const auto next = static_cast<uint64_t>(kTwisterWords - left);
    std::memcpy(bytes + kLeft, &count, 4);
    std::memcpy(bytes + kNext, &next, 8);
    for (int i = 0; i < kTwisterWords; ++i) {
      const uint64_t wide = words[i];
      std::memcpy(bytes + kWords + 8 * i, &wide, 8);
    }
  }
};

void exponential_noise(TensorView state, TensorView out) {
  check_cpu("state", state), check_bytes("state", state), check_contiguous("state", state);
  check_shape("state", state, {TorchState::kBytes});
  check_cpu("out", out), check_contiguous("out", out);
  if (float_dtype("out", out) != DType::kF32) TVM_FFI_THROW(ValueError) << "out: expected dtype float32";
  auto* bytes = static_cast<uint8_t*>(state.data_ptr());
  TorchState torch(bytes);
  if (torch.left < 0 || torch.left > kTwisterWords) TVM_FFI_THROW(ValueError) << "state: not one of torch's generator";
  float* values = static_cast<float*>(out.data_ptr());
  const int64_t count = out.numel();
  // what is left of one state, at most a word of it unpaired, and new states behind it
  std::vector<uint32_t> words(static_cast<size_t>((kStates + 1) * kTwisterWords));
  const auto fill = [&](const Team& team) {
    const NoiseKernels& kernels = noise_kernels(active_isa());
    for (int64_t done = 0; done < count;) {
      const int64_t needed = 2 * (count - done) - torch.left;
      const int64_t states = std::clamp<int64_t>((needed + kTwisterWords - 1) / kTwisterWords, 0, kStates);
      const int64_t held = torch.left + states * kTwisterWords;
      const int64_t batch = std::min(held / 2, count - done);
      team.sync();
      if (team.rank == 0) {
        std::copy(torch.words + kTwisterWords - torch.left, torch.words + kTwisterWords, words.data());
        const uint32_t* last = torch.words;
        for (int64_t s = 0; s < states; ++s) {
          uint32_t* next = words.data() + torch.left + s * kTwisterWords;
          kernels.twist(last, next);
          last = next;
        }
        if (states > 0) std::copy(last, last + kTwisterWords, torch.words);
        torch.left = held - 2 * batch;
      }
      team.sync();
      const Share mine = team.share(batch);
      kernels.values(words.data() + 2 * mine.begin, mine.end - mine.begin, values + done + mine.begin);
      done += batch;
    }
  };
  run_team(threads_for(count, 16384), fill);
  torch.store(bytes);
}

}  // namespace
}  // namespace llmopt

TVM_FFI_DLL_EXPORT_TYPED_FUNC(exponential_noise, llmopt::exponential_noise);
