"""What differs between families is data in llmopt/models: nothing elsewhere may ask for the model_type."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path
    for folder in (ROOT / "llmopt", ROOT / "kernels" / "ops")
    for path in folder.rglob("*.py")
    if ROOT / "llmopt" / "models" not in path.parents
)


def reads_model_type(node: ast.expr) -> bool:
    """x.model_type, x["model_type"], getattr(x, "model_type"), x.get("model_type"), or a variable of that name."""
    match node:
        case ast.Attribute(attr="model_type") | ast.Name(id="model_type"):
            return True
        case ast.Subscript(slice=ast.Constant(value="model_type")):
            return True
        case ast.Call(func=function, args=args):
            nested = isinstance(function, ast.Attribute) and reads_model_type(function.value)
            named = any(isinstance(arg, ast.Constant) and arg.value == "model_type" for arg in args)
            return nested or named
    return False


def branches(source: str) -> list[int]:
    """Lines that compare a model_type with something, or match on it. Asking whether it is there at all is allowed."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            compares = not all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops)
            if compares and any(reads_model_type(side) for side in (node.left, *node.comparators)):
                lines.append(node.lineno)
        elif isinstance(node, ast.Match) and reads_model_type(node.subject):
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize(
    "source",
    [
        "if model.config.model_type == 'qwen3': pass",
        "if 'qwen3' == config.model_type: pass",
        "if config.model_type in ('qwen3', 'llama'): pass",
        "if config['model_type'] != 'qwen3': pass",
        "if getattr(config, 'model_type', None) == 'qwen3': pass",
        "if config.get('model_type') == 'qwen3': pass",
        "if config.model_type.lower() == 'qwen3': pass",
        "match config.model_type:\n    case 'qwen3': pass",
    ],
)
def test_the_scan_sees_branches(source: str) -> None:
    assert branches(source) == [1]


@pytest.mark.parametrize(
    "source",
    [
        "family = family_for(config.model_type)",
        "if 'model_type' not in config: raise KeyError",
        "if config.model_type is None: pass",
        "if family.attention.kind == 'mla': pass",
    ],
)
def test_the_scan_lets_other_uses_pass(source: str) -> None:
    assert branches(source) == []


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_no_branch_on_the_family_outside_models(path: Path) -> None:
    found = branches(path.read_text())
    assert not found, f"{path.relative_to(ROOT)}: compares model_type on lines {found}; put the fact in ModelFamily"
