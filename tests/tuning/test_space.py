from pathlib import Path

import pytest

from crossx.errors import UsageError
from crossx.training.config import Config, DataConfig, ModelConfig, OptimConfig, TrainerConfig
from crossx.tuning.space import Choices, Range, default_space, read_space

CROSSX = Config(optim=OptimConfig(lr=0.01, weight_decay=1e-4))
PLAIN = Config(model=ModelConfig(method="plain"))


def space(folder: Path, text: str, base: Config = CROSSX):
    path = folder / "space.yaml"
    path.write_text(text)
    found = read_space(path, base)
    found.check(base)
    return found


def test_choices_and_ranges_of_every_kind(tmp_path: Path):
    found = space(
        tmp_path,
        """
        optim.lr: {low: 1e-4, high: 1e-2, log: true}
        optim.weight_decay: [0, 1e-4]
        data.batch_size: {low: 8, high: 31, step: 8}
        model.num_parts: {low: 1, high: 3}
        model.c3s_weights: {times: [0, 1, 2]}
        optim:
          mixup: {low: 0, high: 1}
          freeze_batch_norm: [false, true]
        data.augmentation: [crop, trivial, crop]
        optim.momentum: {times: [0.5, 1]}
        optim.new_layers_lr_factor: {times: {low: 0.1, high: 10, log: true}}
        """,
    )
    assert found.options == {
        "optim.lr": Range(1e-4, 1e-2, whole=False, log=True),
        "optim.weight_decay": Choices([0, 1e-4]),
        "data.batch_size": Range(8, 24, whole=True, step=8),
        "model.num_parts": Range(1, 3, whole=True),
        "model.c3s_weights": Choices([[0.0, 0.0, 0.0], [0.5, 0.25, 0.5], [1.0, 0.5, 1.0]]),
        "optim.mixup": Range(0.0, 1.0, whole=False),
        "optim.freeze_batch_norm": Choices([False, True]),
        "data.augmentation": Choices(["crop", "trivial"]),
        "optim.momentum": Choices([0.45, 0.9]),
        "optim.new_layers_lr_factor": Range(0.1, 10.0, whole=False, log=True),
    }
    assert found.combinations() is None
    # a batch of 32 is not in the space
    assert found.values_of(CROSSX) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a space maps options to values"),
        ("[1]", "a space maps options to values"),
        ("lr: [1, 2]", "'lr' is not an option of a section"),
        ("optin.lr: [1, 2]", "Did you mean 'optim'"),
        ("optim.lrr: [1, 2]", "unknown option optim.lrr. Did you mean 'lr'"),
        ("model.mamc_weight: [1, 2]", "unknown option model.mamc_weight"),
        ("optim.lr: 0.1", "takes a list of values, or a range"),
        ("optim.lr: []", "2 to 100 different values to choose from, not 0"),
        ("optim.lr: [0.1, 0.1]", "2 to 100 different values to choose from, not 1"),
        ("optim.lr: [0.1, fast]", "cannot be fast"),
        ("optim.freeze_batch_norm: ['on', false]", "cannot be 'on'"),
        ("optim.lr: [0.1, -1]", "lr must be above 0"),
        ("data.augmentation: [crop, crup]", "cannot be crup (Input should be 'crop'"),
        ("model.num_parts: [1, 2.5]", "cannot be 2.5"),
        ("optim.lr: {low: 1}", "a range needs low and high"),
        ("optim.lr: {low: 1, high: 2, logg: true}", "unknown key 'logg'. Did you mean 'log'"),
        ("optim.lr: {low: 2, high: 1}", "low 2 must be below high 1"),
        ("optim.lr: {low: 0, high: 1, log: true}", "log needs low above 0"),
        ("optim.lr: {low: 1, high: 2, log: 3}", "log is true or false"),
        ("optim.lr: {low: .nan, high: 2}", "are numbers"),
        ("optim.lr: {low: 1, high: 2, step: 3}", "step 3 must be above 0 and fit"),
        ("optim.lr: {low: a, high: b}", "low, high and step are numbers, not a"),
        ("model.num_parts: {low: 1, high: 2.5}", "takes whole numbers"),
        ("data.hflip: {low: 0, high: 2}", "hflip must be in"),
        ("optim.mixup: {times: [1, 2]}", "needs a number other than 0"),
        ("data.augmentation: {times: [1, 2]}", "needs a number other than 0"),
        ("optim.lr: {times: [1, 2], log: true}", "is given alone"),
        ("optim.lr: {times: 3}", "takes a list of factors"),
        ("model.c3s_weights: {times: {low: 1, high: 2}}", "of which `times` takes a list"),
        ("data.val_fraction: [0.1, 0.2]", "not searched: it decides on which images"),
        ("data.test_images_per_class: [9, 20]", "not searched: it decides on which images"),
        ("optim.selection: [best, last]", "not searched: it decides how"),
        ("model.method: [plain, crossx]", "crossx ablate"),
        ("optim.lr: [1, 2]\noptim: {lr: [1, 3]}", "optim.lr is given twice"),
    ],
)
def test_wrong_spaces_are_one_line(tmp_path: Path, text: str, message: str):
    with pytest.raises(UsageError) as refused:
        space(tmp_path, text)
    assert message in str(refused.value)
    assert str(refused.value).startswith(str(tmp_path / "space.yaml"))


