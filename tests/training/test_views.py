import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from crossx.cli.main import main
from crossx.data.datamodule import DataModule
from crossx.data.sampler import Draw
from crossx.data.views import StoredViews
from crossx.errors import CrossXError, UsageError
from crossx.methods import create_method
from crossx.training.checkpoints import read_checkpoint
from crossx.training.config import OptimConfig
from crossx.training.fit import fit, resume
from crossx.training.task import Task

FROZEN = {"freeze_stride": 8, "lr": 0.01, "schedule": "constant", "fit_heads": 2, "selection": "last"}


@pytest.mark.slow
def test_training_on_stored_maps_is_training_on_the_images(make_config, monkeypatch):
    images = fit(make_config("images", optim=FROZEN, trainer={"max_epochs": 2}))
    loaded = []
    to_device = DataModule.to_device

    def counted(self, batch, device):
        loaded.append(len(batch[1]))
        return to_device(self, batch, device)

    monkeypatch.setattr(DataModule, "to_device", counted)
    stored = fit(make_config("stored", optim=FROZEN | {"cached_views": 2}, trainer={"max_epochs": 2}))
    # both views of 27 images, then only the three validation images of each epoch
    assert sum(loaded) == 2 * 27 + 2 * 3
    expected, found = load_file(images.weights), load_file(stored.weights)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        # the maps are stored in half precision
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=2e-3, msg=name)


