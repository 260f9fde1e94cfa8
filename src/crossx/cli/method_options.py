"""The options of the methods, without importing torch.

Those of the packaged methods are read from the source. Methods of other packages and files are imported and inspected.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from crossx import plugins
from crossx.cli.parser import Option, option_helps
from crossx.errors import unknown
from crossx.method_source import Names, is_imported
from crossx.method_source import packaged_methods as _packaged


def list_methods() -> list[str]:
    """Return the names of the methods, sorted."""
    return sorted({*_packaged(), *_registry(), *plugins.offers()})


def method_options(name: str) -> list[Option]:
    """Return the options of a method: the keyword-only arguments of its constructor.

    Raises:
        UsageError: If there is no such method.
    """
    if name in _packaged():
        return list(_source_options(*_packaged()[name]))
    if name not in list_methods() and not plugins.named():
        raise unknown("method", name, list_methods())

    from crossx.methods import method_class
    from crossx.methods.registry import option_types

    helps = option_helps(method_class(name))
    return [_option(option, hint, default, helps) for option, (hint, default) in option_types(name).items()]


def present_methods() -> list[str]:
    """Return the names of the methods whose options are known without importing anything, sorted."""
    return sorted({*_packaged(), *_registry()})


def _registry() -> list[str]:
    if not is_imported():
        return []
    from crossx.methods.registry import registered

    return registered()


def _source_options(node: ast.ClassDef, module: str) -> Iterator[Option]:
    names = Names(module)
    helps = option_helps(inspect.cleandoc(ast.get_docstring(node) or ""))
    init = next(item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__")
    for argument, default in zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True):
        yield _option(argument.arg, names.evaluate(argument.annotation), names.evaluate(default), helps)


def _option(name: str, hint: Any, default: Any, helps: Mapping[str, str]) -> Option:
    return Option(f"model.{name}", hint, default, helps.get(name, ""), f"--model.{name}")
