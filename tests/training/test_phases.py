"""A method whose training has phases, and more than one trunk."""

import csv
import json

import pytest
import torch
from phased import TRAINED, Phased, register
from test_data_parallel_fit import rows, run_on_two_ranks
from test_resume import assert_same_run, crash, interrupt

from crossx.errors import CrossXError, UsageError
from crossx.evaluation.run import test_run as evaluate_run
from crossx.methods import create_method, registry
from crossx.report.run import report_run
from crossx.runs import read_history
from crossx.training import loop
from crossx.training.checkpoints import read_checkpoint
from crossx.training.config import OptimConfig
from crossx.training.fit import fit, resume
from crossx.training.optim import freeze, parameter_groups
from crossx.training.task import Task

IN_SEQUENCE, IN_TURN = ["one", "one", "two"], ["one", "two", "one"]


@pytest.fixture(autouse=True)
def phased(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.setattr(Phased, "started", [])
    register()


@pytest.fixture
def saved(monkeypatch):
    """Return a list that grows by a copy of every checkpoint: its phase, and the tensors that are trained."""
    write, seen = loop.write_checkpoint, []

    def recorded(run, state, *, best):
        tensors = state["trained"] or state["state_dict"]
        seen.append((state, {key.removeprefix("method."): value.clone() for key, value in tensors.items()}))
        write(run, state, best=best)

    monkeypatch.setattr(loop, "write_checkpoint", recorded)
    return seen


def sections(order="sequence", factor=0.1, **optim):
    optim = {"momentum": 0.9, "weight_decay": 0.1, "decay_norm_and_bias": True, "lr": 0.01, **optim}
    return {"model": {"method": "phased", "order": order, "factor": factor}, "optim": optim}


@pytest.mark.parametrize(
    ("order", "names", "options", "trainer"),
    [
        ("sequence", IN_SEQUENCE, {}, {}),
        ("turns", IN_TURN, {"optimizer": "adamw"}, {"accumulate_grad_batches": 2}),
        pytest.param(
            "turns",
            IN_TURN,
            {"ema_decay": 0.5, "recompute_activations": True},
            {"precision": "bf16-mixed"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_phase_changes_what_it_trains_and_nothing_else(make_config, saved, order, names, options, trainer):
    fit(make_config(**sections(order, **options), trainer=trainer))
    assert [state["phase"] for state, _ in saved] == names
    assert Phased.started == names if order == "turns" else ["one", "two"]
    previous = saved[0][1]
    for name, (_, tensors) in zip(names[1:], saved[1:], strict=True):
        changed = {key for key in tensors if not torch.equal(tensors[key], previous[key])}
        allowed = {key for key in tensors if key.startswith(TRAINED[name])}
        if name == "two" and previous["steps"] == 1:
            assert tensors["steps"] == 2
            changed.remove("steps")
        assert changed <= allowed
        # all of it, norms' statistics included, but for weights of which the gradient is zero
        assert len(changed) > 0.9 * len(allowed)
        assert {"running_mean", "num_batches_tracked"} <= {key.rpartition(".")[2] for key in changed}
        assert any(key.startswith("norm.running") for key in changed) == (name == "two")
        previous = tensors


@pytest.mark.slow
def test_what_the_start_of_a_phase_sets_is_not_averaged_with_what_it_was(make_config, saved):
    fit(make_config(**sections(factor=0.0, ema_decay=0.9)))
    state, trained = saved[-1]
    averaged = {key.removeprefix("method."): value for key, value in state["state_dict"].items()}
    for name, value in create_method("phased", backbone="test_resnet", num_classes=3).named_parameters():
        if name.startswith(TRAINED["two"]):
            # not trained, at a rate of zero
            torch.testing.assert_close(averaged[name], trained[name])
            assert value.ndim < 2 or not torch.equal(saved[0][1][name], trained[name]) or "second" in name
    assert averaged["steps"] == trained["steps"] == 2
    first = next(key for key in averaged if key.startswith("backbone.") and key.endswith("weight"))
    assert not torch.equal(averaged[first], trained[first])


@pytest.mark.parametrize("schedule", ["constant", "one_cycle"])
@pytest.mark.slow
def test_steps_are_scaled_by_the_factor_of_the_phase(make_config, saved, schedule):
    steps = {}
    for factor in (1.0, 0.25):
        options = sections(factor=factor, momentum=0.0, schedule=schedule)
        trainer = {"limit_train_batches": 2, "accumulate_grad_batches": 2, "checkpoint_every_n_steps": 1}
        if schedule == "one_cycle":
            trainer["max_epochs"] = 4
        run = fit(make_config(str(factor), **options, trainer=trainer))
        before, after = (tensors["second.bias"] for _, tensors in saved[1:3])
        # the bias is untouched by the start of the phase, and has no gradient before
        steps[factor] = after - before
        rates = [row["lr"] for row in rows_of(run)]
        saved.clear()
    torch.testing.assert_close(steps[0.25], 0.25 * steps[1.0])
    assert steps[1.0].abs().max() > 0
    assert len(rates) == trainer.get("max_epochs", 3)
    if schedule == "constant":
        assert rates == pytest.approx([0.01, 0.01, 0.0025])


def rows_of(run):
    return json.loads((run.path / "metrics.json").read_text())["epochs"]


def test_the_phase_is_in_every_row_and_in_the_line_of_an_epoch(make_config, capsys):
    run = fit(make_config(**sections(), trainer={"enable_progress_bar": True, "logger": "tensorboard"}))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch ")]
    assert [line.split("  ")[0] for line in lines] == [f"epoch {n}/3" for n in (1, 2, 3)]
    assert [name in line.split("  ") for line, name in zip(lines, IN_SEQUENCE, strict=True)] == [True] * 3
    assert [row["phase"] for row in read_history(run.path / "metrics.json")] == IN_SEQUENCE
    with (run.path / "metrics.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["phase"] for row in written] == IN_SEQUENCE
    assert list(written[0])[:3] == ["epoch", "step", "phase"]
    evaluate_run(run.path)
    page = report_run(run.path, device="cpu").read_text()
    assert page.count("<td>one</td>") == 2
    assert page.count("<td>two</td>") == 1


def test_a_text_in_place_of_another_number_is_refused(make_config):
    run = fit(make_config(**sections()))
    path = run.path / "metrics.json"
    content = json.loads(path.read_text())
    for name, value, said in (
        ("train/loss", "one", r"epochs\.1\.train/loss: should be a valid number"),
        ("phase", 3.0, r"epochs\.1\.phase: should be a valid string"),
        ("epoch", None, r"epochs\.1\.epoch: should be a valid number"),
    ):
        rows = [dict(row) for row in content["epochs"]]
        rows[1][name] = value
        path.write_text(json.dumps({**content, "epochs": rows}))
        with pytest.raises(CrossXError, match=said):
            read_history(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "options", "trainer", "at_batch", "again"),
    [
        # at the end of the first phase, and in the middle of the second one
        ("sequence", {}, {}, 9, ["two"]),
        ("sequence", {"ema_decay": 0.8}, {"checkpoint_every_n_steps": 1}, 11, []),
        (
            "turns",
            {"optimizer": "adamw", "freeze_backbone_epochs": 1},
            {"checkpoint_every_n_steps": 3},
            8,
            ["one"],
        ),
        ("turns", {"freeze_backbone_epochs": 1}, {}, 7, ["two", "one"]),
    ],
)
def test_a_stopped_run_continues_in_its_phase_bit_for_bit(
    make_config, monkeypatch, order, options, trainer, at_batch, again
):
    chosen = {**sections(order, **options), "trainer": trainer, "data": {"augmentation": "trivial"}}
    whole = fit(make_config("whole", **chosen))
    config = make_config("stopped", **chosen)
    with monkeypatch.context() as patch:
        interrupt(patch, at_batch, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(config)
    Phased.started.clear()
    run = resume(config.run_path())
    assert Phased.started == again
    assert_same_run(run, whole)


@pytest.mark.slow
def test_a_longer_training_starts_the_phases_that_it_comes_to(make_config):
    run = fit(make_config(**sections(), trainer={"max_epochs": 2}))
    assert read_checkpoint(run.last)["phase"] == "one"
    assert_same_run(resume(run.path, max_epochs=3), fit(make_config("whole", **sections())))


@pytest.mark.slow
def test_a_checkpoint_of_a_version_without_phases_is_of_the_phase_that_all_methods_have(
    make_config, monkeypatch
):
    whole = fit(make_config("whole"))
    write = loop.write_checkpoint

    def written(run, state, *, best):
        assert state.pop("phase") == "all"
        assert state["history"]["open"].pop("phase") is None
        write(run, state, best=best)

    config = make_config("old")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_checkpoint", written)
        interrupt(patch, 7, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(config)
    assert_same_run(resume(config.run_path()), whole)


@pytest.mark.slow
def test_a_backbone_frozen_for_epochs_stays_as_it_is_in_every_phase(make_config, saved):
    fit(make_config(**sections("turns", freeze_backbone_epochs=2)))
    start = create_method("phased", backbone="test_resnet", num_classes=3)
    trunks = [key for key in start.state_dict() if key.startswith(("backbone.", "glimpse."))]
    (_, first), (_, second), (_, third) = saved
    # the copy in the second phase is that of the first trunk
    assert all(torch.equal(first[key], second[key]) for key in trunks if key.startswith("backbone."))
    copied = [key for key in trunks if key.startswith("glimpse.")]
    assert all(torch.equal(second[key], second[key.replace("glimpse.", "backbone.", 1)]) for key in copied)
    assert not torch.equal(first["second.bias"], second["second.bias"])
    changed = [
        key for key in trunks if key.startswith("backbone.") and not torch.equal(second[key], third[key])
    ]
    assert len(changed) > 0.9 * len(copied)


@pytest.mark.parametrize("option", [{"freeze_backbone": True}, {"freeze_backbone_epochs": 1}])
def test_a_phase_without_anything_to_train_is_refused_before_the_first_step(make_config, option):
    with pytest.raises(
        UsageError, match="leave nothing to train in epoch 1, phase 'trunk' of method 'phased'"
    ):
        fit(make_config(**sections("trunk", **option)))


def test_all_trunks_are_pretrained_frozen_and_decayed_alike():
    method = create_method("phased", backbone="test_resnet", num_classes=3)
    assert method.trunks() == [method.backbone, method.glimpse]
    assert {id(p) for p in method.new_parameters()} == {
        id(p) for head in (method.first, method.second) for p in head.parameters()
    }
    config = OptimConfig(lr=1.0, layer_decay=0.5, new_layers_lr_factor=4.0)
    rate = {id(p): group["lr"] for group in parameter_groups(method, config) for p in group["params"]}
    names = dict(method.named_parameters())
    assert {rate[id(p)] for name, p in names.items() if name.startswith(("first", "second"))} == {4.0}
    for name, parameter in method.backbone.named_parameters():
        assert rate[id(parameter)] == rate[id(names[f"glimpse.{name}"])] < 1
    images = torch.randn(2, 3, 64, 64)
    assert all(
        torch.equal(method.backbone.eval()(images)[k], v) for k, v in method.glimpse.eval()(images).items()
    )
    task = Task(method, OptimConfig(recompute_activations=True), class_counts=[1, 1, 1])
    assert all(trunk.recomputes for trunk in task.method.trunks())
    norms = freeze(method, OptimConfig(freeze_backbone=True))
    trunks = [module for trunk in method.trunks() for module in trunk.modules()]
    assert norms == [module for module in trunks if isinstance(module, torch.nn.BatchNorm2d)]
    assert {name for name, p in method.named_parameters() if p.requires_grad} == {
        f"{head}.{kind}" for head in ("first", "second") for kind in ("weight", "bias")
    }


@pytest.mark.slow
def test_a_clone_is_taken_from_the_trunk_of_a_method_without_it(make_config):
    plain = fit(make_config("plain", trainer={"max_epochs": 1}))
    start = make_config("start", **sections(), trainer={"max_epochs": 1})
    start.init = str(plain.path)
    run = fit(start)
    assert all("glimpse" not in name for name in run.read_info()["init"]["new"])
    taken = read_checkpoint(plain.best)["state_dict"]
    for key, value in read_checkpoint(run.last)["state_dict"].items():
        if key.startswith("method.glimpse.trunk."):
            # not trained in the first phase
            assert torch.equal(value, taken[key.replace("glimpse", "backbone")])
    # and from one with it, each trunk from its own
    both = fit(make_config("both", **sections()))
    again = make_config("again", **sections(), trainer={"max_epochs": 1})
    again.init = str(both.path)
    before, after = (read_checkpoint(r.last)["state_dict"] for r in (both, fit(again)))
    own = [key for key in after if key.startswith("method.glimpse.")]
    chosen = read_checkpoint(both.best)["state_dict"]
    assert all(torch.equal(after[key], chosen[key]) for key in own)
    assert before.keys() == after.keys()


@pytest.mark.slow
def test_phases_on_two_ranks(make_config, tmp_path):
    """Each phase leaves out parameters, for whose gradients DDP must not wait."""
    chosen = sections("turns", freeze_batch_norm=True, lr=0.003)
    chosen["model"]["normalize"] = False
    configs = {
        name: make_config(
            name,
            **{**chosen, "optim": chosen["optim"] | {"freeze_backbone_epochs": frozen}},
            data={"batch_size": 5},
            trainer={"devices": 2, **trainer},
        )
        for name, frozen, trainer in (
            ("whole", 0, {"checkpoint_every_n_minutes": 1000}),
            ("stopped", 0, {}),
            ("within", 0, {"checkpoint_every_n_steps": 1}),
            ("frozen", 1, {}),
        )
    }
    runs = run_on_two_ranks(configs, tmp_path, "phased")
    for name in ("stopped", "within"):
        assert_same_run(runs[name], runs["whole"])
    for name, frozen in (("whole", 0), ("frozen", 1)):
        optim = chosen["optim"] | {"freeze_backbone_epochs": frozen}
        alone = fit(make_config(f"{name}-alone", **{**chosen, "optim": optim}, data={"batch_size": 10}))
        for ours, theirs in zip(rows(runs[name]), rows(alone), strict=True):
            assert ours.pop("phase") == theirs.pop("phase")
            del ours["seconds"], theirs["seconds"]
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
