"""``crossx new-method NAME``."""

from __future__ import annotations

import keyword
import re
import unicodedata
from collections.abc import Iterator
from importlib import metadata, resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated

from crossx.cli import method_options
from crossx.cli.values import Folder
from crossx.commands import quoted
from crossx.errors import CrossXError, UsageError
from crossx.recipes import list_recipes
from crossx.runs import is_utf8, storage_error

TEMPLATES = resources.files("crossx.cli").joinpath("templates", "new_method")
MAX_NAME = 40
_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


def new_method(name: Annotated[str, "NAME"], *, output: Folder | None = None) -> None:
    """Write a package with a method of your own, ready to be trained and tested.

    The package has a method that works, its tests, a recipe and a page. Replace what the method computes by your own
    idea; the tests say what every method owes to crossx.

    Args:
        name: The method's name: lower-case letters, digits and _.
        output: Folder to create (default: crossx-NAME).

    Examples:
        crossx new-method bilinear
        pip install -e crossx-bilinear
        crossx fit --config crossx-bilinear/bilinear.yaml --data.root photos --output runs/bilinear
        crossx new-method bilinear --output somewhere/else
    """
    check_name(name)
    folder = Path(output or f"crossx-{name.replace('_', '-')}")
    files = write_package(name, folder)
    for file in files:
        print(file)
    method = folder / "src" / f"crossx_{name}" / "method.py"
    shown = quoted(folder)
    print(f"\nnext: pip install -e {shown} && pytest {shown}; then change {method}")


def check_name(name: str) -> None:
    """Check the name of a new method.

    Raises:
        UsageError: If it is not the name of a Python module in lower case, or is taken.
    """
    if not _NAME.fullmatch(name):
        # é is an e and an accent, which is left out
        ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
        plain = re.sub(r"[^a-z0-9]+", "_", ascii_name.lower()).strip("_").lstrip("0123456789_")
        hint = f" Did you mean {plain!r}?" if _NAME.fullmatch(plain) and plain != name else ""
        raise UsageError(
            f"{name!r} is not the name of a method.{hint} It has lower-case letters, digits and _, as in a_b2."
        )
    if len(name) > MAX_NAME:
        raise UsageError(f"{name!r}: has {len(name)} characters; at most {MAX_NAME} are allowed.")
    if keyword.iskeyword(name):
        raise UsageError(f"{name!r}: is a word of Python. Choose another name.")
    if name in method_options.list_methods():
        raise UsageError(f"{name!r}: there is a method of this name already. Choose another name.")
    if name in list_recipes():
        raise UsageError(f"{name!r}: there is a recipe of this name already. Choose another name.")


def write_package(name: str, folder: Path) -> list[Path]:
    """Write the package of a new method to a new folder, and return its files.

    Raises:
        UsageError: If there is something at ``folder`` already, or its path is not UTF-8.
        CrossXError: If it cannot be written.
    """
    if not is_utf8(folder):
        raise UsageError(f"{str(folder)!r}: the path is not valid UTF-8. Give another --output.")
    package, cls = f"crossx_{name}", "".join(part.capitalize() for part in name.split("_"))
    values = {
        "name": name,
        "package": package,
        "distribution": package.replace("_", "-"),
        "cls": cls if cls != "Method" else "OwnMethod",
        "title": name.replace("_", " ").capitalize(),
        "version": metadata.version("crossx"),
    }
    renamed = {
        "recipe.yaml": f"{name}.yaml",
        "src/package/__init__.py": f"src/{package}/__init__.py",
        "src/package/method.py": f"src/{package}/method.py",
        "tests/test_method.py": f"tests/test_{name}.py",
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CrossXError(f"{folder}: cannot be created ({error.strerror}).") from error
    try:
        # fails if there is anything of this name, also a broken link
        folder.mkdir()
    except FileExistsError as error:
        raise UsageError(f"{folder}: exists already. Give another --output.") from error
    except OSError as error:
        raise CrossXError(f"{folder}: cannot be created ({error.strerror}).") from error
    written = []
    for path, text in _templates(TEMPLATES):
        target = folder / renamed.get(path, path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("x", encoding="utf-8") as file:
                file.write(_render(text, values))
        except OSError as error:
            raise storage_error(target, error) from error
        written.append(target)
    return written


def _render(text: str, values: dict[str, str]) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(text).render(values)


def _templates(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path and the text of each template."""
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _templates(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".jinja"):
            yield f"{prefix}{entry.name.removesuffix('.jinja')}", entry.read_text(encoding="utf-8")
