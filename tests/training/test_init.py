"""Runs that start from another one; which tensors are taken is in tests/methods/test_start.py."""

import hashlib
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import layouts
from crossx.data.catalog import read_configured
from crossx.data.fingerprints import fingerprint
from crossx.errors import Stopped, UsageError
from crossx.methods import DFL
from crossx.methods.start import Start
from crossx.methods.weights import load_method
from crossx.runs import Run
from crossx.training.checkpoints import read_checkpoint
from crossx.training.config import Config
from crossx.training.creation import create
from crossx.training.fit import fit, resume
from crossx.training.loop import Loop
from crossx.training.optim import build_optimizer

SHORT = {"max_epochs": 1, "limit_train_batches": 1}


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Five classes, of which the first three have the names of the images that ``run`` was trained on."""
    return layouts.write_folder(tmp_path_factory.mktemp("others"), classes=5, images_per_class=8)


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """A run of one epoch on three classes."""
    return fit(
        Config.from_dict(
            {
                "model": {"method": "plain", "backbone": "test_resnet", "pretrained": False},
                "data": {
                    "dataset": "folder",
                    "root": str(images),
                    "image_size": 64,
                    "batch_size": 8,
                    "num_workers": 0,
                },
                "trainer": SHORT | {"accelerator": "cpu", "enable_progress_bar": False, "logger": False},
                "output": str(tmp_path_factory.mktemp("first") / "run"),
            }
        )
    )


def first_state(run):
    """The weights before the first step, of a run of one epoch."""
    return {
        name.removeprefix("method."): value
        for name, value in read_checkpoint(run.previous)["state_dict"].items()
    }


def test_a_run_starts_from_another_one_and_says_so(make_config, run, others, caplog):
    caplog.set_level("INFO", "crossx")
    config = make_config("second", data={"root": str(others)}, trainer=SHORT)
    config.init = str(run.path.relative_to(run.path.parent.parent))
    # it is not loaded: there is no network here, and this backbone has pretrained weights
    config.model.pretrained = True
    config.model.backbone = "test_resnet.r160_in1k"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run.path.parent.parent)
        second = fit(config)
    assert Config.from_yaml(second.config).init == str(run.path)
    info, own = second.read_info(), load_file(run.weights)
    assert not info["pretrained"]
    checksum = hashlib.sha256(run.weights.read_bytes()).hexdigest()
    expected = {"run": str(run.path), "id": run.read_info()["id"], "sha256": checksum, "num_classes": 3}
    assert {name: info["init"][name] for name in expected} == expected
    state = first_state(second)
    assert [line.split()[0] for line in info["init"]["new"]] == ["classifier.weight", "classifier.bias"]
    for name, value in state.items():
        if name.startswith("classifier"):
            rows = [second.read_spec().classes.index(each) for each in run.read_spec().classes]
            value = value[rows]
        assert torch.equal(value, own[name]), name
    assert "3 of 5 classes taken" in caplog.text
    assert second.read_spec().preprocessing == run.read_spec().preprocessing


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["checkpoint", "shared"])
def test_a_checkpoint_and_a_shared_model_are_starts(make_config, run, tmp_path, kind):
    given = run.last
    if kind == "shared":
        given = tmp_path / "shared"
        given.mkdir()
        for file in (run.spec, run.weights):
            shutil.copy(file, given)
    config = make_config("second", trainer=SHORT)
    config.init = str(given)
    second = fit(config)
    init = second.read_info()["init"]
    assert (init["weights"], init["id"] is None) == (
        ("last.ckpt", False) if kind == "checkpoint" else ("model.safetensors", True)
    )
    assert not init["new"]
    trained = {name.removeprefix("method."): v for name, v in read_checkpoint(run.last)["state_dict"].items()}
    assert all(torch.equal(value, trained[name]) for name, value in first_state(second).items())


@pytest.mark.slow
def test_what_was_taken_is_not_new(make_config, run, others):
    """It trains at the backbone's rate, or at that of new layers if that is lower, also after a resume."""
    for root, factor, rate in ((None, 10.0, 1.0), (None, 0.1, 0.1), (str(others), 10.0, 10.0)):
        config = make_config(f"{root is None}-{factor}", trainer=SHORT)
        config.init, config.optim.new_layers_lr_factor = str(run.path), factor
        config.data.root = root or config.data.root
        done = fit(config)
        method, _ = load_method(done.path)
        method.taken = frozenset(read_checkpoint(done.last)["taken"])
        rates = {
            id(parameter): group["lr"]
            for group in build_optimizer(method, config.optim).param_groups
            for parameter in group["params"]
        }
        lr = config.optim.lr
        assert rates[id(method.classifier.weight)] == pytest.approx(rate * lr)
        assert {rates[id(parameter)] for parameter in method.backbone.parameters()} == {lr}


