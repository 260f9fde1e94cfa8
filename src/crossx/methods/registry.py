"""The registered methods: by name, with their options, from this package, other packages and imported files."""

from __future__ import annotations

import inspect
import logging
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from crossx import plugins
from crossx.backbones import create_backbone
from crossx.errors import CrossXError, UsageError, first_line, unknown
from crossx.methods.base import Method
from crossx.runs import Run
from crossx.schema.model import MAX_IMAGE_SIZE
from crossx.suggestions import nearest

M = TypeVar("M", bound=type[Method])

_REGISTRY: dict[str, type[Method]] = {}
_IMPORTED: dict[str, plugins.Source] = {}
"""What was imported with ``import_methods`` or for a run, by the name of its module."""
_LOADED: dict[str, plugins.Offer] = {}
"""Method name -> the package that it was loaded from."""
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")

ELSEWHERE = "If it is one of your own, install its package, or give --import with the file or module that registers it"

log = logging.getLogger(__name__)


def register_method(name: str) -> Callable[[M], M]:
    """Register the decorated method class as ``name``: letters, digits, ``_``, ``-`` and ``.``.

    Raises:
        ValueError: If the name is registered already, or has other characters.
        TypeError: If the class is not a ``Method``.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a method: use letters, digits and _")

    def register(cls: M) -> M:
        if not (isinstance(cls, type) and issubclass(cls, Method)):
            raise TypeError(f"{getattr(cls, '__name__', cls)} is not a subclass of crossx.methods.Method")
        if name in _REGISTRY:
            raise ValueError(f"method {name!r} is registered twice")
        _REGISTRY[name] = cls
        cls.name = name
        return cls

    return register


def registered() -> list[str]:
    """Return the names of the methods that are registered in this process, sorted."""
    return sorted(_REGISTRY)


def registered_elsewhere() -> list[str]:
    """Return the names of those that are not crossx's own."""
    return [name for name in registered() if not _REGISTRY[name].__module__.startswith("crossx.")]


def list_methods() -> list[str]:
    """Return the names of all methods, sorted, with those that installed packages offer; these are not imported."""
    return sorted({*_REGISTRY, *plugins.offers()})


def method_class(name: str) -> type[Method]:
    """Return the class registered as ``name``, imported from the package that offers it if there is one.

    Raises:
        UsageError: If there is none; the message suggests the nearest name.
        CrossXError: If the package cannot be imported.
    """
    if name not in _REGISTRY:
        import_methods(plugins.named())
    if name not in _REGISTRY:
        offered = plugins.offers().get(name)
        if not offered:
            raise unknown("method", name, list_methods())
        _load(name, offered)
    return _REGISTRY[name]


def import_methods(words: Iterable[str]) -> None:
    """Import files (``mine.py``) and modules (``package.module``) that register methods; their code is run.

    Their content is remembered, so that runs that were trained with them can be used without naming them again.

    Raises:
        UsageError: If there is no such file or module, or it registers no method.
        CrossXError: If its code fails.
    """
    for source in map(plugins.Source.find, words):
        if _IMPORTED.get(source.key) != source:
            _import(source)
            try:
                plugins.trust(source)
            except CrossXError as error:
                log.warning("%s: not remembered for later commands: %s", source.word, error)


def imported_methods() -> list[str]:
    """Return what to give ``import_methods`` in another process."""
    return [source.word for source in _IMPORTED.values()]


def recall_method(name: str, run: Run) -> None:
    """Import the method of a run as its training did, if that is the user's own code, unchanged (docs/trust.md).

    Raises:
        CrossXError: If the method is not known here and its code may not be imported unasked, saying what to give.
    """
    if name not in _REGISTRY:
        import_methods(plugins.named())
    if name in _REGISTRY:
        return
    recorded = [] if run.hub else (run.read_info().get("imports") or [])
    reason = ELSEWHERE
    for source in map(plugins.Source.from_json, recorded):
        refused = plugins.refuse(source, run.path)
        if refused is None:
            _import(source)
        elif name not in plugins.offers():
            reason = refused
            break
    if name not in _REGISTRY and name not in plugins.offers():
        raise CrossXError(f"{run.spec}: unknown method {name!r}.{nearest(name, list_methods())} {reason}.")


def origin(cls: type[Method]) -> tuple[list[plugins.Source], tuple[str, str] | None]:
    """Return where a method's code is from, for ``run.json``.

    Returns:
        The imported files and modules, and the name and version of the package that offers it; neither for the
        methods of crossx.
    """
    if offer := _LOADED.get(cls.name):
        return [], offer.package
    module = cls.__module__
    if module.partition(".")[0] == "crossx":
        return [], None
    if _IMPORTED:
        return list(_IMPORTED.values()), None
    # registered by the user's own program, which is named, but not imported unasked
    try:
        path = Path(inspect.getfile(cls)).absolute()
        return [plugins.Source("", path, plugins.digest(path))], None
    except (OSError, TypeError, UsageError):
        return [], None


def _import(source: plugins.Source) -> None:
    before = [name for name, cls in _REGISTRY.items() if _is_within(cls.__module__, source.key)]
    if source.key in _IMPORTED or (before and not source.module):
        # it has changed since
        for name in before:
            del _REGISTRY[name]
        for module in [module for module in sys.modules if _is_within(module, source.key)]:
            del sys.modules[module]
    _IMPORTED.pop(source.key, None)
    known = {*_REGISTRY}
    with _undone_on_failure(source.key):
        try:
            source.execute()
        except CrossXError:
            raise
        except (Exception, SystemExit) as error:
            reason = plugins.failure(error, source.path)
            raise CrossXError(f"{source.word}: cannot be imported ({reason}).") from error
        if not {*_REGISTRY} - known and not before:
            raise UsageError(
                f"--import {source.word}: registers no method: decorate a subclass of crossx.methods.Method with "
                '@register_method("NAME").'
            )
    _IMPORTED[source.key] = source


