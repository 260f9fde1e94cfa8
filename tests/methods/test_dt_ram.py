import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch import Tensor, nn
from torch.nn import functional as F

from crossx.errors import UsageError
from crossx.methods import Phase, create_method
from crossx.methods.dt_ram import DTRAM, join, rewards_of, until


def build(**options) -> DTRAM:
    torch.manual_seed(0)
    method = create_method("dt_ram", backbone="test_resnet", num_classes=3, image_size=64, **options)
    assert isinstance(method, DTRAM)
    for step in method.steps:  # far from the centre, and different for each image
        step.locator[2].weight.data *= 20
    return method.eval()


def images(number: int = 4, height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(number, 3, height, width, generator=torch.Generator().manual_seed(1))


def start(method: DTRAM, name: str) -> None:
    method.phase = Phase(name)
    method.start_phase(method.phase, [])


def step_by_step(method: DTRAM, image: Tensor, view: int | None = None) -> dict[str, Tensor]:
    """One image (3, H, W) through the network, which stops for real."""
    height, width = image.shape[1:]
    seen = (
        image[None]
        if view is None
        else F.interpolate(image[None], (view, view), mode="bilinear", antialias=True)
    )
    h = method.backbone(seen)["last"].mean((2, 3))
    answers, features, boxes = [method.classifier(h)], [h], []
    side = round(method.glimpse_scale * min(height, width))
    for number, step in enumerate(method.steps):
        decider = method.stop.deciders[number]
        if torch.sigmoid(decider[1:](torch.tanh(answers[-1]))) >= 0.5:
            break
        hidden = torch.tanh(step.locator[0](h))
        x, y = step.locator[2](hidden)[0].clamp(-1, 1).tolist()
        left = width / 2 * (1 + method.reach * x) - side / 2
        top = height / 2 * (1 + method.reach * y) - side / 2
        boxes.append([left, top, left + side, top + side])
        size = view or min(height, width)
        steps = np.arange(size) / (size - 1) * (side - 1)
        where = np.meshgrid([0, 1, 2], top + steps, left + steps, indexing="ij")
        pixels = map_coordinates(image.double().numpy(), where, order=1, mode="grid-constant")
        glimpse = torch.from_numpy(pixels)[None].float()
        h = F.relu(step.trunk(glimpse)["last"].mean((2, 3)) + step.feedback(h))
        answers.append(step.classifier(h))
        features.append(h)
    taken = len(boxes)
    boxes += [boxes[-1] if boxes else [0, 0, width, height]] * (len(method.steps) - taken)
    features += [torch.zeros_like(h)] * (len(method.steps) - taken)
    glimpses = torch.stack(answers[1:]).mean(0)[0] if taken else torch.zeros(3)
    return {
        "prediction": answers[0][0] + glimpses,
        "steps": torch.tensor(1 + taken),
        "boxes": torch.tensor(boxes).float(),
        "embedding": torch.cat(features, 1)[0],
    }


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width", "view"), [(64, 64, None), (70, 96, None), (101, 128, 64)])
def test_prediction_is_that_of_a_network_that_stops(height: int, width: int, view: int | None) -> None:
    method, batch = build(view_size=view, num_steps=4, glimpse_scale=0.4), images(6, height, width)
    with torch.no_grad():
        answers = method._look(batch, 4).answers
        for number, decider in enumerate(method.stop.deciders):
            # some images stop at each step
            decider[3].bias -= decider(answers[:, number]).median()
        expected = [step_by_step(method, image, view) for image in batch]
        found = method(batch), method.count_steps(batch), method.boxes(batch), method.embeddings(batch)
    assert len({int(each["steps"]) for each in expected}) > 1
    for (name, atol), values in zip(
        {"prediction": 1e-4, "steps": 0, "boxes": 1e-3, "embedding": 1e-4}.items(), found, strict=True
    ):
        torch.testing.assert_close(
            values, torch.stack([each[name] for each in expected]), rtol=1e-4, atol=atol
        )


def test_predictions_are_not_sampled_and_training_is() -> None:
    method, batch = build(), images()
    assert torch.equal(method(batch), method(batch))
    method.train()
    torch.manual_seed(1)
    first = method._look(batch, 3)
    torch.manual_seed(1)
    assert torch.equal(method._look(batch, 3).boxes, first.boxes)
    assert not torch.equal(method._look(batch, 3).boxes, first.boxes)


def test_phases_follow_each_other_and_have_an_epoch_each() -> None:
    method = build(phase_shares=[6, 2, 1, 1])
    for epochs in range(1, 40):
        names = [method.phase_at(epoch, epochs).name for epoch in range(epochs)]
        order = ["step_1", "step_2", "step_3", "stop"]
        assert [*dict.fromkeys(names)] == order[:epochs]
        assert sorted(names, key=order.index) == names
        if epochs % 10 == 0:
            assert [names.count(name) * 10 for name in order] == [share * epochs for share in (6, 2, 1, 1)]
    assert [build(dynamic=False).phase_at(epoch, 3).name for epoch in range(3)] == order[:3]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1, 1, 1, 0.5, 0.5, 0.5]),
        ("step", [1, 0.1, 0.01, 0.5, 0.05, 0.005]),
        (
            "cosine",
            [(1 + math.cos(math.pi * part / 6)) / 2 * most for most in (1, 0.5) for part in (1, 3, 5)],
        ),
    ],
)
def test_learning_rates_of_the_phases(schedule: str, expected: list[float]) -> None:
    method = build(phase_schedule=schedule, later_lr_factor=0.5)
    factors = [method.phase_at(epoch, 12).lr_factor for epoch in range(12)]
    assert factors == pytest.approx(expected + 2 * expected[3:])


