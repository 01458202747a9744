"""A process that has computed forks, and the child computes: it neither hangs nor counts otherwise."""

from __future__ import annotations

import subprocess
import sys

import pytest

from llmopt import native

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels")

SETUP = """
import faulthandler, os, signal, sys, threading, time
import torch, llmopt
from llmopt.models.shapes import tiny_model

torch.set_num_threads(2)
model = tiny_model("qwen3")
llmopt.optimize(model, passes=["fuse_kernels"], measure=False, calibration=torch.arange(64).view(2, 32))
prompt = torch.arange(1, 20)[None]
options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
generate = lambda: model.generate(prompt, **options)
torch.ones(2000, 2000).sum()  # torch's pool is running


def in_child(work):
    pid = os.fork()
    if pid == 0:
        faulthandler.register(signal.SIGALRM, chain=True)
        signal.alarm(60)
        try:
            os._exit(0 if work() else 1)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(2)
    status = os.waitpid(pid, 0)[1]
    assert status == 0, status


def same():
    return torch.equal(generate(), expected)
"""

CASES = {
    "a child generates after its parent": """
expected = generate()
in_child(same)
assert same()
""",
    "a child generates before its parent, as with gunicorn's preload": """
parts = []
reader, writer = os.pipe()
in_child(lambda: os.write(writer, bytes(str(generate().tolist()), "ascii")))
assert os.read(reader, 10000).decode() == str(generate().tolist())
""",
    "torch's own loops, and a child of the child": """
expected = generate()
def work():
    assert torch.get_num_threads() == 1
    assert float(torch.ones(2000, 2000).sum()) == 4e6
    in_child(same)
    return same()
in_child(work)
""",
    "whoever asks for more threads in the child gets one from us": """
expected = generate()
from llmopt.ops.next_token import next_token
logits, ids = torch.arange(300000.0)[None], torch.zeros(1, dtype=torch.int64)
def work():
    torch.set_num_threads(2)  # torch's own loops would hang from here on
    next_token(logits, ids)
    return int(ids) == 299999
in_child(work)
""",
    "threads of the child may have several": """
expected = generate()
def several():
    torch.set_num_threads(2)
    found.append(same())
    found.append(torch.get_num_threads())
    found.append(len(os.listdir("/proc/self/task")))
found = []
def work():
    thread = threading.Thread(target=several)
    thread.start()
    thread.join()
    return found[:2] == [True, 2] and found[2] >= 3  # the child's first, this one, and its second
in_child(work)
""",
    "a fork while another thread generates": """
expected = generate()
stop = threading.Event()
def forever():
    while not stop.is_set():
        generate()
thread = threading.Thread(target=forever)
thread.start()
for _ in range(10):
    time.sleep(0.02)
    in_child(same)
stop.set()
thread.join()
""",
    "workers of multiprocessing, as DataLoader starts them": """
import multiprocessing
expected = generate()
context = multiprocessing.get_context("fork")
workers = [context.Process(target=lambda: sys.exit(not same())) for _ in range(3)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join(60)
    assert worker.exitcode == 0, worker.exitcode
""",
}


COMPILED = """
from llmopt.passes import CompileTvm
llmopt.restore(model)
llmopt.optimize(
    model, passes=[CompileTvm(backend=BACKEND)], measure=False, calibration=torch.arange(64).view(2, 32)
)
in_child(lambda: len(generate()[0]) == 31)  # before its parent
expected = generate()
in_child(same)
assert same()
"""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fork(case: str) -> None:
    run(CASES[case])


@pytest.mark.parametrize("backend", ["tvm", "inductor"])
def test_a_child_decodes_by_the_compiled_step(backend: str) -> None:
    pytest.importorskip("tvm")
    run(f"BACKEND = {backend!r}\n{COMPILED}")


def run(case: str) -> None:
    # a hang ends with the child's traceback, and the test by this timeout at the latest
    done = subprocess.run(
        [sys.executable, "-c", SETUP + case], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