@pytest.mark.parametrize("name", ["plain", "crossx", "dfl"])
def test_a_step_on_maps_is_the_step_on_their_images(name):
    torch.manual_seed(0)
    method = create_method(name, backbone="test_resnet", num_classes=3)
    task = Task(method, OptimConfig(freeze_stride=8, cached_views=1), class_counts=[1, 1, 1])
    images, targets = torch.randn(6, 3, 64, 64), torch.arange(6) % 3
    start = {key: value.clone() for key, value in task.state_dict().items()}
    gradients = []
    for task.takes_maps in (False, True):
        task.load_state_dict(start)
        task.zero_grad()
        with torch.no_grad():
            batch = task.early(images) if task.takes_maps else images
        task(batch, targets)[0].backward()
        gradients.append({key: p.grad.clone() for key, p in task.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any(value.any() for value in gradients[0].values())
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, msg=key)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(make_config, tmp_path):
    torch.manual_seed(7)
    # weights that the seed of the run does not draw
    trunk = create_method("plain", backbone="test_resnet", num_classes=3).backbone.trunk
    torch.save(trunk.state_dict(), weights := tmp_path / "trunk.pth")
    changes = {"model": {"backbone_weights": str(weights)}, "optim": FROZEN | {"cached_views": 2}}
    whole = fit(make_config("whole", **changes, trainer={"max_epochs": 3}))
    part = fit(make_config("part", **changes, trainer={"max_epochs": 1}))
    part = resume(part.path, max_epochs=3)
    expected, found = (read_checkpoint(run.last)["state_dict"] for run in (whole, part))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not [path for path in part.path.rglob("*") if path.suffix == ".tmp"]


def test_freeze_stride_keeps_exactly_the_layers_before_the_map():
    method = create_method("plain", backbone="test_resnet", num_classes=3)
    task = Task(method, OptimConfig(freeze_stride=8), class_counts=[1, 1, 1])
    trained = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    early = (
        "backbone.trunk.conv1.",
        "backbone.trunk.bn1.",
        "backbone.trunk.layer1.",
        "backbone.trunk.layer2.",
    )
    assert trained == {name for name, _ in method.named_parameters() if not name.startswith(early)}
    kept = {name for name, module in method.named_modules() if module in task.frozen_norms}
    norms = {name for name, module in method.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
    assert kept == {name for name in norms if f"{name}.".startswith(early)}
    assert not any(norm.training for norm in task.frozen_norms)


def test_an_epoch_sees_its_view_of_each_image(tmp_path):
    stored = StoredViews([5, 6, 7], 2, (4, 2, 3), tmp_path)
    maps = torch.randn(6, 4, 2, 3)
    stored.write(0, maps[:4])
    stored.write(4, maps[4:])
    assert StoredViews.order(3, 2) == [Draw(view, index) for view in (0, 1) for index in (0, 1, 2)]
    for epoch, index, repeat in np.ndindex(4, 3, 2):
        found, label = stored[Draw(epoch, index, repeat)]
        assert label == [5, 6, 7][index]
        assert torch.equal(found, maps[3 * ((epoch + repeat) % 2) + index].half())


def test_maps_beyond_half_precision_stay_finite(tmp_path):
    stored = StoredViews([0], 1, (1, 1, 2), tmp_path)
    stored.write(0, torch.tensor([1e6, -1e6]).view(1, 1, 1, 2))
    assert stored[Draw(0, 0)][0].flatten().tolist() == [65504.0, -65504.0]


def test_too_little_room_is_one_line(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CrossXError, match=r"no room for 2\.0 GB .*fewer views") as raised:
        StoredViews([0] * 1000, 10, (100, 10, 100), Path(tmp_path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optim": {"cached_views": 2}}, "say which with optim.freeze_stride"),
        ({"optim": {"cached_views": -1}}, "optim.cached_views must be at least 0"),
        ({"optim": {"freeze_stride": 0}}, "optim.freeze_stride must be at least 1"),
        ({"optim": FROZEN | {"cached_views": 2, "mixup": 0.4}}, "optim.mixup cannot be combined"),
        ({"optim": FROZEN | {"cached_views": 2, "compile": True}}, "optim.compile cannot be combined"),
        ({"optim": {"freeze_stride": 3}}, "optim.freeze_stride 3: .*it has: 2, 4, 8, 16"),
        (
            {
                "optim": FROZEN | {"cached_views": 2},
                "model": {"method": "ra_cnn"},
                "data": {"num_workers": 0},
            },
            "Give --optim.cached_views 0",
        ),
        (
            {"optim": FROZEN | {"cached_views": 2}, "model": {"method": "nts"}, "data": {"image_size": 128}},
            "uses the images not only through its first layers. Give --optim.cached_views 0",
        ),
        (
            {
                "optim": FROZEN | {"cached_views": 2, "freeze_stride": 16},
                "model": {"method": "crossx", "options": {"osme_placement": "residual"}},
            },
            "has layers of its own up to the map of optim.freeze_stride 16.*cached_views 0",
        ),
        # their views are of images, and no prediction depends on them
        (
            {"optim": FROZEN | {"cached_views": 2}, "model": {"method": "pdisconet"}},
            "uses the images not only through its first layers. Give --optim.cached_views 0",
        ),
        (
            {
                "optim": FROZEN | {"cached_views": 2},
                "model": {"method": "crossx", "options": {"equivariance_weights": [0.0, 0.1]}},
            },
            "uses the images not only through its first layers. Give --optim.cached_views 0",
        ),
    ],
)
def test_what_cannot_be_stored_is_refused_before_training(make_config, sections, message):
    with pytest.raises(UsageError, match=message) as raised:
        fit(config := make_config(**sections))
    assert "\n" not in str(raised.value)
    if "cached_views 0" in message:
        # the same --output can be given again
        assert not config.run_path().exists()


@pytest.mark.slow
def test_a_fast_run_is_an_ordinary_run(images, tmp_path, capsys):
    run = tmp_path / "run"
    small = ["--model.backbone", "test_resnet", "--model.pretrained", "false", "--data.image_size", "64"]
    small += ["--data.num_workers", "0", "--data.val_fraction", "0.2", "--trainer.accelerator", "cpu"]
    assert main(["fit", "--preset", "fast", "--data.root", str(images), *small, "--output", str(run)]) == 0
    assert main(["test", str(run)]) == 0
    assert json.loads((run / "test.json").read_text())["n"] == 6
    assert main(["report", str(run)]) == 0
    assert main(["export", str(run), "--output", str(tmp_path / "model.pt2")]) == 0
    picture = next(images.rglob("*.png"), None) or next(images.rglob("*.jpg"))
    assert main(["explain", str(run), str(picture), "--output", str(tmp_path / "maps")]) == 0
    assert main(["fit", "--resume", str(run), "--trainer.max_epochs", "6"]) == 0
    assert len(json.loads((run / "metrics.json").read_text())["epochs"]) == 6
