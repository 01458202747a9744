// advise_huge_pages(buffer uint8[n]): huge pages behind a buffer that has not been written to yet.
// populate_pages(buffer uint8[n]): gives the pages of a buffer memory now. Contents stay, so others may write meanwhile.
#include "huge_pages.h"

#include "tensor_check.h"

namespace {

struct Pages {
  void* begin;
  size_t bytes;  // whole pages inside the buffer, may be 0
};

Pages pages_of(const tvm::ffi::TensorView& buffer) {
  constexpr uintptr_t kPage = 4096;
  llmopt::check_cpu("buffer", buffer);
  llmopt::check_bytes("buffer", buffer);
  llmopt::check_contiguous("buffer", buffer);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(buffer.data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = (begin + buffer.numel()) / kPage * kPage;
  return {reinterpret_cast<void*>(first), first < last ? last - first : 0};
}

void advise(tvm::ffi::TensorView buffer) {
  const Pages pages = pages_of(buffer);
  if (pages.bytes > 0) llmopt::advise_huge_pages(pages.begin, pages.bytes);
}

void populate(tvm::ffi::TensorView buffer) {
  const Pages pages = pages_of(buffer);
  if (pages.bytes > 0) llmopt::populate_pages(pages.begin, pages.bytes);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(advise_huge_pages, advise);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(populate_pages, populate);
