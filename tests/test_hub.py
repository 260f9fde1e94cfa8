import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

import hub_stub
from crossx.hub import TAKEN, HubModel, announce, download_model, upload_model
from crossx.runs import Run, open_run
from hub_stub import Hub
from refusals import refusal

FILES = {name: f"{name} of me/birds".encode() for name in TAKEN}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with hub_stub.serve() as (content, address):
        hub_stub.use(monkeypatch, address, str(tmp_path / "cache"))
        content.repositories["me/birds"] = {"main": dict(FILES), "v2": {**FILES, "model.json": b"two"}}
        yield content


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("me/birds", HubModel("me/birds")),
        ("me/birds@v2", HubModel("me/birds", "v2")),
        ("me/birds@refs/pr/1", HubModel("me/birds", "refs/pr/1")),
        ("hf-hub:me/birds", HubModel("me/birds", explicit=True)),
        ("hf-hub:me/birds@v2", HubModel("me/birds", "v2", explicit=True)),
        ("me/crossx_resnet50.cub_448", HubModel("me/crossx_resnet50.cub_448")),
        *(
            (path, None)
            for path in (
                "birds",
                "/me/birds",
                "me/birds/",
                "runs/me/birds",
                "./birds",
                "../birds",
                "my runs/a",
            )
        ),
        *((path, None) for path in ("", "/", "me/", "me/birds@", "birds@v2", "~/birds", "me/last.ckpt")),
    ],
)
def test_names_on_the_hub_are_told_from_paths(text: str, expected: HubModel | None) -> None:
    assert HubModel.parse(text) == expected


