"""Everything that can be wrong with a checkpoint directory is an error that names the file and the key."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_tools import AutoGptq, edit_config, edit_tensors, quantize, tiny
from safetensors.torch import load_file, save_file

from llmopt.checkpoint import load, loader, recorded_passes, save
from llmopt.errors import CheckpointError

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One good checkpoint of each kind; tests change a copy."""
    root = tmp_path_factory.mktemp("made")
    model = tiny("qwen3_moe")
    plain = save(model, root / "plain")
    (plain / "llmopt.json").unlink()
    AutoGptq(desc_act=False).write(model, root / "gptq")
    AutoGptq(desc_act=True, sym=False).write(tiny("llama"), root / "desc_act")
    originals = quantize(model)
    save(model, root / "ours", originals=originals)
    save(tiny("qwen3"), root / "sharded", max_shard_bytes=100_000)
    return {p.name: p for p in root.iterdir()}


@pytest.fixture
def copy(made: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def make(kind: str) -> Path:
        return Path(shutil.copytree(made[kind], tmp_path / "model"))

    return make


@pytest.fixture
def reads_weights() -> None:
    """For tests of what only shows in the weights themselves."""


@pytest.fixture(autouse=True)
def nothing_is_installed(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Unless a test says so, an error comes before the first weight is read, and nothing reaches for the network."""

    def refuse(*args: object) -> None:
        pytest.fail("weights were read before the error")

    if "reads_weights" not in request.fixturenames:
        monkeypatch.setattr(loader.Loader, "run", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def refused(directory: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load(directory)
    for part in parts:
        assert part in str(error.value), f"{part!r} not in {error.value}"


# -- the directory -----------------------------------------------------------------------------------------------------


def test_no_directory(tmp_path: Path) -> None:
    refused(tmp_path / "none", "none", "expected a checkpoint directory, got nothing")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "expected a checkpoint directory, got a file")
    with pytest.raises(CheckpointError, match="got nothing"):
        recorded_passes(tmp_path / "none")


def test_no_config(copy: Callable[[str], Path]) -> None:
    directory = copy("plain")
    (directory / "config.json").unlink()
    refused(directory, "config.json: no such file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('"x"', "expected a JSON object, got str"),
        ('{"a":' * 100_000, "not JSON"),
        ('{"hidden_size": ' + "9" * 5000 + "}", "not JSON"),
        ("\xff", "not JSON in UTF-8"),
    ],
    ids=["cut off", "empty", "list", "string", "deep", "huge number", "latin-1"],
)
def test_config_is_not_an_object(copy: Callable[[str], Path], text: str, message: str) -> None:
    directory = copy("plain")
    (directory / "config.json").write_bytes(text.encode("latin-1"))
    refused(directory, "config.json", message)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles(copy: Callable[[str], Path], name: str) -> None:
    directory = copy("plain")
    (directory / "model.safetensors").rename(directory / name)
    refused(directory, name, "pickles can run code")


def test_no_weights(copy: Callable[[str], Path]) -> None:
    directory = copy("plain")
    (directory / "model.safetensors").unlink()
    refused(directory, "expected model.safetensors or model.safetensors.index.json, got neither")
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, directory / f"{name}.safetensors")
    refused(directory, "a.safetensors, b.safetensors without an index")


# -- shards and links --------------------------------------------------------------------------------------------------


def edit_index(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / "model.safetensors.index.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_missing_shard(copy: Callable[[str], Path]) -> None:
    directory = copy("sharded")
    shard = sorted(directory.glob("*.safetensors"))[-1]
    shard.unlink()
    refused(directory, shard.name, "no such file")


@pytest.mark.parametrize("value", [None, [], {}, "x", {"a": 1}, {"a": "pytorch_model.bin"}, {"a": ""}])
def test_bad_weight_map(copy: Callable[[str], Path], value: Any) -> None:
    directory = copy("sharded")
    edit_index(directory, lambda data: data.update(weight_map=value))
    refused(directory, "model.safetensors.index.json: weight_map", "expected")


def test_no_weight_map(copy: Callable[[str], Path]) -> None:
    directory = copy("sharded")
    edit_index(directory, lambda data: data.pop("weight_map"))
    refused(directory, "model.safetensors.index.json: weight_map", "got NoneType")


def outside(directory: Path) -> Path:
    """A shard moved out of the checkpoint."""
    shard = min(directory.glob("*.safetensors"))
    target = directory.parent / "outside.safetensors"
    shard.rename(target)
    edit_index(
        directory,
        lambda data: data["weight_map"].update({k: "@" for k, v in data["weight_map"].items() if v == shard.name}),
    )
    return target


@pytest.mark.parametrize("how", ["dots", "absolute", "dots inside", "link", "link to a link", "directory link"])
def test_entry_that_leaves_the_directory(copy: Callable[[str], Path], how: str) -> None:
    directory = copy("sharded")
    target = outside(directory)
    name = {
        "dots": "../outside.safetensors", "absolute": str(target), "dots inside": "sub/../../outside.safetensors",
        "directory link": "sub/outside.safetensors",
    }.get(how, "inside.safetensors")  # fmt: skip
    if how == "dots inside":
        (directory / "sub").mkdir()
    elif how == "link":
        (directory / name).symlink_to(target)
    elif how == "link to a link":
        (directory / "second").symlink_to(target)
        (directory / name).symlink_to("second")
    elif how == "directory link":
        (directory / "sub").symlink_to(directory.parent)
    path = directory / "model.safetensors.index.json"
    path.write_text(path.read_text().replace('"@"', json.dumps(name)))
    refused(directory, name, "leaves the checkpoint" if "link" in how else "expected the name of a file")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
def test_single_file_that_links_outside(copy: Callable[[str], Path], name: str) -> None:
    directory = copy("plain")
    target = directory.parent / "elsewhere"
    (directory / name).rename(target)
    (directory / name).symlink_to(target)
    refused(directory, name, "leaves the checkpoint directory")


def test_link_loop_and_special_files(copy: Callable[[str], Path]) -> None:
    directory = copy("plain")
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").symlink_to("model.safetensors")
    refused(directory, "model.safetensors: no such file")
    (directory / "model.safetensors").unlink()
    os.mkfifo(directory / "model.safetensors")
    refused(directory, "model.safetensors: expected a regular file")


@pytest.mark.usefixtures("reads_weights")
def test_links_inside_are_fine(copy: Callable[[str], Path]) -> None:
    directory = copy("plain")
    (directory / "model.safetensors").rename(directory / "real")
    (directory / "model.safetensors").symlink_to("real")
    link = directory.parent / "link"
    link.symlink_to(directory)
    assert load(link).config._name_or_path == str(directory)


def test_tensor_in_two_shards(copy: Callable[[str], Path]) -> None:
    directory = copy("sharded")
    first, second = sorted(directory.glob("*.safetensors"))[:2]
    both = {**load_file(first), **load_file(second)}
    save_file(both, first)
    refused(directory, second.name, "is in", "as well")


def test_index_names_a_tensor_that_its_shard_lacks(copy: Callable[[str], Path]) -> None:
    directory = copy("sharded")
    first = min(directory.glob("*.safetensors")).name
    edit_index(directory, lambda data: data["weight_map"].update(ghost=first))
    refused(directory, "weight_map: ghost: is not in", first)


def test_malformed_shard_names_the_file(copy: Callable[[str], Path]) -> None:
    directory = copy("plain")
    path = directory / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    refused(directory, "model.safetensors", "truncated")


# -- config ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["gpt2", "qwen", "../../evil", None, 3, ["qwen3"], ""])
def test_model_type(copy: Callable[[str], Path], value: Any) -> None:
    directory = copy("plain")
    edit_config(directory, model_type=value)
    refused(directory, "config.json", "model_type: expected")
    if value == "qwen":
        refused(directory, "nearest: qwen")


@pytest.mark.parametrize("value", [-1, 0, 2**40, 1.5, "128", True, [128]])
@pytest.mark.parametrize(
    "key",
    ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "head_dim",
     "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "intermediate_size"],
)  # fmt: skip
def test_absurd_numbers(copy: Callable[[str], Path], key: str, value: Any) -> None:
    directory = copy("plain")
    edit_config(directory, num_experts=..., num_local_experts=...)
    edit_config(directory, **{key: value})
    refused(directory, f"config.json: {key}: expected an integer in 1..")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok: expected at most 8"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of 4"),
        ({"num_experts": 8, "num_local_experts": 16}, "num_experts: expected 16 as in num_local_experts"),
        ({"partial_rotary_factor": 1e12}, "partial_rotary_factor: expected a share"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": -1}}, "partial_rotary_factor"),
        ({"dtype": "float8_e4m3fn"}, "dtype: expected float32 | bfloat16 | float16"),
        ({"dtype": "load"}, "dtype: expected"),
        ({"dtype": 3}, "dtype: expected"),
        ({"layer_types": ["full_attention"]}, "config.json"),
        ({"hidden_act": "no_such"}, "config.json"),
        ({"rope_parameters": {"rope_type": "no_such"}}, "config.json"),
        ({"get_text_config": 1}, "config.json"),
        ({"sliding_window": "x"}, "config.json"),
        ({"rms_norm_eps": None}, "config.json"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_config_that_makes_no_model(copy: Callable[[str], Path], changes: dict[str, Any], message: str) -> None:
    directory = copy("plain")
    edit_config(directory, **changes)
    refused(directory, message)


@pytest.mark.parametrize("factor", [float("nan"), 0.0])
def test_rope_that_is_not_finite(copy: Callable[[str], Path], factor: float) -> None:
    directory = copy("plain")
    edit_config(directory, rope_parameters={"rope_type": "linear", "factor": factor, "rope_theta": 10000.0})
    refused(directory, "config.json", "rope")


@pytest.mark.usefixtures("reads_weights")
def test_code_in_the_config_is_never_run(copy: Callable[[str], Path]) -> None:
    directory = copy("plain")
    (directory / "evil.py").write_text("raise SystemExit('executed')")
    edit_config(
        directory, trust_remote_code=True, _attn_implementation_internal="kernels-community/evil",
        _attn_implementation="kernels-community/evil", attn_implementation="kernels-community/evil",
        _experts_implementation="kernels-community/evil", experts_implementation="kernels-community/evil",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, use_kernels=True,
        name_or_path="evil/repo", _name_or_path="evil/repo",
    )  # fmt: skip
    (directory / "generation_config.json").write_text(json.dumps({"trust_remote_code": True, "eos_token_id": 2}))
    model = load(directory)
    assert type(model).__module__.startswith("transformers.models.qwen3_moe.")
    assert model.config._attn_implementation in ("sdpa", "eager")
    assert model.config._experts_implementation in ("grouped_mm", "eager", "batched_mm")
    assert not hasattr(model.config, "auto_map")
    assert model.config._name_or_path == str(directory)


def test_generation_config(copy: Callable[[str], Path]) -> None:
    directory = copy("plain")
    (directory / "generation_config.json").write_text("[]")
    refused(directory, "generation_config.json: expected a JSON object")
    (directory / "generation_config.json").write_text('{"watermarking_config": {"no_such": 1}}')
    refused(directory, "generation_config.json: not a generation config")


# -- names and shapes --------------------------------------------------------------------------------------------------


def test_missing_and_extra_tensors(copy: Callable[[str], Path]) -> None:
    directory = copy("plain")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.self_attn.q_norn.weight"] = tensors.pop("model.layers.0.self_attn.q_norm.weight")
    save_file(tensors, directory / "model.safetensors")
    refused(
        directory, "expected 1 more tensors", "model.layers.0.self_attn.q_norm.weight (nearest: ",
        "model.layers.0.self_attn.q_norn.weight", "1 tensors belong to nothing",
    )  # fmt: skip


@pytest.mark.parametrize("part", ["gate_proj.qweight", "up_proj.scales", "down_proj.qzeros"])
def test_missing_part_of_an_expert(copy: Callable[[str], Path], part: str) -> None:
    directory = copy("gptq")
    edit_tensors(directory, **{f"model.layers.1.mlp.experts.3.{part}": ...})
    refused(directory, f"model.layers.1.mlp.experts.3.{part}")


def test_more_layers_than_the_config_says(copy: Callable[[str], Path]) -> None:
    directory = copy("gptq")
    edit_config(directory, num_hidden_layers=2)
    refused(directory, "tensors belong to nothing in the model", "model.layers.2.", "more")


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("plain", "hidden_size", 256), ("plain", "vocab_size", 1024), ("plain", "num_experts", 16),
        ("plain", "num_hidden_layers", 4), ("gptq", "hidden_size", 256), ("gptq", "head_dim", 64),
        ("gptq", "moe_intermediate_size", 32), ("ours", "vocab_size", 513), ("ours", "hidden_size", 256),
    ],
)  # fmt: skip
def test_sizes_that_disagree_with_the_config(copy: Callable[[str], Path], kind: str, key: str, value: int) -> None:
    directory = copy(kind)
    edit_config(directory, **{key: value, **({"num_local_experts": value} if key == "num_experts" else {})})
    refused(directory, "expected")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("qweight", lambda t: t[:-1], "expected shape [16, 128]"),
        ("qweight", lambda t: t[:, :-8], "expected shape [16, 128]"),
        ("qweight", lambda t: t.t(), "expected shape [16, 128]"),
        ("qweight", lambda t: t.to(torch.int64), "expected int32, got int64"),
        ("qweight", lambda t: t.flatten(), "expected shape [16, 128]"),
        ("qzeros", lambda t: t[:1], "expected shape [4, 16]"),
        ("qzeros", lambda t: t.to(torch.int16), "expected int32"),
        ("scales", lambda t: t[:-1], "expected shape [4, 128]"),
        ("scales", lambda t: t.to(torch.float64), "expected float32, bfloat16, float16"),
        ("scales", lambda t: t.to(torch.int32), "expected float32, bfloat16, float16"),
        ("g_idx", lambda t: t[:-1], "expected shape [128]"),
        ("g_idx", lambda t: t.float(), "expected int32, int64"),
    ],
)
def test_packed_shapes_and_dtypes(copy: Callable[[str], Path], part: str, change: Any, message: str) -> None:
    directory = copy("gptq")
    edit_tensors(directory, **{f"{Q}.{part}": change})
    refused(directory, f"model.safetensors: {Q}.{part}: {message}")


def test_plain_dtype(copy: Callable[[str], Path]) -> None:
    directory = copy("plain")
    edit_tensors(directory, **{f"{Q}.weight": lambda t: t.to(torch.int8)})
    refused(directory, f"{Q}.weight: expected float32, bfloat16, float16, got int8")


# -- quantization settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "awq"}, "quant_method: expected 'gptq', got 'awq'"),
        ({"quant_method": "llmopt-next"}, "quant_method: expected 'gptq'"),
        ({"quant_method": None}, "quant_method: expected 'gptq', got None"),
        ({"bits": 3}, "bits: expected 4 or 8, got 3"),
        ({"bits": 2}, "bits: expected 4 or 8"),
        ({"bits": "4"}, "bits: expected 4 or 8"),
        ({"bits": True}, "bits: expected 4 or 8"),
        ({"bits": 8, "sym": False}, "sym: expected true at 8 bits"),
        ({"group_size": 0}, "group_size: expected 32, 64, a multiple of 128, or -1, got 0"),
        ({"group_size": -2}, "group_size: expected"),
        ({"group_size": 16}, "group_size: expected"),
        ({"group_size": 100}, "group_size: expected"),
        ({"group_size": 2**40}, "group_size: expected"),
        ({"group_size": "32"}, "group_size: expected"),
        ({"group_size": None}, "group_size: expected"),
        ({"group_size": 64}, "scales: expected shape [2, 128] (from the config), got [4, 128]"),
        ({"sym": "yes"}, "sym: expected true or false"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format: expected gptq or gptq_v2, got 'marlin'"),
        ({"is_marlin_format": True}, "checkpoint_format: expected gptq or gptq_v2, got 'marlin'"),
        ({"pack_dtype": "int16"}, "pack_dtype: expected 'int32'"),
        ({"adapter": {"name": "lora"}}, "adapter: expected nothing"),
        ({"dynamic": [1]}, "dynamic: expected an object"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_quantization_settings(copy: Callable[[str], Path], changes: dict[str, Any], message: str) -> None:
    directory = copy("gptq")
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    edit_config(directory, quantization_config={**config, **changes})
    refused(directory, message)


def test_quantization_config_is_missing_or_no_object(copy: Callable[[str], Path]) -> None:
    directory = copy("gptq")
    edit_config(directory, quantization_config=...)
    refused(directory, ".qweight: quantized, but config.json has no quantization_config")
    edit_config(directory, quantization_config="gptq")
    refused(directory, "quantization_config: expected an object, got str")


# -- values: found while weights are read ------------------------------------------------------------------------------


def change_at(index: tuple[int, ...], value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


@pytest.mark.usefixtures("reads_weights")
@pytest.mark.parametrize("name", [Q, "model.layers.2.mlp.experts.5.up_proj"], ids=["linear", "expert"])
@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("scales", change_at((1, 3), 0.0), "expected scales other than 0, got 1 zeros"),
        ("scales", change_at((1, 3), float("nan")), "expected finite scales, got NaN or Inf"),
        ("scales", change_at((1, 3), float("-inf")), "expected finite scales, got NaN or Inf"),
        ("scales", lambda t: change_at((1, 3), 1e6)(t.float()), "expected scales that float16 can hold, got 1e+06"),
        ("scales", lambda t: change_at((1, 3), 1e-9)(t.float()), "expected scales that float16 can hold, got 1e-09"),
        ("scales", lambda t: change_at((1, 3), 3.3e-8)(t.float()), "expected scales that float16 can hold"),
        ("qzeros", change_at((0, 0), 0x77777778), "expected zero points of 8 (sym is true), got [9]"),
        ("g_idx", change_at((5,), 4), "g_idx: expected groups 0..3, got 4"),
        ("g_idx", change_at((5,), -1), "g_idx: expected groups 0..3, got -1"),
        ("g_idx", change_at((5,), 3), "g_idx: expected 32 columns a group"),
    ],
)
def test_packed_values(copy: Callable[[str], Path], name: str, part: str, change: Any, message: str) -> None:
    directory = copy("gptq")
    edit_tensors(directory, **{f"{name}.{part}": change})
    refused(directory, f"model.safetensors: {name}.{part}: ", message)


@pytest.mark.usefixtures("reads_weights")
def test_v2_zeros_labelled_v1(copy: Callable[[str], Path]) -> None:
    """The commonest mislabelling: every zero point is off by one, and nothing else would notice."""
    directory = copy("gptq")
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    edit_config(directory, quantization_config={**config, "checkpoint_format": "gptq_v2"})
    refused(directory, "qzeros: expected zero points of 8", "is checkpoint_format right?")


@pytest.mark.usefixtures("reads_weights")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("kind", "name", "index"),
    [
        ("plain", "model.layers.1.mlp.experts.3.down_proj.weight", (0, 0)),
        ("plain", "model.embed_tokens.weight", (500, 127)),
        ("gptq", "model.norm.weight", (3,)),
        ("gptq", "model.layers.1.mlp.gate.weight", (0, 0)),
    ],
)
def test_nan_in_plain_tensors(
    copy: Callable[[str], Path], kind: str, name: str, index: tuple[int, ...], value: float
) -> None:
    directory = copy(kind)
    edit_tensors(directory, **{name: change_at(index, value)})
    refused(directory, f"model.safetensors: {name}: expected finite values, got NaN or Inf")


@pytest.mark.usefixtures("reads_weights")
def test_negative_scales_are_legal(copy: Callable[[str], Path]) -> None:
    directory = copy("gptq")
    edit_tensors(directory, **{f"{Q}.scales": lambda t: -t})
    before = load_file(directory / "model.safetensors")[f"{Q}.scales"]
    assert torch.equal(load(directory).model.layers[0].self_attn.q_proj.codes()[1], before.t())


@pytest.mark.usefixtures("reads_weights")
def test_expert_with_a_bias(copy: Callable[[str], Path]) -> None:
    directory = copy("gptq")
    name = "model.layers.1.mlp.experts.3.down_proj.bias"
    edit_tensors(directory, **{name: torch.zeros(128)})
    load(directory)
    edit_tensors(directory, **{name: torch.ones(128)})
    refused(directory, name, "expected zeros")


# -- llmopt.json -------------------------------------------------------------------------------------------------------


def edit_manifest(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / "llmopt.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


HEAD = "lm_head"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format_version=99), "format_version: expected 1, got 99"),
        (lambda d: d.pop("format_version"), "format_version"),
        (lambda d: d.update(passes=[]), "passes: expected dict"),
        (lambda d: d.update(passes={"a": 1}), "passes: a: expected an object"),
        (lambda d: d.update(files={}), "files: expected list"),
        (lambda d: d.update(files=[1]), "files: expected file names"),
        (lambda d: d.update(report=1), "report: expected an object or null"),
        (lambda d: d.update(weights={}), "weights: model.safetensors: not recorded"),
        (lambda d: d["weights"].update({"../x": {"nbytes": 1, "sha256": ""}}), "'../x'"),
        (lambda d: d["weights"]["model.safetensors"].update(sha256=3), "sha256: expected str"),
        (lambda d: d["weights"]["model.safetensors"].update(sha256="00"), "model.safetensors: expected sha256 00..."),
        (lambda d: d["requantized"].update({"model.norm": d["requantized"][HEAD]}), "requantized: model.norm"),
        (lambda d: d["requantized"][HEAD].update(kind="embedding", dtype="bfloat16"), "requantized: lm_head"),
        (lambda d: d["requantized"][HEAD].update(bits=3), "bits: expected 4, or 8"),
        (lambda d: d["requantized"][HEAD].update(asymmetric=True), "bits: expected 4, or 8 and symmetric"),
        (lambda d: d["requantized"][HEAD].update(group_size=17), "group_size: expected"),
        (lambda d: d["requantized"][HEAD].update(group_size=32), "lm_head.scales: expected torch.float16 [512, 4]"),
        (lambda d: d["requantized"][HEAD].update(tensor="../x"), "expected 1 more tensors", ),
        (lambda d: d["requantized"][HEAD].update(tensor="model.norm.weight"), "model.norm.weight: expected shape"),
        (lambda d: d["requantized"][HEAD].update(scales="nope"), "nope.scales: expected"),
        (lambda d: d["requantized"][HEAD].update(permuted=True), "lm_head.perm: expected"),
        (lambda d: d["requantized"]["model.embed_tokens"].update(dtype="load"), "dtype: expected one of"),
        (lambda d: d["requantized"].update({HEAD: 3}), "requantized: lm_head: expected an object"),
        (lambda d: d["requantized"].pop(HEAD), None),
    ],
)  # fmt: skip
def test_manifest(
    copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, change: Any, message: str | None
) -> None:
    directory = copy("ours")
    edit_manifest(directory, change)
    if message is None:
        # not quantized again, then: a plain head
        monkeypatch.undo()
        assert isinstance(load(directory).lm_head, torch.nn.Linear)
    else:
        refused(directory, message)


def test_scales_file(copy: Callable[[str], Path]) -> None:
    directory = copy("ours")
    (directory / "llmopt.scales").unlink()
    refused(directory, "llmopt.scales: missing")
    (directory / "llmopt.scales").symlink_to("/etc/hostname")
    refused(directory, "llmopt.scales: leaves the checkpoint directory")


@pytest.mark.usefixtures("reads_weights")
def test_changed_weights_are_noticed(copy: Callable[[str], Path]) -> None:
    directory = copy("ours")
    edit_tensors(directory, **{"lm_head.weight": change_at((0, 0), 3.0)})
    refused(directory, "model.safetensors: expected sha256", "damaged or changed")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: quantized again"):
        load(directory, verify=False)
    edit_tensors(directory, **{"lm_head.weight": change_at((0, 0), float("nan"))})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: expected finite values"):
        load(directory, verify=False)
