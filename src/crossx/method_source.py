"""The packaged methods as their source says, without importing torch."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from functools import cache
from importlib import resources
from typing import Any

PACKAGE = "crossx.methods"


def is_imported() -> bool:
    """Whether the methods themselves are imported, with those registered elsewhere."""
    return PACKAGE in sys.modules


@cache
def packaged_methods() -> dict[str, tuple[ast.ClassDef, str]]:
    """Return name -> class and module of each method in the package."""
    files = [file.name for file in resources.files("crossx").joinpath("methods").iterdir()]
    modules = [f"{PACKAGE}.{name.removesuffix('.py')}" for name in files if name.endswith(".py")]
    return {
        name: (node, module)
        for module in modules
        for node in _tree(module).body
        if isinstance(node, ast.ClassDef)
        for name in _registered_names(node)
    }


def curve_titles(method: str) -> dict[str, str]:
    """Return ``Method.curve_titles`` of a packaged method; those of the base class for another one."""
    if method in packaged_methods():
        node, module = packaged_methods()[method]
        cls = _Class(node, Names(module))
    else:
        cls = Names(f"{PACKAGE}.base")["Method"]
    titles: dict[str, str] = cls.curve_titles
    return titles


def _registered_names(node: ast.ClassDef) -> Iterator[str]:
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "register_method":
            yield ast.literal_eval(decorator.args[0])


class Names(dict[str, Any]):
    """The names of a module, evaluated from its source on lookup; names from other packages are imported."""

    def __init__(self, module: str) -> None:
        super().__init__()
        self.module = module

    def evaluate(self, node: ast.expr | None) -> Any:
        """Return the value of an expression of the module."""
        assert node is not None, "an option has a type and a default"
        return eval(compile(ast.Expression(node), self.module, "eval"), {}, self)

    def __missing__(self, name: str) -> Any:
        for node in _tree(self.module).body:
            match node:
                case ast.ClassDef(name=target) if target == name:
                    return _Class(node, self)
                case ast.Assign(targets=[ast.Name(id=target)], value=value) if target == name:
                    return self.evaluate(value)
                case ast.AnnAssign(target=ast.Name(id=target), value=ast.expr() as value) if target == name:
                    return self.evaluate(value)
                case ast.ImportFrom(module=str(source), names=imported) if name in {
                    item.name for item in imported
                }:
                    ours = source.partition(".")[0] == "crossx"
                    return Names(source)[name] if ours else getattr(importlib.import_module(source), name)
        raise KeyError(name)


class _Class:
    """A class of ours, whose attributes are evaluated from its source on lookup, or from that of its bases."""

    def __init__(self, node: ast.ClassDef, names: Names) -> None:
        self._node, self._names = node, names

    def __getattr__(self, name: str) -> Any:
        for node in self._node.body:
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name and node.value:
                return self._names.evaluate(node.value)
        for base in self._node.bases:
            cls = self._names.evaluate(base)
            if isinstance(cls, _Class):
                return getattr(cls, name)
        raise AttributeError(name)


@cache
def _tree(module: str) -> ast.Module:
    package, *parts = module.split(".")
    root = resources.files(package)
    file = root.joinpath(*parts, "__init__.py")
    if not file.is_file():
        file = root.joinpath(*parts[:-1], f"{parts[-1]}.py")
    return ast.parse(file.read_text(encoding="utf-8"))
