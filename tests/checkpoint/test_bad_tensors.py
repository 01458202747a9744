"""Tensors that do not fit the config, each other or their settings: an error that names the file and the tensor."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_tools import edit_config, edit_tensors, refused
from safetensors.torch import load_file, save_file

from llmopt.checkpoint import load, loader
from llmopt.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("nothing_is_read")

Q = "model.layers.0.self_attn.q_proj"


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


@pytest.mark.usefixtures("reads_weights")
def test_a_difference_in_hashes_is_told_before_what_follows_from_it(copy: Callable[[str], Path]) -> None:
    directory = copy("ours")
    edit_tensors(directory, **{"lm_head.weight": change_at((0, 0), float("nan"))})
    refused(directory, "model.safetensors: expected sha256", "damaged or changed")


@pytest.mark.usefixtures("reads_weights")
def test_nothing_waits_for_hashes_after_an_interruption(
    copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loader.Loader, "run", interrupted)
    directory = copy("ours")
    edit_tensors(directory, **{"lm_head.weight": change_at((0, 0), 3.0)})
    with pytest.raises(KeyboardInterrupt):
        load(directory)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("llmopt")]