def test_a_phase_trains_what_it_names() -> None:
    method, batch = build().train(), images()
    everything = dict(method.named_parameters())
    for epoch in range(4):
        phase = method.phase_at(epoch, 4)
        start(method, phase.name)
        trained = {name for name in everything if name.startswith(phase.trains)}
        for name, parameter in everything.items():
            parameter.requires_grad_(name in trained)
            parameter.grad = None
        method.objective(batch, torch.tensor([0, 1, 2, 0])).loss.backward()
        assert {name for name, parameter in everything.items() if parameter.grad is not None} == trained
    expected = {"backbone.", "classifier.", "steps.0.", "steps.1.", "stop."}
    trained_at_all = {prefix for epoch in range(4) for prefix in method.phase_at(epoch, 4).trains}
    assert trained_at_all == expected


def test_a_training_that_starts_from_another_network_has_all_its_steps() -> None:
    method = build()
    method.stage.fill_(4)  # as taken from a network that was trained to the end
    start(method, "step_1")
    assert method.stage == 1
    with torch.no_grad():
        method.classifier.bias.fill_(5.0)
    start(method, "step_2")
    assert torch.equal(method.steps[0].classifier.bias, method.classifier.bias)


def test_a_step_starts_from_the_one_before_once() -> None:
    method, batch = build(), images()
    start(method, "step_1")
    assert method.stage == 1
    torch.testing.assert_close(method(batch), method.head_logits(batch)["step_1"])
    assert method.count_steps(batch).tolist() == [1] * 4
    whole = torch.tensor([0.0, 0, 64, 64]).expand(4, 2, 4)
    assert torch.equal(method.boxes(batch), whole)
    with torch.no_grad():
        method.backbone.trunk.conv1[0].weight.mul_(2)
        method.backbone.trunk.bn1.running_mean.add_(1)
    start(method, "step_2")
    state = method.backbone.state_dict()
    for name, value in method.steps[0].trunk.state_dict().items():
        assert torch.equal(value, state[name])
    assert torch.equal(method.steps[0].classifier.weight, method.classifier.weight)
    heads = method.head_logits(batch)
    torch.testing.assert_close(heads["joined"], heads["step_1"] + heads["step_2"])
    with torch.no_grad():
        method.steps[0].feedback.weight.fill_(0.25)
    start(method, "step_3")
    for part in ("trunk", "feedback", "classifier"):
        for own, before in zip(
            getattr(method.steps[1], part).state_dict().values(),
            getattr(method.steps[0], part).state_dict().values(),
            strict=True,
        ):
            assert torch.equal(own, before)
    assert not torch.equal(method.steps[1].locator[0].weight, method.steps[0].locator[0].weight)
    heads = method.head_logits(batch)
    torch.testing.assert_close(heads["joined"], heads["step_1"] + (heads["step_2"] + heads["step_3"]) / 2)
    start(method, "stop")
    assert method.stage == 4
    # a longer training may return to an earlier phase
    before = {name: value.clone() for name, value in method.state_dict().items()}
    expected = method(batch)
    start(method, "step_2")
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    assert torch.equal(method(batch), expected)


