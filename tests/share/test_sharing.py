import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open

import crossx
import hub_stub
import layouts
from crossx.errors import CrossXError
from crossx.methods.weights import load_method
from crossx.predict.predictor import Predictor
from crossx.runs import Run, write_json, write_text
from crossx.share import push_to_hub, save_pretrained
from crossx.share.sharing import CARD, FILES
from hub_stub import Hub
from refusals import refusal

RESULTS = {
    "top1": 0.5,
    "class_mean": 0.5,
    "n": 6,
    "heads": {"last": 0.5},
    "weights": "model.safetensors",
    "selection": {"how": "last", "epoch": 1},
    "dataset": "folder",
    "split": "test",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Write a run that was tested."""
    run = Run(layouts.write_run(tmp_path_factory.mktemp("run")))
    write_json(run.path / "test.json", RESULTS)
    write_text(
        run.path / "test" / "per_class.csv",
        "class,n,accuracy,most_confused_with\nrobin,2,0.5,wren\nwren,2,0.5,robin\ncrossbill,2,0.5,wren\n",
    )
    return run


@pytest.fixture
def predictor(run: Run) -> Predictor:
    return Predictor.load(run.path, device="cpu")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with hub_stub.serve() as (content, address):
        hub_stub.use(monkeypatch, address, str(tmp_path / "cache"))
        content.writers.add("secret")
        yield content


@torch.inference_mode()
def logits(predictor: Predictor) -> torch.Tensor:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return predictor.method(images.to(memory_format=torch.channels_last))


def test_what_is_shared_loads_bit_for_bit(predictor: Predictor, tmp_path: Path) -> None:
    folder = save_pretrained(predictor, tmp_path / "shared", license="apache-2.0")
    loaded = crossx.load(folder, device="cpu")
    assert torch.equal(logits(loaded), logits(predictor))
    assert loaded.spec == predictor.spec
    # and once more, from what was loaded
    again = crossx.load(save_pretrained(loaded, tmp_path / "again"), device="cpu")
    assert torch.equal(logits(again), logits(predictor))


def test_the_folder_holds_safetensors_json_card_and_chart(predictor: Predictor, tmp_path: Path) -> None:
    folder = save_pretrained(predictor, tmp_path, license="mit")
    assert {path.name for path in folder.iterdir()} == set(FILES) - {"activation_maps.png"}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(predictor.method.state_dict())
    config = json.loads((folder / "config.json").read_text())
    assert (config["library_name"], config["architecture"]) == ("crossx", "crossx_test_resnet")
    assert (config["num_classes"], config["label_names"]) == (3, list(predictor.classes))
    assert config["pretrained_cfg"]["input_size"] == [3, 64, 64]
    card = ModelCard.load(folder / CARD)
    assert card.data.license == "mit"
    assert card.data.eval_results[0].metric_value == 0.5
    assert "![" in card.text
    with Image.open(folder / "accuracy.png") as picture:
        assert picture.width > 600


def test_one_image_in_memory_may_be_given(predictor: Predictor, tmp_path: Path) -> None:
    folder = save_pretrained(predictor, tmp_path / "shared", images=Image.new("RGB", (90, 70), "teal"))
    assert (folder / "activation_maps.png").is_file()


@pytest.mark.slow
def test_maps_of_images_are_shown_if_they_are_given(predictor: Predictor, tmp_path: Path) -> None:
    layouts.write_image(tmp_path / "mine.jpg", 0, 0)
    folder = save_pretrained(predictor, tmp_path / "shared", images=tmp_path / "mine.jpg")
    with Image.open(folder / "activation_maps.png") as picture:
        assert picture.width > 300
    assert "activation_maps.png" in (folder / CARD).read_text()
    save_pretrained(predictor, folder)
    assert not (folder / "activation_maps.png").exists()
    assert "README.md" in refusal(
        save_pretrained, predictor, tmp_path / "other", images=[tmp_path / "shared/README.md"]
    )
    assert not (tmp_path / "other" / "model.json").exists()


def test_only_a_new_empty_or_shared_folder_is_written_to(
    predictor: Predictor, run: Run, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    line = refusal(save_pretrained, predictor, copy)
    assert line.startswith(
        f"{copy}: holds other files (model.json). Choose a new or an empty folder as --output"
    )
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    timm_model = tmp_path / "timm"
    write_json(timm_model / "config.json", {"architecture": "resnet18"})
    assert "holds other files (config.json)" in refusal(save_pretrained, predictor, timm_model)
    shared = save_pretrained(predictor, tmp_path / "shared")
    (shared / ".git").mkdir()
    save_pretrained(predictor, shared)
    assert (shared / ".git").is_dir()


def test_a_folder_that_is_half_written_does_not_load(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_pretrained(predictor, tmp_path / "shared")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("crossx.share.sharing.save_weights", killed)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(predictor, folder)
    assert "no model.json" in refusal(crossx.load, folder)
    monkeypatch.undo()
    assert crossx.load(save_pretrained(predictor, folder), device="cpu").spec == predictor.spec


def test_results_of_other_weights_are_not_told(
    predictor: Predictor, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def results(predictor: Predictor) -> str:
        shared = save_pretrained(predictor, tmp_path / "shared")
        return ModelCard.load(shared / CARD).text.split("## Results")[1].split("## ")[0].strip()

    assert "50.00" in results(predictor)
    shutil.copytree(run.path, tmp_path / "run")
    other = tmp_path / "run" / "checkpoints" / "other.safetensors"
    other.parent.mkdir()
    shutil.copy(run.weights, other)
    assert results(crossx.load(other, device="cpu")) == "Not measured."
    newer = tmp_path / "run" / "model.safetensors"
    os.utime(newer, ns=(2**62, 2**62))
    assert results(crossx.load(tmp_path / "run", device="cpu")) == "Not measured."
    assert results(Predictor.from_method(*load_method(run.path), device="cpu")) == "Not measured."
    with torch.no_grad():
        next(predictor.method.parameters()).add_(1)
    with caplog.at_level("WARNING", logger="crossx"):
        assert results(predictor) == "Not measured."
    assert "changed after it was loaded" in caplog.text


@pytest.mark.slow
def test_a_model_goes_to_the_hub_and_comes_back(
    hub: Hub, predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = push_to_hub(predictor, "me/birds", private=True, token="secret", license="mit")
    assert address.endswith("/me/birds")
    files = hub.repositories["me/birds"]["main"]
    assert set(files) == set(FILES) - {"activation_maps.png"}
    assert hub.private == {"me/birds"}
    assert 'crossx.load("me/birds")' in files[CARD].decode()
    loaded = crossx.load("me/birds", device="cpu")
    assert torch.equal(logits(loaded), logits(predictor))
    assert loaded.spec == predictor.spec
    predictor.spec = replace(predictor.spec, dataset="another")
    # a folder with the name of the user means nothing here
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me").mkdir()
    push_to_hub(predictor, "me/birds", revision="v2", token="secret")
    (tmp_path / "me").rmdir()
    assert crossx.load("me/birds@v2", device="cpu").spec.dataset == "another"
    assert crossx.load("hf-hub:me/birds", device="cpu").spec.dataset == "folder"


def test_a_push_that_cannot_work_is_refused(hub: Hub, predictor: Predictor) -> None:
    assert "names no repository" in refusal(push_to_hub, predictor, "birds")
    assert "not uploaded" in refusal(push_to_hub, predictor, "me/birds", token="wrong")
    assert hub.repositories == {}


def test_files_of_a_stranger_are_checked(hub: Hub, predictor: Predictor, tmp_path: Path) -> None:
    folder = save_pretrained(predictor, tmp_path / "shared")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    spec = json.loads(files["model.json"])
    for name, changed, reason in (
        (
            "model.json",
            json.dumps({**spec, "backbone": "hf-hub:evil/model"}).encode(),
            "backbone: is no plain",
        ),
        ("model.json", json.dumps({**spec, "method": "crossy"}).encode(), "unknown method 'crossy'"),
        ("model.json", json.dumps({**spec, "classes": ["a", "b"]}).encode(), "its weights do not fit"),
        ("model.json", b"{", "not valid JSON"),
        ("model.safetensors", b"\x80\x04pickled", "not a weights file"),
    ):
        hub.repositories["me/bad"] = {"main": {**files, name: changed}}
        with pytest.raises(CrossXError, match=reason) as caught:
            crossx.load("me/bad", device="cpu")
        assert "\n" not in str(caught.value)
