import math

import pytest
import torch
from torch.optim import SGD
from torch.optim import lr_scheduler as reference

from crossx.errors import UsageError
from crossx.methods import create_method
from crossx.training.config import OptimConfig
from crossx.training.optim import (
    build_optimizer,
    build_scheduler,
    freeze,
    lr_factor,
    parameter_groups,
)

STEPS_PER_EPOCH, EPOCHS = 4, 6
TOTAL = STEPS_PER_EPOCH * EPOCHS


@pytest.fixture
def method():
    return create_method("plain", backbone="test_resnet", num_classes=3)


def rates(optimizer, scheduler):
    seen = []
    for _ in range(TOTAL):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return torch.tensor(seen, dtype=torch.float64)


def two_groups():
    return SGD(
        [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in (0.1, 0.02)], momentum=0.9
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schedule": "constant"}, lambda o: reference.ConstantLR(o, factor=1.0)),
        (
            {"schedule": "step", "step_size": 2, "gamma": 0.5},
            lambda o: reference.StepLR(o, 2 * STEPS_PER_EPOCH, 0.5),
        ),
        (
            {"schedule": "multistep", "milestones": [1, 4]},
            lambda o: reference.MultiStepLR(o, [STEPS_PER_EPOCH, 4 * STEPS_PER_EPOCH], 0.1),
        ),
        ({"schedule": "cosine"}, lambda o: reference.CosineAnnealingLR(o, TOTAL)),
        (
            {"schedule": "one_cycle", "warmup_epochs": 2},
            lambda o: reference.OneCycleLR(o, [0.1, 0.02], total_steps=TOTAL, pct_start=2 / EPOCHS),
        ),
    ],
)
def test_schedules_equal_those_of_torch(options, expected):
    ours, theirs = two_groups(), two_groups()
    scheduler = build_scheduler(
        ours, OptimConfig(**options), steps_per_epoch=STEPS_PER_EPOCH, total_steps=TOTAL
    )
    torch.testing.assert_close(rates(ours, scheduler), rates(theirs, expected(theirs)))


@pytest.mark.parametrize(("warmup", "steps", "total"), [(0.25, 4, 24), (2, 4, 8), (2, 4, 5)])
def test_one_cycle_without_room_to_rise_is_refused(warmup, steps, total):
    config = OptimConfig(schedule="one_cycle", warmup_epochs=warmup)
    with pytest.raises(UsageError, match="with one_cycle it must be more than one and fewer than all"):
        build_scheduler(two_groups(), config, steps_per_epoch=steps, total_steps=total)


def test_warm_up_rises_linearly_to_the_peak_and_cosine_ends_at_its_minimum():
    config = OptimConfig(schedule="cosine", warmup_epochs=1.5, min_lr_factor=0.1)
    factors = [
        lr_factor(step, config, steps_per_epoch=STEPS_PER_EPOCH, total_steps=TOTAL)
        for step in range(TOTAL + 1)
    ]
    assert factors[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0])
    assert factors[6] == 1.0
    assert factors[15] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 9 / 18)))
    assert factors[TOTAL] == pytest.approx(0.1)


def test_warm_up_in_steps_may_be_longer_than_the_training():
    config = OptimConfig(schedule="cosine", warmup_steps=100)
    factors = [lr_factor(step, config, steps_per_epoch=4, total_steps=8) for step in range(9)]
    cosine = [1, 1, 1, 1, 1, *(0.5 * (1 + math.cos(math.pi * done / 4)) for done in (1, 2, 3, 4))]
    assert factors == pytest.approx([(step + 1) / 100 * share for step, share in enumerate(cosine)])
    # in a long training it is an ordinary warm-up
    assert lr_factor(99, config, steps_per_epoch=4, total_steps=1000) == 1
    # epochs that are given win
    both = OptimConfig(schedule="constant", warmup_steps=100, warmup_epochs=1)
    assert [lr_factor(step, both, steps_per_epoch=4, total_steps=80) for step in (0, 3)] == [0.25, 1]


def test_new_layers_and_depths_learn_at_their_own_rate(method):
    config = OptimConfig(lr=1.0, new_layers_lr_factor=10.0, layer_decay=0.5)
    rate = {id(p): group["lr"] for group in parameter_groups(method, config) for p in group["params"]}
    assert {rate[id(p)] for p in method.classifier.parameters()} == {10.0}
    layers = method.backbone.layer_groups()
    for distance, layer in enumerate(reversed(layers), start=1):
        assert {rate[id(p)] for p in layer} == {0.5**distance}
    assert len(rate) == len(list(method.parameters()))


@pytest.mark.parametrize("decay_all", [False, True])
def test_weight_decay_spares_norms_and_biases(method, decay_all):
    config = OptimConfig(weight_decay=0.1, decay_norm_and_bias=decay_all)
    decay = {
        id(p): group["weight_decay"] for group in parameter_groups(method, config) for p in group["params"]
    }
    for name, parameter in method.named_parameters():
        spared = parameter.ndim == 1 and not decay_all
        assert decay[id(parameter)] == (0.0 if spared else 0.1), name


def test_optimizers(method):
    sgd = build_optimizer(method, OptimConfig(momentum=0.8, nesterov=True))
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.param_groups[0]["momentum"] == 0.8
    assert sgd.param_groups[0]["nesterov"]
    assert isinstance(build_optimizer(method, OptimConfig(optimizer="adamw")), torch.optim.AdamW)


def test_frozen_backbone_leaves_the_new_layers(method):
    freeze(method, OptimConfig(freeze_backbone=True))
    trained = {id(p) for group in parameter_groups(method, OptimConfig()) for p in group["params"]}
    assert trained == {id(p) for p in method.classifier.parameters()}


def test_nothing_left_to_train(method):
    method.requires_grad_(False)
    with pytest.raises(UsageError, match="nothing to train"):
        parameter_groups(method, OptimConfig())
