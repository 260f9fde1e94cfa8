"""Feed mutated files to the parsers of crossx, in child processes, and keep the inputs that break one.

    make fuzz SECONDS=600

A parser may return or raise ``CrossXError`` with one line. Anything else (another exception, a signal, an input that
takes more than ``LIMIT`` seconds) is a failure: the input is written to fuzz/failures/PARSER/FILE/, and the exit code
is 1. Inputs that failed once are in fuzz/corpus/, and tests/test_fuzz.py reads them again.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import mmap
import os
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

# the threads of OpenMP do not survive a fork, and torch would wait for them
os.environ.setdefault("OMP_NUM_THREADS", "1")

from crossx.data.readers import mat
from crossx.errors import CrossXError
from parsers import Read
from targets import TARGETS, Target
from tokens import NUMBERS

HERE = Path(__file__).parent
LIMIT = 60
"""Seconds that one input may take."""
BATCH = 5
"""Seconds of inputs per child process."""
MEMORY = 6 << 30
"""Address space of a child beyond that of its parent, in bytes."""


def mutate(data: bytes, seeds: list[bytes], target: Target, generator: random.Random) -> bytes:
    """Return a mutant of a file: a few changes of bytes, tokens, numbers, lines and ends."""
    result = bytearray(data)
    for _ in range(generator.choice((1, 1, 1, 2, 3, 5))):
        size = len(result)
        start = (
            generator.randrange(max(0, size - 1024), size)
            if target.tail and size and generator.random() < 0.7
            else generator.randrange(size + 1)
        )
        match generator.randrange(9):
            case 0 if size:
                place = min(start, size - 1)
                result[place] ^= 1 << generator.randrange(8)
            case 1 if size:
                place = min(start, size - 1)
                result[place] = generator.choice((0, 1, 0x7F, 0x80, 0xFF, generator.randrange(256)))
            case 2:
                del result[start : start + generator.choice((1, 1, 2, 4, 8, 64, size))]
            case 3 | 4 if target.tokens:
                token = generator.choice(target.tokens)
                over = len(token) if generator.random() < 0.3 else 0
                result[start : start + over] = token
            case 5:
                numbers = list(re.finditer(rb"\d+(\.\d+)?", result[: 1 << 16]))
                if numbers:
                    found = generator.choice(numbers)
                    result[found.start() : found.end()] = generator.choice(NUMBERS)
            case 6:
                lines = bytes(result).split(b"\n")
                if len(lines) > 1:
                    a, b = generator.randrange(len(lines)), generator.randrange(len(lines))
                    lines[a] = generator.choice(
                        (lines[b], b"", lines[a] + lines[b], lines[a] + b"\n" + lines[b])
                    )
                    result = bytearray(b"\n".join(lines))
            case 7:
                other = generator.choice(seeds)
                a, length = generator.randrange(len(other) + 1), generator.choice((4, 16, 64, 256))
                result[start : start + generator.choice((0, length))] = other[a : a + length]
            case 8 if size:
                length = generator.choice((1, 4, 16))
                result[start:start] = result[start : start + length] * generator.choice((1, 2, 50))
    content = bytes(result[: 1 << 20])
    return target.repair(content) if target.repair and generator.random() < 0.8 else content


class Forks:
    """Stands in for ``mat.run_child``: the same code in forks of one process, as a new Python is slow to start."""

    def __init__(self) -> None:
        command = [sys.executable, str(HERE / "mat_forks.py")]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, path: Path, variables: tuple[str, ...]) -> tuple[int, bytes]:
        assert self.server.stdin
        assert self.server.stdout
        self.server.stdin.write(json.dumps([str(path), variables]).encode() + b"\n")
        self.server.stdin.flush()
        code, size = json.loads(self.server.stdout.readline())
        return code, self.server.stdout.read(size)

    def close(self) -> None:
        """Stop the process."""
        assert self.server.stdin
        assert self.server.stdout
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()


def problem_of(read: Read, folder: Path) -> str:
    """Return what is wrong with a parser's result: the exception, or an empty string."""
    try:
        read(folder)
    except CrossXError as error:
        lines = str(error).splitlines()
        return (
            ""
            if len(lines) == 1 and len(lines[0]) < 5000
            else f"a message of {len(lines)} lines: {lines[:2]}"
        )
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in where if "/crossx/" in frame.filename] or where
        return f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}: {str(error)[:300]}"
    return ""


@dataclass
class Figures:
    """What was run of one target."""

    inputs: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


def corpus(root: Path = HERE / "corpus") -> Iterator[tuple[str, str, Path]]:
    """Yield parser, mutated file and path of each input that failed once."""
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        parser, name, _ = path.relative_to(root).parts
        yield parser, name.replace("+", "/"), path


def place(root: Path, parser: str, name: str, content: bytes) -> Path:
    """Return where an input of a parser is kept."""
    return root / parser / name.replace("/", "+") / hashlib.sha256(content).hexdigest()[:12]


