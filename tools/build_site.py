"""Build the documentation site from the repository's Markdown and docstrings: build_site.py [--check] [--url URL].

The pages stay plain Markdown that GitHub shows as it is. They are copied to build/site/pages in the layout of the
repository, so that links between them hold; linked files come along, linked sources as pages. In docs/api.md, comments
of the form ``<!-- ::: crossx.fit -->`` become the docstrings. Then Zensical builds build/site/html, and stops at a
broken link or anchor. --check only compares links and anchors with the files, as GitHub resolves them, and needs no
package.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "zensical.toml"
START = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
SECTIONS: dict[str, tuple[str, ...]] = {
    "Tutorials": ("docs/tutorials/photos.md", "docs/tutorials/paper.md", "docs/own-method.md"),
    "Choose": ("docs/which-method.md", "docs/comparison.md", "docs/licences.md"),
    "Data and training": (
        "docs/install.md", "docs/data.md", "docs/audit.md", "docs/training.md", "docs/tune.md", "docs/scaling.md",
        "docs/synthetic.md",
    ),
    "Evaluate": ("docs/report.md", "docs/explain.md", "docs/parts.md", "docs/unknowns.md", "docs/ablation.md"),
    "Predict and deploy": (
        "docs/predict.md", "docs/neighbors.md", "docs/collections.md", "docs/export.md", "docs/serve.md",
        "docs/share.md", "docs/kubernetes.md", "docs/upgrade.md",
    ),
    "Guides": (),
    "Methods": (),
    "Reference": ("docs/cli.md", "docs/api.md", "docs/errors.md"),
    "Results": (
        "docs/results.md", "docs/results/paper.md", "docs/results/parts.md", "docs/results/drawn.md",
        "docs/results/sgd.md", "docs/fidelity.md", "docs/performance.md", "docs/reliability.md",
    ),
    "Project": ("docs/architecture.md", "docs/trust.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md"),
}  # fmt: skip
"""Navigation. Pages that are in no section appear in Guides, or in Methods if they are in docs/methods."""

_LINK = re.compile(r"(\]\()([^)\s]+)((?:\s+\"[^\"]*\")?\))")
_CODE = re.compile(r"^( *)```.*?^\1```|(?<!`)`[^`\n]+`(?!`)", re.DOTALL | re.MULTILINE)
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".js": "javascript", ".txt": "text"}


def pages() -> list[Path]:
    """Return the Markdown files of the site, relative to the repository."""
    found = [Path(name) for name in START]
    return found + sorted(path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*.md"))


def links(text: str) -> Iterator[str]:
    """Yield the targets of a page's links and images, outside code."""
    for match in _LINK.finditer(_CODE.sub(lambda code: " " * len(code[0]), text)):
        yield match[2]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} (.*)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = 0
        while (name := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(name)
    return found


def is_outside(target: str) -> bool:
    """Whether a link leads to another site."""
    return re.match(r"[a-z][a-z0-9+.-]*:", target, re.IGNORECASE) is not None


def broken_links() -> list[str]:
    """Return a line for each link of a page that GitHub cannot resolve."""
    broken = []
    for page in pages():
        for target in links((ROOT / page).read_text(encoding="utf-8")):
            if is_outside(target):
                continue
            file, _, anchor = unquote(target).partition("#")
            path = (ROOT / page).parent / file if file else ROOT / page
            if target.startswith("/") or not path.exists():
                broken.append(f"{page}: {target}: there is no such file.")
            elif anchor and path.suffix == ".md" and anchor not in anchors(path):
                broken.append(f"{page}: {target}: there is no such heading.")
    return broken


def navigation() -> list[dict[str, list[str]]]:
    """Return the sections, with each page of the site in one of them."""
    listed = {page for section in SECTIONS.values() for page in section}
    there = {page.as_posix() for page in pages()}
    extra = sorted(there - listed - {"README.md"})
    methods = [page for page in extra if page.startswith("docs/methods/")]
    more = {"Methods": methods, "Guides": [page for page in extra if page not in methods]}
    sections = {
        title: [*(page for page in listed if page in there), *more.get(title, [])]
        for title, listed in SECTIONS.items()
    }
    return [{title: found} for title, found in sections.items() if found]


def stage(folder: Path) -> None:
    """Copy the pages and what they link to into ``folder``."""
    shutil.rmtree(folder, ignore_errors=True)
    todo = pages()
    for page in todo:
        text = (ROOT / page).read_text(encoding="utf-8")
        target = folder / ("index.md" if page == Path("README.md") else page)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = re.sub(r"^<!-- (::: [\w.]+) -->$", r"\1", text, flags=re.MULTILINE)
        target.write_text(
            _LINK.sub(lambda match, page=page: _staged(match, page, folder), text), encoding="utf-8"
        )


def _staged(match: re.Match[str], page: Path, folder: Path) -> str:
    """Return a link to its target on the site, and bring the target there."""
    before, target, after = match.groups()
    file, hash_, anchor = target.partition("#")
    path = ((ROOT / page).parent / unquote(file)).resolve()
    if is_outside(target) or not file or not path.is_relative_to(ROOT) or not path.exists():
        return match[0]
    name = path.relative_to(ROOT)
    if path.is_dir():
        file = f"{file.rstrip('/')}/index.md"
        _list(path, folder / name / "index.md")
    elif path.suffix in _LANGUAGES:
        file = f"{file}.md"
        _show(path, folder / f"{name}.md")
    elif name == Path("README.md"):
        file = file.replace("README.md", "index.md")
    elif path.suffix != ".md" or name not in pages():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    return f"{before}{file}{hash_}{anchor}{after}"


def _show(source: Path, page: Path) -> None:
    page.parent.mkdir(parents=True, exist_ok=True)
    name, text = source.relative_to(ROOT).as_posix(), source.read_text(encoding="utf-8")
    page.write_text(
        f"# {source.name}\n\n`{name}`\n\n~~~~{_LANGUAGES[source.suffix]}\n{text}\n~~~~\n", encoding="utf-8"
    )


def _list(source: Path, page: Path) -> None:
    page.parent.mkdir(parents=True, exist_ok=True)
    files = sorted(path for path in source.iterdir() if path.is_file())
    for path in files:
        shutil.copyfile(path, page.parent / path.name)
    lines = "\n".join(f"- [{path.name}]({path.name})" for path in files)
    page.write_text(f"# {source.relative_to(ROOT).as_posix()}\n\n{lines}\n", encoding="utf-8")


def write_config(path: Path, url: str | None = None) -> None:
    """Write the settings of zensical.toml with the navigation, and the site's address."""
    settings = CONFIG.read_text(encoding="utf-8")
    sections = ", ".join(
        f"{{{json.dumps(title)} = {json.dumps(found)}}}"
        for section in navigation()
        for title, found in section.items()
    )
    address = f"site_url = {json.dumps(url)}\n" if url else ""
    for before, after in (
        ("[project]", f'[project]\n{address}nav = ["index.md", {sections}]'),
        ('paths = ["src"]', f"paths = [{json.dumps(str(ROOT / 'src'))}]"),
    ):
        assert settings.count(before) == 1
        settings = settings.replace(before, after)
    path.write_text(settings, encoding="utf-8")


def build(folder: Path) -> int:
    """Build ``folder/html`` from ``folder/pages``, and return Zensical's exit code."""
    command = [
        sys.executable,
        "-m",
        "zensical",
        "build",
        "--clean",
        "--strict",
        "--config-file",
        "zensical.toml",
    ]
    return subprocess.run(command, cwd=folder, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="only check the links and anchors of the Markdown files"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "site", help="folder to build in")
    parser.add_argument(
        "--url", help="address of the site; without it, the page for errors links to the host's root"
    )
    arguments = parser.parse_args()
    broken = broken_links()
    print(*broken, sep="\n", end="\n" if broken else "", file=sys.stderr)
    if broken or arguments.check:
        return int(bool(broken))
    stage(arguments.output / "pages")
    write_config(arguments.output / "zensical.toml", arguments.url)
    return build(arguments.output)


if __name__ == "__main__":
    sys.exit(main())
