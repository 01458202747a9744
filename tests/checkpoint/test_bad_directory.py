"""Directories, links, shards and configs that must not be trusted: an error that names the file and the key."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_tools import edit_config, refused
from safetensors.torch import load_file, save_file

from llmopt.checkpoint import load, recorded_passes
from llmopt.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("nothing_is_read")

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
