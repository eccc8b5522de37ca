"""The package's own source as one self-contained file, the only form in which diffusers loads code from a repository.

diffusers copies the files of a repository flat into a cache and imports each by itself, so a file may import nothing of
its neighbours. Modules up to the pipelines say ``from .module import Name`` and have no side effects on import; in the
order of their imports they can be written one after another. Nothing is renamed and nothing is evaluated: the text of a
module is kept, its imports of our other modules are dropped, and its imports from outside are collected at the top.
"""

from __future__ import annotations

import ast
import re
from functools import lru_cache
from pathlib import Path

from .version import __version__

LIBRARY = __name__.partition(".")[0]
HOMEPAGE = "https://github.com/diffusers-sde/diffusers-sde"
ROOT = Path(__file__).parents[1]

# These modules read files of the package, which an exported file does not have. It gets these texts in their place.
SUBSTITUTES = {
    "shipping.flattening": """LIBRARY = "diffusers_sde"
_SOURCE = Path(__file__).read_text(encoding="utf-8")  # now: another repository's file may take this one's place


def self_contained_source(*entries: str) -> str:
    return _SOURCE""",
    "shipping.cards": """def add_card(folder, pipe, repo_id, results=None):
    text = f"---\\nlibrary_name: diffusers\\n---\\n\\n# {repo_id}\\n\\nA `{type(pipe).__name__}`.\\n"
    (Path(folder) / "README.md").write_text(text, encoding="utf-8")""",
}
SUBSTITUTE_IMPORTS = {"shipping.flattening": ["from pathlib import Path"]}

HEADER = f'''"""{{title}} of {LIBRARY} {__version__} in one file, which loads without the package.

Generated from the package's source by its export; change it there: {HOMEPAGE}
Licence: Apache-2.0.
"""

from __future__ import annotations

'''
# diffusers writes a class's module into model_index.json, and both kinds of loading look up the package's name there.
# diffusers finds the pipeline by scanning the module's globals, so the loop variable is deleted: it is a second
# reference to a class.
FOOTER = f'''

_class = None
for _class in [_value for _value in globals().values() if isinstance(_value, type) and _value.__module__ == __name__]:
    if issubclass(_class, ConfigMixin):
        _class.__module__ = "{LIBRARY}"
del _class
'''


@lru_cache
def self_contained_source(*entries: str) -> str:
    """One file with everything that these modules and packages, such as ``schedulers``, define and need.

    Raises:
        ValueError: A module cannot be flattened, and why.
    """
    modules: dict[str, list[str]] = {}
    imports: set[str] = {"from diffusers import ConfigMixin"}
    defined: dict[str, tuple[str, str]] = {}
    for entry in entries:
        _visit(entry, modules, imports, defined)
    hoisted = sorted(imports, key=lambda line: (line.startswith("from"), line))
    body = "\n\n\n".join(f"# {'-' * 20} {name}\n\n" + text for name, [text] in modules.items() if text)
    text = HEADER.format(title=" and ".join(entries)) + "\n".join(hoisted) + "\n\n\n" + body + FOOTER
    # diffusers finds imports by regular expressions, which match the examples in docstrings too.
    return re.sub(rf"(?m)^([ \t]+)(?=(from|import) {LIBRARY}\b)", r"\1>>> ", text)


def _visit(name: str, modules: dict[str, list[str]], imports: set[str], defined: dict[str, tuple[str, str]]) -> None:
    """Add a module to ``modules`` (text by name), after those that it imports."""
    if name in modules:
        return
    if name in SUBSTITUTES:
        modules[name] = [SUBSTITUTES[name]]
        imports.update(SUBSTITUTE_IMPORTS.get(name, ()))
        return
    modules[name] = []  # a circle of imports ends here
    path = ROOT.joinpath(*name.split("."))
    is_package = path.is_dir()
    path = path / "__init__.py" if is_package else path.with_suffix(".py")
    source = path.read_text(encoding="utf-8")
    package = name.split(".") if is_package else name.split(".")[:-1]
    tree = ast.parse(source)
    dropped: set[int] = set()
    for i, node in enumerate(tree.body):
        drop = i == 0 and isinstance(node, ast.Expr)  # the docstring
        if isinstance(node, ast.Import):
            imports.add(ast.unparse(node))
            _define(node, name, defined)
            drop = True
        elif isinstance(node, ast.ImportFrom) and node.level:
            parents = package[: len(package) - node.level + 1]
            if node.module is None or len(parents) < len(package) - node.level + 1 or any(a.asname for a in node.names):
                raise ValueError(f"{name}: cannot be flattened: {ast.unparse(node)}; say 'from .module import Name'.")
            _visit(".".join([*parents, node.module]), modules, imports, defined)
            drop = True
        elif isinstance(node, ast.ImportFrom):
            if node.module != "__future__":
                imports.update(f"from {node.module} import {ast.unparse(alias)}" for alias in node.names)
                _define(node, name, defined)
            drop = True
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            drop = True
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and "__all__" in _names(node):
            drop = True
        else:
            drop = drop or _define(node, name, defined)
        if drop:
            dropped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    for inner in ast.walk(tree):
        if isinstance(inner, ast.ImportFrom) and inner.level and inner.lineno not in dropped:
            raise ValueError(f"{name}, line {inner.lineno}: cannot be flattened: an import inside a function.")
    lines = [line for number, line in enumerate(source.splitlines(), 1) if number not in dropped]
    # A dict keeps the order of first insertion, so the module is inserted anew to stand behind its imports.
    del modules[name]
    modules[name] = ["\n".join(lines).strip()]


def _names(node: ast.stmt) -> list[str]:
    """Names that a top-level statement binds."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
    return []


def _define(node: ast.stmt, module: str, defined: dict[str, tuple[str, str]]) -> bool:
    """Note what a statement binds; return whether another module has the same statement.

    Raises:
        ValueError: Two modules mean different things by one name.
    """
    known = False
    for name in _names(node):
        meaning = ast.unparse(node)
        if isinstance(node, ast.ImportFrom):
            meaning = next(f"from {node.module} import {a.name}" for a in node.names if name in (a.asname, a.name))
        elif isinstance(node, ast.Import):
            meaning = next(f"import {a.name}" for a in node.names if name in (a.asname, a.name.split(".")[0]))
        other, other_meaning = defined.setdefault(name, (module, meaning))
        if other_meaning != meaning and other != module:  # a module may bind a name again: overloads do
            raise ValueError(f"{name} means different things in {other} and {module}: rename one of them.")
        known = known or other != module
    return known and not isinstance(node, (ast.Import, ast.ImportFrom))
