"""The documentation site: links, navigation, the listed API and, with crossx[docs], the build."""

import importlib
import os
import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest

import build_site
import crossx
import crossx.testing
from build_site import ROOT

API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
DIRECTIVES = re.findall(r"^<!-- ::: ([\w.]+) -->$", API, re.MULTILINE)


@pytest.fixture
def pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder docs of a small repository."""
    for name in build_site.START:
        (tmp_path / name).write_text("# Page\n")
    (tmp_path / "docs" / "methods").mkdir(parents=True)
    monkeypatch.setattr(build_site, "ROOT", tmp_path)
    return tmp_path / "docs"


def test_links_and_anchors_of_the_pages_lead_somewhere() -> None:
    assert build_site.broken_links() == []


def test_every_page_is_in_the_navigation_once() -> None:
    listed = [page for section in build_site.navigation() for found in section.values() for page in found]
    assert sorted(listed) == sorted(
        page.as_posix() for page in build_site.pages() if page != Path("README.md")
    )
    named = {page for section in build_site.SECTIONS.values() for page in section}
    assert named <= {page.as_posix() for page in build_site.pages()}


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("[a](b.md) [c](../README.md#page) [d](https://example.org/x#y)", ""),
        ("![a](missing.png)", "docs/a.md: missing.png: there is no such file."),
        ("[a](b.md#two-words)", "docs/a.md: b.md#two-words: there is no such heading."),
        ("[a](#nowhere)", "docs/a.md: #nowhere: there is no such heading."),
        ("[a](b.md#heading--with-code-1)", ""),
        ("[a](b.md#heading--with-code-2)", "docs/a.md: b.md#heading--with-code-2: there is no such heading."),
        ("[a](/docs/b.md)", "docs/a.md: /docs/b.md: there is no such file."),
        ("`[a](missing.md)`\n\n```\n[a](missing.md)\n```\n", ""),
    ],
)
def test_broken_links_are_found(text: str, broken: str, pages: Path) -> None:
    (pages / "a.md").write_text(f"# A\n\n{text}\n")
    (pages / "b.md").write_text(
        "# B\n\n## Heading: — with code\n\n```\n# two words\n```\n\n## Heading — `with` code\n"
    )
    assert build_site.broken_links() == ([broken] if broken else [])


def test_linked_files_come_along_and_new_pages_are_listed(pages: Path, tmp_path: Path) -> None:
    for name in ("results", "src"):
        (tmp_path / name).mkdir()
    (tmp_path / "results" / "a.json").write_text("{}")
    (tmp_path / "src" / "a.py").write_text("x = 1\n")
    (pages / "new.md").write_text(
        "[1](../results/a.json) [2](../results/) [3](../src/a.py) [4](../README.md#page)\n\n<!-- ::: crossx.fit -->\n"
    )
    (pages / "methods" / "own.md").write_text("# Own\n")
    staged = tmp_path / "build"
    build_site.stage(staged)
    assert (staged / "docs" / "new.md").read_text() == (
        "[1](../results/a.json) [2](../results/index.md) [3](../src/a.py.md) [4](../index.md#page)\n\n::: crossx.fit\n"
    )
    assert (staged / "results" / "a.json").read_text() == "{}"
    assert "[a.json](a.json)" in (staged / "results" / "index.md").read_text()
    assert "x = 1" in (staged / "src" / "a.py.md").read_text()
    sections = {title: found for section in build_site.navigation() for title, found in section.items()}
    assert sections["Guides"] == ["docs/new.md"]
    assert sections["Methods"] == ["docs/methods/own.md"]


def test_the_api_page_lists_the_public_names() -> None:
    assert {f"crossx.{name}" for name in crossx.__all__} <= {*re.findall(r"`([\w.]+)`", API)}


@pytest.mark.slow
def test_the_listed_names_exist() -> None:
    assert DIRECTIVES
    listed = set()
    for name in DIRECTIVES:
        module, _, attribute = name.rpartition(".")
        found = attrgetter(attribute)(importlib.import_module(module))
        assert found.__doc__
        listed.add(found)
    assert {getattr(crossx.testing, name) for name in crossx.testing.__all__} <= listed
    names = {name for name in crossx.__all__ if name not in ("__version__", "load")}
    assert {getattr(crossx, name) for name in names} <= listed


@pytest.mark.slow
def test_the_site_is_built_strictly(tmp_path: Path) -> None:
    pytest.importorskip("zensical", reason="needs crossx[docs]")
    pytest.importorskip("mkdocstrings_handlers.python", reason="needs crossx[docs]")
    done = subprocess.run(
        [
            sys.executable, ROOT / "tools" / "build_site.py", "--output", tmp_path,
            "--url", "https://birds.example/crossx/",
        ],
        capture_output=True, text=True, check=False, env={**os.environ, "NO_COLOR": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "html" / "docs" / "api" / "index.html").read_text(encoding="utf-8")
    for name in DIRECTIVES:
        assert f'id="{name}"' in page
    assert str(crossx.fit.__doc__).partition("\n")[0] in page
    # it is served from any address, so its links must say where the site is
    lost = (tmp_path / "html" / "404.html").read_text(encoding="utf-8")
    links = re.findall(r'(?:href|src)="(/[^"]*)"', lost)
    assert links
    assert all(link.startswith("/crossx/") for link in links)
    broken = tmp_path / "pages" / "docs" / "api.md"
    broken.write_text(broken.read_text(encoding="utf-8") + "\n[nowhere](cli.md#nowhere)\n", encoding="utf-8")
    assert build_site.build(tmp_path) != 0