class Fuzzer:
    """One target in a folder of its own."""

    def __init__(self, name: str, folder: Path, failures: Path) -> None:
        self.name, self.target, self.folder, self.failed = name, TARGETS[name], folder, failures
        folder.mkdir(parents=True)
        self.target.write(folder)
        self.originals = {file: (folder / file).read_bytes() for file in self.target.files}
        self.figures = Figures()
        self.batch = 0
        kept = [(file, path.read_bytes()) for parser, file, path in corpus() if parser == name]
        self.seeds = [*self.originals.items(), *kept]
        # inputs so far, and the index of the file that is mutated
        self.shared = mmap.mmap(-1, 16)
        problem = problem_of(self.target.read, folder)
        if problem:
            raise SystemExit(f"{name}: the seed itself fails: {problem}")

    def run(self, seconds: float) -> None:
        """Run one child for some seconds, and record what it did."""
        self.batch += 1
        self.shared[:] = bytes(16)
        started = time.monotonic()
        reading, writing = os.pipe()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            with open(writing, "w") as pipe:
                code = 1
                try:
                    self._child(pipe, seconds)
                    code = 0
                except BaseException:
                    pipe.write(json.dumps(["", traceback.format_exc()]) + "\n")
                finally:
                    pipe.flush()
                    os._exit(code)
        os.close(writing)
        with open(reading) as pipe:
            for line in pipe:
                self.figures.failures.append(": ".join(json.loads(line)))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        inputs, index = struct.unpack("qq", self.shared[:])
        if status < 0:
            file = self.target.files[index]
            kept = self._keep(file, (self.folder / file).read_bytes())
            self.figures.failures.append(f"{kept}: {signal.Signals(-status).name}")
        for file, content in self.originals.items():
            (self.folder / file).write_bytes(content)
        self.figures.inputs += inputs
        self.figures.seconds += time.monotonic() - started

    def _child(self, pipe: io.TextIOBase, seconds: float) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        silent = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silent, stream)
        generator = random.Random(f"{self.name} {self.batch}")
        known: set[str] = set()
        end = time.monotonic() + seconds
        count = 0
        last = None
        while time.monotonic() < end:
            file, seed = generator.choice(self.seeds)
            others = [content for name, content in self.seeds if name == file]
            content = mutate(seed, others, self.target, generator)
            if last not in (None, file):
                (self.folder / last).write_bytes(self.originals[last])
            self.shared[8:] = struct.pack("q", self.target.files.index(file))
            (self.folder / file).write_bytes(content)
            signal.alarm(LIMIT)
            problem = problem_of(self.target.read, self.folder)
            signal.alarm(0)
            last, count = file, count + 1
            self.shared[:8] = struct.pack("q", count)
            kind = problem.partition(": ")[0]
            if problem and kind not in known:
                known.add(kind)
                pipe.write(json.dumps([str(self._keep(file, content)), problem]) + "\n")
                # a signal would lose what is buffered
                pipe.flush()

    def _keep(self, file: str, content: bytes) -> Path:
        path = place(self.failed, self.name, file, content)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path


def add_run(path: Path, fuzzers: Mapping[str, Fuzzer]) -> None:
    """Add the figures of this run to those in a file: runs of other times and commits stay next to it."""
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    head = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=HERE, capture_output=True, text=True, check=False,
    )  # fmt: skip
    parsers = {
        name: {
            "inputs": fuzzer.figures.inputs,
            "seconds": round(fuzzer.figures.seconds, 1),
            "failures": len(fuzzer.figures.failures),
        }
        for name, fuzzer in fuzzers.items()
    }
    command = " ".join(["python", "fuzz/fuzzing.py", *sys.argv[1:]])
    runs.append({"command": command, "commit": head.stdout.strip() or None, "parsers": parsers})
    figures = [one for run in runs for one in run["parsers"].values()]
    totals = {kind: sum(one[kind] for one in figures) for kind in ("inputs", "failures")}
    path.write_text(json.dumps({**totals, "runs": runs}, indent=2) + "\n")


def main() -> int:
    """Fuzz, print the inputs per parser, and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parsers", nargs="*", metavar="PARSER", help=f"of {', '.join(TARGETS)}; by default all"
    )
    parser.add_argument("--seconds", type=float, default=60, help="time for all parsers together")
    parser.add_argument(
        "--keep-going", action="store_true", help="do not stop at the first failure of a parser"
    )
    parser.add_argument("--json", type=Path, help="also add the figures to this file")
    parser.add_argument(
        "--failures", type=Path, default=HERE / "failures", help="folder for inputs that fail"
    )
    options = parser.parse_args()
    for name in options.parsers:
        if name not in TARGETS:
            parser.error(f"unknown parser {name!r}: choose from {', '.join(TARGETS)}")
    warnings.simplefilter("ignore")
    forks = Forks()
    mat.run_child = forks
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as base:
        fuzzers = {
            name: Fuzzer(name, Path(base) / name, options.failures) for name in options.parsers or TARGETS
        }
        share = max(0.2, min(BATCH, options.seconds / len(fuzzers)))
        end = time.monotonic() + options.seconds
        while time.monotonic() < end:
            for fuzzer in fuzzers.values():
                if not fuzzer.figures.failures or options.keep_going:
                    fuzzer.run(share)
            if all(fuzzer.figures.failures for fuzzer in fuzzers.values()) and not options.keep_going:
                break
    for name, fuzzer in fuzzers.items():
        figures = fuzzer.figures
        print(
            f"{name:12} {figures.inputs:>9,} inputs in {figures.seconds:7.1f} s, {len(figures.failures)} failures"
        )
        for failure in figures.failures:
            print(f"  {failure[:400]}")
    forks.close()
    total = sum(fuzzer.figures.inputs for fuzzer in fuzzers.values())
    failed = sum(len(fuzzer.figures.failures) for fuzzer in fuzzers.values())
    print(f"{total:,} inputs, {failed} failures")
    if options.json:
        add_run(options.json, fuzzers)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
