"""Deleting a model gives its memory back, whatever was done with it: seen from outside, by the process's resident size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmopt import native

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels")

CHILD = """
import ctypes, gc, json, sys, weakref
import torch
torch.set_num_threads(1)
import llmopt
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from llmopt.models import family_for

kind, directory = sys.argv[1:]
ids = torch.randint(5, 500, (1, 16), generator=torch.Generator().manual_seed(0))
rows = torch.randint(5, 500, (2, 32), generator=torch.Generator().manual_seed(0))

def rss():
    # freed blocks that the allocator keeps for the next are nobody's, and pages of libraries come and go
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon:"))

def plain(vocab):
    # nearly all of it is embedding and head, which are quantized quickly
    sizes = {"vocab_size": vocab, "hidden_size": 512, "intermediate_size": 512, "tie_word_embeddings": False}
    config = CONFIG_MAPPING["qwen3"](**{**family_for("qwen3").tiny_config, **sizes})
    config.dtype = torch.bfloat16
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()

def optimized(vocab):
    return llmopt.optimize(plain(vocab), ["quantize_gptq", "fuse_kernels"], calibration=rows, measure=False)

def make(vocab):
    if kind == "loaded":
        return llmopt.load(f"{directory}/{vocab}")
    model = optimized(vocab)
    model.generate(ids, max_new_tokens=3, do_sample=False)
    return llmopt.restore(model) if kind == "restored" else model

def bytes_of(model):
    return sum(t.numel() * t.element_size() for t in {
        t.data_ptr(): t for t in (*model.parameters(), *model.buffers())
    }.values())

if kind == "loaded":
    for vocab in (512, 200_000):
        llmopt.save(optimized(vocab), f"{directory}/{vocab}")
    gc.collect()

def use(vocab):
    model = make(vocab)
    model.generate(ids, max_new_tokens=3, do_sample=False)
    return model, weakref.ref(model), bytes_of(model)

use(512)  # what the first model of a process brings in
gc.collect()
before = rss()
model, reference, size = use(200_000)
held = rss()
del model
gc.collect()
print(json.dumps({"size": size, "held": held - before, "left": rss() - before, "alive": reference() is not None}))
"""


@pytest.mark.parametrize("kind", ["optimized", "restored", "loaded"])
def test_a_deleted_model_leaves_nothing(tmp_path: Path, kind: str) -> None:
    done = subprocess.run([sys.executable, "-c", CHILD, kind, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    print(seen)
    assert seen["size"] > 150e6
    # it was there
    assert seen["held"] > 0.9 * seen["size"]
    assert not seen["alive"]
    assert seen["left"] < 0.15 * seen["size"]
