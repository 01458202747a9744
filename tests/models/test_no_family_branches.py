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


def is_fixed(node: ast.expr) -> bool:
    """A string, a collection of strings, or a CONSTANT: something that could spell a family."""
    match node:
        case ast.Constant(value=str()):
            return True
        case ast.Tuple(elts=items) | ast.List(elts=items) | ast.Set(elts=items):
            return any(map(is_fixed, items))
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name.isupper()
    return False


def is_branch(node: ast.AST) -> bool:
    match node:
        case ast.Compare(left=left, comparators=others):
            sides = [left, *others]
            return any(map(reads_model_type, sides)) and any(map(is_fixed, sides))
        case ast.Match(subject=subject):
            return reads_model_type(subject)
        case ast.Call(func=ast.Attribute(attr="startswith" | "endswith", value=value)):
            return reads_model_type(value)
    return False


def branches(source: str) -> list[int]:
    """Lines that compare a model_type with a fixed name, or match on it. Comparing two variables is allowed."""
    return [node.lineno for node in ast.walk(ast.parse(source)) if is_branch(node)]


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
        "if config.model_type in MOE_TYPES: pass",
        "if config.model_type.startswith('deepseek'): pass",
        "if 'ernie' in config.model_type: pass",
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
        "if config['model_type'] != family.model_type: raise ValueError",
        "if family.attention.kind == 'mla': pass",
    ],
)
def test_the_scan_lets_other_uses_pass(source: str) -> None:
    assert branches(source) == []


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_no_branch_on_the_family_outside_models(path: Path) -> None:
    found = branches(path.read_text())
    assert not found, f"{path.relative_to(ROOT)}: compares model_type on lines {found}; put the fact in ModelFamily"
