"""The command line: quick help, one-line errors with the documented exit codes, JSON alone on stdout."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from llmopt import cli_models, native
from llmopt.cli import app
from llmopt.errors import CalibrationError, CheckpointError, InputError, UnsupportedModelError
from llmopt.measure.report import Gain, Interval, Memory, PassRow, Report, Timing
from llmopt.models.shapes import tiny_model
from llmopt.passes import QuantizeGptq

COMMANDS = ("optimize", "bench", "compare", "kernels", "passes", "doctor")
runner = CliRunner()


def interval(value: float) -> Interval:
    return Interval(value, 0.98 * value, 1.02 * value, 9)


def report(name: str) -> Report:
    eager = Timing(interval(100), interval(40), 128, 32)
    fast = Timing(interval(50), interval(10), 128, 32)
    gain = Gain(interval(2), interval(4))
    row = PassRow("quantize_gptq", "kept", "faster", {}, 1.0, fast, gain, gain, memory=Memory(10))
    return Report({"name": name}, {}, {}, baseline=eager, baseline_memory=Memory(40), passes=[row])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny model as transformers saves it."""
    tiny_model("qwen3").save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str) -> None:
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"llmopt {command}" in result.stdout.split("Examples:")[1]


def test_help_lists_every_command_and_the_exit_codes() -> None:
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    assert all(f"\n  {command}" in result.stdout for command in COMMANDS)
    assert "Exit codes: 0 done, 1 the work failed, 2 bad usage or input" in " ".join(result.stdout.split())


def test_version() -> None:
    import llmopt

    result = runner.invoke(app, ["--version"])
    assert (result.exit_code, result.stdout.strip()) == (0, f"llmopt {llmopt.__version__}")


def test_help_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from llmopt.cli import app; "
        "assert CliRunner().invoke(app, ['optimize', '--help']).exit_code == 0; "
        "print(', '.join({'torch', 'transformers', 'matplotlib', 'tvm_ffi'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