def test_the_default_space_is_centred_on_the_configuration():
    found = default_space(CROSSX)
    assert found.options["optim.lr"] == Range(1e-3, 0.1, whole=False, log=True)
    assert found.options["optim.weight_decay"] == Choices([1e-5, 1e-4, 1e-3])
    assert found.options["model.c3s_weights"].values[1] == [0.5, 0.25, 0.5]
    now = found.values_of(CROSSX)
    assert now is not None
    assert (now["optim.lr"], now["optim.label_smoothing"], now["data.augmentation"]) == (0.01, 0.0, "crop")
    odd = Config(optim=OptimConfig(label_smoothing=0.3), data=DataConfig(augmentation="trivial"))
    assert default_space(odd).options["optim.label_smoothing"] == Choices([0.3, 0.0, 0.1])
    assert default_space(odd).values_of(odd) is not None
    # what is 0 cannot be multiplied
    assert "optim.weight_decay" not in default_space(PLAIN).options
    assert not any(name.startswith("model.") for name in default_space(PLAIN).options)


def test_a_method_that_takes_no_steps_needs_a_space_of_its_own(tmp_path: Path):
    base = Config(model=ModelConfig(method="probe"), trainer=TrainerConfig(max_epochs=0))
    with pytest.raises(UsageError, match="has nothing to search with this configuration"):
        default_space(base)


@pytest.mark.parametrize(
    "method", ["crossx", "dfl", "fcan", "ma_cnn", "mamc", "maxent", "pdisconet", "pn_cnn"]
)
def test_the_packaged_weights_are_options_of_their_methods(method: str):
    found = default_space(Config(model=ModelConfig(method=method)))
    assert [name for name in found.options if name.startswith("model.")]
    found.check(Config(model=ModelConfig(method=method)))


def test_drawn_numbers_have_few_digits_and_stay_within_the_bounds():
    values = Range(0.0, 0.9996, whole=False)
    assert values.rounded(0.123456) == 0.123
    assert values.rounded(0.9996) == 0.9996
    assert Range(1, 3, whole=True).rounded(2) == 2


def test_numbers_of_a_narrow_range_or_with_a_step_keep_their_digits():
    average = Range(0.99, 0.9999, whole=False)
    assert [average.rounded(value) for value in (0.99951234, 0.9996789)] == [0.99951, 0.99968]
    assert Range(0.0, 1000.0, whole=False, step=0.5).rounded(123.5) == 123.5
    assert Range(0.0, 1.0, whole=False).rounded(0.0) == 0.0


def test_every_length_is_validated_after_its_last_epoch(tmp_path: Path):
    base = Config(
        model=ModelConfig(method="plain", backbone="test_resnet", pretrained=False),
        data=DataConfig(dataset="synthetic"),
        trainer=TrainerConfig(max_epochs=4, check_val_every_n_epoch=2),
    )
    (path := tmp_path / "space.yaml").write_text("trainer.max_epochs: [4, 5]")
    # `tune` checks these before the first trial
    assert [config.trainer.max_epochs for config in read_space(path, base).check(base)] == [4, 5]
