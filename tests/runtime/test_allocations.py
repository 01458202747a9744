"""A decode step in its steady state allocates nothing: every call of malloc and its kin is counted."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmopt import native
from llmopt.models import FAMILIES

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="no compiled kernels"),
    pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="needs g++ and LD_PRELOAD"),
]

COUNTER = """
#include <dlfcn.h>
#include <atomic>
#include <cerrno>
#include <cstddef>

static std::atomic<long> counted{0};

extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

long allocations() { return counted.load(); }
void* malloc(size_t size) { ++counted; return __libc_malloc(size); }
void* calloc(size_t n, size_t size) { ++counted; return __libc_calloc(n, size); }
void* realloc(void* p, size_t size) { ++counted; return __libc_realloc(p, size); }
void* memalign(size_t to, size_t size) { ++counted; return __libc_memalign(to, size); }
void* aligned_alloc(size_t to, size_t size) { ++counted; return __libc_memalign(to, size); }
int posix_memalign(void** out, size_t to, size_t size) {
    ++counted;
    *out = __libc_memalign(to, size);
    return *out == nullptr ? ENOMEM : 0;
}
}
"""

STEPS = """
import ctypes, sys
import torch, llmopt
from llmopt.models.shapes import tiny_model
from llmopt.runtime.generate import engine_of
from llmopt.runtime.step import DecodeStep

count = ctypes.CDLL(None).allocations
count.restype = ctypes.c_long
before = count()
kept = torch.empty(1000)
assert count() > before  # what torch allocates is seen

family, *stacks = sys.argv[1:]
torch.set_num_threads(2)
for passes in stacks:
    model = tiny_model(family)
    llmopt.optimize(model, passes=passes.split(), measure=False, calibration=torch.arange(64).view(2, 32))
    engine = engine_of(model)
    for sequences in (1, 3):
        step = DecodeStep(engine, engine.new_cache(sequences, 300), greedy=True)
        for _ in range(2):  # scratch grows to what the depth needs, once; Python may want room of its own
            step.start(torch.ones(sequences, dtype=torch.int32))
            before = count()
            for _ in range(140):
                step.run()
        assert count() == before, (passes, sequences, count() - before)
"""


@pytest.fixture(scope="module")
def counter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("counter")
    source, library = folder / "counter.cpp", folder / "counter.so"
    source.write_text(COUNTER)
    subprocess.run(["g++", "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


@pytest.mark.parametrize("family", [f.model_type for f in FAMILIES])
def test_steps_allocate_nothing(family: str, counter: Path) -> None:
    stacks = ["fuse_kernels", "quantize_gptq fuse_kernels"]
    if importlib.util.find_spec("tvm") is not None:
        stacks += ["compile_tvm", "quantize_gptq compile_tvm"]
    done = subprocess.run(
        [sys.executable, "-c", STEPS, family, *stacks], capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "LD_PRELOAD": str(counter)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