BAD_INPUT = {
    "no_such_directory": (["optimize", "{tmp}/gone", "-o", "{tmp}/out"], "a local checkpoint directory"),
    "no_config": (["optimize", "{tmp}", "-o", "{tmp}/out"], "no config.json"),
    "out_is_the_input": (["optimize", "{model}", "-o", "{model}"], "--out: expected another directory"),
    "out_is_not_empty": (["optimize", "{model}", "-o", "{tmp}"], "is not empty; --overwrite"),
    "measure_both_ways": (
        ["optimize", "{model}", "-o", "{tmp}/out", "--no-measure", "--measure-full"],
        "expected one of --no-measure and --measure-full",
    ),
    "calibration_is_gone": (
        ["optimize", "{model}", "-o", "{tmp}/out", "--calibration", "{tmp}/c.txt"],
        "calibration: ",
    ),
    "bench_without_subject": (["bench"], "either --model DIR, or --shape NAME"),
    "bench_with_both": (
        ["bench", "--model", "{model}", "--shape", "qwen3-0.6b"],
        "either --model DIR, or --shape NAME",
    ),
    "bench_layers_of_a_checkpoint": (["bench", "--model", "{model}", "--layers", "2"], "--layers N"),
    "bench_isolated_shape": (["bench", "--shape", "qwen3-0.6b", "--isolated-memory"], "expected --model DIR"),
    "unknown_shape": (["bench", "--shape", "qwen3-0.5b"], "nearest: qwen3-0.6b"),
    "compare_one": (["compare", "{model}"], "at least two"),
    "compare_gone": (["compare", "{model}", "{tmp}/gone"], "a local checkpoint directory"),
    "compare_no_report": (["compare", "{model}/config.json", "{model}/config.json"], "not a report"),
    "compare_mixed": (
        ["compare", "{model}", "{model}/config.json"],
        "either checkpoints or report files, got both ({model}/config.json is a file, {model} is not)",
    ),
    "compare_not_a_checkpoint": (["compare", "{model}", "{tmp}"], "no config.json"),
    "unknown_format": (
        ["optimize", "{model}", "-o", "{tmp}/out", "--checkpoint-format", "gptq_v3"],
        "--checkpoint-format: expected 'gptq' or 'gptq_v2', got 'gptq_v3'",
    ),
    "unknown_op": (["kernels", "nosuch"], "op: expected int4_linear"),
    "unknown_isa": (
        ["kernels", "int4_linear", "--isa", "avx3"],
        "--isa: expected auto | portable | avx2 | avx512 | amx",
    ),
    "unknown_case": (["kernels", "int4_linear", "--case", "nosuch"], "case: expected"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(
    arguments: list[str], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    if "--isa" in arguments and not native.available():
        pytest.skip("needs the compiled kernels")
    filled = [argument.format(tmp=tmp_path, model=checkpoint) for argument in arguments]
    before = sorted(tmp_path.rglob("*"))
    result = runner.invoke(app, filled)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert message.format(tmp=tmp_path, model=checkpoint) in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_usage_error_is_exit_code_2() -> None:
    assert runner.invoke(app, ["optimize"]).exit_code == 2
    assert runner.invoke(app, ["nosuch"]).exit_code == 2


def test_debug_shows_where_an_error_comes_from(tmp_path: Path) -> None:
    result = runner.invoke(app, ["--debug", "compare", str(tmp_path)])
    assert isinstance(result.exception, InputError)


def test_full_disk_is_a_failure_of_the_work(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli_models, "open_model", full)
    result = runner.invoke(app, ["optimize", str(checkpoint), "-o", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert result.stderr == "error: [Errno 28] No space left on device\n"


def test_compare_of_saved_reports(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{name}.json") for name in ("a", "b")]
    for name, path in zip(("model-a", "model-b"), paths, strict=True):
        report(name).to_json(path)
    table = runner.invoke(app, ["compare", *paths])
    assert table.exit_code == 0
    assert "model-a" in table.stdout
    assert "4.00x" in table.stdout
    alone = runner.invoke(app, ["compare", *paths, "--json", "-"])
    assert [each["model"]["name"] for each in json.loads(alone.stdout)] == ["model-a", "model-b"]
    both = runner.invoke(app, ["compare", *paths, "--json", str(tmp_path / "out.json")])
    assert both.stdout == table.stdout
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(alone.stdout)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens and rounds, no ceilings."""
    from llmopt.measure import ceilings, timing

    plan = timing.Plan(prompt_tokens=8, decode_tokens=3, min_rounds=2, max_rounds=2)
    monkeypatch.setattr(timing, "Plan", lambda **_: plan)
    monkeypatch.setattr(ceilings, "usable_meter", lambda: None)


def test_compare_measures_checkpoints_of_every_kind(checkpoint: Path, tmp_path: Path, quick: None) -> None:
    import llmopt

    model = llmopt.load(checkpoint)
    ids = torch.randint(0, model.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
    llmopt.optimize(model, ["quantize_gptq"], calibration=ids, measure=False)
    llmopt.save(model, tmp_path / "ours")
    llmopt.save(model, tmp_path / "gptq", checkpoint_format="gptq_v2")
    (tmp_path / "gptq" / "llmopt.json").unlink()
    paths = [str(checkpoint), str(tmp_path / "ours"), str(tmp_path / "gptq")]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    result = runner.invoke(app, ["compare", *paths, "--json", "-", "--seed", "5"])
    assert result.exit_code == 0, result.stderr
    found = llmopt.Comparison.from_json(result.stdout)
    assert [row.name for row in found.rows] == ["tiny", "ours", "gptq"]
    assert ["int4 g128" in row.model["weights"] for row in found.rows] == [False, True, True]
    assert found.rows[2].gain is not None
    assert found.settings["seed"] == 5
    table = runner.invoke(app, ["compare", *paths, "--json", str(tmp_path / "out.json")])
    assert table.exit_code == 0
    assert "3 models, measured in the same rounds" in table.stdout
    assert "x tiny" in table.stdout
    assert [row["name"] for row in json.loads((tmp_path / "out.json").read_text())["rows"]] == ["tiny", "ours", "gptq"]
    (tmp_path / "out.json").unlink()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_compare_may_be_given_one_checkpoint_twice(checkpoint: Path, tmp_path: Path, quick: None) -> None:
    other = shutil.copytree(checkpoint, tmp_path / "elsewhere" / "tiny")
    result = runner.invoke(app, ["compare", str(checkpoint), str(checkpoint), str(other), "--json", "-"])
    assert result.exit_code == 0, result.stderr
    names = [row["name"] for row in json.loads(result.stdout)["rows"]]
    assert names == [f"{checkpoint} #1", f"{checkpoint} #2", str(other)]


def test_compare_loads_nothing_before_every_path_is_checked(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr(cli_models, "open_model", refuse)
    result = runner.invoke(app, ["compare", str(checkpoint), str(tmp_path)])
    assert (result.exit_code, "no config.json" in result.stderr) == (2, True)


@pytest.mark.parametrize("name", ["gptq", "gptq_v2"])
def test_optimize_writes_the_checkpoint_format_asked_for(name: str, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text(json.dumps([list(range(100)), list(range(200, 300))]))
    result = runner.invoke(
        app,
        ["optimize", str(checkpoint), "-o", str(tmp_path / "out"), "--no-measure", "--passes", "quantize_gptq"]
        + ["--calibration", str(tmp_path / "ids.json")]
        + (["--checkpoint-format", name] if name != "gptq" else []),
    )
    assert result.exit_code == 0, result.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["checkpoint_format"] == name


def test_doctor_ends_with_every_pass_and_says_whether_it_is_ready() -> None:
    from llmopt.passes import PASSES

    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[1] for line in lines[-len(PASSES) :]] == list(PASSES)
    assert all(line[2] in ("ready", "not") for line in lines[-len(PASSES) :])
    assert {line[0] for line in lines} <= {"ok", "off", "warn"}


def test_doctor_json_is_alone_on_stdout() -> None:
    result = runner.invoke(app, ["doctor", "--json", "-"])
    data = json.loads(result.stdout)
    assert data["usable"] is True
    named = {check["name"]: check for check in data["checks"]}
    assert named["torch"]["status"] == "ok"
    assert data["environment"]["versions"]["torch"] in named["torch"]["detail"]


def test_doctor_fails_on_a_library_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmopt import cli_doctor
    from llmopt.measure import environment

    monkeypatch.setattr(environment, "versions", lambda: dict.fromkeys(environment.REQUIRED, "0.0.1"))
    checks = {check.name: check for check in cli_doctor._required()}
    assert checks["torch"].status == "fail"
    assert "at least 2.10 is needed" in checks["torch"].detail
    assert not cli_doctor.usable(list(checks.values()))


def test_open_model_reads_a_plain_checkpoint(checkpoint: Path) -> None:
    opened = cli_models.open_model(checkpoint, eager=True)
    assert opened.model.config._attn_implementation == "eager"
    assert not opened.model.training
    assert opened.tokenizer is None


@pytest.mark.parametrize("eager", [False, True], ids=["as_given", "eager"])
def test_open_model_refuses_what_would_be_loaded_with_random_weights(eager: bool, checkpoint: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        cli_models.open_model(checkpoint, eager=eager)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model_type": "gpt2"}, UnsupportedModelError, "got 'gpt2'"),
        ({"model_type": "qwen_3"}, UnsupportedModelError, "nearest: qwen3"),
        ({"hidden_size": 48}, CheckpointError, "tiny"),
        ({"quantization_config": {"quant_method": "awq"}}, InputError, "quantized by awq"),
    ],
    ids=["unsupported", "misspelt", "sizes", "quantized_otherwise"],
)
def test_open_model_refuses_bad_configs(
    change: dict[str, object], error: type[Exception], message: str, checkpoint: Path
) -> None:
    config = json.loads((checkpoint / "config.json").read_text()) | change
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        cli_models.open_model(checkpoint)


def test_open_model_refuses_a_truncated_file(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="tiny"):
        cli_models.open_model(checkpoint)


def test_open_model_runs_no_code_from_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Config"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert type(cli_models.open_model(checkpoint).model).__name__ == "Qwen3ForCausalLM"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("c.txt", "some text\n", "some text\n"),
        ("c.json", '["a", "b"]', ["a", "b"]),
        ("c.json", "[[1, 2], [3]]", [[1, 2], [3]]),
    ],
    ids=["text", "texts", "token_ids"],
)
def test_read_calibration(name: str, text: str, expected: object, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert cli_models.read_calibration(tmp_path / name) == expected


@pytest.mark.parametrize("text", ["{", '{"a": 1}', "[1, 2]", "[[true]]"], ids=["malformed", "object", "flat", "bools"])
def test_read_calibration_refuses(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(CalibrationError, match=r"calibration: .*c\.json"):
        cli_models.read_calibration(tmp_path / "c.json")


def test_bench_refuses_a_shape_that_only_fits_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmopt import bench

    monkeypatch.setattr(bench, "available_bytes", lambda: 1_000_000_000)
    with pytest.raises(InputError, match=r"qwen3-0\.6b does not fit into memory in bfloat16"):
        bench.bench_shape("qwen3-0.6b", ["swap_flash_attention"])


def test_passes_are_listed_with_every_option_and_what_it_says() -> None:
    from llmopt.cli_passes import option_texts
    from llmopt.passes import PASSES

    listed = runner.invoke(app, ["passes"]).output
    for name, kind in PASSES.items():
        assert set(option_texts(kind)) == set(kind.option_names())
        assert all(f"  {name}.{option} = " in listed for option in kind.option_names())
    assert ":mod:" not in listed
    assert "``" not in listed
    assert "fuse_kernels" not in runner.invoke(app, ["passes", "pool_memory"]).output
    assert runner.invoke(app, ["passes", "poll_memory"]).exit_code == 2


@pytest.mark.parametrize(
    ("options", "settings", "named"),
    [
        ({"sym": False}, {}, "sym=False"),
        ({"skip": ("*",)}, {}, "skip"),
        ({"head_bits": None}, {}, "head_bits=None"),
        ({}, {"num_layers": 28}, "num_layers"),
        ({}, {"quality_budget": 0.1, "calibration": torch.ones(2, 9)}, "quality_budget, calibration"),
        ({}, {"strict": True}, "strict"),
    ],
)
def test_what_random_codes_do_not_have_is_refused(
    options: dict[str, Any], settings: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmopt import bench

    monkeypatch.setattr(bench, "available_bytes", lambda: 1_000_000_000)
    with pytest.raises(InputError, match=rf"random codes it has no {named}$"):
        bench.bench_shape("qwen3-0.6b", [QuantizeGptq(**options)], **settings)


def test_a_benchmark_times_the_rival_unless_a_backend_is_set() -> None:
    def backend(*settings: str, rivals: bool = True) -> str:
        chosen = cli_models.select_passes("compile_tvm", list(settings), rivals=rivals)
        assert chosen is not None
        return str(chosen[0].backend)

    assert backend() == backend("compile_tvm.tune_s=3") == "auto"
    assert backend("compile_tvm.backend=tvm") == backend(rivals=False) == "tvm"


def run_events(capsys: pytest.CaptureFixture[str]) -> str:
    from llmopt import cli_output
    from llmopt.passes.base import Event

    with cli_output.progress() as on_event:
        on_event(Event("stage", "quantize_gptq", "checking"))
        on_event(Event("progress", "quantize_gptq", "[layer] 1", 1, 28))
        on_event(Event("warning", "quantize_gptq", "3 experts [starved]"))
        on_event(Event("verdict", "quantize_gptq", "kept: faster"))
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_progress_is_silent_but_for_warnings_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_events(capsys) == "warning: quantize_gptq: 3 experts [starved]\n"


def test_progress_on_a_terminal_shows_steps_and_verdicts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    shown = run_events(capsys)
    assert "quantize_gptq: kept: faster" in shown
    assert "3 experts [starved]" in shown


@pytest.mark.skipif(not native.available(), reason="needs the compiled kernels")
def test_kernels_json_is_alone_on_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmopt.measure import ceilings, kernel_bench

    monkeypatch.setattr(ceilings, "_buffer_bytes", lambda: 64 << 20)
    monkeypatch.setattr(kernel_bench, "_LEAST_WORKING_SET", 1 << 20)
    arguments = ["kernels", "int4_linear", "--case", "tail_rows", "--rounds", "1"]
    table = runner.invoke(app, arguments)
    assert table.exit_code == 0, table.stderr
    assert "tail_rows" in table.stdout
    alone = runner.invoke(app, [*arguments, "--json", "-"])
    (result,) = json.loads(alone.stdout)["results"]
    assert (result["op"], result["case"], result["wrong"]) == ("int4_linear", "tail_rows", None)
    assert result["time"]["p50_us"] > 0


def test_kernels_exit_code_says_that_a_result_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmopt.measure import kernel_bench

    def wrong(spec: object, inputs: object) -> tuple[str, float]:
        return "3 of 4 values outside", 1.0

    monkeypatch.setattr(kernel_bench, "check", wrong)
    result = runner.invoke(app, ["kernels", "int4_linear", "--case", "tail_rows", "--rounds", "1"])
    assert result.exit_code == 1
    assert "WRONG, not timed: 3 of 4 values outside" in result.stdout
