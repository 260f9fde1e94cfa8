"""The commands of the tutorials, run in their order on tiny datasets with a tiny network."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import layouts

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"
SHORT = (
    "--model.backbone test_resnet --model.pretrained false --data.image_size 64 --data.batch_size 4 "
    "--data.num_workers 0 --data.val_fraction 0 --optim.warmup_steps 1 --trainer.max_epochs 1 --trainer.accelerator cpu"
)
NOT_RUN = {
    "crossx ablate --suite fig3": "fourteen trainings; tests/ablation runs the suites",
}
"""Beginnings of commands that are not run, and why."""
TIMEOUT = 120


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Yield language and text of each code block."""
    yield from re.findall(
        r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


class Reader:
    """Does what a reader of a tutorial does, in the current folder."""

    def __init__(self) -> None:
        self.service: subprocess.Popen[bytes] | None = None
        self.verbs: list[str] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def run(self, line: str) -> None:
        if any(line.startswith(beginning) for beginning in NOT_RUN):
            return
        words = shlex.split(line.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}"))
        if words[0] == "curl":
            if shutil.which("curl"):
                succeed([*words, "--fail", "--silent", "--show-error"])
            return
        assert words[0] == "crossx"
        verb = words[1]
        self.verbs.append(verb)
        if verb == "serve":
            self.serve(words)
        else:
            succeed(
                [sys.executable, "-m", *words, *(shlex.split(SHORT) if verb in ("fit", "ablate") else ())]
            )

    def serve(self, words: list[str]) -> None:
        self.service = subprocess.Popen([sys.executable, "-m", *words, "--port", str(self.port)])
        end = time.monotonic() + TIMEOUT
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=5)
            except OSError:
                assert self.service.poll() is None
                assert time.monotonic() < end
                time.sleep(0.2)
            else:
                return

    def leave(self) -> None:
        if self.service is not None:
            self.service.terminate()
            self.service.wait(TIMEOUT)


def succeed(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    reader = Reader()
    yield reader
    reader.leave()


def follow(reader: Reader, name: str) -> None:
    page = TUTORIALS / name
    for language, text in blocks(page):
        if language == "python":
            succeed([sys.executable, "-c", text])
        elif language == "yaml":
            Path("mine.yaml").write_text(text)
        elif not language:
            for line in text.replace("\\\n", " ").splitlines():
                reader.run(line)


@pytest.mark.slow
def test_from_photos_to_an_api(reader: Reader) -> None:
    pytest.importorskip("fastapi", reason="needs crossx[serve]")
    pytest.importorskip("onnxruntime", reason="needs crossx[export]")
    pytest.importorskip("onnxscript", reason="needs crossx[export]")
    layouts.write_folder(Path("photos"), classes=3, images_per_class=8)
    os.symlink(next(Path("photos").rglob("*.jpg")), "bird.jpg")
    follow(reader, "photos.md")
    assert reader.verbs == [
        "datasets", "fit", "test", "report", "explain", "fit", "test", "test", "predict", "serve", "export", "fit",
    ]  # fmt: skip
    assert len(Path("predictions.csv").read_text().splitlines()) == 1 + 24 * 3
    for made in ("maps", "runs/sparrows/test/report.html", "sparrows.onnx"):
        assert Path(made).exists()


@pytest.mark.slow
def test_reproduce_and_extend_the_paper(reader: Reader) -> None:
    layouts.write_cub(Path("data/CUB_200_2011"), classes=3, images_per_class=8)
    follow(reader, "paper.md")
    assert reader.verbs == [
        "datasets", "datasets", "fit", "test", "fit", "test", "test", "compare", "test", "explain", "ablate",
    ]  # fmt: skip
    for made in ("table.md", "table.tex", "runs/crossx/test", "out/mine/results.json"):
        assert Path(made).exists()
    assert {folder.name for folder in Path("out/mine").iterdir() if folder.is_dir()} == {
        "two",
        "three",
        "only-cl",
    }


def test_commands_that_are_not_run_are_still_there() -> None:
    text = "".join(text for page in TUTORIALS.glob("*.md") for _, text in blocks(page))
    assert all(beginning in text for beginning in NOT_RUN)
