"""The package's source as one file: nothing of it is left behind, and names that clash are found."""

import ast
import builtins
import re

import pytest

from diffusers_sde.shipping import flattening
from diffusers_sde.shipping.flattening import self_contained_source


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write modules of a package that takes the place of ours."""
    monkeypatch.setattr(flattening, "ROOT", tmp_path)

    def write(**modules):
        self_contained_source.cache_clear()
        for name, text in modules.items():
            (tmp_path / f"{name}.py").write_text(text)

    yield write
    self_contained_source.cache_clear()


@pytest.mark.parametrize("entry", ["schedulers", "pipelines"])
def test_every_name_is_defined_and_nothing_is_imported_from_beside(entry):
    text = self_contained_source(entry)
    tree = ast.parse(text)
    defined = set(dir(builtins)) | {"__file__", "__name__"}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            assert not getattr(node, "level", 0)
            assert not (getattr(node, "module", None) or "").startswith("diffusers_sde")
            defined |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            defined.add(node.id)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            defined.add(node.name)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert used <= defined
    # diffusers looks for imports by these expressions, in examples too.
    assert not re.findall(r"^\s*from\s+\.\S+\s+import", text, re.M)
    assert not re.findall(r"^\s*(?:from|import)\s+diffusers_sde", text, re.M)


def test_modules_follow_their_imports(package):
    package(
        a="from .b import two\nfour = two + two\n", b='"""B."""\nimport math\n\none = math.exp(0)\ntwo = one + one\n'
    )
    text = self_contained_source("a")
    namespace = {"__name__": "flat"}
    exec(text, namespace)
    assert namespace["four"] == 4.0


def test_a_name_with_two_meanings_is_refused(package):
    package(a="from .b import x\ny = 1\n", b="x = 1\ny = 2\n")
    with pytest.raises(ValueError, match="y means different things in b and a"):
        self_contained_source("a")
    package(a="from .b import x\nfrom math import log\n", b="from numpy import log\nx = log(1)\n")
    with pytest.raises(ValueError, match="log means different things"):
        self_contained_source("a")


def test_the_same_statement_twice_is_one(package):
    package(a="from .b import x\nLimit = 3\n", b="Limit = 3\nx = Limit\n")
    assert self_contained_source("a").count("Limit = 3") == 1


@pytest.mark.parametrize("line", ["from . import b", "from .b import x as y", "def f():\n    from .b import x\n"])
def test_imports_that_cannot_be_flattened_are_refused(package, line):
    package(a=f"{line}\n", b="x = 1\n")
    with pytest.raises(ValueError, match="cannot be flattened"):
        self_contained_source("a")