class Brightness(nn.Module):
    """A trunk that sees the mean of an image."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"last": images.mean((1, 2, 3))[:, None, None, None].expand(-1, 96, 1, 1)}


class Constant(nn.Module):
    """A locator that points at the same position in every image."""

    def __init__(self, x: float, y: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor([x, y]))

    def forward(self, features: Tensor) -> Tensor:
        return self.mean.expand(len(features), 2)


def test_the_locator_climbs_the_expected_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images brighter to the right, an answer that is correct if the glimpse is right of a threshold."""
    method = build(
        num_steps=2,
        dynamic=False,
        glimpse_scale=0.25,
        glimpse_size=8,
        reach=0.75,
        location_std=0.3,
        locator_weight=0.5,
    )
    step = method.steps[0]
    method.backbone, step.trunk, step.locator = Brightness(), Brightness(), Constant(0.1, -0.2)
    with torch.no_grad():
        for parameter in (*step.feedback.parameters(), *step.classifier.parameters()):
            parameter.zero_()
        step.classifier.weight[1, 0] = 1
        step.classifier.bias[0] = 35.0  # class 1 if the centre's x is above 35
        step.baseline.fill_(0.3)
    half = 4000
    # the quantiles of equally likely draws: an average over them is the integral over the normal distribution
    draws = torch.tensor([NormalDist().inv_cdf((number + 0.5) / half) for number in range(half)])
    noise = torch.stack([draws.repeat(2), torch.ones(half).repeat(2)], 1)
    noise[half:, 1] = -1
    monkeypatch.setattr(torch, "randn_like", lambda like: noise)
    ramp = (torch.arange(64) + 0.5).expand(2 * half, 1, 32, 64)
    method.train()
    method.phase = Phase("step_2")
    objective = method.objective(ramp, torch.ones(2 * half, dtype=torch.int64))
    (objective.terms["locator"] + objective.terms["baseline"]).backward()
    threshold = (35 / 32 - 1) / 0.75
    scaled = NormalDist(0.1, 0.3)
    reward = 1 - scaled.cdf(threshold)
    expected = torch.tensor([-0.5 * scaled.pdf(threshold), 0.0])
    torch.testing.assert_close(step.locator.mean.grad, expected, rtol=0.01, atol=1e-3)
    assert float(step.baseline.grad) == pytest.approx(2 * (0.3 - reward), abs=1e-3)


@pytest.mark.parametrize(("exploration", "discount"), [(0.0, 1.0), (0.2, 0.9), (1.0, 1.0)])
def test_the_decisions_climb_the_expected_reward(
    monkeypatch: pytest.MonkeyPatch, exploration: float, discount: float
) -> None:
    method = build(num_steps=4, exploration=exploration, step_discount=discount).double()
    answers = torch.tensor([[[1.0, 0, 0], [0, 3, 0], [0.5, 0, 0], [0, 0, 9]]]).double()
    targets = torch.tensor([1])
    # (1, 0, 0), (1, 3, 0), (1.25, 1.5, 0), (1.17, 1, 3)
    rewards = [0, 1, 1, 0]
    assert [int(join(answers, until_of(count)).argmax() == 1) for count in range(4)] == rewards
    stop, features = method.stop, [torch.zeros(1, 96).double()] * 4
    with torch.no_grad():
        stop.baseline.fill_(0.4)
    look = method._look(images(1).double(), 4)._replace(features=features, answers=answers)
    monkeypatch.setattr(method, "_look", lambda images, steps: look)
    method.train()
    method.phase = Phase("stop")
    # P(n steps) from the deciders, one by one
    going, probabilities = torch.ones(()).double(), []
    for number, decider in enumerate(stop.deciders):
        chance = torch.sigmoid(decider(answers[:, number]))[0, 0]
        chance = (1 - exploration) * chance + exploration / (4 - number)
        probabilities.append(going * chance)
        going = going * (1 - chance)
    probabilities.append(going)
    expected_reward = sum(
        probability * reward * discount**number
        for number, (probability, reward) in enumerate(zip(probabilities, rewards, strict=True))
    )
    parameters = list(stop.deciders.parameters())
    exact = torch.autograd.grad(-expected_reward, parameters, allow_unused=exploration == 1)
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for count, probability in enumerate(probabilities):
        draws = torch.where(until_of(count), 1.0, 0.0)
        monkeypatch.setattr(torch, "rand_like", lambda like, draws=draws: draws.double())
        objective = method.objective(images(1), targets)
        assert objective.measures["steps"] == 1 + count
        gradients = torch.autograd.grad(objective.terms["stop"], parameters)
        total = [sum_ + probability.detach() * own for sum_, own in zip(total, gradients, strict=True)]
    for own, other in zip(total, exact, strict=True):
        torch.testing.assert_close(own, torch.zeros_like(own) if other is None else other)
    if exploration == 1:
        assert [float(probability.detach()) for probability in probabilities] == pytest.approx([0.25] * 4)


