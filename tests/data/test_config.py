import dataclasses
import inspect
import re
import subprocess
import sys

import pytest

from crossx.data.config import DataConfig
from crossx.errors import UsageError


def test_defaults_are_valid_and_need_no_torch():
    code = "import sys; from crossx.data.config import DataConfig; DataConfig(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_field_is_documented():
    documented = re.findall(r"^ {4}(\w+): ", inspect.getdoc(DataConfig) or "", re.MULTILINE)
    assert documented == [field.name for field in dataclasses.fields(DataConfig)]


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("image_size", 31, "at least 32"),
        ("resize_size", 447, "at least 448 (data.image_size)"),
        ("crop_bottom", -1, "at least 0"),
        ("batch_size", 0, "at least 1"),
        ("eval_batch_size", 0, "at least 1"),
        ("num_workers", -1, "at least 0"),
        ("num_classes", 1, "at least 2"),
        ("images_per_class", 0, "at least 1"),
        ("val_fraction", 1.0, "[0, 1)"),
        ("val_fraction", -0.1, "[0, 1)"),
        ("val_fraction", float("nan"), "[0, 1)"),
        ("test_fraction", 1.0, "[0, 1)"),
        ("hflip", 1.01, "[0, 1]"),
        ("random_erasing", -1.0, "[0, 1]"),
        ("interpolation", "bicubik", "Did you mean 'bicubic'?"),
        ("train_on", "test", "Choose from: train, trainval."),
        ("augmentation", "crops", "Did you mean 'crop'?"),
        ("sampling", "balance", "Did you mean 'balanced'?"),
        ("bad_images", "ignore", "Choose from: skip, stop."),
        ("cache_folder", "scratch", "give --data.cache disk too"),
    ],
)
def test_what_cannot_work_is_told_in_one_line(option, value, told):
    with pytest.raises(UsageError) as error:
        DataConfig(**{option: value})
    message = str(error.value)
    assert f"data.{option}" in message
    assert told in message
    assert "\n" not in message


def test_ends_of_the_ranges_are_allowed():
    DataConfig(image_size=32, resize_size=32, val_fraction=0.0, hflip=1.0, random_erasing=1.0, num_workers=0)


def test_validate_sees_a_field_that_was_changed_later():
    config = DataConfig()
    config.batch_size = 0
    with pytest.raises(UsageError, match=r"data\.batch_size"):
        config.validate()
