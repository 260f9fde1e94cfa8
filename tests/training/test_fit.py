import json
import os

import numpy as np
import pytest
import torch
from finished_runs import assert_same, method_weights, rows
from safetensors.torch import load_file
from timm.models import VisionTransformer

import layouts
from crossx.data.catalog import read_configured
from crossx.data.fingerprints import fingerprint
from crossx.errors import CrossXError, UsageError
from crossx.evaluation.calibration import calibrate_run
from crossx.evaluation.subject import open_data
from crossx.losses import part_correlations
from crossx.methods.base import Method
from crossx.methods.plain import Plain
from crossx.methods.weights import load_method
from crossx.runs import Run, locked_folder
from crossx.training.checkpoints import read_checkpoint
from crossx.training.config import Config
from crossx.training.fit import fit
from crossx.training.history import History
from crossx.training.task import Task


def test_run_folder_holds_everything(make_config):
    config = make_config(trainer={"logger": ["tensorboard", "csv"], "log_every_n_steps": 2})
    run = fit(config)
    assert Config.from_yaml(run.config) == config
    info = run.read_info()
    assert info["status"] == "finished"
    assert info["images"] == {"train": 27, "val": 3, "test": 6}
    assert [row["epoch"] for row in rows(run)] == ["1", "2", "3"]
    assert [row["step"] for row in rows(run)] == ["4", "8", "12"]
    written = json.loads((run.path / "metrics.json").read_text())["epochs"]
    assert [{name: str(value) for name, value in row.items()} for row in written] == rows(run)
    best = max(written, key=lambda row: (row["val/top1"], row["epoch"]))
    assert info["selection"] == {
        "how": "best",
        "split": "val",
        "metric": "top1",
        "epoch": best["epoch"],
        "value": best["val/top1"],
    }
    assert list((run.path / "tensorboard").glob("events.out.tfevents*"))
    assert_same(load_file(run.weights), method_weights(run.best))
    index = read_configured(config.data).with_validation(config.data.val_fraction, config.data.split_seed)
    trained = [fingerprint(record.path) for record in index.split("train")]
    assert sorted(set(trained)) == np.load(run.images).tolist()


@pytest.mark.slow
def test_a_method_gets_the_sampling_that_it_needs(make_config, tmp_path):
    model = {"method": "mamc", "embedding_size": 8}
    run = fit(make_config(model=model, data={"augmentation": "trivial"}, trainer={"max_epochs": 2}))
    # 9 images of each of three classes: 5 pairs each, in batches of four
    assert [row["step"] for row in rows(run)] == ["4", "8"]
    assert all(float(row["train/mamc_sasc"]) > 0 for row in rows(run))
    method, spec = load_method(run.path)
    assert method.embed.weight.shape == (2, 8, 4 * method.backbone.channels["last"])
    assert spec.preprocessing.image_size == 64
    again = make_config("again", model=model, data={"sampling": "pairs", "augmentation": "trivial"})
    again.trainer.max_epochs = 2
    assert_same(load_file(fit(again).weights), load_file(run.weights))
    with pytest.raises(UsageError, match=r"method 'mamc' needs data.sampling pairs, not uniform\. Leave"):
        fit(make_config("uniform", model=model, data={"sampling": "uniform"}))
    with pytest.raises(UsageError, match=r"data.batch_size must be even for data.sampling pairs, not 5"):
        fit(make_config("odd", model=model, data={"batch_size": 5}))
    assert not (tmp_path / "uniform").exists()
    assert not (tmp_path / "odd").exists()
    with pytest.raises(UsageError, match=r"method 'mamc' needs one class per image"):
        fit(make_config("mixup", model=model, optim={"mixup": 0.2}))
    assert not (tmp_path / "mixup").exists()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_backbone_is_frozen_in_the_first_epochs_alone(make_config, monkeypatch, optimizer):
    seen = []
    forward = Task.forward

    def recorded(self, images, targets):
        seen.append({name: value.clone() for name, value in self.method.state_dict().items()})
        return forward(self, images, targets)

    monkeypatch.setattr(Task, "forward", recorded)
    optim = {"optimizer": optimizer, "weight_decay": 0.1, "freeze_backbone_epochs": 2, "lr": 0.002}
    fit(make_config(optim=optim))

    def changed(first, last):
        pairs = {name: torch.equal(value, seen[last][name]) for name, value in seen[first].items()}
        return {name for name, same in pairs.items() if not same}

    # four steps an epoch: entry 8 is the state before the first step of the third
    assert changed(0, 8) == {"classifier.weight", "classifier.bias"}
    assert {name for name in seen[0] if "conv" in name or "running" in name} <= changed(8, 11)


