"""Read what a training wrote, and evaluate it by plain loops."""

import csv

import torch

from crossx.data.catalog import read_dataset
from crossx.data.datamodule import DataModule
from crossx.training.checkpoints import read_checkpoint
from crossx.training.config import Config


def rows(run):
    with (run.path / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def method_weights(path):
    state = read_checkpoint(path)["state_dict"]
    return {name.removeprefix("method."): value for name, value in state.items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def accuracy(method, spec, split):
    """Accuracy by a plain loop over single images."""
    config = Config.from_yaml(spec.config).data
    index = read_dataset(config.dataset, config.root, test_fraction=config.test_fraction, split_seed=0)
    data = DataModule(index, spec.read_spec().preprocessing, config, seed=0)
    single = ((data.normalize(images), targets) for images, targets in _single(data, split))
    right = [int(method(images).argmax(1)[0] == targets[0]) for images, targets in single]
    return sum(right) / len(right)


def _single(data, split):
    for images, targets in data.eval_loader(split):
        yield from zip(images.split(1), targets.split(1), strict=True)
