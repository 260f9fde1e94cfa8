"""The number of epochs and the schedule that follows from it."""

import math

import pytest
import torch

from crossx.training.plan import Plan

STEPS = 4
"""Optimiser steps per epoch."""


def started(plan: Plan, skipped: int = 0) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    plan.start(optimizer, STEPS, skipped)
    return optimizer


def rate(optimizer: torch.optim.Optimizer) -> float:
    return optimizer.param_groups[0]["lr"]


@pytest.fixture
def cosine(make_config):
    return lambda **trainer: make_config(optim={"schedule": "cosine", "lr": 0.1}, trainer=trainer)


def test_a_schedule_continues_at_any_step_as_if_it_had_run(cosine):
    config = cosine(max_epochs=5)
    whole = Plan(config)
    optimizer = started(whole)
    for step in range(5 * STEPS):
        expected = 0.05 * (1 + math.cos(math.pi * step / (5 * STEPS)))
        assert rate(optimizer) == pytest.approx(expected)
        if step:
            resumed = Plan(config, whole.state_dict())
            again = started(resumed)
            resumed.continue_at(step)
            assert rate(again) == rate(optimizer)
            assert resumed.schedule_state() == whole.schedule_state()
        optimizer.step()
        whole.step()


@pytest.mark.parametrize(
    ("ends", "epochs", "changes"),
    [
        ([12.0], 5, True),  # 60 seconds have room for five epochs
        ([5.0, 10.0], 10, False),
        ([30.0, 60.0], 2, False),  # over: no schedule is needed any more
    ],
)
def test_epochs_that_do_not_fit_into_the_time_shorten_the_schedule(cosine, ends, epochs, changes):
    plan = Plan(cosine(max_epochs=10, max_time="1m"))
    optimizer = started(plan)
    for _ in range(len(ends) * STEPS):
        optimizer.step()
        plan.step()
    assert plan.fit_into_time(ends) is changes
    assert plan.epochs == epochs
    length = 5 if changes else 10
    assert rate(optimizer) == pytest.approx(0.05 * (1 + math.cos(math.pi * len(ends) / length)))


def test_a_plan_of_other_limits_does_not_count(cosine):
    saved = {"epochs": 3, "limits": [10, 60.0]}
    assert Plan(cosine(max_epochs=10, max_time="60s"), saved).epochs == 3
    assert Plan(cosine(max_epochs=10, max_time="61s"), saved).epochs == 10
    assert Plan(cosine(max_epochs=10), saved).epochs == 10