def test_history_has_the_means_of_s_over_the_images_of_an_epoch(make_config, monkeypatch):
    seen = []

    def recorded(features):
        seen.append(features.detach())
        return part_correlations(features)

    monkeypatch.setattr("crossx.methods.crossx.part_correlations", recorded)
    options = {"method": "crossx", "use_previous": False, "use_merged": False, "c3s_weights": [0, 0, 0]}
    run = fit(make_config(model=options, optim={"lr": 0.002}, trainer={"max_epochs": 2}))
    # four steps an epoch, of 8, 8, 8 and 3 images
    assert [len(features) for features in seen] == [8, 8, 8, 3] * 2
    for row, steps in zip(rows(run), (seen[:4], seen[4:]), strict=True):
        assert not [name for name in row if name.startswith("train/c3s")]
        totals = [0.0, 0.0]
        for features in steps:
            unit = features / features.norm(dim=2, keepdim=True)
            s = [[float((unit[:, p] @ unit[:, q].T).mean()) for q in range(2)] for p in range(2)]
            totals[0] += len(features) * (s[0][0] + s[1][1]) / 2
            totals[1] += len(features) * s[0][1]
        means = [float(row[f"train/s_{name}_last"]) for name in ("diagonal", "off_diagonal")]
        assert means == pytest.approx([total / 27 for total in totals], rel=1e-5)


def test_same_seed_gives_the_same_weights(make_config):
    first, second = fit(make_config("a")), fit(make_config("b"))
    assert_same(load_file(first.weights), load_file(second.weights))


def test_what_was_assumed_of_the_images_is_said_before_training(make_config, images, tmp_path, caplog):
    root = tmp_path / "own"
    root.mkdir()
    for folder in images.iterdir():
        (root / folder.name).symlink_to(folder)
    (root / "Thumbs.db").touch()
    options = {"data": {"root": str(root), "sampling": "balanced"}, "optim": {"class_weights": "balanced"}}
    fit(make_config(**options, trainer={"max_epochs": 1}))
    assert "skipped 1 hidden or system file or folder: 'Thumbs.db'." in caplog.text
    assert "both favour rare classes" in caplog.text


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_share_that_leaves_no_batch_is_refused(make_config, split):
    with pytest.raises(UsageError, match=f"limit_{split}_batches 0.001 leaves none of"):
        fit(make_config(trainer={f"limit_{split}_batches": 0.001}))


def test_the_same_batches_in_every_epoch(make_config, monkeypatch):
    forward, seen = Task.forward, []

    def recorded(self, images, targets):
        seen.append((images.double().sum().item(), targets.tolist()))
        return forward(self, images, targets)

    monkeypatch.setattr(Task, "forward", recorded)
    fit(make_config(trainer={"max_epochs": 2, "overfit_batches": 1}, data={"augmentation": "crop"}))
    assert len(seen) == 2
    assert seen[0] == seen[1]


def test_options_work_together(make_config):
    optim = {
        "optimizer": "adamw",
        "schedule": "one_cycle",
        "weight_decay": 0.05,
        "layer_decay": 0.7,
        "label_smoothing": 0.1,
        "class_weights": "balanced",
        "mixup": 0.2,
        "cutmix": 1.0,
        "freeze_batch_norm": True,
        "ema_decay": 0.9,
    }
    trainer = {"max_epochs": 2, "accumulate_grad_batches": 3, "gradient_clip_val": 1.0}
    run = fit(make_config(optim=optim, trainer=trainer))
    assert [row["step"] for row in rows(run)] == ["2", "4"]
    weights = load_file(run.weights)
    assert all(value.isfinite().all() for value in weights.values())
    statistics = [value for name, value in weights.items() if name.endswith("running_mean")]
    assert statistics
    assert not any(value.any() for value in statistics)


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(make_config, monkeypatch):
    forward, seen = Task.forward, []

    def diverging(self, images, targets):
        seen.append(len(targets))
        loss, numbers = forward(self, images, targets)
        if len(seen) == 6:
            numbers["data"] = numbers["data"] * float("inf")
            loss = loss * float("inf")
        return loss, numbers

    monkeypatch.setattr(Task, "forward", diverging)
    config = make_config()
    with pytest.raises(
        CrossXError, match=r"at step 6 \(epoch 2, batch 2\): train/loss .*train/data inf"
    ) as caught:
        fit(config)
    assert "last.ckpt (epoch 1)" in str(caught.value)
    run = Run(config.run_path())
    assert run.read_info()["status"] == "failed"
    assert read_checkpoint(run.last)["step"] == 4
    assert all(value.isfinite().all() for value in method_weights(run.last).values())


