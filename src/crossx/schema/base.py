"""Types with bounds, the classes of all schemas, and errors of one line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from crossx.errors import CrossXError

MAX_SHOWN = 80
"""Characters of a key to quote in an error."""

Text = Annotated[str, Field(max_length=1000)]
LongText = Annotated[str, Field(max_length=4096)]
Number = Annotated[float, Field(ge=-1e12, le=1e12)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Temperature = Annotated[float, Field(ge=1e-12, le=1e12)]


class StrictModel(BaseModel):
    """Base of all schemas: converts no types, and refuses numbers that are not finite."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class ExactModel(StrictModel):
    """Base of schemas that refuse unknown keys."""

    model_config = ConfigDict(extra="forbid")


def sequence(kind: Any, most: int, least: int = 0) -> Any:
    """Return the type of a list or tuple with bounds on its length."""
    return Annotated[tuple[kind, ...], Field(strict=False, min_length=least, max_length=most)]


def either(kind: Any, words: str) -> Any:
    """Return a type whose error is ``should be WORDS``, instead of one error per member of the union."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            raise ValueError(f"should be {words}") from error

    return Annotated[kind, WrapValidator(validate)]


_Scalar = bool | Annotated[int, Field(ge=-(2**31), le=2**31)] | Number | LongText | None
Option = either(
    _Scalar | sequence(_Scalar, 64), "a number, true, false, null, a short text or a short list of them"
)


class Problem(NamedTuple):
    """The first error of a validation.

    Attributes:
        kind: Its type in pydantic.
        path: Keys and indices of the value.
        where: The same as text that can be printed.
        reason: What is wrong.
    """

    kind: str
    path: tuple[int | str, ...]
    where: str
    reason: str

    @classmethod
    def of(cls, error: ValidationError, within: str = "") -> Problem:
        """Return the first error; ``within`` is the key of the validated values."""
        first = error.errors(include_url=False, include_input=False)[0]
        path = (within, *first["loc"]) if within else first["loc"]
        return cls(first["type"], path, shown(".".join(map(str, path))), _reason(first))


def check(kind: type[BaseModel], values: Any, source: Path | str, what: str, within: str = "") -> None:
    """Raise ``CrossXError`` if values do not follow a schema.

    Args:
        kind: The schema.
        values: Contents of a file.
        source: The file, for the error.
        what: What the file should be, for the error.
        within: The key of ``values`` in the file.
    """
    try:
        kind.model_validate(values)
    except ValidationError as error:
        problem = Problem.of(error, within)
        reason = f"{problem.where}: {problem.reason}" if problem.where else problem.reason
        raise CrossXError(f"{source}: not {what} ({reason}).") from error


def shown(text: str) -> str:
    """Return a text of unknown origin, shortened and on one line."""
    short = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
    return "".join(c if c.isprintable() else "?" for c in short)


def _reason(error: Mapping[str, Any]) -> str:
    known = {
        "missing": "is missing",
        "extra_forbidden": "is not known here",
        "string_pattern_mismatch": "is no plain name",
    }
    if error["type"] in known:
        return known[error["type"]]
    message = str(error["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    message = message.partition(" or instance of ")[0]
    for theirs, ours in (("valid tuple", "list"), ("Tuple", "List"), ("valid dictionary", "mapping")):
        message = message.replace(theirs, ours)
    return message[:1].lower() + message[1:]
