from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import layouts
from crossx.data.config import DataConfig
from crossx.data.drawn.synthetic import read_synthetic
from crossx.training.config import Config, ModelConfig, OptimConfig


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of twelve tiny images: 27 to train on, 3 for validation, 6 to test on."""
    return layouts.write_folder(tmp_path_factory.mktemp("images"), classes=3, images_per_class=12)


@pytest.fixture(scope="session")
def birds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options of drawn birds with parts: three classes of twelve images, 24 to train on."""
    sizes = {"num_classes": 3, "images_per_class": 12}
    root = tmp_path_factory.mktemp("drawn") / "birds"
    read_synthetic(root, **sizes)
    return {"dataset": "synthetic", "root": str(root), **sizes}


@pytest.fixture
def make_config(images: Path, tmp_path: Path) -> Callable[..., Config]:
    """Build a configuration that trains in a fraction of a second; keywords are options by section."""

    def make(name: str = "run", **sections: dict[str, Any]) -> Config:
        model = {"method": "plain", "backbone": "test_resnet", "pretrained": False}
        data = {"dataset": "folder", "root": str(images), "image_size": 64, "batch_size": 8, "num_workers": 0}
        trainer = {"max_epochs": 3, "accelerator": "cpu", "enable_progress_bar": False, "logger": False}
        return Config(
            model=ModelConfig.from_dict(model | sections.get("model", {})),
            data=DataConfig(**(data | sections.get("data", {}))),
            optim=OptimConfig(**sections.get("optim", {})),
            trainer=trainer | sections.get("trainer", {}),
            seed=3,
            output=str(tmp_path / name),
        )

    return make
