"""Read and write YAML. Imports no torch.

Numbers are those of YAML 1.2 (``1e-4`` is a float); ``yes``, ``no``, ``on`` and ``off`` are booleans as in YAML 1.1.
Files of unknown origin are bounded in size, depth and number of values, those that aliases repeat included.
"""

from __future__ import annotations

import io
import re
import reprlib
from itertools import accumulate
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, CollectionNode, MappingNode, Node, ScalarNode
from ruamel.yaml.constructor import ConstructorError, DuplicateKeyError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.representer import SafeRepresenter

from crossx.errors import CrossXError, UsageError, first_line
from crossx.text import read_text

MAX_TEXT = 1 << 20
"""Largest YAML file that is read, in bytes."""
MAX_VALUES = 100_000
"""Most values of a document, where an alias counts as all the values that it repeats."""
MAX_DEPTH = 50
MAX_OPEN = 500
"""Most open brackets and braces, in texts and comments too: parsing takes the square of their number."""
_PREFIX = "tag:yaml.org,2002:"
_PLAIN_TAGS = {
    _PREFIX + name for name in ("null", "bool", "int", "float", "str", "seq", "map", "timestamp", "merge")
}
_MAX_BITS = 1000

_BOOL = "tag:yaml.org,2002:bool"
_WORDS = re.compile("(yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF)$")
# all other texts are quoted: they may be read as a number, a date or an indicator
_PLAIN = re.compile(r"[A-Za-z_/][\w ./()%,;+-]*")


class _Constructor(SafeConstructor):
    def construct_object(self, node: Node, deep: bool = False) -> Any:
        tag = str(node.tag)
        if tag not in _PLAIN_TAGS:
            raise _refused(node, f"could not determine a plain value for the tag {reprlib.repr(tag)}")
        try:
            value = super().construct_object(node, deep)
        except YAMLError:
            raise
        # such as a date in month 13
        except ValueError as error:
            raise _refused(node, first_line(error)) from error
        except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise _refused(node, f"not a value of its type, {tag.removeprefix(_PREFIX)}") from error
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise _refused(node, "a number of too many digits")
        if isinstance(value, str) and not _is_text(value):
            raise _refused(node, "a text with a NUL or half a character")
        return value

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        if not isinstance(node, MappingNode):
            raise _refused(node, "expected a mapping")
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                raise _refused(key, "a list or mapping as a key")
        return super().construct_mapping(node, deep)


def _refused(node: Node, problem: str) -> ConstructorError:
    return ConstructorError(None, None, problem, node.start_mark)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value


class _Representer(SafeRepresenter):
    def represent_float(self, data: float) -> ScalarNode:
        node: ScalarNode = super().represent_float(data)
        # YAML 1.1 takes 1e-05 for text
        if "." not in node.value:
            node.value = node.value.replace("e", ".0e")
        return node

    def represent_str(self, data: str) -> ScalarNode:
        style = None if _PLAIN.fullmatch(data) else "'" if data.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Representer.add_representer(float, _Representer.represent_float)
_Representer.add_representer(str, _Representer.represent_str)


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor, yaml.Representer = _Constructor, _Representer
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    _ = yaml.resolver.versioned_resolver  # fills the table that the next line adds to
    yaml.resolver.add_version_implicit_resolver((1, 2), _BOOL, _WORDS, list("yYnNoO"))
    yaml.width = 1 << 20
    return yaml


def read_yaml(path: Path, hint: str = "") -> str:
    """Read the text of a YAML file; ``hint`` follows the error of a missing file.

    Raises:
        UsageError: If it is missing, unreadable, not UTF-8, too large, or no regular file.
    """
    try:
        return read_text(path, MAX_TEXT, hint)
    except CrossXError as error:
        raise UsageError(str(error)) from error


def load_yaml(text: str, source: str) -> Any:
    """Return the content of YAML text: mappings, lists and plain values; ``source`` is named in errors.

    Raises:
        UsageError: If it is not valid YAML, gives a key twice, has a value that contains itself, other types, or more
            or deeper values than a configuration has, naming the line.
    """
    if _most_open(text) > MAX_OPEN:
        raise UsageError(f"{source}: not valid YAML (nested too deeply).")
    yaml = _yaml()
    try:
        root = yaml.compose(text)
        if root is None:
            return None
        _check_size(root, source, {})
        return yaml.constructor.construct_document(root)
    except RecursionError as error:
        raise UsageError(f"{source}: not valid YAML (nested too deeply).") from error
    except DuplicateKeyError as error:
        line, key = error.problem_mark.line + 1, error.problem.split('"')[1]
        raise UsageError(f"{source}: line {line} gives {reprlib.repr(key)} again.") from error
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1} is " if mark else ""
        problem = " ".join(str(error.problem or error.context).split())
        raise UsageError(f"{source}: {where}not valid YAML ({problem}).") from error
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UsageError(f"{source}: line {line} is not valid YAML ({first_line(error)}).") from error
    # on damaged text ruamel.yaml raises whatever its scanner meets: IndexError, ValueError of chr, ...
    except (
        YAMLError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        AssertionError,
    ) as error:
        raise UsageError(f"{source}: not valid YAML ({first_line(error)}).") from error


def _most_open(text: str) -> int:
    brackets = re.findall(r"[\[\]{}]", text)
    return max(accumulate((1 if bracket in "[{" else -1 for bracket in brackets), initial=0))


def _check_size(node: Node, source: str, seen: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return the number of values of a node and its depth; ``seen`` has those of each node, (0, 0) while it is open.

    Raises:
        UsageError: If they are too many or too deep, or a node contains itself.
    """
    known = seen.get(id(node))
    line = f"{source}: line {node.start_mark.line + 1} is not valid YAML"
    if known == (0, 0):
        raise UsageError(f"{line} (a value that contains itself).")
    if known or not isinstance(node, CollectionNode):
        return known or (1, 1)
    seen[id(node)] = (0, 0)
    values, depth = 1, 1
    for child in node.value:
        for part in child if isinstance(child, tuple) else (child,):
            further, below = _check_size(part, source, seen)
            values, depth = values + further, max(depth, below + 1)
    if depth > MAX_DEPTH:
        raise UsageError(f"{line} (nested too deeply).")
    if values > MAX_VALUES:
        raise UsageError(f"{line} (its aliases repeat more than {MAX_VALUES} values, or it has as many).")
    seen[id(node)] = values, depth
    return values, depth


def compose_yaml(text: str) -> Any:
    """Return the node of YAML text that ``load_yaml`` reads; nodes know their lines and columns."""
    return _yaml().compose(text)


def dump_yaml(values: Any, *, flow: bool = False) -> str:
    """Write plain values as YAML that readers of YAML 1.1 understand, too.

    Args:
        values: Mappings, lists and scalars, written in their order.
        flow: Whether to write everything on one line: ``[1, 2]``.
    """
    yaml = _yaml()
    yaml.default_flow_style = flow
    text = io.StringIO()
    yaml.dump(values, text)
    return text.getvalue().removesuffix("...\n")