def _load(name: str, offered: list[plugins.Offer]) -> None:
    """Import the package that offers a method."""
    if len(offered) > 1:
        packages = " and ".join(offer.package[0] for offer in offered)
        raise CrossXError(f"method {name!r} is offered by the packages {packages}: uninstall all but one.")
    (offer,) = offered
    with _undone_on_failure():
        try:
            found = offer.entry.load()
            if name not in _REGISTRY and isinstance(found, type) and not found.__dict__.get("name"):
                register_method(name)(found)
        except (Exception, SystemExit) as error:
            raise CrossXError(
                f"method {name!r}: {offer} cannot be imported ({plugins.failure(error)}). Repair or uninstall it."
            ) from error
        if name not in _REGISTRY:
            raise CrossXError(
                f"method {name!r}: {offer} offers it as {offer.entry.value}, which registers no method of this name."
            )
    _LOADED[name] = offer


@contextmanager
def _undone_on_failure(module: str | None = None) -> Iterator[None]:
    """Forget what was registered by code that fails."""
    registered = {**_REGISTRY}
    try:
        yield
    except BaseException:
        _REGISTRY.clear()
        _REGISTRY.update(registered)
        for name in [name for name in sys.modules if module and _is_within(name, module)]:
            del sys.modules[name]
        raise


def _is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def published_name(name: str, options: Mapping[str, Any]) -> str:
    """Return the name under which the method registered as ``name`` was published with these options."""
    return method_class(name).published_name(options)


def method_options(name: str) -> dict[str, Any]:
    """Return option name -> default of the method registered as ``name``."""
    return {option: parameter.default for option, parameter in _option_parameters(name).items()}


def option_types(name: str) -> dict[str, tuple[Any, Any]]:
    """Return option name -> type hint (``Any`` without one) and default of the method registered as ``name``."""
    try:
        hints = get_type_hints(method_class(name).__init__)
    except NameError:  # a type that is only imported for type checkers
        hints = {}
    return {
        option: (hints.get(option, Any), parameter.default)
        for option, parameter in _option_parameters(name).items()
    }


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Check options against the names and type hints of the method registered as ``name``.

    Raises:
        UsageError: If the method has no such option, or a value is of the wrong type or not one of the choices of a
            ``Literal``; the message suggests the nearest name.
    """
    parameters = _option_parameters(name)
    hints = {option: hint for option, (hint, _) in option_types(name).items()}
    for option, value in options.items():
        if option not in parameters:
            raise UsageError(
                f"method {name!r} has no option {option!r}.{nearest(option, parameters)} "
                f"It has: {', '.join(sorted(parameters)) or 'none'}."
            )
        hint = hints[option]
        try:
            _type_adapter(hint).validate_python(value)
        except ValidationError as error:
            if choices := _literal_choices(hint):
                raise unknown(option, str(value), choices) from error
            annotation = parameters[option].annotation
            expected = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
            raise UsageError(
                f"method {name!r}: option {option} is of the wrong type: expected {expected}, "
                f"not {reprlib.repr(value)}."
            ) from error


def _option_parameters(name: str) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(method_class(name).__init__).parameters.values()
    return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _type_adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(strict=True, arbitrary_types_allowed=True))


def _literal_choices(hint: Any) -> list[str]:
    """Return the choices of ``Literal[...]`` or of ``Literal[...] | None``."""
    literals = [kind for kind in (hint, *get_args(hint)) if get_origin(kind) is Literal]
    return [choice for literal in literals for choice in get_args(literal)]


def create_method(
    name: str,
    *,
    backbone: str,
    num_classes: int,
    pretrained: bool = False,
    backbone_weights: str | None = None,
    backbone_args: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    **options: Any,
) -> Method:
    """Build a method on a backbone.

    Args:
        name: A registered method, see ``list_methods``.
        backbone: A timm model name, or a ``local-dir:`` or ``hf-hub:`` name.
        num_classes: K.
        pretrained: Whether to start from timm's pretrained weights.
        backbone_weights: A plain state dict to start from instead (a ``.pth`` or ``.safetensors`` file).
        backbone_args: Further arguments of ``timm.create_model``.
        image_size: Side of the images in pixels, for methods whose layers depend on it; by default the backbone's own.
            If the option ``view_size`` is given, that is what the backbone sees.
        **options: Options of the method, see ``method_options``.

    Raises:
        UsageError: For an unknown method, backbone or option, or an invalid value.
        CrossXError: If pretrained weights are not available.
    """
    cls = method_class(name)
    check_options(name, options)
    completed = {**method_options(name), **options}
    view_size: int | None = completed.get("view_size")
    if view_size is not None and not 2 <= view_size <= MAX_IMAGE_SIZE:
        raise UsageError(f"view_size must be between 2 and {MAX_IMAGE_SIZE}, not {view_size}.")
    trunk = create_backbone(
        backbone,
        pretrained=pretrained,
        weights=backbone_weights,
        args=backbone_args,
        image_size=view_size or image_size,
    )
    try:
        method = cls(trunk, num_classes, **options)
    except TypeError as error:  # from an option without a type hint
        raise UsageError(f"method {name!r}: an option is of the wrong type ({first_line(error)}).") from error
    method.options = completed
    method.view_size = view_size
    return method
