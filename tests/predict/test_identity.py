import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

import hub_stub
from crossx.errors import CrossXError, UsageError
from crossx.export.export import export_run
from crossx.predict.identity import MAX_TEXT, Identity, identify
from crossx.predict.predictor import Predictor
from crossx.runs import write_json
from layouts import write_image, write_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("run") / "mine")
    write_json(run / "run.json", {"id": "d43f46"})
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "mine")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def identity_of(path: str | Path, **given: str) -> Identity:
    return identify(Predictor.load(path, "cpu"), **given)


def test_a_run_has_its_folders_name_and_its_id(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Identity("mine", "d43f46", sha256(run / "model.safetensors"))
    assert identity_of(run) == expected
    assert identity_of(run / "model.safetensors") == expected
    monkeypatch.chdir(run)
    assert identity_of(".") == expected


def test_a_link_to_a_run_has_its_own_name(run: Path) -> None:
    (link := run.with_name("current")).symlink_to(run)
    assert identity_of(link).name == "current"


def test_without_an_id_the_version_is_the_beginning_of_the_checksum(run: Path) -> None:
    checksum = sha256(run / "model.safetensors")
    for info in ({}, {"id": None}, {"id": ""}):
        write_json(run / "run.json", info)
        assert identity_of(run) == Identity("mine", checksum[:12], checksum)
    (run / "run.json").unlink()
    assert identity_of(run).version == checksum[:12]


def test_given_names_take_the_place_of_those_found(run: Path) -> None:
    (run / "run.json").write_text("{")
    found = identity_of(run, name="Vögel/2", version="1.4 (March)")
    assert (found.name, found.version) == ("Vögel/2", "1.4 (March)")
    with pytest.raises(CrossXError, match=r"run.json: not valid JSON"):
        identity_of(run, name="birds")


@pytest.mark.parametrize("given", ["", "a\nb", "\x1b[1m", "x" * (MAX_TEXT + 1), "\u2028", "\ud800"])
def test_given_names_are_one_short_line(trained: Path, given: str) -> None:
    predictor = Predictor.load(trained, "cpu")
    with pytest.raises(UsageError, match="model_name must be 1 to 100 printable characters"):
        identify(predictor, given)
    with pytest.raises(UsageError, match="model_version must be"):
        identify(predictor, "x", given)


def test_found_names_are_one_short_line(run: Path) -> None:
    odd = run.rename(run.with_name("a\nb" + "x" * 200))
    write_json(odd / "run.json", {"id": "v\r\nSet-Cookie: x" + "y" * 200})
    found = identity_of(odd)
    assert found.name == "a\\nb" + "x" * 96
    assert found.version.startswith("v\\r\\nSet-Cookie: xy")
    assert len(found.version) == MAX_TEXT
    assert found.name.isprintable()


def test_an_exported_file_has_its_own_name_and_checksum(run: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "1.jpg", 0, 0)
    file = export_run(run, tmp_path / "birds.safetensors", images=tmp_path / "images").files[0]
    assert identity_of(file) == Identity("birds.safetensors", sha256(file)[:12], sha256(file))


def test_the_weights_of_openvino_are_in_the_second_file(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crossx.predict import exported

    described = exported.describe_export(Predictor.load(trained, "cpu").spec, "openvino", "fp32", None)
    monkeypatch.setattr(exported, "_read_openvino", lambda file: (json.dumps(described), None))
    (tmp_path / "birds.xml").write_text("network")
    (tmp_path / "birds.bin").write_bytes(b"weights")
    found = identity_of(tmp_path / "birds.xml")
    assert (found.name, found.checksum) == ("birds.xml", sha256(tmp_path / "birds.bin"))


@pytest.mark.slow
def test_a_model_of_the_hub_has_its_commit(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: (trained / name).read_bytes() for name in ("model.json", "model.safetensors")}
    with hub_stub.serve() as (hub, address):
        hub_stub.use(monkeypatch, address, str(tmp_path / "cache"))
        hub.repositories["me/birds"] = {"main": files | {"config.json": b"{}"}, "v2": files}
        for words, branch in (("me/birds", "main"), ("me/birds@v2", "v2")):
            resolved = hub.resolve("me/birds", branch)
            assert resolved is not None
            found = identity_of(words)
            assert found == Identity("me/birds", resolved[0], sha256(trained / "model.safetensors"))


def test_weights_that_were_replaced_meanwhile_are_not_named(run: Path) -> None:
    predictor = Predictor.load(run, "cpu")
    weights = run / "model.safetensors"
    shutil.copy(weights, run / "new")
    os.replace(run / "new", weights)
    with pytest.raises(CrossXError, match=r"model.safetensors: was replaced while it was loaded"):
        identify(predictor)


def test_a_network_without_a_file_has_no_checksum(trained: Path) -> None:
    loaded = Predictor.load(trained, "cpu")
    made = Predictor.from_method(loaded.method, loaded.spec, "cpu")
    assert identify(made) == Identity("model", "unknown", None)
    assert identify(made, "birds", "3") == Identity("birds", "3", None)
