"""What docs/upgrade.md promises to users of an earlier or a later version."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from crossx.cli.main import main
from crossx.errors import CrossXError
from crossx.predict.exported import KEY, ExportedModel
from crossx.predict.predictor import Predictor
from crossx.runs import SCHEMA, ModelSpec, Preprocessing, Run, read_json, write_json
from layouts import write_image
from refusals import refusal

ASSETS = Path(__file__).parent / "assets"
PAGE = (Path(__file__).parents[1] / "docs" / "upgrade.md").read_text()
NOT_A_SCHEMA = [None, True, 1.0, "1", 0, -1, [1], {"1": 1}, 1.5, ""]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(shutil.copytree(ASSETS / "run_0_1", tmp_path / "run"))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "bird.jpg"
    write_image(path, 0, 0)
    return path


def change(path: Path, **values: Any) -> None:
    write_json(path, {**read_json(path), **values})


def missing(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """Yield what ``old`` has and ``new`` has not."""
    if isinstance(old, dict):
        for key, value in old.items():
            if key in new:
                yield from missing(value, new[key], f"{where}.{key}")
            else:
                yield f"{where}.{key}"
    elif isinstance(old, list):
        yield from (f"{where}.{item}" for item in old if item not in new)
    elif old != new:
        yield f"{where}: {old} is now {new}"


def test_nothing_is_taken_away() -> None:
    pytest.importorskip("fastapi", reason="needs crossx[serve]")
    from contract import contract

    before = json.loads((ASSETS / "contract_0_1.json").read_text())
    assert list(missing(before, contract(ASSETS / "run_0_1"))) == []


def test_what_is_taken_away_is_found() -> None:
    old = {"a": ["x", "y"], "b": {"c": "number"}, "d": {}}
    assert list(missing(old, {"a": ["y", "z"], "b": {"c": "string"}})) == [
        ".a.x", ".b.c: number is now string", ".d",
    ]  # fmt: skip
    assert list(missing(old, {**old, "a": ["z", "y", "x"], "e": 1})) == []


def test_a_new_key_is_a_decision() -> None:
    """A key that changes predictions belongs to preprocessing or options, or needs a new schema: docs/upgrade.md."""
    before = json.loads((ASSETS / "contract_0_1.json").read_text())
    # the sets and the weight of an unused score change no prediction; a file with a rejection is of schema 2
    assert SCHEMA == 2
    added = ["combined_weight", "rejection", "sets"]
    assert sorted(["schema", *(field.name for field in fields(ModelSpec))]) == sorted(
        before["model.json"] + added
    )
    assert sorted(field.name for field in fields(Preprocessing)) == before["preprocessing"]


def test_a_newer_schema_is_refused_by_every_verb_that_loads(
    run: Run, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(run.spec, schema=SCHEMA + 1)
    line = f"{run.spec}: schema 3, this version of crossx reads 1 to 2: upgrade crossx."
    promised = re.search(r"`model.json: (schema 3, this version .*)`", PAGE)
    assert promised is not None
    assert line.endswith(promised[1])
    folder = str(image.parent)
    for words in (
        ["predict", str(run.path), str(image)], ["test", str(run.path), "--data.root", folder],
        ["explain", str(run.path), str(image), "--output", f"{folder}/maps"], ["report", str(run.path)],
        ["serve", str(run.path), "--port", "0"], ["share", str(run.path), "--output", f"{folder}/shared"],
        ["export", str(run.path), "--output", f"{folder}/x.safetensors"],
        ["calibrate", str(run.path), "--data.root", folder],
    ):  # fmt: skip
        assert main(words) == 1
        assert capsys.readouterr().err == f"crossx {words[0]}: error: {line}\n"


@pytest.mark.parametrize("schema", [3, 4, 2**63, pytest.param(10**4000, id="digits")])
def test_a_newer_schema_is_told_before_anything_else(run: Run, schema: int) -> None:
    """The rest of a newer file may be anything."""
    message = refusal(ModelSpec.from_json, {"schema": schema, "networks": []}, run.spec)
    assert message.endswith("this version of crossx reads 1 to 2: upgrade crossx.")
    assert len(message) < len(str(run.spec)) + 150


@pytest.mark.parametrize("schema", NOT_A_SCHEMA)
def test_no_schema_is_no_description(run: Run, schema: object) -> None:
    values = {**read_json(run.spec), "schema": schema}
    message = refusal(ModelSpec.from_json, values, run.spec)
    assert message.startswith(
        f"{run.spec}: not a model description of crossx (schema: should be 1 to 2, not "
    )
    del values["schema"]
    assert "not None" in refusal(ModelSpec.from_json, values, run.spec)


def test_keys_of_a_later_version_are_ignored_where_they_change_nothing(run: Run, image: Path) -> None:
    (before,) = Predictor.load(run.path, "cpu").predict(image, top=3)
    change(run.spec, authors=["me"], licence={"id": "mit"})
    change(run.info, schema=7, cost={"kWh": 1})
    (after,) = Predictor.load(run.path, "cpu").predict(image, top=3)
    assert after == before
    assert run.read_info()["cost"] == {"kWh": 1}


@pytest.mark.parametrize("key", ["preprocessing", "options", "backbone_args"])
def test_keys_of_a_later_version_are_refused_where_they_change_the_numbers(run: Run, key: str) -> None:
    change(run.spec, **{key: {**read_json(run.spec)[key], "antialiasing": True}})
    message = refusal(Predictor.load, run.path, "cpu")
    assert message.startswith(f"{run.spec}: ")
    assert "antialiasing" in message


@pytest.mark.parametrize(
    "key", ["levels", "temperature", "preprocessing.crop_bottom", "preprocessing.pipeline"]
)
def test_keys_that_came_later_have_defaults(run: Run, key: str) -> None:
    values = read_json(run.spec)
    *within, name = key.split(".")
    section = values[within[0]] if within else values
    del section[name]
    write_json(run.spec, values)
    spec = run.read_spec()
    default = {field.name: field for field in fields(Preprocessing if within else ModelSpec)}[name]
    expected = {} if name == "levels" else default.default
    assert getattr(spec.preprocessing if within else spec, name) == expected


def test_an_exported_file_keeps_its_numbers(run: Run, image: Path) -> None:
    predictor = Predictor.load(ASSETS / "exported_0_1.safetensors", "cpu")
    (expected,) = Predictor.load(run.path, "cpu").predict(image, top=3)
    (found,) = predictor.predict(image, top=3)
    assert [label for label, _ in found.top] == [label for label, _ in expected.top]
    assert dict(found.top) == pytest.approx(dict(expected.top), abs=1e-5)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (3, "schema 3, this version of crossx reads 1 to 2: upgrade crossx."),
        ("1", "not a model description of crossx"),
    ],
)
def test_the_schema_of_an_exported_file_counts_too(tmp_path: Path, schema: object, reason: str) -> None:
    old = ASSETS / "exported_0_1.safetensors"
    with safe_open(old, "pt") as opened:
        described = json.loads(opened.metadata()[KEY])
    file = tmp_path / "new.safetensors"
    save_file(load_file(old), file, {KEY: json.dumps({**described, "schema": schema})})
    with pytest.raises(CrossXError, match=re.escape(reason)):
        ExportedModel.load(file)
    assert described["crossx_version"] == "0.1.0"