@pytest.mark.parametrize(
    "name",
    [
        *(
            "me/birds",
            "_me/b_",
            "me/b.c-d",
            "me/.b",
            "me/b-",
            "-me/b",
            "me/b--c",
            "me/b..c",
            "me/b.git",
            "mé/b",
        ),
        *("me/b c", "me/" + "b" * 96, "me/" + "b" * 97),
    ],
)
def test_names_of_repositories_are_those_of_the_client(name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError:
        assert HubModel.parse(name) is None
    else:
        assert HubModel.parse(name) == HubModel(name)


def test_a_slip_in_a_folder_that_is_there_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert HubModel.parse("runs/mien") is not None
    (tmp_path / "runs").mkdir()
    assert HubModel.parse("runs/mien") is None
    assert HubModel.parse("hf-hub:runs/mien") is not None
    assert HubModel.parse("runs/mien@v2", on_hub=True) == HubModel("runs/mien", "v2")
    assert HubModel.parse("./mien", on_hub=True) is None


@pytest.mark.parametrize("text", ["hf-hub:", "hf-hub:birds", "hf-hub:me/birds@", "hf-hub:a/b/c"])
def test_a_prefix_before_no_name_is_refused(text: str) -> None:
    assert refusal(HubModel.parse, text).startswith(f"{text!r} names no model: write hf-hub:USER/NAME")


def test_a_model_is_downloaded_once(hub: Hub) -> None:
    folder = download_model(HubModel("me/birds"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert any("/resolve/" in request for request in hub.requests)
    hub.requests.clear()
    assert download_model(HubModel("me/birds")) == folder
    assert hub.requests == ["GET /api/models/me/birds/revision/main"]


def test_a_download_is_announced_and_one_from_the_cache_is_not(
    hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "crossx")
    download_model(HubModel("me/birds"))
    assert caplog.messages == [f"downloading me/birds from {huggingface_hub.constants.ENDPOINT}"]
    download_model(HubModel("me/birds"))
    assert len(caplog.messages) == 1


def no_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where the Hub's client would wait for a retry."""

    def sleep(seconds: float) -> None:
        raise AssertionError(f"waited {seconds} seconds")

    monkeypatch.setattr(time, "sleep", sleep)


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:{}", "http://no-such-host.invalid", "https://127.0.0.1:{}/a/mirror"]
)
@pytest.mark.parametrize("cached", [True, False])
def test_a_hub_that_cannot_be_reached_is_not_asked_again(
    address: str, cached: bool, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        if cached:
            folder = download_model(HubModel("me/birds"))
        hub_stub.use(
            monkeypatch, address.format(port), str(tmp_path / "cache" if not cached else folder.parents[2])
        )
        no_retries(monkeypatch)
        if cached:
            assert download_model(HubModel("me/birds")) == folder
        else:
            message = refusal(download_model, HubModel("me/birds"))
            assert message.startswith(
                "me/birds: no such run folder or checkpoint file, and the model cannot be downloaded"
            )
            assert message.endswith("Check the name and the network.")
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_proxy_is_asked_in_place_of_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.setenv("no_proxy", "")
        announce("me/birds", "http://no-such-host.invalid")
        proxy.accept()[0].close()


def test_a_revision_is_another_model(hub: Hub) -> None:
    run, weights = open_run("me/birds@v2")
    assert run.spec.read_bytes() == b"two"
    assert (run.hub, weights) == ("me/birds@v2", run.weights)


def test_nothing_but_safetensors_and_json_is_taken(hub: Hub) -> None:
    files = hub.repositories["me/birds"]["main"]
    files |= {"pytorch_model.bin": b"pickled", "checkpoints/best.ckpt": b"pickled", "loader.py": b"code"}
    folder = download_model(HubModel("me/birds"))
    assert {path.name for path in folder.rglob("*") if path.is_file()} == set(TAKEN)


@pytest.mark.parametrize("missing", ["model.json", "model.safetensors"])
def test_a_model_of_another_library_is_refused(hub: Hub, missing: str) -> None:
    files = hub.repositories["me/birds"]["main"]
    del files[missing]
    files["checkpoints/best.ckpt"] = b"pickled"
    assert refusal(open_run, "me/birds").startswith(
        f"me/birds: the model on the Hugging Face Hub was not made by crossx (no {missing})."
    )


def test_a_path_that_exists_wins(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run(Path("me/birds"))
    run.path.mkdir(parents=True)
    for path in (run.spec, run.weights):
        path.write_text("mine")
    assert open_run("me/birds") == (run, run.weights)
    assert hub.requests == []
    assert open_run("hf-hub:me/birds")[0].hub == "me/birds"


def test_a_path_object_is_never_asked_for(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(open_run, Path("me/birds")) == "me/birds: no such run folder or checkpoint file."
    assert hub.requests == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "me/bird",
            "me/bird: no such run folder or checkpoint file, and no such model on the Hugging Face Hub. ",
        ),
        ("no name/x", "no name/x: no such run folder or checkpoint file."),
        ("hf-hub:me/bird", "me/bird: no such model on the Hugging Face Hub. Check the path or the name; "),
        (
            "me/birds@v3",
            "me/birds@v3: no such run folder or checkpoint file, and the model on the Hugging Face ",
        ),
        (
            "me/gated",
            "me/gated: no such run folder or checkpoint file, and the model on the Hugging Face Hub is gated",
        ),
    ],
)
def test_what_the_hub_does_not_give_is_told_in_a_line(hub: Hub, name: str, expected: str) -> None:
    hub.gated.add("me/gated")
    assert refusal(open_run, name).startswith(expected)


def test_without_network_the_cache_is_used(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = download_model(HubModel("me/birds"))
    cache = str(tmp_path / "cache")
    hub_stub.use(monkeypatch, "http://127.0.0.1:9", cache)
    assert download_model(HubModel("me/birds")) == folder
    line = refusal(open_run, "me/wrens")
    assert "the model cannot be downloaded from the Hugging Face Hub (" in line
    assert line.endswith("Check the name and the network.")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert download_model(HubModel("me/birds")) == folder
    assert "HF_HUB_OFFLINE forbids" in refusal(open_run, "me/wrens")


def test_half_a_download_goes_on(hub: Hub) -> None:
    weights = hub.repositories["me/birds"]["main"].pop("model.safetensors")
    refusal(open_run, "me/birds")
    hub.repositories["me/birds"]["main"]["model.safetensors"] = weights
    assert open_run("me/birds")[1].read_bytes() == weights


def test_results_are_not_written_into_the_cache(hub: Hub, tmp_path: Path) -> None:
    run = open_run("me/birds@v2")[0]
    assert "`hf download me/birds --revision v2 --local-dir DIR`" in refusal(run.results_folder)
    assert run.results_folder(tmp_path) == tmp_path


def test_what_is_uploaded_is_what_is_downloaded(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.writers.add("secret")
    for name in (*TAKEN, "private_notes.txt"):
        (tmp_path / name).write_bytes(name.encode())
    address = upload_model(tmp_path, HubModel("me/wrens"), files=list(TAKEN), private=True)
    assert address.endswith("/me/wrens")
    upload_model(tmp_path, HubModel("me/wrens", "v2"), files=["config.json", "model.json"])
    assert hub.private == {"me/wrens"}
    assert set(hub.repositories["me/wrens"]["main"]) == set(TAKEN)
    folder = download_model(HubModel("me/wrens", "v2"))
    assert {path.name: path.read_bytes().decode() for path in folder.iterdir()} == {
        name: name for name in TAKEN
    }


def test_an_upload_that_is_refused_is_told_in_a_line(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    line = refusal(upload_model, tmp_path, HubModel("me/birds"), files=["config.json"])
    assert line.startswith("me/birds: not uploaded: the Hugging Face Hub refuses (")
    assert "`hf auth login`" in line
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refusal(upload_model, tmp_path, HubModel("me/birds"), files=["config.json"])
    assert line == "me/birds: not uploaded: HF_HUB_OFFLINE is set. Unset it, or use --output DIR."
