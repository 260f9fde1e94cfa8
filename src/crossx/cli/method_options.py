"""The options of the methods, without importing torch.

Those of the packaged methods are read from the source. Methods of other packages and files are imported and inspected.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from typing import Any

from crossx import plugins
from crossx.cli.parser import Option, option_helps
from crossx.errors import unknown

PACKAGE = "crossx.methods"


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
    from crossx.methods.base import option_types

    helps = option_helps(method_class(name))
    return [_option(option, hint, default, helps) for option, (hint, default) in option_types(name).items()]


def present_methods() -> list[str]:
    """Return the names of the methods whose options are known without importing anything, sorted."""
    return sorted({*_packaged(), *_registry()})


def _registry() -> list[str]:
    if PACKAGE not in sys.modules:
        return []
    from crossx.methods.base import registered

    return registered()


@cache
def _packaged() -> dict[str, tuple[ast.ClassDef, str]]:
    """Return the class and the module of each method in the package."""
    files = [file.name for file in resources.files("crossx").joinpath("methods").iterdir()]
    modules = [f"{PACKAGE}.{name.removesuffix('.py')}" for name in files if name.endswith(".py")]
    return {
        name: (node, module)
        for module in modules
        for node in _tree(module).body
        if isinstance(node, ast.ClassDef)
        for name in _registered_names(node)
    }


def _registered_names(node: ast.ClassDef) -> Iterator[str]:
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "register_method":
            yield ast.literal_eval(decorator.args[0])


def _source_options(node: ast.ClassDef, module: str) -> Iterator[Option]:
    names = _Names(module)
    helps = option_helps(inspect.cleandoc(ast.get_docstring(node) or ""))
    init = next(item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__")
    for argument, default in zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True):
        yield _option(argument.arg, names.evaluate(argument.annotation), names.evaluate(default), helps)


def _option(name: str, hint: Any, default: Any, helps: Mapping[str, str]) -> Option:
    return Option(f"model.{name}", hint, default, helps.get(name, ""), f"--model.{name}")


class _Names(dict[str, Any]):
    """The names of a module, evaluated from its source on lookup; names from other packages are imported."""

    def __init__(self, module: str) -> None:
        super().__init__()
        self.module = module

    def evaluate(self, node: ast.expr | None) -> Any:
        assert node is not None, "an option has a type and a default"
        return eval(compile(ast.Expression(node), self.module, "eval"), {}, self)

    def __missing__(self, name: str) -> Any:
        for node in _tree(self.module).body:
            match node:
                case ast.Assign(targets=[ast.Name(id=target)], value=value) if target == name:
                    return self.evaluate(value)
                case ast.AnnAssign(target=ast.Name(id=target), value=ast.expr() as value) if target == name:
                    return self.evaluate(value)
                case ast.ImportFrom(module=str(source), names=imported) if name in {
                    item.name for item in imported
                }:
                    ours = source.partition(".")[0] == "crossx"
                    return _Names(source)[name] if ours else getattr(importlib.import_module(source), name)
        raise KeyError(name)


@cache
def _tree(module: str) -> ast.Module:
    package, *parts = module.split(".")
    root = resources.files(package)
    file = root.joinpath(*parts, "__init__.py")
    if not file.is_file():
        file = root.joinpath(*parts[:-1], f"{parts[-1]}.py")
    return ast.parse(file.read_text(encoding="utf-8"))
