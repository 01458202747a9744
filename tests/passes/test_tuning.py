"""compile_tvm's schedules: what is drawn computes the same, what is found is kept, shared, and refused where it is not ours."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import llmopt
from llmopt import native
from llmopt.cli import app
from llmopt.errors import InputError, PassError
from llmopt.models import FAMILIES, resolve_model
from llmopt.models.shapes import tiny_model
from llmopt.passes import CompileTvm
from llmopt.passes.base import Event, PassContext
from llmopt.passes.compile_tvm.records import Record, Records, RefusedRecordsError, files

tvm = pytest.importorskip("tvm")
pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels")

from tvm.s_tir import Schedule  # noqa: E402

from llmopt.passes.compile_tvm import compiled, schedules, tuning  # noqa: E402
from llmopt.passes.compile_tvm.engine import TvmEngine  # noqa: E402

TARGET = {"kind": "llvm"}
HOST = compiled.target(torch.device("cpu"))
FOUND = Record("k", 3, 9, True, 2.0, 1.0, [[], []])


@pytest.fixture(scope="module", params=[f.model_type for f in FAMILIES])
def lowered(request: Any) -> Any:
    engine = TvmEngine(resolve_model(tiny_model(request.param)), None)
    return compiled.lower(list(engine.kinds.values()), engine.hidden_size, HOST)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("LLMOPT_CACHE", str(folder))
    return folder


def results(kernel: Any, tokens: int) -> list[torch.Tensor]:
    """Every argument after a call, symbolic sizes all ``tokens``."""
    made = []
    draw = torch.Generator().manual_seed(0)
    for parameter in kernel.params:
        shape = [tokens if isinstance(s, tvm.tirx.Var) else int(s) for s in parameter.shape]
        dtype = getattr(torch, str(parameter.dtype))
        floats = torch.randn(shape, generator=draw) if dtype.is_floating_point else torch.zeros(shape)
        made.append(floats.to(dtype))
    built = tvm.compile(tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")}), target=HOST).jit()
    built["main"](*(compiled.as_argument(t) for t in made))
    return made


def test_every_schedule_computes_what_the_kernel_does_for_any_number_of_tokens(lowered: Any) -> None:
    assert lowered.kernels
    for name, kernel in lowered.kernels.items():
        for tokens in (1, 3):
            expected = results(kernel, tokens)
            drawn = [schedules.function(schedules.drawn(kernel, seed)) for seed in (1, 2, 8)]
            for scheduled in (schedules.function(schedules.default(kernel)), *drawn):
                for want, got in zip(expected, results(scheduled, tokens), strict=True):
                    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_the_default_leaves_no_elementwise_stage_to_itself(lowered: Any) -> None:
    swiglu = [f for name, f in lowered.kernels.items() if "fast_exp" in name]
    # a model whose MLPs are all experts, which are one op
    assert swiglu or not any("split" in name and "exp" in name for name in lowered.kernels)
    for kernel in swiglu:
        assert "sblock_alloc_buffer" in str(kernel)
        assert "sblock_alloc_buffer" not in str(schedules.function(schedules.default(kernel)))


def test_a_schedule_is_replayed_from_its_json(lowered: Any) -> None:
    for kernel in lowered.kernels.values():
        for seed in range(1, 9):
            schedule = schedules.drawn(kernel, seed)
            again = schedules.replayed(kernel, json.loads(json.dumps(schedules.said(schedule))))
            assert str(schedules.function(again)) == str(schedules.function(schedule))


def test_schedules_leave_their_kernel_as_it_was(lowered: Any) -> None:
    for kernel in lowered.kernels.values():
        name, text = schedules.name_of(kernel), str(kernel)
        schedules.default(kernel)
        for seed in range(1, 5):
            schedules.replayed(kernel, schedules.said(schedules.drawn(kernel, seed)))
        assert (schedules.name_of(kernel), str(kernel)) == (name, text)


def test_kernels_are_named_by_what_they_compute() -> None:
    engines = [TvmEngine(resolve_model(tiny_model(family)), None) for family in ("qwen3", "ernie4_5")]
    named = []
    for engine in engines:
        for _ in range(2):
            kernels = compiled.lower(list(engine.kinds.values()), engine.hidden_size, HOST).kernels
            named.append({name: schedules.name_of(kernel) for name, kernel in kernels.items()})
    assert named[0] == named[1]
    assert len(set(named[0].values())) == len(named[0])
    assert named[0]["rms_norm"] != named[2]["rms_norm"]  # another epsilon or size


HOSTILE = {
    "an instruction of no rule": [[["UnsafeSetDType", ["b0", 0], ["int8"], []]], []],
    "an intrinsic": [[["Tensorize", ["b0"], ["evil", True], []]], []],
    "code of C": [[["Annotate", ["b0", "int f();"], ["pragma_import_c"], []]], []],
    "code of LLVM": [[["Annotate", ["b0", "define void @f()"], ["pragma_import_llvm"], []]], []],
    "a split without a guard": [[["Split", ["l0", None, 7], [1, 1], ["l1", "l2"]]], []],
    "a loop unrolled without end": [[["Annotate", ["l0", 1 << 30], ["pragma_auto_unroll_max_step"], []]], []],
    "an object in place of a number": [[["Annotate", ["b0", {"type": "ffi.Array"}], ["meta_schedule.vectorize"], []]], []],
    "text in place of a block": [[["ComputeInline", ['"b0"'], [], []]], []],
    "another function": [[["GetSBlock", [], ["root", "other"], ["b0"]]], []],
    "choices of its own": [[["SampleCategorical", [], [[0, 4096], [0.5, 0.5]], ["v0"]]], [[0, 1]]],
    "a decision that is none": [[["SampleCategorical", [], [[0, 16, 64], [0.5, 0.25, 0.25]], ["v0"]]], [[0, "x"]]],
    "no list": {"insts": []},
    "text": "schedule",
    "a number": 7,
    "instructions of the wrong length": [[["GetLoops"]], []],
    "a block there is not": [[["GetSBlock", [], ["nowhere", "main"], ["b0"]]], []],
    "a variable there is not": [[["ComputeInline", ["b7"], [], []]], []],
}  # fmt: skip


@pytest.mark.parametrize("fault", HOSTILE)
def test_what_no_schedule_of_ours_says_is_refused(fault: str, lowered: Any) -> None:
    kernel = lowered.kernels["rms_norm"]
    with pytest.raises(schedules.RefusedScheduleError, match=r"it (holds|is)"):
        schedules.replayed(kernel, HOSTILE[fault])


# records


def test_records_are_kept_beside_those_of_others(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "records.json"
    mine, others = Records(file, TARGET), Records(file, {"kind": "cuda"})
    mine.add("a", FOUND)
    others.add("a", dataclasses.replace(FOUND, schedule=None))
    mine.add("b", dataclasses.replace(FOUND, schedule=None))
    again = Records(file, TARGET)
    assert again.find("a") == FOUND
    assert again.find("c") is None
    assert again.schedules() == {"a": [[], []]}
    assert Records(file, {"kind": "cuda"}).schedules() == {}
    assert [f.name for f in file.parent.iterdir() if f.suffix == ".json"] == ["records.json"]


def _add(file: Path, who: int) -> None:
    records = Records(file, TARGET)
    for i in range(10):
        records.add(f"{who}-{i}", FOUND)


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "records.json"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_add, args=(file, who)) for who in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(Records(file, TARGET).schedules()) == 30


def written(**change: Any) -> str:
    """A file of one record, changed."""
    record = {**dataclasses.asdict(FOUND), **change}
    return json.dumps({"format": "llmopt schedules 1", "targets": {"a": {"b": record}}})


OURS = '{"format": "llmopt schedules 1"'
DAMAGED = [
    "", "{", "[]", '{"format": 2}', OURS + "}", OURS + ', "targets": []}', OURS + ', "targets": {"a": {"b": {"name": "c"}}}}',
    written(us=0), written(us="x"), written(us=-1.0), written(default_us=float("inf")), written(tried="x"), written(seeds=-1),
    written(done=1), written(name=3), written(schedule="x"), "[" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_file_is_refused_and_left_alone(text: str, tmp_path: Path) -> None:
    file = tmp_path / "records.json"
    file.write_text(text)
    with pytest.raises(RefusedRecordsError, match="not a file of tuning records"):
        Records(file, TARGET)
    file.unlink()
    records = Records(file, TARGET)
    file.write_text(text)
    with pytest.raises(RefusedRecordsError):
        records.add("a", FOUND)
    assert file.read_text() == text


# the search


def test_a_search_goes_on_where_an_interrupted_one_ended(
    lowered: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, where = tmp_path / "records.json", tvm.target.Target(HOST)
    drawn, seeds = schedules.drawn, []

    def counted(kernel: Any, seed: int) -> Any:
        seeds.append(seed)
        if len(seeds) == 6:
            raise KeyboardInterrupt
        return drawn(kernel, seed)

    monkeypatch.setattr(schedules, "drawn", counted)
    kernels = {"rms_norm": lowered.kernels["rms_norm"]}
    with pytest.raises(KeyboardInterrupt):
        tuning.tune(kernels, Records(file, TARGET), where, 60, lambda name, finished: None)
    key = schedules.name_of(kernels["rms_norm"])
    left = Records(file, TARGET).find(key)
    assert left is not None
    assert not left.done
    assert left.seeds == 6
    assert left.tried >= 1
    assert left.default_us >= left.us > 0
    tuning.tune(kernels, Records(file, TARGET), where, 60, lambda name, finished: None)
    ended = Records(file, TARGET).find(key)
    assert ended is not None
    assert ended.done
    assert seeds == list(range(1, ended.seeds + 1))
    tuning.tune(kernels, Records(file, TARGET), where, 60, lambda name, finished: pytest.fail("it was done"))


def test_the_budget_ends_a_search(lowered: Any, tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []
    records, where = Records(tmp_path / "records.json", TARGET), tvm.target.Target(HOST)
    tuning.tune(lowered.kernels, records, where, 1e-6, lambda *said: told.append(said))
    assert len(told) == 1
    tuning.tune(lowered.kernels, records, where, 60, lambda *said: told.append(said))
    assert [name for name, _ in told[-len(lowered.kernels) :]] == list(lowered.kernels)
    assert told[-1][1] == len(lowered.kernels) - 1


def test_what_computes_something_else_is_no_candidate(
    lowered: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kernel, other = lowered.kernels["rms_norm"], schedules.drawn
    nothing = tvm.tirx.PrimFunc(kernel.params, tvm.tirx.Evaluate(0), attrs=kernel.attrs)

    def drawn(kernel: Any, seed: int) -> Any:
        return Schedule(nothing) if seed % 2 else other(kernel, seed)

    monkeypatch.setattr(schedules, "drawn", drawn)
    records = Records(tmp_path / "records.json", TARGET)
    tuning.tune({"rms_norm": kernel}, records, tvm.target.Target(HOST), 20, lambda *said: None)
    found = records.find(schedules.name_of(kernel))
    assert found is not None
    assert found.tried > 1
    if found.schedule is not None:
        # of the wrong ones none can be told from the kernel's trace
        assert found.schedule[0], "the empty function was taken"


# the pass


def optimized(model: Any, **options: Any) -> dict[str, Any]:
    llmopt.optimize(model, passes=[CompileTvm(**options)], measure=False)
    (row,) = [row for row in llmopt.report(model).passes if row.name == "compile_tvm"]
    assert row.verdict == "kept", row.reason
    details: dict[str, Any] = row.details
    return details


def test_what_tuning_finds_is_used_from_then_on(tmp_path: Path) -> None:
    plain = optimized(tiny_model("qwen3"))
    assert plain["cache"] == "built"
    assert "records" not in plain
    tuned = optimized(tiny_model("qwen3"), tune_s=60)
    found = tuned["tuning"]
    assert found["kernels"] == found["done"] == len(tuned["kernels"])
    assert any(line.startswith(f"tuning: {found['kernels']} kernels") for line in tuned["said"])
    (file,) = files()
    faster = Records(file, records_of(file)).schedules()
    assert len(faster) == len(found["faster"])
    assert optimized(tiny_model("qwen3"))["cache"] == "found"
    assert optimized(tiny_model("qwen3"), tune_s=60)["tuning"]["seconds"] < found["seconds"]


def records_of(file: Path) -> dict[str, Any]:
    """What the records of a file with one target are for."""
    (target,) = json.loads(file.read_text())["targets"]
    loaded: dict[str, Any] = json.loads(target)
    return loaded


def chosen(file: Path, model: Any, change: Any) -> None:
    """Write records that give every kernel of a model a schedule."""
    engine = TvmEngine(resolve_model(model), None)
    kernels = compiled.lower(list(engine.kinds.values()), engine.hidden_size, HOST).kernels
    optimized(tiny_model("qwen3"), tune_s=1e-6, records=str(file))
    records = Records(file, records_of(file))
    for name, kernel in kernels.items():
        schedule = change(schedules.said(schedules.drawn(kernel, 3)))
        records.add(schedules.name_of(kernel), Record(name, 1, 1, True, 2.0, 1.0, schedule))


def test_records_of_others_are_used_and_verified(tmp_path: Path, token_rows: Any) -> None:
    file, ids = tmp_path / "given.json", token_rows(1, 12)
    chosen(file, tiny_model("qwen3"), lambda schedule: schedule)
    plain, model = tiny_model("qwen3"), tiny_model("qwen3")
    details = optimized(model, records=str(file))
    assert details["cache"] == "built"
    assert f"schedules of {file}" in details["said"]
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))
    assert optimized(tiny_model("qwen3"), records=str(file))["cache"] == "found"
    assert files() == []


def test_records_that_are_none_are_an_error_where_given_and_said_where_kept(tmp_path: Path) -> None:
    file = tmp_path / "given.json"
    with pytest.raises(InputError, match="no such file"):
        llmopt.optimize(tiny_model("qwen3"), passes=[CompileTvm(records=str(file))], measure=False, strict=True)
    file.write_text("{}")
    with pytest.raises(InputError, match="not a file of tuning records"):
        llmopt.optimize(tiny_model("qwen3"), passes=[CompileTvm(records=str(file))], measure=False, strict=True)
    file.unlink()
    chosen(file, tiny_model("qwen3"), lambda schedule: HOSTILE["code of C"])
    with pytest.raises(PassError, match="Annotate"):
        llmopt.optimize(tiny_model("qwen3"), passes=[CompileTvm(records=str(file))], measure=False, strict=True)
    optimized(tiny_model("qwen3"), tune_s=60)
    (kept,) = files()
    kept.write_text(file.read_text())
    for _ in range(2):  # nothing is kept under their name
        details = optimized(tiny_model("qwen3"))
        assert "Annotate" in details["refused"]
        assert details["cache"] == "built"
        assert any("not used" in line for line in details["said"])
    kept.write_text("damaged")
    assert "not a file of tuning records" in optimized(tiny_model("qwen3"))["refused"]


def test_an_interrupt_leaves_the_model_and_what_was_found(token_rows: Any) -> None:
    model, ids = tiny_model("qwen3"), token_rows(1, 12)
    before = model(ids).logits
    resolved = resolve_model(model)

    def emit(event: Event) -> None:
        if event.message.startswith("tuning") and event.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CompileTvm(tune_s=60).apply(PassContext(resolved, resolved.device, emit))
    assert torch.equal(model(ids).logits, before)
    assert "generate" not in vars(model)
    (file,) = files()
    assert file.read_text().count('"default_us"') == 2
    told: list[tuple[str, int, int]] = []
    ctx = PassContext(resolved, resolved.device, lambda e: told.append((e.message, e.done, e.total)))
    total = len(CompileTvm(tune_s=60).apply(ctx).details["kernels"])
    assert [done for message, done, _ in told if message.startswith("tuning")] == list(range(2, total))
    assert {of for message, _, of in told if message.startswith("tuning")} == {total}


@pytest.mark.parametrize(
    "options", [{"tune_s": -1}, {"tune_s": float("nan")}, {"tune_s": True}, {"tune_s": "9"}, {"records": ""}, {"records": 3},
                {"backend": "inductor", "tune_s": 3}]
)  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        CompileTvm(**options)


def test_a_saved_model_neither_searches_nor_names_a_file(tmp_path: Path, token_rows: Any) -> None:
    model, elsewhere = tiny_model("qwen3"), tmp_path / "elsewhere" / "records.json"
    optimized(model, tune_s=60, records=str(tmp_path / "mine.json"))
    llmopt.save(model, tmp_path / "saved")
    said = json.loads((tmp_path / "saved" / "llmopt.json").read_text())
    options = said["passes"]["compile_tvm"]
    assert (options["tune_s"], options["records"]) == (0.0, None)
    # whoever writes them into a checkpoint writes nothing on the machine that loads it
    options.update(tune_s=60.0, records=str(elsewhere))
    (tmp_path / "saved" / "llmopt.json").write_text(json.dumps(said))
    loaded = llmopt.load(tmp_path / "saved")
    assert "generate" in vars(loaded)
    assert not elsewhere.parent.exists()


def test_records_that_cannot_be_kept_are_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Records, "add", full)
    assert "No space left" in optimized(tiny_model("qwen3"), tune_s=60)["refused"]
    with pytest.raises(PassError, match="No space left"):
        llmopt.optimize(
            tiny_model("qwen3"),
            passes=[CompileTvm(tune_s=60, records=str(tmp_path / "r.json"))],
            measure=False,
            strict=True,
        )


def test_schedules_are_listed_and_removed_only_if_asked(cache: Path) -> None:
    optimized(tiny_model("qwen3"), tune_s=60)
    (file,) = files()
    run = CliRunner()
    assert f"{file.stem}" in run.invoke(app, ["cache", "list"]).stdout
    assert "kept 1 file of schedules" in run.invoke(app, ["cache", "clear"]).stdout
    assert files() == [file]
    assert "removed 1 file of schedules" in run.invoke(app, ["cache", "clear", "--schedules"]).stdout
    assert files() == []
    file.write_text("damaged")
    assert "refused" in run.invoke(app, ["cache", "list"]).stdout
