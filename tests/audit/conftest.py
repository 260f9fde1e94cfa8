"""A tiny backbone with random weights, in place of a pretrained one, and drawn photographs."""

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from photographs import photograph


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("backbone")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model("test_resnet", num_classes=0)
    config = {"architecture": "test_resnet", "num_classes": 0, "pretrained_cfg": {"input_size": [3, 64, 64]}}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(network.state_dict(), folder / "model.safetensors")
    return f"local-dir:{folder}"


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 24 images, red and blue, in train and test; the names of wrong ones say what is wrong."""
    root = tmp_path_factory.mktemp("photographs")
    colours = {"red": (1.0, 0.4, 0.3), "blue": (0.3, 0.5, 1.0)}
    for label, (name, colour) in enumerate(colours.items()):
        for number in range(24):
            folder = root / ("test" if number % 4 == 3 else "train") / name
            folder.mkdir(parents=True, exist_ok=True)
            photograph(100 * label + number, colour).save(folder / f"{number:02d}.png")
    photograph(900, colours["red"]).save(root / "train/blue/wrong.png")
    original = Image.open(root / "train/red/00.png")
    original.crop((6, 4, 92, 91)).save(root / "test/red/cropped.jpg", quality=60)
    (root / "train/red/same.png").write_bytes((root / "train/red/01.png").read_bytes())
    Image.open(root / "train/red/02.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(
        root / "train/blue/mirrored.png"
    )
    Image.new("RGB", (96, 96), (3, 3, 3)).save(root / "train/blue/dark.png")
    (root / "train/blue/broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    return root
