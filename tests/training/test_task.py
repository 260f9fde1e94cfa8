import pytest
import torch
from torch import nn
from torch.nn import functional as F

from crossx.errors import UsageError
from crossx.methods import create_method
from crossx.methods.plain import Plain
from crossx.training.config import OptimConfig
from crossx.training.task import Task


def make_task(**options):
    torch.manual_seed(0)
    method = create_method("plain", backbone="test_resnet", num_classes=3)
    return Task(method, OptimConfig(**options), class_counts=[6, 3, 1])


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 0, 1, 0])


def norms(task):
    return [module for module in task.method.modules() if isinstance(module, nn.BatchNorm2d)]


def test_numbers_of_a_step(batch):
    task = make_task().train()
    loss, numbers = task(*batch)
    logits = task.method(batch[0])
    assert numbers.keys() == {"loss", "data", "top1"}
    torch.testing.assert_close(numbers["loss"], F.cross_entropy(logits, batch[1]).detach())
    assert torch.equal(numbers["loss"], loss.detach())
    assert numbers["top1"] == (logits.argmax(1) == batch[1]).float().mean()
    assert not any(number.requires_grad for number in numbers.values())


def test_criterion_takes_smoothing_and_balanced_weights(batch):
    task = make_task(label_smoothing=0.1, class_weights="balanced")
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    weights = torch.tensor([10 / (3 * 6), 10 / (3 * 3), 10 / (3 * 1)])
    expected = F.cross_entropy(logits, batch[1], weight=weights, label_smoothing=0.1)
    torch.testing.assert_close(task.method.criterion(logits, batch[1]), expected)
    plain = create_method("plain", backbone="test_resnet", num_classes=3)
    assert task.method.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_mixing_gives_class_probabilities(batch, options):
    task = make_task(**options)
    images, targets = task.mix(*batch)
    assert images.shape == batch[0].shape
    assert not torch.equal(images, batch[0])
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    assert torch.isfinite(task(*batch)[0])


def test_mixing_is_refused_where_a_method_needs_one_class(monkeypatch):
    monkeypatch.setattr(Plain, "supports_soft_targets", False)
    with pytest.raises(UsageError, match="method 'plain' needs one class per image"):
        make_task(cutmix=1.0)


@pytest.mark.parametrize("option", ["freeze_batch_norm", "freeze_backbone"])
def test_frozen_batch_norm_changes_neither_statistics_nor_scale(batch, option):
    task = make_task(**{option: True}).train()
    before = {name: value.clone() for name, value in task.method.backbone.state_dict().items()}
    parameters = [p for p in task.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    task(*batch)[0].backward()
    optimizer.step()
    after = task.method.backbone.state_dict()
    frozen = {name for name in before if torch.equal(before[name], after[name])}
    in_norms = {name for name in before if ".bn" in name or "running" in name or "num_batches" in name}
    assert in_norms
    assert in_norms <= frozen
    assert (frozen == before.keys()) is (option == "freeze_backbone")


def test_batch_norm_learns_unless_frozen(batch):
    task = make_task().train()
    before = norms(task)[0].running_mean.clone()
    task(*batch)
    assert not torch.equal(before, norms(task)[0].running_mean)


def test_channels_last():
    weight = make_task(channels_last=True).method.backbone.trunk.conv1
    assert next(weight.parameters()).is_contiguous(memory_format=torch.channels_last)