@pytest.mark.slow
def test_a_frozen_backbone_is_the_taken_one_without_layers_that_were_not_there(make_config):
    """The classifier's own layers of ConvNeXt, which other methods drop, start anew and are trained."""
    sections = {"model": {"backbone": "test_convnext"}, "trainer": SHORT}
    first = fit(make_config("first", **{**sections, "model": {**sections["model"], "method": "mamc"}}))
    config = make_config("second", **sections, optim={"freeze_backbone": True, "lr": 0.1})
    config.init = str(first.path)
    second = fit(config)
    before, after = first_state(second), load_file(second.weights)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {line.split()[0] for line in second.read_info()["init"]["new"]} == changed
    assert {"backbone.trunk.head.norm.weight", "classifier.weight"} <= changed


@pytest.mark.slow
def test_preparation_leaves_what_was_taken(make_config, others, monkeypatch):
    model = {"method": "dfl", "num_filters": 2}
    first = fit(make_config("first", model=model, trainer=SHORT))
    config = make_config("second", model=model, data={"root": str(others)}, trainer=SHORT)
    config.init = str(first.path)
    seen = []
    set_up = Loop._prepare
    monkeypatch.setattr(
        Loop,
        "_prepare",
        lambda self: (
            seen.append(self.method.filters.conv.weight.detach().clone()),
            set_up(self),
        ),
    )
    second = fit(config)
    # two filters per class
    prepared = first_state(second)["filters.conv.weight"].unflatten(0, (5, 2))
    before, taken = seen[0].unflatten(0, (5, 2)), load_file(first.weights)["filters.conv.weight"]
    for label, name in enumerate(second.read_spec().classes):
        if name in first.read_spec().classes:
            there = first.read_spec().classes.index(name)
            assert torch.equal(prepared[label], taken.unflatten(0, (3, 2))[there])
        else:
            assert not torch.equal(prepared[label], before[label])
    # nothing to prepare: all is there
    monkeypatch.setattr(DFL, "prepare", lambda self, batches: pytest.fail("prepared again"))
    config = make_config("third", model=model, trainer=SHORT)
    config.init = str(first.path)
    assert torch.equal(first_state(fit(config))["filters.conv.weight"], taken)


@pytest.mark.slow
@pytest.mark.parametrize("same", [True, False])
def test_heads_are_fitted_unless_all_were_taken(make_config, run, others, caplog, same):
    root = {} if same else {"data": {"root": str(others)}}
    config = make_config("second", **root, optim={"fit_heads": 1}, trainer=SHORT)
    config.init = str(run.path)
    head = first_state(fit(config))["classifier.weight"]
    taken = head.shape[0] == 3 and torch.equal(head, load_file(run.weights)["classifier.weight"])
    assert taken == same
    assert ("fit_heads has no effect" in caplog.text) == same


@pytest.mark.parametrize("recorded", [True, False])
def test_another_split_of_the_same_images_is_warned_of(make_config, run, caplog, recorded, tmp_path):
    start = Run(tmp_path / "start")
    shutil.copytree(run.path, start.path)
    trained = set(np.load(start.images).tolist())
    if not recorded:
        start.images.unlink()
    for seed, warned in ((0, False), (1, True)):
        config = make_config(f"seed-{seed}", data={"split_seed": seed}, trainer=SHORT)
        index = read_configured(config.data).with_validation(config.data.val_fraction, seed)
        held_out = [fingerprint(record.path) for split in ("val", "test") for record in index.split(split)]
        seen = len(trained & {*held_out})
        assert bool(seen) == warned
        create(config, index, Start.read(str(start.path)))
        expected = f"trained on {seen} of the {len(held_out)} images that are held out now"
        assert (
            expected if recorded else "may have seen images that are held out now"
        ) in caplog.text or not warned
        assert ("held out now" in caplog.text) == warned


def test_what_is_refused_leaves_no_folder(make_config, run):
    config = make_config("second", model={"backbone": "test_convnext"})
    config.init = str(run.path)
    with pytest.raises(UsageError, match="'test_resnet', and this run's is 'test_convnext'"):
        fit(config)
    assert not config.run_path().exists()
    with pytest.raises(UsageError, match=r"init and model\.backbone_weights"):
        Config.from_dict({"init": "a", "model": {"backbone_weights": "w.pth"}})


@pytest.mark.slow
def test_a_run_is_resumed_without_the_one_it_started_from(make_config, run, others, monkeypatch):
    sections = {"data": {"root": str(others)}, "optim": {"new_layers_lr_factor": 5.0, "ema_decay": 0.5}}
    whole, stopped = (
        make_config(name, **sections, trainer={"max_epochs": 2}) for name in ("whole", "stopped")
    )
    whole.init = stopped.init = str(run.path)
    reference = fit(whole)
    step, seen = Loop._step, []

    def interrupted(self):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(1)
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_step", interrupted)
        with pytest.raises(Stopped, match="stopped after 0 complete epochs"):
            fit(stopped)
    monkeypatch.setattr(Start, "read", lambda source: pytest.fail("read again"))
    resumed = resume(stopped.run_path())
    ours, theirs = load_file(resumed.weights), load_file(reference.weights)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert resumed.read_info()["init"] == reference.read_info()["init"]
    assert read_checkpoint(resumed.last)["taken"] == read_checkpoint(reference.last)["taken"]
    assert Run(resumed.path).read_info()["status"] == "finished"
