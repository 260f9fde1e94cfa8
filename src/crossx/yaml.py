"""Read and write YAML. Imports no torch.

Numbers are those of YAML 1.2 (``1e-4`` is a float); ``yes``, ``no``, ``on`` and ``off`` are booleans as in YAML 1.1.
"""

from __future__ import annotations

import io
import re
from typing import Any

from ruamel.yaml import YAML, CollectionNode, Node, ScalarNode
from ruamel.yaml.constructor import ConstructorError, DuplicateKeyError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.representer import SafeRepresenter

from crossx.errors import UsageError, first_line

_BOOL = "tag:yaml.org,2002:bool"
_WORDS = re.compile("(yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF)$")
# all other texts are quoted: they may be read as a number, a date or an indicator
_PLAIN = re.compile(r"[A-Za-z_/][\w ./()%,;+-]*")


class _Constructor(SafeConstructor):
    def construct_object(self, node: Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except YAMLError:
            raise
        # such as a date in month 13
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ConstructorError(None, None, first_line(error), node.start_mark) from error


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


def load_yaml(text: str, source: str) -> Any:
    """Return the content of YAML text; ``source`` is named in errors.

    Raises:
        UsageError: If it is not valid YAML, gives a key twice, or has a value that contains itself, naming the line.
    """
    yaml = _yaml()
    try:
        root = yaml.compose(text)
        if root is None:
            return None
        _refuse_cycles(root, source, {})
        return yaml.constructor.construct_document(root)
    except RecursionError as error:
        raise UsageError(f"{source}: not valid YAML (nested too deeply).") from error
    except DuplicateKeyError as error:
        line, key = error.problem_mark.line + 1, error.problem.split('"')[1]
        raise UsageError(f"{source}: line {line} gives {key!r} again.") from error
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1
        raise UsageError(f"{source}: line {line} is not valid YAML ({error.problem}).") from error
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UsageError(f"{source}: line {line} is not valid YAML ({first_line(error)}).") from error


def _refuse_cycles(node: Node, source: str, state: dict[int, str]) -> None:
    """Check that no node contains itself; ``state`` maps the id of each visited node to ``open`` or ``done``."""
    if state.get(id(node)) == "open":
        line = node.start_mark.line + 1
        raise UsageError(f"{source}: line {line} is not valid YAML (a value that contains itself).")
    if id(node) in state or not isinstance(node, CollectionNode):
        return
    state[id(node)] = "open"
    for child in node.value:
        for part in child if isinstance(child, tuple) else (child,):
            _refuse_cycles(part, source, state)
    state[id(node)] = "done"


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
