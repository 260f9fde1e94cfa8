import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from crossx.errors import CrossXError, UsageError
from crossx.recipes import list_recipes
from crossx.training.config import Config, ModelConfig, OptimConfig, TrainerConfig

SCALARS = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(0, 1) | st.text(max_size=8)


def test_method_options_lie_flat_in_yaml():
    config = Config(model=ModelConfig(method="crossx", options={"num_parts": 3}))
    written = yaml.safe_load(config.to_yaml())
    assert written["model"]["num_parts"] == 3
    assert "options" not in written["model"]


@given(
    options=st.dictionaries(st.from_regex(r"part_[a-z]{1,8}", fullmatch=True), SCALARS, max_size=3),
    lr=st.floats(1e-6, 10),
    milestones=st.lists(st.integers(1, 99), unique=True).map(sorted),
    seed=st.integers(0, 2**32 - 1),
)
def test_yaml_round_trip(options, lr, milestones, seed):
    config = Config(
        model=ModelConfig(options=options), optim=OptimConfig(lr=lr, milestones=milestones), seed=seed
    )
    assert Config.from_dict(yaml.safe_load(config.to_yaml())) == config


@pytest.mark.parametrize("text", ["\x85", "a\u2028b", "\u2029", "ü\n"])
def test_line_breaks_of_unicode_come_back(text):
    config = Config(model=ModelConfig(options={"part": text}), output=text)
    assert Config.from_dict(yaml.safe_load(config.to_yaml())) == config


def test_left_out_options_take_their_defaults():
    trainer = Config.from_dict({"trainer": {"precision": "bf16-mixed"}}).trainer
    assert trainer == TrainerConfig(precision="bf16-mixed")
    assert (trainer.max_epochs, trainer.loggers) == (30, ["tensorboard", "csv"])
    assert Config(trainer={"max_epochs": 3}).trainer == TrainerConfig(max_epochs=3)
    assert Config.from_dict({}) == Config()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimm": {}}, "Did you mean 'optim'"),
        ({"optim": {"momentumm": 0.9}}, "Did you mean 'momentum'"),
        ({"optim": {"schedule": "cosin"}}, "Did you mean 'cosine'"),
        ({"optim": {"selection": "best_on_tets"}}, "Did you mean 'best_on_test'"),
        ({"optim": {"lr": -1}}, "optim.lr must be above 0"),
        ({"optim": {"lr": float("inf")}}, "optim.lr must be above 0"),
        ({"optim": {"lr": "fast"}}, "^optim.lr takes a number, not 'fast'.$"),
        ({"optim": {"lr": [1, 2]}}, r"^optim.lr takes a number, not \[1, 2\].$"),
        ({"optim": {"lr": True}}, "^optim.lr takes a number, not True.$"),
        ({"optim": {"ema_decay": "0.9"}}, "^optim.ema_decay takes a number, not '0.9'.$"),
        ({"optim": {"nesterov": "yes"}}, "^optim.nesterov takes true or false, not 'yes'.$"),
        ({"optim": {"milestones": 3}}, r"^optim.milestones takes a list such as \[1, 2\], not 3.$"),
        ({"optim": {"milestones": [1, "a"]}}, "^optim.milestones takes a list"),
        ({"trainer": {"max_epochs": 2.5}}, "^trainer.max_epochs takes a whole number, not 2.5.$"),
        ({"trainer": {"max_epochs": None}}, "^trainer.max_epochs takes a whole number, not None.$"),
        ({"trainer": {"limit_val_batches": "all"}}, "^trainer.limit_val_batches takes a number, not 'all'.$"),
        ({"data": {"image_size": "224"}}, "^data.image_size takes a whole number, not '224'.$"),
        ({"model": {"pretrained": "no"}}, "^model.pretrained takes true or false, not 'no'.$"),
        ({"seed": "zero"}, "^seed takes a whole number, not 'zero'.$"),
        ({"optim": {"milestones": [25, 15]}}, "milestones"),
        ({"optim": {"schedule": "multistep"}}, "needs optim.milestones"),
        ({"optim": {"ema_decay": 1.0}}, r"ema_decay must be in \(0, 1\)"),
        ({"optim": {"nesterov": True, "momentum": 0}}, "nesterov needs"),
        ({"optim": 3}, "optim must be a mapping"),
        ({"trainer": {"max_epochs": 0}}, "max_epochs must be at least 1"),
        ({"trainer": {"max_epochs": -1}}, "max_epochs must be at least 0"),
        ({"model": {"method": "plain"}, "trainer": {"max_epochs": 0}}, "max_epochs must be at least 1"),
        (
            {"model": {"method": "probe", "head": "sgd"}, "trainer": {"max_epochs": 0}},
            "unless the heads are fitted",
        ),
        ({"optim": {"warmup_steps": -1}}, "warmup_steps must be at least 0"),
        ({"trainer": {"callbacks": []}}, "callbacks cannot be given"),
        ({"trainer": {"max_epoch": 3}}, "Did you mean 'max_epochs'"),
        ({"trainer": {"max_steps": 0}}, "max_steps must be at least 1, or -1"),
        ({"trainer": {"max_time": "2 hours"}}, "max_time takes a time such as 1h30m"),
        ({"trainer": {"max_time": {"houres": 2}}}, "max_time takes a time such as 1h30m"),
        (
            {"trainer": {"limit_val_batches": 1.5}},
            r"limit_val_batches takes a whole number, or a fraction in \[0, 1\]",
        ),
        ({"trainer": {"checkpoint_every_n_minutes": 0}}, "checkpoint_every_n_minutes must be above 0"),
        ({"trainer": {"gradient_clip_algorithm": "norms"}}, "Did you mean 'norm'"),
        ({"trainer": {"logger": ["tensorbord"]}}, "Did you mean 'tensorboard'"),
        ({"seed": -1}, "seed"),
    ],
)
def test_mistakes_are_one_line(values, message):
    with pytest.raises(UsageError, match=message) as caught:
        Config.from_dict(values)
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy_and_paths_are_accepted(tmp_path: Path) -> None:
    optim = {"lr": np.float32(0.5), "step_size": np.int64(3), "milestones": [np.int64(1)]}
    config = Config.from_dict({"optim": optim, "data": {"root": tmp_path}})
    assert (config.optim.lr, config.optim.step_size, config.data.root) == (0.5, 3, str(tmp_path))
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert Config.from_yaml(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("text", ["optim: {lr: [1]}", "optim: {lrr: 1}", "data: null", "optim: {lr: -1}"])
def test_a_mistake_in_a_file_names_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        Config.from_yaml(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < len(str(path)) + 100


@pytest.mark.parametrize("text", ["[1, 2]", "model: {", "\x00"])
def test_files_that_are_no_configuration(tmp_path: Path, text: str):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(CrossXError, match=r"config\.yaml") as caught:
        Config.from_yaml(path)
    assert "\n" not in str(caught.value)


def test_run_path_names_what_the_run_is():
    config = Config(model=ModelConfig(method="plain", backbone="local-dir:/data/mobilenet/"), seed=4)
    assert config.run_path() == Path("runs/plain-folder-mobilenet-s4")
    assert Config(output="out").run_path() == Path("out")


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (None, float("inf")),
        ("01:02:03:04", 93784),
        ("00:30:00", 1800),
        ("1h30m", 5400),
        ("1.5h", 5400),
        ("2d 10s", 172810),
        ("45m", 2700),
        ({"hours": 2, "minutes": 30}, 9000),
    ],
)
def test_time_limit_in_seconds(given, seconds):
    assert TrainerConfig(max_time=given).seconds == seconds


