"""`crossx new-method`, and the page on methods of one's own, whose commands are run."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import layouts
from crossx import plugins
from crossx.cli.main import main
from crossx.cli.new_method import check_name, write_package
from crossx.errors import UsageError
from crossx.recipes import load_recipe
from refusals import refusal

PAGE = Path(__file__).parents[2] / "docs" / "own-method.md"
SHORT = (
    "--data.image_size=64 --data.batch_size=2 --data.num_workers=0 --data.val_fraction=0 --data.test_fraction=0.34 "
    "--trainer.max_epochs=1 --trainer.accelerator=cpu --model.backbone=test_resnet --model.pretrained=false"
)


@pytest.mark.parametrize("name", ["bilinear", "a", "my_2nd_method", "method", "x" * 40])
def test_the_package_is_complete(name: str, tmp_path: Path) -> None:
    files = write_package(name, tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert {str(file.relative_to(folder)) for file in files} == {
        "README.md",
        "pyproject.toml",
        f"{name}.yaml",
        f"src/crossx_{name}/__init__.py",
        f"src/crossx_{name}/method.py",
        f"tests/test_{name}.py",
    }
    for file in files:
        text = file.read_text()
        assert "{{" not in text
        assert text.endswith("\n")
        if file.suffix == ".py":
            compile(text, str(file), "exec")
            assert len(text.splitlines()) <= 150
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    (entry,) = project["entry-points"][plugins.GROUP].items()
    assert entry[0] == name
    module, cls = entry[1].split(":")
    assert f"class {cls}(Method):" in (folder / "src" / module / "method.py").read_text()
    assert load_recipe(folder / f"{name}.yaml").get("model", "method") == name


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Bilinear", "Did you mean 'bilinear'?"),
        ("my-method", "Did you mean 'my_method'?"),
        ("my method", "Did you mean 'my_method'?"),
        ("2d", "Did you mean 'd'?"),
        ("_a", "Did you mean 'a'?"),
        ("a__b", "Did you mean 'a_b'?"),
        ("../evil", "Did you mean 'evil'?"),
        ("Été", "Did you mean 'ete'?"),
        ("日本", "lower-case letters, digits and _"),
        ("", "lower-case letters, digits and _"),
        ("a\nb", "Did you mean 'a_b'?"),
        ("a\n", "Did you mean 'a'?"),
        ("class", "a word of Python"),
        ("plain", "there is a method of this name already"),
        ("quickstart", "there is a recipe of this name already"),
        ("x" * 41, "has 41 characters; at most 40 are allowed"),
    ],
)
def test_names_are_checked(name: str, words: str) -> None:
    assert words in refusal(check_name, name)


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "broken link"])
def test_nothing_is_overwritten(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "crossx-mine"
    if kind == "file":
        target.write_text("kept")
    elif kind == "broken link":
        target.symlink_to(tmp_path / "nowhere")
    else:
        target.mkdir()
        if kind == "folder":
            (target / "README.md").write_text("kept")
    assert main(["new-method", "mine", "--output", str(target)]) == 2
    assert (
        capsys.readouterr().err
        == f"crossx new-method: error: {target}: exists already. Give another --output.\n"
    )
    assert not (tmp_path / "nowhere").exists()
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["kept"] * (
        kind in ("folder", "file")
    )


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be created" in refusal(write_package, "mine", tmp_path / "file" / "mine")
    with pytest.raises(UsageError, match="not valid UTF-8"):
        write_package("mine", tmp_path / os.fsdecode(b"caf\xe9"))


def install(folder: Path, name: str) -> dict[str, str]:
    """Do what `pip install -e` does, in the folder itself; return the environment that finds the package."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    about = folder / "src" / f"crossx_{name}-{project['version']}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    entries = "\n".join(f"{key} = {value}" for key, value in project["entry-points"][plugins.GROUP].items())
    (about / "entry_points.txt").write_text(f"[{plugins.GROUP}]\n{entries}\n")
    path = os.pathsep.join([str((folder / "src").absolute()), *filter(None, sys.path)])
    return {**os.environ, "PYTHONPATH": path, "XDG_STATE_HOME": str(folder.absolute() / "state")}


def succeed(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_tests(folder: Path, environment: dict[str, str]) -> str:
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), str(folder)]
    return succeed([sys.executable, *words], environment)


@pytest.mark.slow
def test_the_tests_of_a_new_package_pass(tmp_path: Path) -> None:
    write_package("mine", tmp_path / "mine")
    environment = install(tmp_path / "mine", "mine")
    assert " passed" in run_tests(tmp_path / "mine", environment)


@pytest.mark.slow
def test_the_commands_of_the_page_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of the page in its order; only pip is replaced, and the training is made short."""
    monkeypatch.chdir(tmp_path)
    layouts.write_folder(tmp_path / "photos", classes=2, images_per_class=3)
    text = PAGE.read_text()
    environment = dict(os.environ)
    ran = []
    for before, language, block in re.findall(r"(?s)(.*?)^```(\w*)\n(.*?)^```$", text, re.MULTILINE):
        if language:
            target = Path(re.findall(r"`(crossx-bilinear/[\w/.]+)`", before)[-1])
            assert target.is_file(), target
            assert len(block.splitlines()) <= 150
            target.write_text(block)
            continue
        for line in block.splitlines():
            verb = line.split()[1]
            if line.startswith("pip install"):
                environment = install(Path("crossx-bilinear"), "bilinear")
            elif line.startswith("pytest"):
                continue  # below, with the files of the page
            else:
                if "--import mine.py" in line:
                    source = Path("crossx-bilinear/src/crossx_bilinear/method.py").read_text()
                    Path("mine.py").write_text(source.replace('"bilinear"', '"mine"'))
                    environment = {**os.environ, "XDG_STATE_HOME": environment["XDG_STATE_HOME"]}
                if verb == "fit":
                    line += f" {SHORT}"
                succeed([sys.executable, "-m", *line.split()], environment)
                ran.append(verb)
    assert ran == ["new-method", "fit", "test", "predict", "explain", "export", "fit", "test"]
    path = os.pathsep.join([str(tmp_path / "crossx-bilinear" / "src"), *filter(None, sys.path)])
    assert " passed" in run_tests(tmp_path / "crossx-bilinear", {**environment, "PYTHONPATH": path})
