"""A griffe extension: docstrings and signatures of the schedulers, which are complete only after the import."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from griffe import Class, Docstring, Extension, Parameter, ParameterKind, Parameters

from diffusers_sde.schedulers import SDEScheduler


class Completed(Extension):
    """The schedulers have arguments in common, which the source of each class leaves to ``sampler_arguments``."""

    def on_class(self, *, cls: Class, **_: Any) -> None:
        """Take the docstring and the arguments of a scheduler from the imported class."""
        if not cls.module.path.startswith("diffusers_sde.schedulers"):
            return
        imported = getattr(importlib.import_module(cls.module.path), cls.name, None)
        if not (inspect.isclass(imported) and issubclass(imported, SDEScheduler)):
            return
        if cls.docstring and imported.__doc__:
            old = cls.docstring
            cls.docstring = Docstring(inspect.cleandoc(imported.__doc__), lineno=old.lineno, parent=cls)
        if "__init__" in cls.members:
            constructor: Any = cls.members["__init__"]
            constructor.parameters = Parameters(
                *(
                    Parameter(
                        p.name,
                        annotation=None if p.annotation is p.empty else str(p.annotation),
                        kind=ParameterKind.keyword_only
                        if p.kind is p.KEYWORD_ONLY
                        else ParameterKind.positional_or_keyword,
                        default=None if p.default is p.empty else repr(p.default),
                    )
                    for p in inspect.signature(imported.__init__).parameters.values()
                )
            )