def test_diverging_for_real(make_config):
    with pytest.raises(CrossXError, match="not finite"):
        fit(make_config(optim={"lr": 1e30}))


def test_out_of_gpu_memory_is_one_line(make_config, monkeypatch):
    def full(self, images, targets):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(Plain, "objective", full)
    with pytest.raises(
        CrossXError, match=r"out of GPU memory at 8 images of 64 pixels\. Lower --data\.batch_size"
    ):
        fit(make_config())


def test_a_run_is_never_overwritten(make_config):
    run = fit(make_config(trainer={"max_epochs": 1}))
    with pytest.raises(UsageError, match=r"already holds a run\. Continue it with `crossx fit --resume"):
        fit(make_config())
    run.config.unlink()
    with pytest.raises(UsageError, match=r"is not empty\. Choose another --output"):
        fit(make_config())


def test_two_trainings_cannot_share_a_folder(make_config):
    config = make_config(trainer={"max_epochs": 1})
    path = config.run_path()
    # the other process has not written anything else yet: it may still be checking its images
    with locked_folder(path, "training in it"):
        with pytest.raises(
            CrossXError, match=r"another process is training in it \(process \d+ on .*, since .*\)"
        ):
            fit(config)
        assert [file.name for file in path.iterdir()] == [".lock"]
    assert fit(config).weights.is_file()
    assert not (path / ".lock").exists()


def test_a_failed_start_leaves_no_folder(make_config, images, tmp_path):
    config = make_config(data={"root": str(tmp_path / "nowhere")})
    with pytest.raises(CrossXError, match="nowhere"):
        fit(config)
    assert not config.run_path().exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_write_permission(make_config, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CrossXError, match="no permission to write"):
        fit(make_config())
    tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"max_epoch": 3}, "Did you mean 'max_epochs'"),
        ({"precision": "bf17"}, "unknown trainer.precision 'bf17'"),
        ({"precision": "bf16-true"}, "Choose from: 16, 16-mixed, 32, 32-true, auto, bf16, bf16-mixed"),
        ({"strategy": "everything"}, "unknown trainer.strategy 'everything'. Choose from: auto, ddp"),
        ({"accelerator": "tpu"}, "trainer: .*torch_xla"),
    ],
)
def test_wrong_trainer_arguments_leave_no_folder(make_config, tmp_path, trainer, message):
    with pytest.raises(UsageError, match=message):
        fit(make_config(trainer=trainer))
    assert not (tmp_path / "run").exists()


def test_a_backbone_that_cannot_recompute_leaves_no_folder(make_config, monkeypatch, tmp_path):
    def refuse(self, on):
        assert not on, "gradient checkpointing not supported"

    # a ViT, whose blocks timm runs: some of timm's models refuse like this
    monkeypatch.setattr(VisionTransformer, "set_grad_checkpointing", refuse)
    config = make_config(
        model={"backbone": "test_vit", "backbone_args": {"dynamic_img_size": True}},
        optim={"recompute_activations": True},
    )
    with pytest.raises(UsageError, match="cannot recompute activations"):
        fit(config)
    assert not (tmp_path / "run").exists()


def test_the_bar_of_an_epoch_whose_steps_were_not_fetched_yet(make_config):
    history = History(Run(make_config().run_path()))
    history.add({"loss": torch.tensor(2.0)}, 8)
    assert history.shown() == {}
    history.evaluated({"val/loss": 1.0, "val/top1": 0.5}, 1)
    assert history.shown() == {"val": "50.0%"}


def test_prepare_sees_the_training_set_once(make_config, monkeypatch):
    seen = []

    def prepare(self, batches):
        seen.append(sum(len(targets) for _, targets in batches))

    monkeypatch.setattr(Plain, "prepare", prepare)
    assert Plain.prepare is not Method.prepare
    run = fit(make_config(trainer={"max_epochs": 1}))
    assert seen == [27]
    # the steps after it train: batch norm has counted them
    assert load_file(run.weights)["backbone.trunk.bn1.num_batches_tracked"] == 4


