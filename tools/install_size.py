"""Size of an installation: crossx alone, and what each extra adds.

    python -m venv fresh && fresh/bin/pip install '.[dev]' packaging && fresh/bin/python tools/install_size.py

Follows the requirements of pyproject.toml through the packages installed for this Python, and adds up the files that
pip recorded for each. CUDA is what torch requires for GPUs; PyTorch's index for CPUs has a torch without these packages
and without the CUDA libraries in torch itself.
"""

from __future__ import annotations

import argparse
import json
import platform
import tomllib
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "install_size.json"
EXTRAS = (
    "parquet",
    "tensorboard",
    "serve",
    "explain",
    "export",
    "ray",
    "tune",
    "datasets",
    "audit",
    "neighbors",
    "docs",
    "dev",
)
TRAINING = ("lightning", "torchmetrics", "scipy")
"""Packages of the base without which ``predict`` and ``serve`` still work (tests/test_extras.py)."""
GPU = ("nvidia-", "cuda-", "triton")
"""Beginnings of the names of packages that torch requires for GPUs."""


def installed_by(
    project: Mapping[str, Any], extras: Iterable[str] = (), without: Iterable[str] = ()
) -> list[str]:
    """Return the distributions that ``pip install crossx[EXTRAS]`` installs, as far as they are installed here.

    Args:
        project: The table ``project`` of pyproject.toml.
        extras: Extras of crossx.
        without: Direct requirements to leave out.
    """
    own = project["optional-dependencies"]
    todo = [(Requirement(line), "") for line in project["dependencies"]]
    todo = [(requirement, extra) for requirement, extra in todo if requirement.name not in {*without}]
    todo += [(Requirement(line), "") for extra in extras for line in own[extra]]
    done: set[tuple[str, str]] = set()
    found: dict[str, None] = {}
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in ("", *requirement.extras):
            if (name, wanted) in done:
                continue
            done.add((name, wanted))
            if name == "crossx":
                todo += [(Requirement(line), "") for line in own.get(wanted, [])]
                continue
            try:
                lines = metadata.requires(name) or []
            except metadata.PackageNotFoundError:
                continue
            found[name] = None
            todo += [(Requirement(line), wanted) for line in lines]
    return sorted(found)


def size(name: str, part: str = "") -> int:
    """Return the bytes of a distribution's files; with ``part``, of those whose name has it."""
    distribution = metadata.distribution(name)
    files = (file for file in distribution.files or () if part in file.name)
    return sum(
        path.stat().st_size for path in map(Path, map(distribution.locate_file, files)) if path.exists()
    )


def measure(project: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes in MB (1e6 bytes): of the base and its parts, and added by each extra."""
    base = installed_by(project)
    sizes = {name: size(name) / 1e6 for name in {*base, *installed_by(project, all_of(project))}}

    def total(names: Iterable[str]) -> float:
        return round(sum(sizes[name] for name in names), 1)

    gpu = [name for name in base if name.startswith(GPU)]
    inference = installed_by(project, without=TRAINING)
    return {
        "base": total(base),
        "base_cuda": total(gpu),
        "cuda_in_torch": round(size("torch", "cuda") / 1e6, 1),
        "base_without_cuda": total({*base} - {*gpu}),
        "only_training": total({*base} - {*inference}),
        "largest": {name: round(sizes[name], 1) for name in sorted(base, key=lambda n: -sizes[n])[:25]},
        "extras": {
            extra: {
                "adds": total({*installed_by(project, [extra])} - {*base}),
                "missing": missing(project, extra),
            }
            for extra in all_of(project)
        },
        "versions": {name: metadata.version(name) for name in base},
    }


def all_of(project: Mapping[str, Any]) -> list[str]:
    """Return the extras to measure that pyproject.toml has."""
    return [extra for extra in EXTRAS if extra in project["optional-dependencies"]]


def missing(project: Mapping[str, Any], extra: str) -> list[str]:
    """Return the direct requirements of an extra that are not installed here, so that its size is too low."""
    there = {*installed_by(project, [extra])}
    named = (Requirement(line).name for line in project["optional-dependencies"][extra])
    return [name for name in named if name != "crossx" and canonicalize_name(name) not in there]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--name", help="key under which to store the sizes, such as cuda or cpu", required=True
    )
    parser.add_argument("--json", type=Path, default=RESULT, help="file to add them to")
    arguments = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = measure(project) | {"python": platform.python_version(), "machine": platform.machine()}
    print(json.dumps({key: value for key, value in found.items() if key != "versions"}, indent=2))
    stored = json.loads(arguments.json.read_text(encoding="utf-8")) if arguments.json.exists() else {}
    stored[arguments.name] = found
    arguments.json.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
