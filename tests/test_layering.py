"""Imports go one way, from the pipelines down to the SDEs."""

import ast
import sys
from pathlib import Path

import pytest

import diffusers_sde

ROOT = Path(next(iter(diffusers_sde.__path__)))

LAYERS = [
    {"version", "checks", "sdes", "parametrizations", "time_grids"},
    {"predictors", "correctors", "plans", "noise"},
    {"adaptive", "sampling", "denoisers", "losses", "ode", "likelihood", "guidance", "operators"},
    {
        "schedulers",
        "options",
        "files",
        "processes",
        "generation",
        "metrics",
        "training",
        "evaluation",
        "pipelines",
        "diagnostics",
    }
    | {"classifiers", "hub"},
    {"hub.export", "convert"},  # a module of a package may lie above the rest of it
]
LAYER_OF = {module: level for level, modules in enumerate(LAYERS) for module in modules}

# The layers below the schedulers flatten into one file on the Hub and need nothing else from outside.
NUMERIC_LAYERS, NUMERIC_IMPORTS = range(3), {"torch", "numpy"} | sys.stdlib_module_names


def unit(name: tuple[str, ...]) -> str:
    """What has a layer of its own: ``hub.export``, or else the package, such as ``hub``, that a module belongs to."""
    return ".".join(name[1:3]) if ".".join(name[1:3]) in LAYER_OF else name[1]


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
    own = LAYER_OF[unit(module)]
    for name in imports(source, module, is_package):
        if name[0] != "diffusers_sde":
            if own in NUMERIC_LAYERS and name[0] not in NUMERIC_IMPORTS:
                yield f"{'.'.join(module)} (L{own}) imports {name[0]}"
        elif len(name) < 2 or name[1] not in LAYER_OF:
            yield f"{'.'.join(module)} imports {'.'.join(name)}, which belongs to no layer"
        elif LAYER_OF[unit(name)] > own:
            yield f"{'.'.join(module)} (L{own}) imports {'.'.join(name)} (L{LAYER_OF[unit(name)]})"


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
        "from ..plans import Plan",
        "import diffusers_sde.hub.export",
        "from diffusers_sde import VESDEScheduler",
        "from .. import losses",
        "import diffusers",
        "def f():\n    from ..ode import solve",
    ],
)
def test_an_upward_import_is_seen(line):
    assert list(violations(line, ("diffusers_sde", "sdes", "ve"), False))


def test_an_upward_import_inside_a_package_is_seen():
    assert list(violations("from .export import main", ("diffusers_sde", "hub", "cards"), False))
    assert not list(violations("from .cards import add_card", ("diffusers_sde", "hub", "export"), False))


@pytest.mark.parametrize(
    "line", ["from .base import SDE", "import torch", "from ..sdes import SDE", "from . import vp"]
)
def test_a_downward_import_is_not(line):
    assert not list(violations(line, ("diffusers_sde", "sdes", "ve"), False))


def test_siblings_of_a_layer_do_not_import_each_other_in_a_circle():
    arrows = {}
    for parameters in modules():
        path, module, is_package = parameters.values
        for name in imports(path.read_text(), module, is_package):
            if name[0] == "diffusers_sde" and len(name) > 1 and unit(name) != unit(module):
                arrows.setdefault(unit(module), set()).add(unit(name))

    def reachable(start):
        seen, stack = set(), [start]
        while stack:
            for target in arrows.get(stack.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    stack.append(target)
        return seen

    assert not [name for name in arrows if name in reachable(name)]