def until_of(count: int) -> Tensor:
    """The first ``count`` of three further steps."""
    return torch.arange(3)[None] < count


def test_steps_after_the_first_stop_are_not_taken() -> None:
    stops = torch.tensor([[b >> 2 & 1, b >> 1 & 1, b & 1] for b in range(8)]).bool()
    expected = [[not any(row[: n + 1]) for n in range(3)] for row in stops.tolist()]
    assert until(stops).tolist() == expected


def test_class_probabilities_as_targets() -> None:
    answers = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 2, 1])
    torch.testing.assert_close(rewards_of(answers, labels), rewards_of(answers, F.one_hot(labels, 3).float()))
    soft = torch.tensor([[0.2, 0.5, 0.3]]).expand(5, 3)
    assert torch.equal(rewards_of(answers, soft), soft[0][answers.argmax(2)])
    method, targets = build(), F.one_hot(torch.tensor([0, 1, 2, 0]), 3).float()
    hard = method.objective(images(), targets.argmax(1))
    torch.testing.assert_close(method.objective(images(), targets).terms, hard.terms)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 1}, "num_steps must be between 2 and 8, not 1"),
        ({"num_steps": 9}, "num_steps must be between 2 and 8, not 9"),
        ({"glimpse_scale": 0.0}, "glimpse_scale must be above 0 and at most 1"),
        ({"glimpse_scale": 1.5}, "glimpse_scale must be above 0 and at most 1"),
        ({"glimpse_size": 1}, "glimpse_size must be between 2 and 4096"),
        ({"reach": -0.1}, "reach must be between 0 and 1"),
        ({"location_std": 0.0}, "location_std must be above 0"),
        ({"location_std": math.nan}, "location_std must be above 0"),
        ({"exploration": 1.1}, "exploration must be between 0 and 1"),
        ({"step_discount": 0.0}, "step_discount must be above 0"),
        ({"locator_weight": -1.0}, "locator_weight must be between 0"),
        ({"later_lr_factor": 0.0}, "later_lr_factor must be above 0"),
        ({"phase_shares": [1, 1]}, "phase_shares must be 4 numbers above 0"),
        ({"phase_shares": [1, 1, 0, 1]}, "phase_shares must be 4 numbers above 0"),
        ({"dynamic": False, "phase_shares": [1] * 4}, "phase_shares must be 3 numbers above 0"),
        ({"phase_schedule": "steps"}, "Did you mean 'step'"),
        ({"view_size": 1}, "view_size must be between 2"),
        ({"dynamic": "yes"}, "dynamic is of the wrong type"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        build(**options)
    assert "\n" not in str(refused.value)


def test_a_vit_takes_glimpses_of_its_own_size() -> None:
    args = {"embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 64}

    def vit(**options) -> DTRAM:
        return create_method(
            "dt_ram",
            backbone="vit_tiny_patch16_224",
            num_classes=2,
            image_size=64,
            backbone_args=args,
            **options,
        ).eval()

    method = vit(view_size=64)
    assert method.check_image_size(100) is None
    assert method(images(1, 100, 100)).shape == (1, 2)
    with pytest.raises(UsageError, match=r"uses glimpses of 32 pixels, which backbone .* does not accept"):
        vit(glimpse_size=32).check_image_size(64)


def test_half_precision_keeps_positions() -> None:
    method, batch = build().train(), images()
    with torch.autocast("cpu", torch.bfloat16):
        objective = method.objective(batch, torch.tensor([0, 1, 2, 0]))
    assert all(term.dtype == torch.float32 and term.isfinite() for term in objective.terms.values())
