import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

import layouts
from crossx.evaluation.metrics import ClassRow
from crossx.methods import create_method
from crossx.methods.weights import describe, load_method
from crossx.runs import Preprocessing, Rejection, Run
from crossx.share.model_card import CardData, CardFigure, check_license, write_card
from refusals import refusal

PREPROCESSING = Preprocessing(64, 72, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
CLASSES = ("001.Jay", "002.A|pipe", "003.`tick`")
RESULTS = {
    "top1": 0.75,
    "top5": None,
    "class_mean": 0.7512345,
    "n": 1200,
    "heads": {"last": 0.7, "previous": 0.5},
    "levels": {"family": 0.9},
    "ece": 0.125,
    "confused_pairs": [{"target": "002.A|pipe", "prediction": "001.Jay", "n": 2, "fraction": 0.5}],
    "intervals": {"top1": [0.7, 0.8], "class_mean": [0.71, 0.79], "confidence": 0.95, "resamples": 10000},
    "weights": "model.safetensors",
    "selection": {"how": "best", "split": "val", "metric": "top1", "epoch": 7, "value": 0.8},
    "dataset": "cub",
    "split": "test",
    "run_status": "finished",
    "seen_in_training": False,
    "seed": 3,
    "skipped": [],
}
INFO = {
    "status": "finished",
    "backbone": "resnet18.a1_in1k",
    "pretrained": True,
    "backbone_weights": None,
    "images": {"train": 2160, "val": 240, "test": 1200},
    "environment": {"python": "3.11.7", "versions": {"torch": "2.9.0"}},
}
CONFIG = {
    "model": {"method": "crossx", "backbone": "local-dir:/home/me/w", "backbone_weights": "/home/me/w.pth"},
    "data": {"dataset": "cub", "root": "/home/me/cub", "image_size": 64},
    "optim": {"lr": 0.01},
    "trainer": {"max_epochs": 30, "default_root_dir": "/home/me/logs", "devices": 2},
    "seed": 3,
    "output": "/home/me/runs/cub",
}


@pytest.fixture(scope="module")
def method() -> Any:
    return create_method("crossx", backbone="test_resnet", num_classes=3)


def card_data(method: Any, dataset: str = "cub", **known: Any) -> CardData:
    return CardData(
        method, describe(method, classes=CLASSES, preprocessing=PREPROCESSING, dataset=dataset), **known
    )


def measured(method: Any, **changes: Any) -> CardData:
    rows = [ClassRow("001.Jay", 4, 1.0, None), ClassRow("002.A|pipe", 4, 0.5, "001.Jay")]
    return card_data(method, info=INFO, config=CONFIG, results={**RESULTS, **changes}, classes=rows)


@pytest.mark.parametrize(
    ("temperature", "tested", "expected"),
    [
        (1.0, {}, "12.5 points"),
        (1.0, {"temperature": 1.0, "ece_calibrated": 0.125}, "12.5 points"),
        (
            0.7531,
            {"temperature": 0.7531, "ece_calibrated": 0.0625},
            "softmax(logits / 0.7531). Its probability is not",
        ),
        (0.7531, {"temperature": 0.7531, "ece_calibrated": 0.0625}, "6.2 points"),
        (0.7531, {"temperature": 1.0, "ece_calibrated": 0.125}, "was not measured"),
        (0.7531, {}, "was not measured"),
    ],
)
def test_the_calibration_error_is_that_of_the_probabilities_given(
    method: Any, temperature: float, tested: dict[str, float], expected: str
) -> None:
    known = measured(method, **tested)
    text = write_card(replace(known, spec=replace(known.spec, temperature=temperature)))
    (line,) = re.findall(r"^- .*(?:points on average|be trusted).*$", text, re.MULTILINE)
    assert expected in line
    assert ("| expected calibration error" in section(text, "Results")) == ("points" in line)


def test_what_becomes_of_images_of_none_of_the_classes_is_told(method: Any) -> None:
    known = measured(method)
    assert "- It always predicts one of its 3 classes," in section(write_card(known), "Limits")
    rejection = Rejection("max_logit", 0.95, 40, {"1": 3.0})
    text = section(write_card(replace(known, spec=replace(known.spec, rejection=rejection))), "Limits")
    assert "always predicts" not in text
    assert (
        "- An image whose score (max_logit) is below a threshold gets none of its 3 classes. The threshold keeps"
        in text
    )
    assert "95% of the images of the classes" in text


def section(text: str, head: str) -> str:
    return text.split(f"\n## {head}\n")[1].split("\n## ")[0]


def test_metadata_are_what_the_hub_reads(method: Any) -> None:
    card = ModelCard(write_card(measured(method), repository="me/birds", license="cc-by-nc-4.0"))
    data = card.data.to_dict()
    assert (data["license"], data["library_name"]) == ("cc-by-nc-4.0", "crossx")
    assert (data["pipeline_tag"], data["datasets"]) == ("image-classification", ["cub"])
    assert data["base_model"] == "timm/resnet18.a1_in1k"
    assert len(set(data["tags"])) == len(data["tags"])
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "birds"
    assert {(r.metric_name, r.metric_value) for r in results} == {
        ("Top-1 accuracy", 0.75),
        ("Class-mean accuracy", 0.7512345),
    }
    assert {(r.task_type, r.dataset_type, r.dataset_split) for r in results} == {
        ("image-classification", "cub", "test")
    }
    assert "3 classes" in results[0].dataset_name


@pytest.mark.parametrize(("classes", "listed"), [(5, False), (6, True)])
def test_metadata_have_top5_of_more_than_five_classes(method: Any, classes: int, listed: bool) -> None:
    known = measured(method, top5=0.875)
    spec = replace(known.spec, classes=tuple(f"bird {number}" for number in range(classes)))
    data = ModelCard(write_card(replace(known, spec=spec))).data.to_dict()
    _, results = model_index_to_eval_results(data["model-index"])
    assert (("Top-5 accuracy", 0.875) in {(r.metric_name, r.metric_value) for r in results}) == listed


def test_results_stand_with_their_intervals(method: Any) -> None:
    text = section(write_card(measured(method)), "Results")
    for row in (
        r"top-1 accuracy, % +\| +75\.00 \(70\.00, 80\.00\)",
        r"class-mean accuracy, % +\| +75\.12 \(71\.00, 79\.00\)",
        r"head `previous` alone, % +\| +50\.00",
        r"level `family`, % +\| +90\.00",
        r"expected calibration error +\| +0\.1250",
    ):
        assert re.search(row, text)
    assert "top-5" not in text
    # of three classes it would be 100%
    assert "top-5" not in section(write_card(measured(method, top5=1.0)), "Results")
    assert "on 1,200 images of the split `test`" in text
    assert "epoch 7, the best on the images of the split `val`" in text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"selection": {"how": "last", "epoch": 10}}, "those after the last epoch (10)"),
        ({"selection": {"how": "best_on_test", "epoch": None}}, "best on these same test images"),
        ({"selection": {"how": "checkpoint given"}}, "is not known"),
        ({"selection": None}, "is not known"),
        ({"seen_in_training": True}, "**These images were trained on"),
        ({"run_status": "running"}, "**The run is not finished (running)"),
        ({"dataset": "nabirds"}, "**The test images are those of another dataset (nabirds)"),
        ({"skipped": ["a.jpg"]}, "Skipped as unreadable: 1 image."),
    ],
)
def test_what_lessens_the_results_is_said(method: Any, changes: Mapping[str, Any], expected: str) -> None:
    assert expected in section(write_card(measured(method, **changes)), "Results")


