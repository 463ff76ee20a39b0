"""Rules that hold for the whole tree and that a reader should be able to rely on."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("so8t_jax", "so8t_torch", "parity_tests")
FILES = sorted(
    p for top in (*PACKAGES, "tests", "benchmarks", "scripts", "examples") for p in (ROOT / top).rglob("*.py")
)
NAMELESS = {"utils", "helpers", "misc", "common", "base", "new", "old", "v2", "ultra", "strict", "final"}


def relative(path):
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def trees(*tops):
    return [(relative(p), tree_of(p)) for p in FILES if relative(p).split("/")[0] in tops]


def handlers(tops):
    return [
        (name, node)
        for name, tree in trees(*tops)
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and node.type is not None
    ]


def caught(handler):
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return {ast.unparse(kind) for kind in kinds}


def statements(function):
    inner = [n for child in function.body for n in ast.walk(child)]
    return sum(isinstance(n, ast.stmt) for n in inner)


def test_there_are_files_to_check():
    assert len(FILES) > 40


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_module_is_short(path):
    limit = 600 if path.name == "kernels.py" else 400
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit


def test_a_function_is_short():
    long = [
        f"{name}:{node.lineno} {node.name} has {statements(node)} statements"
        for name, tree in trees(*PACKAGES, "tests", "benchmarks", "scripts", "examples")
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and statements(node) > 40 and not name.endswith("kernels.py")
    ]
    assert not long


def test_a_path_says_what_it_holds():
    words = {relative(p): set(re.split(r"[/_.]", relative(p))) for p in FILES if "examples" not in p.parts}
    assert not {path: sorted(found & NAMELESS) for path, found in words.items() if found & NAMELESS}


def test_no_two_test_files_have_one_name():
    """Pytest imports the modules of folders that are no packages by their bare names."""
    names = [p.name for p in FILES if p.name.startswith("test_") and not (p.parent / "__init__.py").exists()]
    assert not {name for name in names if names.count(name) > 1}


def test_a_missing_import_is_never_swallowed():
    bad = [
        f"{name}:{node.lineno}"
        for name, node in handlers(PACKAGES)
        if caught(node) & {"ImportError", "ModuleNotFoundError"} and name != "so8t_torch/core/backend.py"
    ]
    assert not bad


def test_a_broad_except_re_raises():
    bad = [
        f"{name}:{node.lineno}"
        for name, node in handlers((*PACKAGES, "benchmarks", "scripts"))
        if caught(node) & {"Exception", "BaseException"} and not any(isinstance(n, ast.Raise) for n in ast.walk(node))
    ]
    assert not bad


def test_no_bare_except():
    bad = [
        f"{name}:{node.lineno}"
        for name, tree in trees(*PACKAGES, "tests", "benchmarks", "scripts", "examples")
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert not bad


def test_the_import_path_is_left_alone():
    bad = [relative(p) for p in FILES if p.name != Path(__file__).name and "sys.path" in p.read_text(encoding="utf-8")]
    assert not bad


def test_scripts_are_thin():
    assert not [relative(p) for p in (ROOT / "scripts").glob("*.py") if len(p.read_text().splitlines()) > 80]


def section_fields():
    """Yield (class, field) for every configuration section in the production package."""
    for name, tree in trees("so8t_torch"):
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and any(
                ast.unparse(b).split(".")[-1].endswith("Section") for b in node.bases
            ):
                for item in node.body:
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                        yield name, node.name, item.target.id


def test_every_setting_is_read_somewhere():
    read = {
        node.attr
        for _, tree in trees("so8t_torch")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    fields = set(section_fields())
    assert fields, "no configuration section was found"
    assert not sorted(f"{cls}.{field}" for _, cls, field in fields if field not in read and field != "model_config")


@pytest.mark.parametrize("path", sorted((ROOT / "configs/train").glob("*.yaml")), ids=lambda p: p.name)
def test_every_configuration_file_loads(path):
    from so8t_torch.core.config import dump_config, load_config
    from so8t_torch.train.config import TrainConfig

    config = load_config(TrainConfig, path)
    assert dump_config(config)


def test_the_top_package_imports_no_model_library():
    import subprocess
    import sys

    probe = "import sys, so8t_torch; print(sorted({'transformers','peft','bitsandbytes','jax'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