@pytest.mark.parametrize(
    "given", ["", "30", "2 hours", "30:00", "1:2:3:4:5", "-1:00:00", "3m1h", 30, {"h": 1}]
)
def test_times_that_cannot_be_parsed(given):
    with pytest.raises(UsageError, match=r"max_time takes a time such as 1h30m, .* not "):
        TrainerConfig(max_time=given)


@pytest.mark.parametrize("given", [32, None, "32"])
def test_precision_as_yaml_may_give_it(given):
    assert TrainerConfig(precision=given).precision == "32"


def test_import_is_torch_free():
    code = "import sys, crossx.training.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_recipe_with_options_changed() -> None:
    config = Config.from_recipe(
        "crossx_cub_resnet50", data={"root": "cub"}, model={"num_parts": 3}, output="runs/mine", seed=4
    )
    assert (config.data.root, config.data.image_size, config.data.resize_size) == ("cub", 448, 600)
    assert config.model.options["num_parts"] == 3
    assert config.model.options["c3s_form"] == "paper"
    assert (config.optim.lr, config.trainer.max_epochs) == (0.01, 30)
    assert (config.output, config.seed) == ("runs/mine", 4)
    with pytest.raises(UsageError, match=r"unknown option data\.rot"):
        Config.from_recipe("crossx_cub_resnet50", data={"rot": "cub"})


@pytest.mark.parametrize("option", ["accumulate_grad_batches", "limit_train_batches"])
def test_trainer_options_that_leave_no_step(option: str) -> None:
    with pytest.raises(UsageError, match=f"trainer.{option}"):
        Config(trainer={option: 0})


def test_lengths_of_a_recipe_are_shortened_to_the_training() -> None:
    optim = OptimConfig(warmup_epochs=5, freeze_backbone_epochs=5, schedule="step", step_size=15)
    same, notes = optim.shortened_to(30)
    assert (same, notes) == (optim, [])
    short, notes = optim.shortened_to(5)
    assert (short.warmup_epochs, short.freeze_backbone_epochs) == (2.5, 2)
    assert [note.split()[0] for note in notes] == [
        "optim.warmup_epochs",
        "optim.freeze_backbone_epochs",
        "optim.schedule",
    ]
    assert "its first drop is after epoch 15 of" in notes[2]
    _, notes = OptimConfig(schedule="multistep", milestones=[15, 25]).shortened_to(10)
    assert notes == [
        "optim.schedule multistep never drops the learning rate: its first drop is after epoch 15 of 10."
    ]


@pytest.mark.parametrize("name", list_recipes())
@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_every_recipe_takes_fewer_epochs(name: str, epochs: int) -> None:
    config = Config.from_recipe(name, trainer={"max_epochs": epochs})
    optim, _ = config.optim.shortened_to(epochs)
    assert optim.warmup_epochs < epochs
    assert optim.freeze_backbone_epochs < epochs
