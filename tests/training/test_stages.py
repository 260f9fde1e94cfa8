import json
import logging

import pytest
from test_resume import crash, interrupt

from crossx.cli.fit import _print_outcome
from crossx.training import stages as module
from crossx.training.fit import fit, resume
from crossx.training.stages import (
    BACKWARD,
    COPY,
    FILES,
    FORWARD,
    OTHER,
    UPDATE,
    VALIDATION,
    WAIT,
    Stages,
    profile_table,
)


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr(module.time, "perf_counter", lambda: Clock.now)
    return Clock


def fail(stages, clock):
    with stages(FILES):
        clock.now += 8
        raise KeyError


def test_every_second_belongs_to_the_innermost_stage(clock):
    stages = Stages()
    clock.now += 1
    with stages(VALIDATION):
        clock.now += 2
        for _ in range(3):
            with stages(WAIT):
                clock.now += 4
        with pytest.raises(KeyError):
            fail(stages, clock)
        clock.now += 16
    clock.now += 32
    expected = {VALIDATION: 18.0, WAIT: 12.0, FILES: 8.0, OTHER: 33.0}
    profile = stages.to_json()
    assert {row["stage"]: row["seconds"] for row in profile["stages"]} == expected
    assert [row["seconds"] for row in profile["stages"]] == sorted(expected.values(), reverse=True)
    assert profile["seconds"] == sum(expected.values())
    assert {row["stage"]: row["times"] for row in profile["stages"]} == {
        VALIDATION: 1,
        WAIT: 3,
        FILES: 1,
        OTHER: 0,
    }
    stages.restart()
    assert stages.to_json() == {"seconds": 0.0, "stages": [{"stage": OTHER, "seconds": 0.0, "times": 0}]}


def test_the_device_is_waited_for_before_the_clock_is_read(clock):
    def wait():
        clock.now += 5

    stages = Stages(wait)
    with stages(FORWARD):
        clock.now += 1
    assert stages.seconds == {OTHER: 5.0, FORWARD: 6.0}


@pytest.mark.parametrize(
    ("waiting", "working", "share"), [(20, 45, 20 / 65), (60, 0, 1.0), (20, 50, None), (20, 39, None)]
)
def test_waiting_is_told_if_it_is_long(clock, waiting, working, share):
    stages = Stages()
    with stages(WAIT):
        clock.now += waiting
    for stage in (COPY, FORWARD, BACKWARD, UPDATE):
        with stages(stage):
            clock.now += working / 4
    with stages(VALIDATION):
        clock.now += 1000
    assert stages.waited() == (None if share is None else pytest.approx(share))


def test_the_table_adds_up(clock):
    stages = Stages()
    for _ in range(4):
        with stages(FORWARD):
            clock.now += 0.75
    clock.now += 1
    assert [line.split() for line in profile_table(stages.to_json())] == [
        ["stage", "seconds", "share", "times", "ms", "each"],
        ["forward", "pass", "and", "loss", "3.00", "75.0%", "4", "750.0"],
        ["everything", "else", "1.00", "25.0%"],
        ["all", "4.00"],
    ]


def test_a_training_writes_its_profile_and_hints_at_the_cache(make_config, monkeypatch, caplog, capsys):
    monkeypatch.setattr(module, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(module, "MIN_SHARE", 0.0)
    caplog.set_level(logging.WARNING, "crossx")
    run = fit(make_config(trainer={"profile": True, "max_epochs": 2, "accumulate_grad_batches": 2}))
    hints = [message for message in caplog.messages if "waited for images for " in message]
    assert len(hints) == 1
    assert "--data.cache ram or disk" in hints[0]
    profile = json.loads(run.profile.read_text())
    times = {row["stage"]: row["times"] for row in profile["stages"]}
    batches, updates = 8, 4  # 27 images in batches of 8, two epochs
    assert times[FORWARD] == times[BACKWARD] == times[COPY] == batches == times[WAIT] + 2
    assert times[UPDATE] == updates
    assert times[VALIDATION] == times[FILES] == 2
    assert sum(row["seconds"] for row in profile["stages"]) == pytest.approx(profile["seconds"])
    _print_outcome(run)
    assert "\n".join(profile_table(profile)) in capsys.readouterr().out


def test_the_profile_of_a_resumed_training_has_what_was_before(clock):
    first = Stages()
    with first(FORWARD):
        clock.now += 2
    state = json.loads(json.dumps(first.state_dict()))
    clock.now += 100  # lost, as no checkpoint has it
    second = Stages()
    second.load_state_dict(state)
    second.restart()
    with second(FORWARD):
        clock.now += 3
    with second(WAIT):
        clock.now += 4
    expected = [(FORWARD, 5.0, 2), (WAIT, 4.0, 1), (OTHER, 0.0, 0)]
    profile = second.to_json()
    assert [(row["stage"], row["seconds"], row["times"]) for row in profile["stages"]] == expected
    assert profile["seconds"] == 9.0
    # the hint is about this process
    assert second.seconds == {FORWARD: 3.0, WAIT: 4.0, OTHER: 0.0}
    assert first.state_dict() == state | {"seconds": {FORWARD: 2.0, OTHER: 107.0}}


@pytest.mark.slow
def test_a_resumed_training_adds_to_its_profile(make_config, monkeypatch):
    config = make_config(trainer={"profile": True, "max_epochs": 2})
    with monkeypatch.context() as patch:
        interrupt(patch, 6, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(config)
    run = resume(config.run_path())
    times = {row["stage"]: row["times"] for row in json.loads(run.profile.read_text())["stages"]}
    # steps 5 and 6 were after the checkpoint of the first of two epochs of four steps
    assert (times[UPDATE], times[VALIDATION]) == (8, 2)
    resume(run.path, max_epochs=3)
    times = {row["stage"]: row["times"] for row in json.loads(run.profile.read_text())["stages"]}
    assert (times[UPDATE], times[VALIDATION]) == (12, 3)
