import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from crossx.evaluation.run import evaluate
from crossx.explain import explain_images
from crossx.losses import ClassificationLoss, reinforce_loss
from crossx.methods import FCAN, create_method
from refusals import refusal

TARGETS = torch.tensor([0, 2])


def build(backbone: str = "test_resnet", **options: object) -> FCAN:
    torch.manual_seed(0)
    method = create_method("fcan", backbone=backbone, num_classes=3, **options)
    assert isinstance(method, FCAN)
    return method.eval()


def images(number: int = 2, size: int = 96) -> Tensor:
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(1))


def attention_maps(method: FCAN, last: Tensor) -> Tensor:
    """The attention of each part on its own, (P, h, w), for a map (1, C, h, w)."""
    first, _, second = method.attention
    last = last / last.square().sum(1, keepdim=True).sqrt()
    scores = []
    for part in range(method.num_parts):
        own = slice(64 * part, 64 * (part + 1))
        hidden = F.relu(F.conv2d(last, first.weight[own], first.bias[own], padding=1))
        scores.append(F.conv2d(hidden, second.weight[part, None], second.bias[part, None], padding=1)[0, 0])
    return torch.stack([score.flatten().softmax(0).view_as(score) for score in scores])


def box_at(row: int, column: int, cells: int, size: int, side: int) -> list[int]:
    """The square around the centre of a cell, moved into the image."""
    centre = [(index + 0.5) * size / cells for index in (column, row)]
    left, top = (min(max(round(value - side / 2), 0), size - side) for value in centre)
    return [left, top, left + side, top + side]