def test_image_size_that_the_backbone_cannot_take(make_config):
    with pytest.raises(UsageError, match="image_size 50 does not work with backbone 'test_vit'"):
        fit(make_config(model={"backbone": "test_vit"}, data={"image_size": 50}))


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_shows_top1_and_the_time_left(make_config, monkeypatch, capsys, terminal):
    monkeypatch.setenv("CROSSX_PROGRESS", "1")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    run = fit(make_config(trainer={"enable_progress_bar": True}))
    shown = capsys.readouterr().err
    last = rows(run)[-1]
    top1 = f"val {100 * float(last['val/top1']):5.2f}%  train {100 * float(last['train/top1']):5.2f}%"
    assert f"epoch 3/3  {top1}  0:00 left  loss {float(last['train/loss']):.4g}  lr " in shown
    assert (f"val: {float(last['val/top1']):.1%}" in shown) is terminal


def test_more_processes_than_cores_are_refused(make_config):
    with pytest.raises(UsageError, match=r"trainer.devices 9999: there is no GPU"):
        fit(make_config(trainer={"devices": 9999, "accelerator": "cpu"}))


@pytest.mark.slow
def test_pipeline_is_recorded_and_a_cache_changes_nothing(make_config):
    plain, cached = (
        fit(make_config(cache, data={"pipeline": "strict", "cache": cache})) for cache in ("none", "ram")
    )
    assert plain.read_spec().preprocessing.pipeline == "strict"
    assert_same(load_file(plain.weights), load_file(cached.weights))


def test_the_run_is_calibrated_on_its_validation_images(make_config, caplog):
    run = fit(make_config())
    kept = run.read_info()["calibration"]
    assert f"the temperature stays 1: {kept['temperature_kept']}." in caplog.text
    assert (kept["dataset"], kept["split"], kept["n"]) == ("folder", "val", 3)
    assert run.read_spec().temperature == kept["temperature"]
    before = run.spec.read_text()
    assert calibrate_run(run.path).described == kept
    assert run.spec.read_text() == before


def test_class_means_are_kept_with_the_weights_if_images_are_rejected(make_config, caplog):
    run = fit(make_config(data={"val_fraction": 0.7}, trainer={"max_epochs": 1}))
    method, spec = load_method(run.path)
    assert (spec.rejection.score, spec.rejection.images) == ("combined", run.read_info()["images"]["val"])
    assert "rejection was calibrated on" in caplog.text
    data = open_data(run, spec)
    sums = torch.zeros_like(method.class_means)
    with torch.no_grad():
        for images, targets in data.eval_loader("train"):
            features = method.embeddings(data.normalize(images))
            sums.index_add_(0, targets, features / features.norm(dim=1, keepdim=True))
    means = sums / sums.norm(dim=1, keepdim=True)
    torch.testing.assert_close(method.class_means, means, rtol=1e-4, atol=1e-5)
    assert "class_means" not in method_weights(run.last)
    before = run.spec.read_text()
    assert calibrate_run(run.path).rejection == spec.rejection
    assert run.spec.read_text() == before


def test_without_validation_images_the_temperature_stays_1(make_config):
    run = fit(make_config(data={"train_on": "trainval"}, optim={"selection": "last"}))
    assert run.read_info()["calibration"] is None
    assert run.read_spec().temperature == 1


def test_what_could_not_be_loaded_afterwards_is_refused_before_the_data_is_read(tmp_path):
    config = Config.from_dict(
        {
            "model": {
                "method": "plain",
                "backbone": "resnet10t",
                "backbone_args": {"cache_dir": str(tmp_path)},
            },
            "data": {"dataset": "folder", "root": str(tmp_path / "nowhere")},
            "output": str(tmp_path / "run"),
        }
    )
    with pytest.raises(UsageError, match=r"backbone_args\.cache_dir is not kept in model\.json"):
        fit(config)
    assert list(tmp_path.iterdir()) == []


def test_class_names_that_could_not_be_loaded_afterwards_are_refused(tmp_path):
    root = layouts.write_folder(tmp_path / "data", classes=2, images_per_class=4)
    table = tmp_path / "images.csv"
    files = sorted(root.rglob("*.jpg"))
    table.write_text("path,label\n" + "".join(f"{file},{file.parent.name * 300}\n" for file in files))
    config = Config.from_dict(
        {
            "model": {"method": "plain", "backbone": "test_resnet", "pretrained": False},
            "data": {"dataset": "table", "root": str(table), "image_size": 64},
            "output": str(tmp_path / "run"),
        }
    )
    with pytest.raises(
        CrossXError, match=r"the run could not be loaded afterwards: .*classes\.0: string should have"
    ):
        fit(config)
    assert not (tmp_path / "run").exists()