def test_without_a_test_there_are_no_numbers(method: Any) -> None:
    card = ModelCard(write_card(card_data(method, "folder")))
    assert "model-index" not in card.data.to_dict()
    assert "metrics" not in card.data.to_dict()
    assert section(card.text, "Results").strip() == "Not measured."
    limits = section(card.text, "Limits")
    assert "accuracy was not measured" in limits
    assert "can be trusted was not measured" in limits
    assert "%" not in limits
    assert section(card.text, "Training").strip().startswith("Not known.")


def test_no_path_of_the_training_machine_is_told(method: Any) -> None:
    info = {**INFO, "backbone": "local-dir:/home/me/w", "data_root": "/home/me/cub"}
    text = write_card(CardData(method, measured(method).spec, info, CONFIG, RESULTS))
    assert "/home/me" not in text
    printed = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert printed == {
        "model": {"method": "crossx", "backbone": "test_resnet"},
        "data": {"dataset": "cub", "image_size": 64},
        "optim": {"lr": 0.01},
        "trainer": {"max_epochs": 30},
        "seed": 3,
    }


def test_terms_and_defects_of_the_dataset_are_told(method: Any) -> None:
    text = write_card(measured(method))
    data = section(text, "Training data")
    assert "Caltech-UCSD Birds-200-2011 (https://" in data
    assert "3 classes of the 200 in the dataset" in data
    assert "non-commercial research and education" in data
    assert "2,160 for training, 240 held out for validation, 1,200 for the test" in data
    assert "timm's pretrained weights `resnet18.a1_in1k`" in data
    assert "4% of the labels are wrong" in section(text, "Limits")


def test_images_of_ones_own_have_no_public_name(method: Any) -> None:
    card = ModelCard(write_card(card_data(method, "folder")))
    assert "datasets" not in card.data.to_dict()
    assert "The author's own images" in section(card.text, "Training data")
    assert "ask the author" in section(card.text, "Training data")


