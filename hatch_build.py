"""Metadata of the distribution that depends on the repository: its URLs, and README with absolute links.

The repository is CROSSX_REPOSITORY (an https URL), that of the GitHub workflow that builds, or that of the source
distribution. Without one there are no URLs of it, and the relative links of README become plain text.
"""

from __future__ import annotations

import os
import re
from email import message_from_string
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z][a-z0-9+.-]*:|#)([^)\s]+)\)", re.IGNORECASE)
_NAME = "Repository"


class RepositoryHook(MetadataHookInterface):
    """Fill in ``readme`` and ``urls``."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Fill in the dynamic fields of pyproject.toml."""
        root = Path(self.root)
        repository = find_repository(root)
        # an unpacked source distribution has the tag of its version
        text = (root / "README.md").read_text(encoding="utf-8")
        tag = f"v{metadata['version']}"
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute_links(text, repository, tag)}
        metadata["urls"] = urls(repository)


def find_repository(root: Path) -> str | None:
    """Return the https URL of the repository that is built, without a slash at its end."""
    given = os.environ.get("CROSSX_REPOSITORY")
    if not given and "GITHUB_REPOSITORY" in os.environ:
        given = (
            f"{os.environ.get('GITHUB_SERVER_URL', 'https://github.com')}/{os.environ['GITHUB_REPOSITORY']}"
        )
    if not given and (root / "PKG-INFO").exists():
        built = message_from_string((root / "PKG-INFO").read_text(encoding="utf-8"))
        pairs = (line.split(", ", 1) for line in built.get_all("Project-URL", []))
        given = dict(pairs).get(_NAME)
    if given and not re.fullmatch(r"https://[\w.-]+(/[\w.-]+)+/?", given):
        raise ValueError(f"CROSSX_REPOSITORY: {given!r} is not the https URL of a repository.")
    return given.rstrip("/") if given else None


def urls(repository: str | None) -> dict[str, str]:
    """Return the URLs of the project."""
    paper = {"Paper": "https://arxiv.org/abs/1909.04412"}
    if repository is None:
        return paper
    return {
        _NAME: repository,
        "Documentation": f"{repository}/tree/main/docs",
        "Changelog": f"{repository}/blob/main/CHANGELOG.md",
        "Issues": f"{repository}/issues",
        **paper,
    }


def absolute_links(text: str, repository: str | None, tag: str) -> str:
    """Return Markdown whose relative links and images lead to a tag of the repository; without one, their text."""

    def absolute(match: re.Match[str]) -> str:
        image, name, target = match.groups()
        if repository is None:
            return "" if image else name
        kind = "raw" if image else "tree" if target.endswith("/") else "blob"
        return f"{image}[{name}]({repository}/{kind}/{tag}/{target})"

    return _LINK.sub(absolute, text)
