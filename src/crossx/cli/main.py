"""The command ``crossx``: runs the verb, and turns errors into one line and an exit code.

Imports only the standard library, so that ``crossx --help`` is fast; a verb's module is imported when it runs.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import importlib
import io
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from crossx.caches import prepare_caches
from crossx.cli.memory import keep_freed_memory, skip_collection_at_exit
from crossx.errors import (
    CrossXError,
    UsageError,
    first_line,
    lost_worker,
    one_line,
    sigterm_interrupts,
    unknown,
)
from crossx.method_source import is_imported
from crossx.suggestions import nearest
from crossx.terminal import (
    columns,
    erase_step,
    fold,
    is_first_process,
    page_width,
    showing_steps,
    speaking,
)

VERBS = (
    "quickstart", "fit", "tune", "test", "ablate", "compare", "report", "calibrate", "predict", "neighbors", "export",
    "explain", "share", "serve", "recipes", "datasets", "import-released", "new-method",
)  # fmt: skip
IMPORTING = (
    "fit",
    "tune",
    "test",
    "ablate",
    "report",
    "calibrate",
    "predict",
    "neighbors",
    "export",
    "explain",
    "share",
    "serve",
)
"""Verbs that need the method of a network, and take ``--import``."""
IMPORT = "--import"

USAGE = """\
usage: crossx VERB [options]

Fine-grained visual categorization: Cross-X learning and the methods it is
compared with.

verbs:
{verbs}

options:
  -h, --help     show this help; after a verb, its options and examples
  --version      show the version
  --debug        show the traceback of an error (also: CROSSX_DEBUG=1)
  --import FILE  import a method of your own (also: CROSSX_IMPORT=FILE);
                 `crossx new-method NAME` writes one

examples:
  crossx quickstart
  crossx fit --config finetune --data.root my_images --output runs/mine
  crossx test runs/mine
  crossx predict runs/mine bird.jpg

RUN is a run folder or a checkpoint file in one; for predict, explain, export,
serve and share also USER/NAME on the Hugging Face Hub, for predict and serve
also a file of export.
"""

INTERRUPTED = 130
BROKEN_PIPE = 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: What follows ``crossx``; by default the process's own arguments.

    Returns:
        0, 1 for a failure, 2 for a wrong command, 130 after Ctrl-C or SIGTERM, 141 if the reader of a pipe has ended.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = os.environ.get("CROSSX_DEBUG", "0") not in ("", "0") or "--debug" in words
    words = [word for word in words if word != "--debug"]
    _open_streams()
    _set_environment()
    _show_log()
    skip_collection_at_exit()
    if "_ARGCOMPLETE" in os.environ:
        from crossx.cli.completion import complete

        complete(VERBS)
    command = f"crossx {words[0]}" if words and words[0] in VERBS else "crossx"
    try:
        with sigterm_interrupts():
            code = _run(command, words, debug)
            sys.stdout.flush()
            sys.stderr.flush()
        return code
    except BrokenPipeError:
        _abandon_streams()
        return BROKEN_PIPE
    except OSError as error:
        # such as a full disk behind `> FILE`
        _abandon_streams()
        with contextlib.suppress(OSError):
            _fail(command, f"standard output: {_os_error(error)}", CrossXError.exit_code, debug)
        return CrossXError.exit_code


def _run(command: str, words: list[str], debug: bool) -> int:
    try:
        return _dispatch(words)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt as interrupt:
        how = "SIGTERM" if interrupt.args else "Ctrl-C"
        return _fail(command, f"stopped by {how}.", INTERRUPTED, debug)
    except CrossXError as error:
        return _fail(command, str(error), error.exit_code, debug)
    except OSError as error:
        return _fail(command, _os_error(error), CrossXError.exit_code, debug)
    except Exception as error:
        return _fail(command, str(lost_worker(error) or _defect(error)), CrossXError.exit_code, debug)


def _dispatch(words: list[str]) -> int:
    if not words:
        raise UsageError(f"which verb? Choose from: {', '.join(VERBS)}; see `crossx --help`.")
    verb, rest = words[0], words[1:]
    if verb in ("-h", "--help", "help"):
        width = max(map(len, VERBS))
        verbs = "\n".join(f"  {name:<{width}}  {_summary(name)}" for name in VERBS)
        print(fold(USAGE.format(verbs=verbs), width=page_width()), end="")
        return 0
    if verb in ("--version", "-V", "version"):
        from crossx import __version__

        print(f"crossx {__version__}")
        return 0
    if verb not in VERBS:
        if verb.startswith("-"):
            hint = nearest(verb, ("--help", "--version", "--debug"))
            raise UsageError(f"unknown option {verb!r}.{hint} `crossx --help` lists the options.")
        raise unknown("verb", verb, VERBS)
    name = verb.replace("-", "_")
    module = importlib.import_module(f"crossx.cli.{name}")
    # a training may have several processes
    speaks = verb != "fit" or is_first_process()
    if not {"-h", "--help"} & {*rest} and (note := prepare_caches()) and speaks:
        print(f"crossx {verb}: {note}", file=sys.stderr)
    keep_freed_memory()
    rest, imports = _take_imports(verb, rest)
    try:
        with showing_steps(), speaking(speaks), _importing(imports):
            if hasattr(module, "run"):
                return int(module.run(rest))
            from crossx.cli.parser import call

            return call(getattr(module, name), rest, verb)
    except SystemExit as leaving:
        # after --help
        if isinstance(leaving.__context__, KeyboardInterrupt):
            raise leaving.__context__ from leaving
        return leaving.code if isinstance(leaving.code, int) else 0


def _take_imports(verb: str, words: list[str]) -> tuple[list[str], list[str]]:
    """Separate ``--import`` and its values from the other words of a verb."""
    rest: list[str] = []
    imports: list[str] = []
    left = list(words)
    while left and left[0] != "--":
        word = left.pop(0)
        name, equals, value = word.partition("=")
        if name != IMPORT:
            rest.append(word)
            continue
        if verb not in IMPORTING:
            raise UsageError(f"{IMPORT} belongs to verbs that use a method: {', '.join(IMPORTING)}.")
        if not equals and not (left and not left[0].startswith("--")):
            raise UsageError(f"{IMPORT} takes a file or a module of Python; see `crossx {verb} --help`.")
        imports.append(value if equals else left.pop(0))
    return rest + left, imports


@contextlib.contextmanager
def _importing(words: list[str]) -> Iterator[None]:
    """Import what the user names, here and in all child processes."""
    if not words:
        yield
        return
    from crossx import plugins

    before = os.environ.get(plugins.VARIABLE)
    found = [plugins.Source.find(word).word for word in words]
    os.environ[plugins.VARIABLE] = plugins.join(dict.fromkeys([*plugins.named(), *found]))
    try:
        from crossx.methods.registry import import_methods

        import_methods(plugins.named())
        yield
    finally:
        if before is None:
            del os.environ[plugins.VARIABLE]
        else:
            os.environ[plugins.VARIABLE] = before


def _summary(verb: str) -> str:
    """Return the first line of the docstring of a verb's function, without importing it."""
    module = ast.parse((Path(__file__).parent / f"{verb.replace('-', '_')}.py").read_text(encoding="utf-8"))
    functions = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}
    function = functions.get(verb.replace("-", "_"), functions.get("run"))
    assert function is not None
    return str(ast.get_docstring(function)).partition("\n")[0].removesuffix(".")


