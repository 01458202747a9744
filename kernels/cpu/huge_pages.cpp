// advise_huge_pages(buffer uint8[n]): huge pages behind a buffer that has not been written to yet.
#include "huge_pages.h"

#include "tensor_check.h"

namespace {

void advise(tvm::ffi::TensorView buffer) {
  constexpr uintptr_t kPage = 4096;
  llmopt::check_cpu("buffer", buffer);
  llmopt::check_bytes("buffer", buffer);
  llmopt::check_contiguous("buffer", buffer);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(buffer.data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = (begin + buffer.numel()) / kPage * kPage;
  if (first < last) llmopt::advise_huge_pages(reinterpret_cast<void*>(first), last - first);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(advise_huge_pages, advise);
