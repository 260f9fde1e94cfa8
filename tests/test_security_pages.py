"""What SECURITY.md, docs/reliability.md and the workflows rest on: tests that exist, pinned actions, lower bounds."""

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from crossx.yaml import load_yaml

ROOT = Path(__file__).parents[1]
PAGES = ("SECURITY.md", "docs/trust.md", "docs/reliability.md")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
RIGHTS = {
    ("release.yml", "publish"): {"id-token": "write"},
    ("pages.yml", "deploy"): {"id-token": "write", "pages": "write"},
}
"""Rights of the only jobs that have any: to publish, and to prove who publishes."""
NEEDED = {"SECURITY.md": 20, "docs/reliability.md": 10}
"""Tests that a page names at least."""


def defined_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", PAGES)
def test_every_test_that_a_page_names_exists(page: str) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / page).read_text(encoding="utf-8"))
    assert len(named) >= NEEDED.get(page, 0)
    for file, function in named:
        assert (ROOT / file).is_file(), file
        assert not function or function in defined_in(ROOT / file), f"{file}::{function}"


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_links_to_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    scripts = re.findall(r"`(\.ci/[\w-]+)`", text)
    missing = [link for link in links if not ((ROOT / page).parent / link).exists()]
    assert missing + [script for script in scripts if not (ROOT / script).is_file()] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_have_least_rights_and_pinned_actions(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    workflow: dict[str, Any] = load_yaml(text, path.name)
    assert workflow["permissions"] == {"contents": "read"}
    assert "pull_request_target" not in text
    assert workflow["concurrency"]["group"]
    for name, job in workflow["jobs"].items():
        assert job.get("permissions") == RIGHTS.get((path.name, name)), name
        assert 0 < job["timeout-minutes"] <= 360
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"])
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False
    pins = re.findall(r"uses: (.*)", text)
    assert pins
    assert all(re.fullmatch(r"\S+@[0-9a-f]{40} # v\d+\.\d+\.\d+", pin) for pin in pins)


def test_one_action_has_one_pin() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in WORKFLOWS)
    pins = set(re.findall(r"uses: (\S+?)@(\S+ # \S+)", text))
    assert len(pins) == len({action for action, _ in pins})


def test_scripts_of_the_workflows_can_be_run() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in WORKFLOWS)
    scripts = set(re.findall(r"\.ci/[\w-]+(?![\w.])", text))
    assert scripts == {".ci/run", ".ci/lower-bounds", ".ci/wheel", ".ci/audit", ".ci/site"}
    assert all((ROOT / script).stat().st_mode & 0o111 for script in scripts)


def test_every_dependency_has_a_lower_bound_and_no_known_malicious_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    requirements = [Requirement(text) for texts in lists for text in texts]
    for requirement in requirements:
        if requirement.name != "crossx":
            assert {clause.operator for clause in requirement.specifier} & {">=", "=="}, requirement.name
    (lightning,) = (requirement for requirement in requirements if requirement.name == "lightning")
    assert not any(lightning.specifier.contains(version) for version in ("2.6.2", "2.6.3"))
    (torch,) = (requirement for requirement in requirements if requirement.name == "torch")
    # CVE-2026-24747: `weights_only=True` can be made to corrupt memory before 2.10
    assert not torch.specifier.contains(Version("2.9.1"))
