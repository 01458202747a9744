"""The cache of compiled libraries: what is found, what is refused and built anew, and builders at the same time."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import llmopt
from llmopt import native
from llmopt.cli import app
from llmopt.models.shapes import tiny_model
from llmopt.passes.compile_tvm.cache import Cache, RefusedEntryError, key_of

MADE_FROM = {"parts": ["a", "b"], "target": {"mcpu": "x"}, "isa": "avx2", "versions": {"apache-tvm": "0.27"}}


needs_tvm = pytest.mark.skipif(not native.available(), reason="no compiled kernels")


@pytest.fixture
def library(tmp_path: Path) -> Path:
    file = tmp_path / "made.so"
    file.write_bytes(b"\x7fELF" + bytes(range(256)))
    return file


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache" / "compiled")


def test_what_is_added_is_found(cache: Cache, library: Path) -> None:
    assert cache.find(MADE_FROM) is None
    added = cache.add(MADE_FROM, ("k1", "k2"), library)
    found = cache.find(MADE_FROM)
    assert found == added
    assert found is not None
    assert found.kernels == ("k1", "k2")
    assert found.library.read_bytes() == library.read_bytes()
    assert cache.find({**MADE_FROM, "isa": "avx512"}) is None
    assert [p.name for p in cache.folder.iterdir()] == [key_of(MADE_FROM)]
    for path in (cache.folder, found.folder, found.library):
        assert path.stat().st_mode & 0o077 == 0, path


def truncated(folder: Path) -> None:
    data = (folder / "module.so").read_bytes()
    (folder / "module.so").write_bytes(data[: len(data) // 2])


def one_bit(folder: Path) -> None:
    data = bytearray((folder / "module.so").read_bytes())
    data[100] ^= 4
    (folder / "module.so").write_bytes(data)


def rewritten(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def fault(folder: Path) -> None:
        said = json.loads((folder / "entry.json").read_text())
        change(said)
        (folder / "entry.json").write_text(json.dumps(said))

    return fault


def linked(folder: Path) -> None:
    real = folder.with_name("elsewhere.so")
    (folder / "module.so").rename(real)
    (folder / "module.so").symlink_to(real)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncated, "not what was written"),
    "one_bit": (one_bit, "not what was written"),
    "no_library": (lambda f: (f / "module.so").unlink(), "No such file"),
    "no_entry": (lambda f: (f / "entry.json").unlink(), "No such file"),
    "not_json": (lambda f: (f / "entry.json").write_text("{"), "not an entry's description"),
    "no_hash": (rewritten(lambda s: s.pop("sha256")), "not an entry's description"),
    "not_a_mapping": (lambda f: (f / "entry.json").write_text("[]"), "not an entry's description"),
    "foreign_machine": (rewritten(lambda s: s["made_from"].update(isa="amx")), "not what was written"),
    "foreign_version": (rewritten(lambda s: s["made_from"].update(versions={})), "not what was written"),
    "fewer_kernels": (rewritten(lambda s: s.update(kernels=[])), "not what was written"),
    "writable_parent": (lambda f: f.parent.parent.chmod(0o777), "others may write"),
    "writable_library": (lambda f: (f / "module.so").chmod(0o666), "others may write"),
    "writable_entry": (lambda f: (f / "entry.json").chmod(0o620), "others may write"),
    "writable_folder": (lambda f: f.chmod(0o777), "others may write"),
    "writable_cache": (lambda f: f.parent.chmod(0o770), "others may write"),
    "linked": (linked, "not a plain file"),
    "somebody_elses": (lambda f: os.chown(f / "module.so", 12345, -1), "belongs to user 12345"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_entry_is_refused_and_can_be_replaced(name: str, cache: Cache, library: Path) -> None:
    if name == "somebody_elses" and os.getuid() != 0:
        pytest.skip("only root can give a file away")
    fault, why = FAULTS[name]
    fault(cache.add(MADE_FROM, ("k",), library).folder)
    with pytest.raises(RefusedEntryError, match=why):
        cache.find(MADE_FROM)
    assert any(isinstance(entry, str) and why in entry for entry in cache.entries())
    if name in ("writable_cache", "writable_parent"):
        # whoever can write to the folder can put anything in it: nothing is kept there until that is mended
        with pytest.raises(RefusedEntryError, match=why):
            cache.add(MADE_FROM, (), library)
        cache.folder.chmod(0o700)
        cache.folder.parent.chmod(0o700)
    cache.add(MADE_FROM, (), library)
    assert cache.find(MADE_FROM) is not None


def test_an_entry_under_another_name_is_refused(cache: Cache, library: Path) -> None:
    folder = cache.add(MADE_FROM, (), library).folder
    other = {**MADE_FROM, "isa": "avx512"}
    folder.rename(folder.with_name(key_of(other)))
    with pytest.raises(RefusedEntryError, match="something else than its name says"):
        cache.find(other)


def compile_one(ready: Any, say: Any) -> None:
    torch.set_num_threads(1)
    model = tiny_model("qwen3")
    ready.wait()
    llmopt.optimize(model, passes=["compile_tvm"], calibration=torch.arange(64).view(2, 32), measure=False)
    ids = torch.arange(12)[None]
    tokens = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    say.put((llmopt.report(model).passes[0].details["cache"], tokens.tolist()))


@needs_tvm
def test_builders_at_the_same_time_build_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tvm")
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path))
    spawn = multiprocessing.get_context("spawn")
    say, ready = spawn.Queue(), spawn.Barrier(2)
    builders = [spawn.Process(target=compile_one, args=(ready, say)) for _ in range(2)]
    for builder in builders:
        builder.start()
    (first, tokens), (second, others) = say.get(timeout=300), say.get(timeout=300)
    for builder in builders:
        builder.join()
        assert builder.exitcode == 0
    assert sorted([first, second]) == ["built", "found"]
    assert tokens == others
    assert len(Cache().entries()) == 1


@needs_tvm
@pytest.mark.parametrize("fault", [truncated, rewritten(lambda said: said["made_from"].update(isa="amx"))])
def test_a_model_is_compiled_anew_where_the_entry_is_refused(
    fault: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tvm")
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path))

    def compiled() -> str:
        model = tiny_model("qwen3")
        llmopt.optimize(model, passes=["compile_tvm"], calibration=torch.arange(64).view(2, 32), measure=False)
        return str(llmopt.report(model).passes[0].details["cache"])

    assert compiled() == "built"
    (entry,) = Cache().entries()
    assert not isinstance(entry, str)
    fault(entry.folder)
    assert compiled().startswith("built anew: ")
    assert compiled() == "found"


def test_the_command_lists_and_clears(cache: Cache, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMOPT_CACHE", str(cache.folder.parent))
    run = CliRunner().invoke
    assert "removed 0 entries" in run(app, ["cache", "clear"]).stdout
    truncated(cache.add({**MADE_FROM, "isa": "avx512"}, (), library).folder)
    entry = cache.add(MADE_FROM, ("a",), library)
    listed = run(app, ["cache", "list"])
    assert listed.exit_code == 0
    assert f"{entry.key}  " in listed.stdout
    assert "2 parts, 1 kernels, avx2, apache-tvm 0.27" in listed.stdout
    assert "refused  " in listed.stdout
    assert "removed 2 entries" in run(app, ["cache", "clear"]).stdout
    assert list(cache.folder.iterdir()) == []


def test_clearing_leaves_what_is_not_its_own(cache: Cache, library: Path, tmp_path: Path) -> None:
    cache.add(MADE_FROM, (), library)
    (cache.folder / "thesis.tex").write_text("years")
    assert cache.clear() == 1
    assert [path.name for path in cache.folder.iterdir()] == ["thesis.tex"]
    link = tmp_path / "link"
    link.symlink_to(cache.folder)
    with pytest.raises(RefusedEntryError, match="not a plain folder"):
        Cache(link).clear()


def test_folders_are_made_private_whatever_the_umask(tmp_path: Path, library: Path) -> None:
    before = os.umask(0)
    try:
        cache = Cache(tmp_path / "a" / "b" / "compiled")
        cache.add(MADE_FROM, (), library)
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "a", tmp_path / "a" / "b", cache.folder)} == {0o700}


@needs_tvm
@pytest.mark.parametrize("trouble", ["file in the way", "no compiler", "does not load"])
def test_trouble_with_the_disk_is_said_and_no_reason_not_to_compile(
    trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tvm")
    monkeypatch.setenv("LLMOPT_CACHE", str(tmp_path / "cache"))
    if trouble == "file in the way":
        (tmp_path / "cache").write_text("")
    if trouble == "no compiler":
        monkeypatch.setattr("tvm.support.cc.get_cc", lambda: None)

    def compiled() -> str:
        model = tiny_model("qwen3")
        llmopt.optimize(model, passes=["compile_tvm"], calibration=torch.arange(64).view(2, 32), measure=False)
        (row,) = llmopt.report(model).passes
        assert row.verdict == "kept", row.reason
        return str(row.details["cache"])

    if trouble == "does not load":
        assert compiled() == "built"

        def refuses(file: Path) -> Any:
            raise OSError(f"{file}: failed to map segment")

        monkeypatch.setattr("llmopt.passes.compile_tvm.current.load", refuses)
        assert compiled().startswith("built anew: ")
    else:
        assert compiled().startswith("not kept: ")
