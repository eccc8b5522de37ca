"""Imports go one way, from the pipelines down to the SDEs."""

import ast
import sys
from pathlib import Path

import pytest

import diffusers_sde

ROOT = Path(next(iter(diffusers_sde.__path__)))

# One package a layer, the lowest first.
LAYERS = [
    "basics",
    "sdes",
    "shipping",
    "networks",
    "sampling",
    "flow",
    "guidance",
    "fitting",
    "schedulers",
    "images",
    "pipelines",
    "metrics",
    "evaluation",
    "training",
    "hub",
    "registration",
    "space",
    "commands",
]
LAYER_OF = {name: level for level, name in enumerate(LAYERS)}

# The mathematics needs nothing else from outside, but for what is named here.
MATHEMATICS, MATHEMATICAL_IMPORTS = ("sdes", "networks", "sampling", "flow", "guidance", "fitting"), {"torch", "numpy"}
WITH_DIFFUSERS = {("diffusers_sde", "networks", name) for name in ("classifier", "ncsnpp")}  # networks themselves


def imports(source: str, module: tuple[str, ...], is_package: bool):
    """Absolute names of everything imported, for a module like ('diffusers_sde', 'sdes', 've')."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module[: len(module) - node.level + (1 if is_package else 0)] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            if node.module is None or base == ("diffusers_sde",):  # from . import name
                yield from (base + (alias.name,) for alias in node.names)
            else:
                yield base


def violations(source: str, module: tuple[str, ...], is_package: bool):
    """Upward or forbidden imports of a module, as messages."""
    own = LAYER_OF[module[1]]
    for name in imports(source, module, is_package):
        if name[0] != "diffusers_sde":
            if module[1] in MATHEMATICS and name[0] not in MATHEMATICAL_IMPORTS | sys.stdlib_module_names:
                if not (module in WITH_DIFFUSERS and name[0] == "diffusers"):
                    yield f"{'.'.join(module)} imports {name[0]}"
        elif len(name) < 2 or name[1] not in LAYER_OF:
            yield f"{'.'.join(module)} imports {'.'.join(name)}, which belongs to no layer"
        elif LAYER_OF[name[1]] > own:
            yield f"{'.'.join(module)} imports {'.'.join(name)}, which lies above it"


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        parts = parts[:-1] if is_package else parts
        if parts:  # the package's own __init__ re-exports from all layers
            yield pytest.param(path, ("diffusers_sde", *parts), is_package, id=".".join(parts))


@pytest.mark.parametrize("path, module, is_package", list(modules()))
def test_imports_go_down(path, module, is_package):
    assert module[1] in LAYER_OF, f"{module[1]} belongs to no layer: add it to LAYERS"
    assert not list(violations(path.read_text(), module, is_package))


@pytest.mark.parametrize(
    "line",
    [
        "from ..schedulers import VESDEScheduler",
        "from ..sampling.rows import Plan",
        "import diffusers_sde.hub.export",
        "from diffusers_sde import VESDEScheduler",
        "from .. import training",
        "import diffusers",
        "def f():\n    from ..flow.solver import integrate",
    ],
)
def test_an_upward_import_is_seen(line):
    assert list(violations(line, ("diffusers_sde", "sdes", "ve"), False))


@pytest.mark.parametrize(
    "line", ["from .base import SDE", "import torch", "from ..sdes import SDE", "from . import vp"]
)
def test_a_downward_import_is_not(line):
    assert not list(violations(line, ("diffusers_sde", "sdes", "ve"), False))


def test_modules_of_a_package_do_not_import_each_other_in_a_circle():
    arrows = {}
    for parameters in modules():
        path, module, is_package = parameters.values
        known = {parameters.values[1] for parameters in modules()}
        for name in imports(path.read_text(), module, is_package):
            if name in known and name != module:
                arrows.setdefault(module, set()).add(name)

    def reachable(start):
        seen, stack = set(), [start]
        while stack:
            for target in arrows.get(stack.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    stack.append(target)
        return seen

    assert not [name for name in arrows if name in reachable(name)]
