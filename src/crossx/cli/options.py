"""What every verb's command line shares: whole option names, errors of one line, the options typed most."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import NoReturn

from crossx.errors import UsageError, nearest

EPILOG = "An error is one line and exit code 1, or 2 for a wrong command; --debug shows its traceback."


class VerbParser(argparse.ArgumentParser):
    """``argparse`` that takes no abbreviated options and raises ``UsageError`` with the nearest match.

    Args:
        verb: Name after ``crossx``.
        description: What the verb does.
        examples: Commands to copy, shown at the end of ``--help``.
        add_help: Whether it takes ``--help``.
    """

    def __init__(
        self, verb: str, description: str = "", examples: Sequence[str] = (), *, add_help: bool = True
    ) -> None:
        super().__init__(
            prog=f"crossx {verb}",
            description=description,
            epilog=epilog(examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            add_help=add_help,
        )

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise UsageError(f"{message}; see `{self.prog} --help`.")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse, options and positional arguments in any order.

        Raises:
            UsageError: For whatever is missing, unknown or of the wrong type.
        """
        values, extra = self.parse_known_intermixed_args(arguments)
        if extra:
            raise unknown_argument(extra[0], self._option_string_actions, self.prog)
        return values


def epilog(examples: Sequence[str]) -> str:
    """Return the end of a verb's ``--help``."""
    return "\n".join(["examples:", *(f"  {example}" for example in examples), "", EPILOG])


def unknown_argument(argument: str, options: Iterable[str], prog: str) -> UsageError:
    """Build the error for an argument that the verb ``prog`` does not take, with the nearest option."""
    name = argument.split("=", 1)[0]
    if not name.startswith("-"):
        return UsageError(f"unexpected argument {argument!r}; see `{prog} --help`.")
    known = list(options)
    same_end = [option for option in known if option.split(".")[-1] == name.lstrip("-").split(".")[-1]]
    hint = f" Did you mean {same_end[0]!r}?" if len(same_end) == 1 else nearest(name, known)
    return UsageError(f"unknown option {name!r}.{hint} `{prog} --help` lists the options.")


def add_run(parser: argparse.ArgumentParser, *, exported: bool = False) -> None:
    """Add the positional argument RUN.

    Args:
        parser: The verb's.
        exported: Whether the verb also takes a file of ``crossx export``.
    """
    either = ", a file of `crossx export`," if exported else ","
    parser.add_argument(
        "run",
        metavar="RUN",
        help=f"run folder, a checkpoint file in one{either} or USER/NAME on the Hugging Face Hub",
    )
    if exported:
        parser.add_argument(
            "--trust",
            action="store_true",
            help="load a .pt2 file, which can run any code on this machine when it is loaded: only for files that you "
            "made yourself; the other formats need no trust",
        )


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Add the options on how images are loaded."""
    parser.add_argument(
        "--data.batch_size", dest="batch_size", type=positive, metavar="N", help="images a step"
    )
    parser.add_argument(
        "--data.num_workers",
        dest="num_workers",
        type=natural,
        metavar="N",
        help="processes that load images (default: one for each CPU core, at most 8)",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option on where the network runs."""
    parser.add_argument(
        "--device",
        default="auto",
        help="auto, cpu, cuda or cuda:N (default: auto, the GPU where there is one)",
    )


def add_prediction(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``Predictor``: device, precision, and views of an image."""
    add_device(parser)
    parser.add_argument(
        "--precision",
        default="auto",
        metavar="NAME",
        help="fp32, fp16, bf16 or auto (default: auto, fp16 on a GPU that is fast in it, else fp32)",
    )
    parser.add_argument("--flip", action="store_true", help="average over each image and its mirror image")
    parser.add_argument(
        "--crops",
        type=int,
        choices=(1, 5),
        default=1,
        help="average over 5 crops, corners and centre (default: 1, the centre)",
    )


def natural(text: str) -> int:
    """Read a whole number from 0 on."""
    return _whole(text, 0)


def positive(text: str) -> int:
    """Read a whole number from 1 on."""
    return _whole(text, 1)


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"must be a whole number from {least} on, not {text!r}")
    return value
