"""The rules of the house that a reader would otherwise have to check by eye."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llmopt
from llmopt.ops import SPECS

ROOT = Path(__file__).parent.parent
MOST_FILE_LINES, MOST_FUNCTION_LINES = 450, 60


def python_files(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


SOURCES = python_files("llmopt", "kernels/ops")
EVERYTHING = sorted({*SOURCES, *python_files("tests", "benchmarks"), ROOT / "setup.py"})


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[:2] == ["kernels", "ops"]:
        parts[:2] = ["llmopt", "ops"]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Full names of all modules a file imports, wherever in it."""
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            full = ".".join([*base, node.module] if node.module else base)
            yield full
            yield from (f"{full}.{alias.name}" for alias in node.names)


def reaches(path: Path, target: str) -> bool:
    return any(name == target or name.startswith(f"{target}.") for name in imports(path))


# from -> what it may not import: optimize -> passes -> {models, ops, measure}
ARROW = {
    "llmopt/models": [
        "llmopt.passes",
        "llmopt.ops",
        "llmopt.loop",
        "llmopt.verbs",
        "llmopt.measure",
        "llmopt.checkpoint",
    ],
    "kernels/ops": [
        "llmopt.passes",
        "llmopt.models",
        "llmopt.loop",
        "llmopt.verbs",
        "llmopt.measure",
        "llmopt.checkpoint",
    ],
    "llmopt/runtime": [
        "llmopt.passes",
        "llmopt.loop",
        "llmopt.verbs",
        "llmopt.receipt",
        "llmopt.measure",
        "llmopt.checkpoint",
        "llmopt.cli",
    ],
    "llmopt/packed.py": ["llmopt.passes", "llmopt.runtime", "llmopt.measure", "llmopt.checkpoint", "llmopt.models"],
    "llmopt/arena.py": ["llmopt.passes", "llmopt.runtime", "llmopt.measure", "llmopt.checkpoint"],
    "llmopt/passes": ["llmopt.loop", "llmopt.verbs", "llmopt.receipt", "llmopt.checkpoint", "llmopt.cli"],
    "llmopt/measure": ["llmopt.loop", "llmopt.verbs", "llmopt.checkpoint", "llmopt.cli"],
    "llmopt/checkpoint": ["llmopt.loop", "llmopt.verbs", "llmopt.cli"],
    "llmopt/loop.py": ["llmopt.verbs", "llmopt.cli", "llmopt.checkpoint"],
}


@pytest.mark.parametrize("folder", ARROW)
def test_imports_follow_the_arrow(folder: str) -> None:
    files = [ROOT / folder] if folder.endswith(".py") else python_files(folder)
    assert files
    wrong = [f"{name_of(f)} imports {target}" for f in files for target in ARROW[folder] if reaches(f, target)]
    assert wrong == []


def test_the_scan_sees_imports(tmp_path: Path) -> None:
    code = "import a.b\nfrom c import d\ndef f():\n    from e.f import g as h\n"
    path = ROOT / "llmopt" / "example_of_this_test.py"
    assert not path.exists()
    tree_file = tmp_path / "x.py"
    tree_file.write_text(code)
    found = {n.names[0].name for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Import | ast.ImportFrom)}
    assert found == {"a.b", "d", "g"}
    assert reaches(ROOT / "llmopt" / "loop.py", "llmopt.passes")
    assert reaches(ROOT / "llmopt" / "loop.py", "torch")
    assert not reaches(ROOT / "llmopt" / "errors.py", "torch")


@pytest.mark.parametrize("path", EVERYTHING, ids=name_of)
def test_installed_code_and_kernels_keep_to_their_names(path: Path) -> None:
    for name in imports(path):
        assert name.partition(".")[0] != "kernels", "Hugging Face has a package of that name: import llmopt.ops"
        if path in SOURCES:
            assert name.partition(".")[0] not in ("tests", "benchmarks")


def test_kernels_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


FRESH = """
import sys
import llmopt
heavy = [m for m in ("torch", "transformers", "matplotlib", "rich", "numpy", "tvm_ffi") if m in sys.modules]
assert not heavy, heavy
assert llmopt.__version__
assert set(llmopt.__all__) <= set(dir(llmopt)) | set(llmopt._HOME), llmopt.__all__
import threading
assert threading.active_count() == 1
"""


def test_importing_llmopt_is_light() -> None:
    ran = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


