import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import crossx
from crossx.audit.run import audit_dataset
from crossx.methods import create_method, list_methods
from crossx.predict.collection import predict_collection
from crossx.predict.predictor import Predictor
from crossx.share import save_pretrained
from crossx.training.config import Config
from crossx.training.fit import fit, resume
from refusals import refusal


def test_public_names_are_those_of_the_rooms() -> None:
    assert crossx.Config is Config
    assert crossx.audit_dataset is audit_dataset
    assert crossx.create_method is create_method
    assert crossx.list_methods is list_methods
    assert crossx.fit is fit
    assert crossx.load == Predictor.load
    assert set(crossx.__all__) <= set(dir(crossx))


def test_version_is_that_of_the_distribution() -> None:
    assert crossx.__version__.count(".") == 2


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'crossx' has no attribute 'nothing'"):
        _ = crossx.nothing


@pytest.mark.parametrize(
    ("call", "named", "remedy"),
    [
        (lambda wrong: crossx.fit(wrong), "crossx.fit takes a Config", "Config.from_recipe("),
        (lambda wrong: crossx.tune(wrong, "tuned"), "crossx.tune takes a Config", "Config.from_recipe("),
        (
            lambda wrong: save_pretrained(wrong, "shared"),
            "save_pretrained takes a Predictor",
            "crossx.load(RUN) loads one",
        ),
    ],
    ids=["fit", "tune", "save_pretrained"],
)
@pytest.mark.parametrize(
    ("wrong", "shown"),
    [("finetune", "'finetune'"), (None, "None"), ({}, "a dict"), (Path("runs/mine"), "a PosixPath")],
    ids=repr,
)
def test_an_argument_of_another_type_is_refused_with_what_makes_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Any,
    named: str,
    remedy: str,
    wrong: Any,
    shown: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(call, wrong)
    assert message.startswith(f"{named}, not {shown}: {remedy}")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("trust", lambda value: crossx.load("model.pt2", trust=value)),
        ("trust", lambda value: predict_collection("model.pt2", "images", "out", trust=value)),
        ("restart", lambda value: resume("run", restart=value)),
        ("pretrained", lambda value: create_method("plain", backbone="x", num_classes=2, pretrained=value)),
    ],
)
@pytest.mark.parametrize("value", ["no", 1, None], ids=repr)
def test_a_flag_is_true_or_false(name: str, call: Any, value: Any) -> None:
    assert refusal(call, value) == f"{name} must be True or False, not {value!r}."


@pytest.mark.parametrize(
    "module",
    [
        "crossx",
        "crossx.errors",
        "crossx.runs",
        "crossx.recipes",
        "crossx.data.catalog",
        "crossx.training.config",
    ],
)
def test_light_modules_do_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'lightning', 'numpy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