def step_by_step(
    method: FCAN, image: Tensor, positions: list[int] | None = None, times: int = 1
) -> dict[str, Tensor | list]:
    """The network on one image (3, S, S), part by part.

    With ``times``, the image is that many times as large as what the trunk sees of it. ``positions`` are those of the
    parts' crops; default: where the attention is largest.
    """
    large, size = image, image.shape[1] // times
    image = F.interpolate(large[None], (size, size), mode="bilinear", antialias=True)[0]
    last = method.backbone(image[None])["last"]
    attention = attention_maps(method, last)
    cells = last.shape[3]
    if positions is None:
        positions = [int(part.argmax()) for part in attention]
    features, boxes = [F.adaptive_avg_pool2d(last, 1).flatten()], []
    for position in positions:
        boxes.append(box_at(position // cells, position % cells, cells, size * times, size * times // 2))
        left, top, right, bottom = boxes[-1]
        crop = large[None, :, top:bottom, left:right]
        if method.crop_size is not None:
            crop = F.interpolate(crop, (method.crop_size,) * 2, mode="bilinear", align_corners=True)
        features.append(F.adaptive_avg_pool2d(method.backbone(crop)["last"], 1).flatten())
    heads = [method.image, *method.parts]
    logits = torch.stack([head(feature) for head, feature in zip(heads, features, strict=True)])
    return {
        "attention": attention,
        "positions": positions,
        "boxes": boxes,
        "heads": logits,
        "embeddings": torch.cat(features),
        "probabilities": (logits[0].softmax(0) + logits[1:].softmax(1).mean(0)) / 2,
    }


def rewards_of(method: FCAN, expected: dict, target: int) -> list[float]:
    """Greedy or final rewards, one per part."""
    if method.reward == "final":
        return [float(expected["probabilities"].argmax() == target)] * method.num_parts
    rewards, before = [], math.inf
    for logits in expected["heads"][1:]:
        loss = F.cross_entropy(logits, torch.tensor(target)).item()
        rewards.append(float(logits.argmax() == target and loss < before))
        before = loss
    return rewards


@pytest.mark.parametrize(("times", "crop_size"), [(1, 64), (2, None)])
def test_prediction_is_that_of_the_paper_step_by_step(times: int, crop_size: int | None) -> None:
    method = build(view_size=96 if times > 1 else None, crop_size=crop_size)
    batch = images(size=96 * times)
    heads, boxes, maps = method.head_logits(batch), method.boxes(batch), method.activation_maps(batch)
    assert list(heads) == ["image", "part1", "part2", "part3"]
    for number, image in enumerate(batch):
        expected = step_by_step(method, image, times=times)
        assert boxes[number].tolist() == expected["boxes"]
        torch.testing.assert_close(maps["attention"][number], expected["attention"])
        logits = torch.stack([head[number] for head in heads.values()])
        torch.testing.assert_close(logits, expected["heads"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            method.embeddings(batch)[number], expected["embeddings"], rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            method(batch)[number].softmax(0), expected["probabilities"], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("reward", ["greedy", "final"])
def test_objective_is_that_of_the_paper_step_by_step(reward: str) -> None:
    method, batch = build(reward=reward, parts_weight=0.7, attention_weight=0.3), images(4)
    terms = dict.fromkeys(["image", "parts", "attention", "baseline"], 0.0)
    mean_reward = 0.0
    targets = torch.tensor([0, 2, 1, 1])
    for image, target in zip(batch, targets.tolist(), strict=True):
        expected = step_by_step(method, image)
        losses = [F.cross_entropy(logits, torch.tensor(target)) for logits in expected["heads"]]
        terms["image"] += losses[0] / 4
        terms["parts"] += 0.7 * sum(losses[1:]) / 3 / 4
        baseline = method.baseline.sigmoid()
        for part, own in enumerate(rewards_of(method, expected, target)):
            log_prob = expected["attention"][part].flatten()[expected["positions"][part]].log()
            terms["attention"] -= 0.3 * log_prob * (own - baseline[part]) / 4
            terms["baseline"] += (own - baseline[part]) ** 2 / 4
            mean_reward += own / 12
    assert mean_reward > 0
    objective = method.objective(batch, targets)
    assert list(objective.terms) == list(terms)
    for name, value in terms.items():
        torch.testing.assert_close(objective.terms[name], value, rtol=1e-4, atol=1e-5)
    assert objective.measures["reward"].item() == pytest.approx(mean_reward)
    entropies = [-(part * part.log()).sum() for part in step_by_step(method, batch[0])["attention"]]
    single = method.objective(batch[:1], targets[:1]).measures["entropy"]
    assert single.item() == pytest.approx(float(sum(entropies).detach()) / 3 / math.log(9), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reward", "baseline"), [("greedy", "none"), ("greedy", "learnt"), ("final", "learnt")]
)
def test_mean_over_all_positions_is_the_gradient_of_the_expected_reward(reward: str, baseline: str) -> None:
    """Exact, for two parts on maps of 2 x 2 positions: 16 combinations."""
    method = build(reward=reward, baseline=baseline, num_parts=2, attention_weight=1.0)
    image = images(1, 64)
    with torch.no_grad():  # classifiers of how a crop differs from the other three, so that rewards differ
        crops = [step_by_step(method, image[0], [position, position]) for position in range(4)]
        mean = torch.stack([crop["embeddings"].view(3, -1)[1] for crop in crops]).mean(0)
        for head in method.parts:
            head.weight.mul_(100)
            head.bias.copy_(-head.weight @ mean)
    # position -> (1 + P, K)
    heads = [step_by_step(method, image[0], [position, position])["heads"] for position in range(4)]
    target = int(heads[0][1].argmax())
    log_maps = attention_maps(method, method.backbone(image)["last"]).flatten(1).log()
    estimate, expected, kinds = torch.zeros(()), torch.zeros(()), set()
    for one, two in product(range(4), repeat=2):
        method._choose = lambda attention, chosen=(one, two): torch.tensor([chosen])
        surrogate = method.objective(image, torch.tensor([target])).terms["attention"]
        first, second = log_maps[0, one].exp(), log_maps[1, two].exp()
        estimate = estimate + (first * second).detach() * surrogate
        logits = torch.stack([heads[0][0], heads[one][1], heads[two][2]])
        probabilities = (logits[0].softmax(0) + logits[1:].softmax(1).mean(0)) / 2
        rewards = rewards_of(method, {"heads": logits, "probabilities": probabilities}, target)
        kinds.add(tuple(rewards))
        if reward == "final":
            expected = expected + first * second * rewards[0]
        else:  # greedy: each part for its own reward, whatever it does to the others'
            expected = expected + first * second.detach() * rewards[0] + first.detach() * second * rewards[1]
    assert len(kinds) > 1
    parameters = list(method.attention.parameters())
    exact = torch.autograd.grad(-expected, parameters)
    for own, other in zip(torch.autograd.grad(estimate, parameters), exact, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-6)


def test_positions_are_sampled_from_the_attention_in_training_only() -> None:
    method, count = build(), 20_000
    attention = torch.randn(1, 3, 2, 3).mul(2).flatten(2).log_softmax(2).view(1, 3, 2, 3)
    assert torch.equal(method._choose(attention), attention.flatten(2).argmax(2))
    method.train()
    drawn = method._choose(attention.expand(count, -1, -1, -1))
    shares = F.one_hot(drawn, 6).float().mean(0)
    probabilities = attention.exp().flatten(2)[0]
    assert ((shares - probabilities).abs() <= 5 * (probabilities / count).sqrt()).all()
    batch = images()
    torch.manual_seed(3)
    first = method.head_logits(batch)
    torch.manual_seed(3)
    again = method.head_logits(batch)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_each_term_trains_its_own_layers() -> None:
    method = build()
    trains = {
        "image": {"image", "backbone"},
        "parts": {"parts", "backbone"},
        "attention": {"attention"},
        "baseline": {"baseline"},
    }
    for name, term in method.objective(images(3), torch.tensor([0, 2, 1])).terms.items():
        method.zero_grad(set_to_none=True)
        term.backward(retain_graph=True)
        reached = {
            key.split(".")[0] for key, p in method.named_parameters() if p.grad is not None and p.grad.any()
        }
        assert reached == trains[name]


@pytest.mark.slow
def test_attention_learns_where_the_reward_is() -> None:
    """Parts are rewarded at a position that the map marks, and nowhere else."""
    method = build(num_parts=2, baseline="learnt").train()
    optimizer = torch.optim.SGD([*method.attention.parameters(), method.baseline], lr=0.2, momentum=0.9)
    random = torch.Generator().manual_seed(2)
    maps = 0.3 * torch.rand(16, method.image.in_features, 3, 3, generator=random)
    marked = torch.randint(9, (16,), generator=random)
    maps.flatten(2)[torch.arange(16), : maps.shape[1] // 2, marked] += 1
    torch.manual_seed(0)
    for _ in range(200):
        attention = method._attend(maps)
        positions = method._choose(attention)
        log_probs = attention.flatten(2).gather(2, positions[..., None])[..., 0]
        rewards = (positions == marked[:, None]).float()
        optimizer.zero_grad()
        sum(reinforce_loss(log_probs, rewards, method.baseline.sigmoid())).backward()
        optimizer.step()
    method.eval()
    assert (method._choose(method._attend(maps)) == marked[:, None]).all()


def test_parts_are_squares_within_the_image() -> None:
    attention = torch.zeros(1, 6, 2, 3)
    positions = torch.arange(6)[None]
    method = build(num_parts=6, crop_share=0.5)
    boxes = method._boxes_at(positions, attention, torch.zeros(1, 3, 64, 120))[0]
    assert boxes.tolist() == [
        [4, 0, 36, 32],
        [44, 0, 76, 32],
        [84, 0, 116, 32],
        [4, 32, 36, 64],
        [44, 32, 76, 64],
        [84, 32, 116, 64],
    ]
    whole = build(num_parts=6, crop_share=1.0)._boxes_at(positions, attention, torch.zeros(1, 3, 64, 64))
    assert whole.tolist() == [[[0, 0, 64, 64]] * 6]
    assert method(torch.randn(1, 3, 64, 96)).shape == (1, 3)


def test_rewards_know_neither_label_smoothing_nor_class_weights() -> None:
    method, batch = build(), images()
    plain = method.objective(batch, TARGETS).terms
    method.criterion = ClassificationLoss(torch.tensor([9.0, 1.0, 1.0]), 0.2)
    changed = method.objective(batch, TARGETS).terms
    assert torch.equal(plain["attention"], changed["attention"])
    assert not torch.isclose(plain["parts"], changed["parts"])


@pytest.mark.parametrize("reward", ["greedy", "final"])
def test_mixed_targets_of_one_class_each_are_that_class(reward: str) -> None:
    method, batch = build(reward=reward), images()
    mixed = F.one_hot(TARGETS, 3).float()
    torch.testing.assert_close(
        dict(method.objective(batch, mixed).terms), dict(method.objective(batch, TARGETS).terms)
    )


def test_statistics_of_crops_are_their_own_or_shared() -> None:
    own, shared = build(), build(crop_statistics="shared")
    assert shared.state_dict().keys() == {
        key for key in own.state_dict() if not key.startswith("crop_statistics")
    }
    before = {key: value.clone() for key, value in own.state_dict().items() if "running_mean" in key}
    own.train()(images())
    assert all(not torch.equal(own.state_dict()[key], value) for key, value in before.items())


def test_numbers_that_are_not_finite_stop_no_sampling() -> None:
    method = build().train()
    assert method._choose(torch.full((2, 3, 2, 2), torch.nan)).max() < 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_parts": 0}, "num_parts must be between 1 and 16, not 0"),
        ({"num_parts": 17}, "num_parts must be between 1 and 16, not 17"),
        ({"crop_share": 0}, "crop_share must be above 0 and at most 1, not 0"),
        ({"crop_share": 1.1}, "crop_share must be above 0 and at most 1, not 1.1"),
        ({"crop_size": 1}, "crop_size must be between 2 and 4096, not 1"),
        ({"view_size": 1}, "view_size must be between 2 and 4096, not 1"),
        ({"parts_weight": 0}, "parts_weight must be above 0 and finite, not 0"),
        ({"attention_weight": float("nan")}, "attention_weight must be above 0 and finite, not nan"),
        ({"reward": "gready"}, "Did you mean 'greedy'"),
        ({"baseline": "learned"}, "Did you mean 'learnt'"),
        ({"crop_statistics": "owned"}, "Did you mean 'own'"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, object], message: str) -> None:
    assert message in refusal(build, **options)


def test_a_backbone_that_does_not_take_the_crops_is_refused() -> None:
    args = {"img_size": 64, "embed_dim": 16, "num_heads": 2, "depth": 4}
    method = build("vit_tiny_patch16_224", backbone_args=args)
    message = refusal(method.check_image_size, 64)
    assert "uses crops of 32 pixels" in message
    assert "--model.crop_size 64" in message
    dynamic = build("vit_tiny_patch16_224", backbone_args={**args, "dynamic_img_size": True})
    assert dynamic.check_image_size(64) is None
    assert dynamic(images(1, 64)).shape == (1, 3)
    assert "view_size 96 is larger than the images, which have 64 pixels" in refusal(
        build(view_size=96).check_image_size, 64
    )


def test_explanations_hold_the_parts_and_the_attention() -> None:
    method, batch = build(num_parts=2), images()
    for own, explanation in zip(method.boxes(batch), explain_images(method, batch), strict=True):
        assert explanation.boxes is not None
        assert explanation.boxes.tolist() == own.tolist()
        assert list(explanation.maps) == ["last", "attention part 1", "attention part 2"]


def test_evaluation_tests_each_head_and_their_mean() -> None:
    method, batch = build(), images(3)
    outputs = evaluate(method, [(batch, torch.tensor([0, 1, 2]))], "cpu", channels_last=False)
    assert list(outputs.heads) == ["image", "part1", "part2", "part3"]
    image, *parts = (torch.as_tensor(head).softmax(1) for head in outputs.heads.values())
    mean = (image + sum(parts) / 3) / 2
    torch.testing.assert_close(torch.as_tensor(outputs.logits).softmax(1), mean)