ALONE = """
import importlib, sys
importlib.import_module(sys.argv[1])
for name in sys.argv[2:]:
    assert name not in sys.modules, name
"""


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("llmopt.ops.int4_linear", ["llmopt.passes", "llmopt.models", "llmopt.loop", "transformers", "matplotlib"]),
        ("llmopt.models", ["llmopt.passes", "llmopt.loop", "llmopt.measure", "matplotlib"]),
        ("llmopt.loop", ["matplotlib", "rich", "typer"]),
        ("llmopt.measure.report", ["torch", "matplotlib", "rich"]),
    ],
)
def test_a_part_imports_alone(module: str, without: list[str]) -> None:
    ran = subprocess.run([sys.executable, "-c", ALONE, module, *without], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_public_names_are_there() -> None:
    for name in llmopt.__all__:
        assert getattr(llmopt, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        llmopt.optimise  # noqa: B018


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_the_environment_is_read_in_one_place(path: Path) -> None:
    if name_of(path) == "llmopt/env.py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv"):
            raise AssertionError(f"line {node.lineno}: os.{node.attr}; only llmopt/env.py reads the environment")
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            assert not {a.name for a in node.names} & {"environ", "getenv"}


def functions(path: Path) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, f"{name_of(path)}:{node.lineno} {node.name}"


def test_files_are_short() -> None:
    long = {name_of(p): n for p in SOURCES if (n := len(p.read_text(encoding="utf-8").splitlines())) > MOST_FILE_LINES}
    assert long == {}


def test_functions_are_short() -> None:
    long = {}
    for path in SOURCES:
        for node, where in functions(path):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = node.end_lineno - body[0].lineno + 1 if body and node.end_lineno else 0
            if lines > MOST_FUNCTION_LINES:
                long[where] = lines
    assert long == {}


# its second half runs as the main program of a process of its own, which may print and set threads
OWN_PROCESS = ROOT / "llmopt" / "measure" / "memory.py"


def test_no_bare_except_and_no_print_left_behind() -> None:
    wrong = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler) and (
                node.type is None or (isinstance(node.type, ast.Name) and node.type.id == "Exception")
            ):
                wrong.append(f"{name_of(path)}:{node.lineno} catches everything")
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            # printing is the command line's trade
            may_print = path.name.startswith("cli") or path == OWN_PROCESS
            if called == "breakpoint" or (called == "print" and not may_print):
                wrong.append(f"{name_of(path)}:{node.lineno} {called}()")
    assert wrong == []


def test_nothing_global_is_set() -> None:
    """No seeds, signal handlers, logging set-up or thread counts in installed code."""
    forbidden = {
        "torch.manual_seed", "torch.set_num_threads", "torch.set_default_dtype", "torch.set_default_device",
        "np.random.seed", "numpy.random.seed", "random.seed", "signal.signal", "logging.basicConfig", "logging.root",
        "torch.set_grad_enabled", "warnings.filterwarnings", "warnings.simplefilter",
    }  # fmt: skip
    wrong = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            # threads.py sets what its caller asks for
            if path == OWN_PROCESS or name_of(path) == "llmopt/threads.py":
                continue
            if isinstance(node, ast.Attribute) and ast.unparse(node) in forbidden:
                wrong.append(f"{name_of(path)}:{node.lineno} {ast.unparse(node)}")
    assert wrong == []


def test_every_module_says_what_it_is() -> None:
    without = [name_of(p) for p in SOURCES if not ast.get_docstring(ast.parse(p.read_text(encoding="utf-8")))]
    assert without == []


def test_every_public_function_has_a_docstring_where_users_look() -> None:
    for name in llmopt.__all__:
        if name not in ("errors", "Report"):
            assert getattr(llmopt, name).__doc__, name
    for name in SPECS:
        # not the spec's run: that of an op that writes into its arguments is a wrapper for tests and benchmarks
        function = getattr(importlib.import_module(f"llmopt.ops.{name}"), name)
        assert "Args:" in (function.__doc__ or ""), name
        assert "Raises:" in (function.__doc__ or ""), name


OP_FOLDERS = sorted(p.parent for p in (ROOT / "kernels" / "ops").glob("*/__init__.py"))


@pytest.mark.parametrize("folder", OP_FOLDERS, ids=lambda p: p.name)
def test_an_op_folder_is_complete(folder: Path) -> None:
    assert (folder / "reference.py").is_file()
    if folder.name in SPECS:
        assert (folder / "spec.py").is_file()
        assert SPECS[folder.name].name == folder.name
    native_files = {p.name for p in folder.glob("*.cpp")}
    assert not native_files or "op.cpp" in native_files
    # loops come for every instruction set or for none
    assert native_files & {"portable.cpp", "avx2.cpp", "avx512.cpp"} in (
        set(),
        {"portable.cpp", "avx2.cpp", "avx512.cpp"},
    )


def test_every_registered_op_has_its_folder() -> None:
    assert set(SPECS) <= {p.name for p in OP_FOLDERS}
    with pytest.raises(KeyError):
        SPECS["no_such_op"]
