"""Griffe extension: constructors of Equinox modules, which are dataclasses without a decorator.

mkdocstrings reads the source without importing it and so cannot see that an `eqx.Module` has a
constructor made from its fields. This takes the fields from the imported class.
"""

import dataclasses
import importlib
from typing import Any

import griffe


class EquinoxSignatures(griffe.Extension):
    """Adds the missing `__init__` to concrete Equinox modules."""

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        runtime = getattr(importlib.import_module(cls.module.path), cls.name, None)
        if (
            "__init__" in cls.members
            or not dataclasses.is_dataclass(runtime)
            or cls.name.startswith("Abstract")
        ):
            return
        kind = griffe.ParameterKind.positional_or_keyword
        parameters = [griffe.Parameter("self", kind=kind)]
        for field in dataclasses.fields(runtime):
            if not field.init:
                continue
            default = None
            if field.default is not dataclasses.MISSING:
                default = repr(field.default)
            elif field.default_factory is not dataclasses.MISSING:
                default = repr(field.default_factory())
            annotation = cls.members[field.name].annotation if field.name in cls.members else None
            parameters.append(griffe.Parameter(field.name, annotation=annotation, kind=kind, default=default))
        init = griffe.Function(
            "__init__", parent=cls, parameters=griffe.Parameters(*parameters), returns="None"
        )
        cls.set_member("__init__", init)
