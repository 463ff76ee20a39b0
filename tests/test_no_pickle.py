"""No source of the project loads a pickle or runs code from a file, outside one function that is named here."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOPS = ("so8t_jax", "so8t_torch", "parity_tests", "benchmarks", "scripts", "examples")
AUDITED = "so8t_torch/train/checkpoint_state.py"
"""The only file that may call ``torch.load``, once, inside a function, with ``weights_only=True`` written out."""

MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "shelve", "torch.package"}
CALLS = {
    *("torch.jit.load", "torch.hub.load", "torch.serialization.load", "torch.serialization.add_safe_globals"),
    *("torch.distributed.checkpoint.load", "pandas.read_pickle", "sklearn.externals", "eval", "exec", "compile"),
    *("yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all", "runpy.run_path"),
}
YAML_LOADS = {"yaml.load", "yaml.load_all"}
SAFE_LOADERS = {"yaml.SafeLoader", "yaml.CSafeLoader", "yaml.BaseLoader"}
UNSAFE_NAMES = {"yaml.Loader", "yaml.FullLoader", "yaml.UnsafeLoader", "yaml.CLoader", "yaml.CFullLoader"}
KEYWORDS = {"allow_pickle": False, "weights_only": True, "trust_remote_code": False, "use_safetensors": True}
"""Keywords of other libraries' readers, and the one value that may be written for each."""


class Scan(ast.NodeVisitor):
    """Collects what is forbidden in one file; names are resolved through its imports."""

    def __init__(self, name: str, tree: ast.Module) -> None:
        self.found: list[str] = []
        self.audited: list[ast.Call] = []
        self._name = name
        self._names: dict[str, str] = {}
        self._safe = set(SAFE_LOADERS)
        self._functions = 0
        self.visit(tree)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._module(alias.name, node)
            top = alias.name.split(".")[0]
            self._names[alias.asname or top] = alias.name if alias.asname else top

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            self._module(str(node.module), node)
            self._module(whole, node)
            self._names[alias.asname or alias.name] = whole
            if whole in UNSAFE_NAMES | CALLS:
                self._report(whole, node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        if {self._full(base) for base in node.bases} & self._safe:
            self._safe.add(node.name)
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._functions += 1
        self.generic_visit(node)
        self._functions -= 1

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if self._full(node) in UNSAFE_NAMES:
            self._report(self._full(node), node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        called = self._full(node.func)
        if called == "torch.load":
            self._torch_load(node)
        elif called in YAML_LOADS and not self._loader_is_safe(node):
            self._report(f"{called} without a safe loader", node)
        elif called in CALLS:
            self._report(called, node)
        elif called in {"getattr", "__import__", "importlib.import_module"}:
            self._indirect(node)
        self._keywords(node)
        self.generic_visit(node)

    def _torch_load(self, node: ast.Call) -> None:
        written = {k.arg: k.value for k in node.keywords}
        value = written.get("weights_only")
        whole = isinstance(value, ast.Constant) and value.value is True and None not in written
        if self._name == AUDITED and self._functions and whole:
            self.audited.append(node)
        else:
            self._report("torch.load outside the audited function, or without weights_only=True", node)

    def _loader_is_safe(self, node: ast.Call) -> bool:
        given = [k.value for k in node.keywords if k.arg == "Loader"] or node.args[1:2]
        return bool(given) and self._full(given[0]) in self._safe

    def _indirect(self, node: ast.Call) -> None:
        words = {str(a.value) for a in node.args if isinstance(a, ast.Constant)}
        if words & (MODULES | {"load", "loads", "eval", "exec"}):
            self._report(f"{ast.unparse(node)}", node)

    def _keywords(self, node: ast.Call) -> None:
        for keyword in node.keywords:
            value = keyword.value
            if keyword.arg in KEYWORDS and not (
                isinstance(value, ast.Constant) and value.value is KEYWORDS[keyword.arg]
            ):
                self._report(f"{keyword.arg}={ast.unparse(value)}", node)

    def _module(self, name: str, node: ast.AST) -> None:
        if name in MODULES or name.split(".")[0] in MODULES:
            self._report(f"import of {name}", node)

    def _full(self, node: ast.AST) -> str:
        text = ast.unparse(node)
        first, dot, rest = text.partition(".")
        return f"{self._names.get(first, first)}{dot}{rest}"

    def _report(self, what: str, node: ast.AST) -> None:
        self.found.append(f"{self._name}:{getattr(node, 'lineno', 0)}: {what}")


def scan(name, text):
    return Scan(name, ast.parse(text))


def test_no_source_loads_a_pickle_or_runs_code_from_a_file():
    files = sorted(path for top in TOPS for path in (ROOT / top).rglob("*.py"))
    assert len(files) > 150
    scans = [scan(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in files]
    assert not [hit for one in scans for hit in one.found]
    assert sum(len(one.audited) for one in scans) <= 1


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.load('a')",
        "import torch as t\nt.load('a', weights_only=True)",
        "from torch import load\nload('a')",
        "from torch.serialization import load as read\nread('a')",
        "import pickle",
        "from pickle import loads",
        "import joblib.numpy_pickle",
        "import dill as json",
        "import shelve",
        "import numpy as np\nnp.load('a', allow_pickle=True)",
        "import numpy as np\nnp.load('a', allow_pickle=flag)",
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, Loader=yaml.FullLoader)",
        "import yaml\nyaml.load(text, yaml.Loader)",
        "from yaml import Loader",
        "from yaml import unsafe_load",
        "import yaml\nclass Own(yaml.Loader): ...\nyaml.load(text, Loader=Own)",
        "import pandas as pd\npd.read_pickle('a')",
        "import torch\ngetattr(torch, 'load')('a')",
        "import importlib\nimportlib.import_module('pickle')",
        "__import__('dill')",
        "Model.from_pretrained(p, use_safetensors=False)",
        "Model.from_pretrained(p, trust_remote_code=True)",
        "read(p, weights_only=False)",
        "eval(text)",
        "import torch\ntorch.hub.load('a', 'b')",
    ],
)
def test_the_scan_finds(text):
    assert scan("so8t_torch/planted.py", text).found


@pytest.mark.parametrize(
    "text",
    [
        "import numpy as np\nnp.load('a')\nnp.load('a', allow_pickle=False)",
        "import yaml\nyaml.safe_load(text)\nyaml.load(text, Loader=yaml.SafeLoader)",
        "import yaml\nclass Own(yaml.SafeLoader): ...\nyaml.load(text, Loader=Own)",
        "from safetensors.torch import load_file\nload_file('a')",
        "import torch\nmodel = torch.compile(model)\nmodel.load_state_dict(state)\nmodel.eval()",
        "import re\nre.compile('a')",
    ],
)
def test_the_scan_leaves_alone(text):
    assert not scan("so8t_torch/planted.py", text).found


GOOD = "import torch\ndef read(path):\n    return torch.load(path, weights_only=True)"


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        (AUDITED, GOOD, True),
        ("so8t_torch/train/other.py", GOOD, False),
        (AUDITED, GOOD.replace("True", "False"), False),
        (AUDITED, GOOD.replace(", weights_only=True", ""), False),
        (AUDITED, GOOD.replace("weights_only=True", "**options"), False),
        (AUDITED, GOOD.replace("weights_only=True", "weights_only=True, **options"), False),
        (AUDITED, "import torch\nstate = torch.load('a', weights_only=True)", False),
    ],
)
def test_the_audited_function_is_the_only_exception(name, text, allowed):
    found = scan(name, text)
    assert (len(found.audited), bool(found.found)) == ((1, False) if allowed else (0, True))