def test_any_class_name_stays_one_cell(method: Any) -> None:
    limits = section(write_card(measured(method)), "Limits")
    assert "`002.A\\|pipe`" in limits
    lines = [line for line in limits.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in lines} == {5}


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"backbone": "hf-hub:timm/resnet18.a1_in1k@main", "pretrained": True}, "timm/resnet18.a1_in1k"),
        ({"backbone": "resnet18", "pretrained": True}, None),
        ({"backbone": "local-dir:w", "pretrained": True}, None),
        ({"backbone": "resnet18.a1_in1k", "pretrained": False}, None),
        ({"backbone": "resnet18.a1_in1k", "pretrained": True, "backbone_weights": "w.pth"}, None),
    ],
)
def test_the_base_model_is_named_where_the_hub_has_it(
    method: Any, info: Mapping[str, Any], expected: str | None
) -> None:
    assert ModelCard(write_card(card_data(method, info=info))).data.to_dict().get("base_model") == expected


@pytest.mark.parametrize(
    ("hub", "pretrained", "expected", "base"),
    [
        (
            "me/birds@v2",
            None,
            "from the model `me/birds@v2` on the Hub: method `plain`, 7 classes of `cub`",
            "me/birds",
        ),
        (None, "resnet18.a1_in1k", "started from timm's pretrained weights `resnet18.a1_in1k`.", None),
        (None, "local-dir:/home/me/w", "from another network of the author: method `plain`", None),
    ],
)
def test_the_network_that_a_run_started_from_is_named_without_paths(
    method: Any, hub: str | None, pretrained: str | None, expected: str, base: str | None
) -> None:
    init = {
        "run": hub or "/home/me/runs/a",
        "hub": hub,
        "sha256": "0" * 64,
        "method": "plain",
        "dataset": "cub",
    }
    init |= {"num_classes": 7, "pretrained": pretrained}
    card = ModelCard(write_card(card_data(method, info={**INFO, "pretrained": False, "init": init})))
    training = section(card.text, "Training data")
    assert expected in training
    assert "0" * 64 in training
    assert "/home/me" not in card.content
    assert "from scratch" not in training
    assert card.data.to_dict().get("base_model") == base


def test_commands_name_the_repository_and_figures_are_shown(method: Any) -> None:
    figures = [CardFigure("accuracy.png", "Accuracy of each class")]
    text = write_card(measured(method), repository="me/birds", figures=figures)
    assert 'crossx.load("me/birds")' in text
    assert "crossx predict me/birds photos/" in text
    assert "![Accuracy of each class](accuracy.png)" in text
    assert 'crossx.load("USER/crossx_test_resnet.cub_64")' in write_card(measured(method))
    assert "luo2019crossx" in text
    plain = create_method("plain", backbone="test_resnet", num_classes=3)
    assert "Citation" not in write_card(card_data(plain))


@pytest.mark.parametrize("license", ["Apache 2.0", "", "mit\nlicense: x", "CC BY"])
def test_a_licence_that_is_no_identifier_is_refused(license: str) -> None:
    assert "is not a licence identifier of the Hub" in refusal(check_license, license)


def test_card_data_are_those_of_the_run_folder(tmp_path: Path) -> None:
    run = Run(layouts.write_run(tmp_path))
    run.info.write_text(json.dumps(INFO))
    config = {**CONFIG, "trainer": {"max_epochs": 30, "devices": 2}}
    run.config.write_text(yaml.safe_dump(config))
    (tmp_path / "test").mkdir()
    (tmp_path / "test/per_class.csv").write_text(
        "class,n,accuracy,most_confused_with\nrobin,4,0.5,wren\nwren,0,,\ncrossbill,2,1.0,\n"
    )
    network, spec = load_method(tmp_path)
    read = CardData.read(network, spec, run, RESULTS)
    assert (read.info, read.config) == (INFO, config)
    assert read.classes == [ClassRow("robin", 4, 0.5, "wren"), ClassRow("crossbill", 2, 1.0, None)]
    assert CardData.read(network, spec, run, {}).classes == []


def test_a_damaged_configuration_is_told(tmp_path: Path, method: Any) -> None:
    run = Run(layouts.write_run(tmp_path))
    for content, message in (
        ("a: [", "config.yaml: line 1 is not valid YAML"),
        ("- a", "config.yaml: not a configuration"),
        ("optim: {lr: 0.1, lrr: 0.1}", "config.yaml: unknown option optim.lrr. Did you mean 'lr'?"),
        ("optin: {lr: 0.1}", "config.yaml: unknown option optin. Did you mean 'optim'?"),
        ("optim: {lr: -1}", "config.yaml: optim.lr must be"),
    ):
        run.config.write_text(content)
        assert message in refusal(CardData.read, method, run.read_spec(), run, {})