def _open_streams() -> None:
    """Escape what the encoding of stdout and stderr does not have, and replace a closed stream."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # takes the number of the closed stream, which the next opened file would get otherwise
            stream = open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, stream)
        if isinstance(stream, io.TextIOWrapper) and name != "stdin":
            stream.reconfigure(errors="backslashreplace")


def _abandon_streams() -> None:
    """Write what is left to nowhere, as Python flushes both streams once more at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _set_environment() -> None:
    """Set defaults of variables that libraries read when they are imported."""
    # a failed download is reported once, in our line
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # threads that spin while they wait slow each other down as soon as another process (one that loads images,
    # say) needs a core too
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _show_log() -> None:
    """Log to the present stderr, which tests replace."""
    log = logging.getLogger("crossx")
    log.handlers = [_LogHandler()]
    log.setLevel(logging.INFO)


class _LogHandler(logging.StreamHandler[TextIO]):
    """Writes lines that fit the terminal, instead of the step that is shown."""

    def format(self, record: logging.LogRecord) -> str:
        return fold(super().format(record), hanging="  ", width=columns(sys.stderr))

    def emit(self, record: logging.LogRecord) -> None:
        erase_step()
        super().emit(record)


def _fail(command: str, message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"{command}: error: {one_line(message)}", file=sys.stderr)
    return code


def _os_error(error: OSError) -> str:
    where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"{where}no space left on the disk, or in the folder of temporary files: free some room."
    return f"{where}{error.strerror or error}."


def _defect(error: Exception) -> str:
    """Describe an unexpected error, and keep its traceback in a file."""
    if type(error).__name__ == "OutOfMemoryError":
        return "out of GPU memory: lower --data.batch_size."
    if "No space left on device" in str(error):
        return f"no space left on the disk ({first_line(error)}): free some room."
    reason = one_line(str(error))
    defect = f"a defect of crossx{_own_methods()}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="crossx-", suffix=".log", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as log:
            traceback.print_exception(error, file=log)
    except OSError:
        return f"unexpected {type(error).__name__}: {reason} ({defect}; --debug shows the traceback)."
    return f"unexpected {type(error).__name__}: {reason} ({defect}; report it with {log.name})."


def _own_methods() -> str:
    """Name the methods that are not crossx's own, since an error may be theirs."""
    if not is_imported():
        return ""
    from crossx.methods.registry import registered_elsewhere

    names = registered_elsewhere()
    return f" or of the method {' or '.join(names)}, see `crossx.testing.check_method`" if names else ""
