"""DT-RAM (Li et al., ICCV 2017 workshops, https://arxiv.org/abs/1703.10332): glimpses, and when to stop looking."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossx.backbones import Backbone
from crossx.distributed import at_least_float32, batch_mean
from crossx.errors import UsageError
from crossx.layers import crop_boxes
from crossx.losses import reinforce_loss
from crossx.methods.base import Method, Objective, Phase
from crossx.methods.registry import register_method
from crossx.schema.model import MAX_IMAGE_SIZE

PhaseSchedule: TypeAlias = Literal["constant", "step", "cosine"]

MAX_STEPS = 8


class Look(NamedTuple):
    """What the first n steps see and answer.

    Attributes:
        features: h_t of each step, n times (B, C).
        answers: Logits of each step, (B, n, K).
        boxes: Glimpses of the steps from the second on, (B, n - 1, 4).
        log_probs: Logarithms of their positions' probability densities but for a constant, (B, n - 1).
    """

    features: list[Tensor]
    answers: Tensor
    boxes: Tensor
    log_probs: Tensor


class Step(nn.Module):
    """A step after the first: where to look, and what to make of it.

    Args:
        trunk: Sees the glimpse.
        num_classes: K.

    Attributes:
        baseline: Expected reward of the position, (1,).
    """

    def __init__(self, trunk: Backbone, num_classes: int) -> None:
        super().__init__()
        channels = trunk.channels["last"]
        self.trunk = trunk
        self.feedback = nn.Linear(channels, channels)
        hidden = max(channels // 2, 1)
        self.locator = nn.Sequential(
            nn.Linear(channels, hidden), nn.Tanh(), nn.Linear(hidden, 2), nn.Hardtanh()
        )
        self.classifier = nn.Linear(channels, num_classes)
        self.baseline = nn.Parameter(torch.zeros(1))

    def start_from(self, before: Step | None, trunk: Backbone, classifier: nn.Linear) -> None:
        """Start with the weights of the step before, but for the locator."""
        self.trunk.load_state_dict(trunk.state_dict())
        self.classifier.load_state_dict(classifier.state_dict())
        if before is not None:
            self.feedback.load_state_dict(before.feedback.state_dict())


class StopPolicy(nn.Module):
    """A network per step that decides from the answer of the step before whether to stop there.

    Args:
        num_classes: K.
        decisions: Steps that may be left out.

    Attributes:
        baseline: Expected reward, (1,).
    """

    def __init__(self, num_classes: int, decisions: int) -> None:
        super().__init__()
        # the bounds keep both actions possible
        self.deciders = nn.ModuleList(
            nn.Sequential(
                nn.Tanh(), nn.Linear(num_classes, 256), nn.Tanh(), nn.Linear(256, 1), nn.Hardtanh(-10.0, 10.0)
            )
            for _ in range(decisions)
        )
        self.baseline = nn.Parameter(torch.zeros(1))

    def forward(self, answers: Tensor) -> Tensor:
        """Return the probability of stopping after each answer but the last, (B, T - 1), for answers (B, T, K)."""
        scores = [decider(answers[:, step]) for step, decider in enumerate(self.deciders)]
        return at_least_float32(torch.cat(scores, 1)).sigmoid()


@register_method("dt_ram")
class DTRAM(Method):
    """Step 1 sees the image, each further step a glimpse where the one before points; a policy decides when to stop.

    Trained in phases: one step, two steps, ... up to ``num_steps``, then when to stop.

    Args:
        backbone: The trunk of the first step; each further step has a clone.
        num_classes: K.
        num_steps: T, the most steps per image, the first included.
        dynamic: Whether the number of steps is learnt per image (DT-RAM) or always T (RAM).
        glimpse_scale: Side of a glimpse as a fraction of the image's shorter side.
        glimpse_size: Side in pixels to which glimpses are resized. Default: what the trunk sees of the image.
        reach: Distance from the centre of the image that a glimpse's centre may have, as a fraction of half the side.
        location_std: Standard deviation of the sampled positions in training; 1 is the distance ``reach``.
        exploration: Share of a random policy in the decisions to stop in training.
        step_discount: Factor of the reward of stopping for each step after the first; below 1, fewer steps are better.
        locator_weight: Weight of the loss of the positions, 1 as released. It is small because the locators' output is
            clipped: large steps move it out of the range in which it learns, to the same corner in every image.
        phase_shares: Relative lengths of the phases: one per step and, if ``dynamic``, one of learning when to stop.
            Default: equal. Each phase has at least one epoch, as far as there are epochs.
        later_lr_factor: Learning-rate factor of all phases but the first.
        phase_schedule: Learning rate within each phase, on top of the training's schedule: ``constant``, ``step`` (a
            tenth after each third, as released) or ``cosine`` (half a wave down to 0).
        view_size: Side in pixels to which images are resized for the first step, while glimpses are cropped from the
            images themselves. Default: that of the images.

    Attributes:
        stage: Number of phases that were started; 0 if the method is trained without phases.
    """

    stops_gradients = True

    curve_titles: ClassVar[dict[str, str]] = {
        "data": "Cross-entropy of each step",
        "locator": "Policy of the positions",
        "stop": "Policy of stopping",
        "baseline": "Squared error of the expected rewards",
        "steps": "Steps per image",
    }
    citation = """\
@inproceedings{li2017dynamic,
  title     = {Dynamic Computational Time for Visual Attention},
  author    = {Li, Zhichao and Yang, Yi and Liu, Xiao and Zhou, Feng and Wen, Shilei and Xu, Wei},
  booktitle = {ICCV Workshops},
  year      = {2017}
}"""
    stage: Tensor

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        num_steps: int = 3,
        dynamic: bool = True,
        glimpse_scale: float = 100 / 224,
        glimpse_size: int | None = None,
        reach: float = 150 / 224,
        location_std: float = 0.24,
        exploration: float = 0.2,
        step_discount: float = 1.0,
        locator_weight: float = 0.002,
        phase_shares: Sequence[float] | None = None,
        later_lr_factor: float = 0.1,
        phase_schedule: PhaseSchedule = "constant",
        view_size: int | None = None,
    ) -> None:
        super().__init__(backbone, num_classes)
        if not 2 <= num_steps <= MAX_STEPS:
            raise UsageError(f"num_steps must be between 2 and {MAX_STEPS}, not {num_steps}.")
        if glimpse_size is not None and not 2 <= glimpse_size <= MAX_IMAGE_SIZE:
            raise UsageError(f"glimpse_size must be between 2 and {MAX_IMAGE_SIZE}, not {glimpse_size}.")
        for option, value, top in (
            ("glimpse_scale", glimpse_scale, 1),
            ("location_std", location_std, 10),
            ("step_discount", step_discount, 1),
            ("later_lr_factor", later_lr_factor, 100),
        ):
            if not 0 < value <= top:
                raise UsageError(f"{option} must be above 0 and at most {top}, not {value}.")
        for option, value, top in (
            ("reach", reach, 1),
            ("exploration", exploration, 1),
            ("locator_weight", locator_weight, 100),
        ):
            if not 0 <= value <= top:
                raise UsageError(f"{option} must be between 0 and {top}, not {value}.")
        phases = num_steps + dynamic
        shares = [1.0] * phases if phase_shares is None else list(phase_shares)
        if len(shares) != phases or not all(0 < share < float("inf") for share in shares):
            raise UsageError(
                f"phase_shares must be {phases} numbers above 0, one per phase of num_steps {num_steps}"
                f"{' and dynamic' if dynamic else ''}, not {shares}."
            )

        self.num_steps, self.phase_shares = num_steps, shares
        self.glimpse_scale, self.glimpse_size, self.reach = glimpse_scale, glimpse_size, reach
        self.location_std, self.exploration = location_std, exploration
        self.step_discount, self.locator_weight = step_discount, locator_weight
        self.later_lr_factor, self.phase_schedule = later_lr_factor, phase_schedule
        backbone.drop_head()
        self.classifier = nn.Linear(backbone.channels["last"], num_classes)
        # Any: type checkers do not know what is in a ModuleList
        self.steps: Any = nn.ModuleList(Step(backbone.clone(), num_classes) for _ in range(num_steps - 1))
        self.stop = StopPolicy(num_classes, num_steps - 1) if dynamic else None
        self.register_buffer("stage", torch.zeros((), dtype=torch.int64))

    def phase_at(self, epoch: int, epochs: int) -> Phase:
        """Return the phase ``step_1``, ``step_2``, ..., ``stop`` of an epoch; see ``Method.phase_at``.

        The second step is trained together with the first, each further one by itself.
        """
        start, total = 0, sum(self.phase_shares)
        for index in range(len(self.phase_shares)):
            later = len(self.phase_shares) - 1 - index
            end = round(sum(self.phase_shares[: index + 1]) / total * epochs)
            end = max(min(end, epochs - later), start + 1)
            if epoch < end or not later:
                break
            start = end
        factor = self.later_lr_factor if index else 1.0
        if self.phase_schedule == "step":
            factor *= 0.1 ** (3 * (epoch - start) // (end - start))
        elif self.phase_schedule == "cosine":  # at the middle of the epoch
            factor *= 0.5 + 0.5 * math.cos(math.pi * (epoch - start + 0.5) / (end - start))
        first = ("backbone.", "classifier.")
        if index == self.num_steps:
            return Phase("stop", ("stop.",), factor)
        trains = [first, (*first, "steps.0.")][index] if index < 2 else (f"steps.{index - 1}.",)
        return Phase(f"step_{index + 1}", trains, factor)

    def start_phase(self, phase: Phase, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Start the steps that are trained for the first time with the weights of the step before."""
        stage = self._stage_of(phase)
        if stage == 1:
            self.stage.zero_()  # of another network that the method started from
        for index in range(max(int(self.stage), 1), min(stage, self.num_steps)):
            if index == 1:
                self.steps[0].start_from(None, self.backbone, self.classifier)
            else:
                before = self.steps[index - 2]
                self.steps[index - 1].start_from(before, before.trunk, before.classifier)
        self.stage.clamp_(min=stage)

    def head_logits(self, images: Tensor) -> dict[str, Tensor]:
        """Return logits (B, K) of each step, ``step_1`` and so on, and of the prediction, ``joined``."""
        return self._heads(self._look(images, self.num_steps).answers)

    def combine_heads(self, heads: Mapping[str, Tensor]) -> Tensor:
        """Return only ``joined``: the answer to the image plus the mean of the answers to its glimpses."""
        return heads["joined"]

    def objective(self, images: Tensor, targets: Tensor) -> Objective:
        """Return the cross-entropies ``data_1``, ``data_2``, ... of the steps and the losses of the policies.

        The reward of a position is 1 if its step's answer is correct; that of the decisions to stop is 1 if the
        prediction is correct, times ``step_discount`` per further step. ``baseline`` is the squared error of the
        expected rewards. With class probabilities as targets, a reward is the probability of the answer.
        """
        stage = self._stage_of(self.phase)
        steps = min(stage or self.num_steps, self.num_steps) if self.training else self.num_steps
        look = self._look(images, steps)
        answers = look.answers
        going = (
            torch.ones_like(look.log_probs, dtype=torch.bool) if self.training else self._predicted(answers)
        )
        terms = {f"data_{step + 1}": self.criterion(answers[:, step], targets) for step in range(steps)}
        policies = {}
        if stage == 0 or 2 <= stage <= self.num_steps:
            # the steps whose positions are trained: without phases all of them
            own = slice(0, self.num_steps - 1) if stage == 0 else slice(stage - 2, stage - 1)
            expected = torch.stack([step.baseline for step in self.steps[own]], 1)  # n times (1,) -> (1, n)
            rewards = rewards_of(answers[:, 1:][:, own], targets)
            surrogate, error = reinforce_loss(look.log_probs[:, own], rewards, expected)
            policies["locator"] = self.locator_weight * surrogate, error
        if self.stop is not None and stage in (0, self.num_steps + 1):
            sampled, policies["stop"] = self._decide(answers, targets, self.stop)
            going = sampled if self.training else going
        terms |= {name: surrogate for name, (surrogate, _) in policies.items()}
        if policies:
            errors = [error for _, error in policies.values()]
            terms["baseline"] = sum(errors[1:], errors[0])
        steps_taken = 1 + going.sum(1).float().mean()
        return Objective.of(terms, join(answers, going), {"steps": batch_mean(steps_taken, len(images))})

    def activation_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``last`` -> the channel mean of the first step's last map, (B, 1, h, w)."""
        maps = self.backbone(self.view(images))["last"]
        return {"last": maps.mean(1, keepdim=True)}  # (B, C, h, w) -> (B, 1, h, w)

    def boxes(self, images: Tensor) -> Tensor:
        """Return the glimpses in their order, (B, T - 1, 4); see ``Method.boxes``.

        Once the method has stopped, the last glimpse is repeated, or the whole image if there was none.
        """
        look = self._look(images, self.num_steps)
        going = self._predicted(look.answers)
        height, width = images.shape[2:]
        last = look.boxes.new_tensor([0, 0, width, height]).expand(len(images), 4)
        boxes = []
        for step in range(self.num_steps - 1):
            last = torch.where(going[:, step, None], look.boxes[:, step], last)
            boxes.append(last)
        return torch.stack(boxes, 1)

    def embeddings(self, images: Tensor) -> Tensor:
        """Return the features of all steps, concatenated, (B, T C); those of steps not taken are 0."""
        look = self._look(images, self.num_steps)
        going = F.pad(self._predicted(look.answers), (1, 0), value=True)  # (B, T - 1) -> (B, T)
        return (torch.stack(look.features, 1) * going[..., None]).flatten(1)  # (B, T, C) -> (B, T*C)

    def linear_heads(self) -> dict[str, nn.Linear]:
        """Return the classifier of ``step_1``; each further step starts from the one before."""
        return {"step_1": self.classifier}

    def head_features(self, images: Tensor) -> dict[str, Tensor]:
        """Return what the first step sees of the image, (B, C); see ``Method``."""
        return {"step_1": self._look(images, 1).features[0]}

    def heads_and_features(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return the logits of all heads, and what the first step sees; see ``Method``."""
        look = self._look(images, self.num_steps)
        return self._heads(look.answers), look.features[0]

    def head_terms(self, heads: Mapping[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Return the cross-entropy of the first step, ``data_1``."""
        return {"data_1": self.criterion(heads["step_1"], targets)}

    def count_steps(self, images: Tensor) -> Tensor:
        """Return the number of steps that the prediction uses, int64 (B,)."""
        return 1 + self._predicted(self._look(images, self.num_steps).answers).sum(1)

    def check_image_size(self, size: int) -> None:
        """Check that the backbone accepts both images and glimpses; see ``Method.check_image_size``."""
        super().check_image_size(size)
        if self.glimpse_size is not None:
            self._check_second_size("glimpse", self.glimpse_size, self.view_size or size)

    def _stage_of(self, phase: Phase) -> int:
        """Return the number of a phase, from 1 on; 0 for one that is not of this method's."""
        names = [*(f"step_{step + 1}" for step in range(self.num_steps)), "stop"]
        return names.index(phase.name) + 1 if phase.name in names else 0

    def _look(self, images: Tensor, steps: int) -> Look:
        seen = self.backbone(self.view(images))["last"].mean((2, 3))  # (B, C, h, w) -> (B, C)
        features, answers = [seen], [self.classifier(seen)]
        boxes, log_probs = [images.new_zeros(images.shape[0], 0, 4)], [seen.new_zeros(images.shape[0], 0)]
        for step in self.steps[: steps - 1]:
            # detached: the gradient of drawn positions is noise to the features, larger than that of the answers
            mean = at_least_float32(step.locator(features[-1].detach()))
            location = mean.detach()
            if self.training:
                location = location + self.location_std * torch.randn_like(location)
            log_probs.append((location - mean).square().sum(1, keepdim=True) / (-2 * self.location_std**2))
            boxes.append(self._glimpse(location.clamp(-1, 1), images)[:, None])  # (B, 4) -> (B, 1, 4)
            size = self.glimpse_size or self.view_size or min(images.shape[2:])
            glimpse = crop_boxes(images, boxes[-1], size)[:, 0]  # (B, 1, 3, s, s) -> (B, 3, s, s)
            seen = step.trunk(glimpse)["last"].mean((2, 3))
            features.append(F.relu(seen + step.feedback(features[-1])))
            answers.append(step.classifier(features[-1]))
        return Look(features, torch.stack(answers, 1), torch.cat(boxes, 1), torch.cat(log_probs, 1))

    def _glimpse(self, location: Tensor, images: Tensor) -> Tensor:
        """Return the boxes, (B, 4), of positions (B, 2) from -1 to 1."""
        height, width = images.shape[2:]
        side = max(2, round(self.glimpse_scale * min(height, width)))
        extent = torch.tensor([width, height], device=images.device)
        corner = (1 + self.reach * location) * extent / 2 - side / 2
        return torch.cat([corner, corner + side], 1)

    def _heads(self, answers: Tensor) -> dict[str, Tensor]:
        # (B, T, K) -> T x (B, K)
        steps = {f"step_{step + 1}": answers[:, step] for step in range(self.num_steps)}
        return {**steps, "joined": join(answers, self._predicted(answers))}

    def _predicted(self, answers: Tensor) -> Tensor:
        """Return which steps after the first, bool (B, T - 1), the prediction takes, for answers (B, T, K).

        From the buffer alone: weights of an earlier phase have fewer steps and do not stop.
        """
        taken = torch.arange(1, answers.shape[1], device=answers.device) < self.stage
        going = (taken | (self.stage == 0)).expand(answers.shape[0], -1)
        if self.stop is None:
            return going
        decides = (self.stage == 0) | (self.stage > self.num_steps)
        return going & ~(decides & ~until(self.stop(answers) >= 0.5))

    def _decide(
        self, answers: Tensor, targets: Tensor, stop: StopPolicy
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the steps that are taken, bool (B, T - 1), and the losses of the policy and of its baseline."""
        answers = answers.detach()
        chances = stop(answers)
        if self.training:
            # a random policy after which each number of steps is equally likely
            uniform = 1 / torch.arange(self.num_steps, 1, -1, device=chances.device)
            chances = (1 - self.exploration) * chances + self.exploration * uniform
            stops = torch.rand_like(chances) < chances
        else:
            stops = chances >= 0.5
        going = until(stops)
        # a decision is taken if none before was to stop
        taken = F.pad(going[:, :-1], (1, 0), value=True)
        rewards = rewards_of(join(answers, going)[:, None], targets) * self.step_discount ** going.sum(
            1, keepdim=True
        )
        log_probs = torch.where(stops, chances, 1 - chances).log()
        return going, reinforce_loss(log_probs, rewards, stop.baseline, taken)


def until(stops: Tensor) -> Tensor:
    """Return which steps come before the first stop, bool (B, n), for decisions bool (B, n) before each step."""
    going, columns = torch.ones_like(stops[:, 0]), []
    for stop in stops.unbind(1):
        going = going & ~stop
        columns.append(going)
    return torch.stack(columns, 1)


def join(answers: Tensor, going: Tensor) -> Tensor:
    """Return the first answer plus the mean of the further ones that are taken, (B, K).

    Args:
        answers: (B, T, K).
        going: Which answers after the first are taken, bool (B, T - 1).
    """
    share = going / going.sum(1, keepdim=True).clamp(min=1)
    further = (share.to(answers.dtype)[..., None] * answers[:, 1:]).sum(1)  # (B, T - 1, K) -> (B, K)
    return answers[:, 0] + further


def rewards_of(answers: Tensor, targets: Tensor) -> Tensor:
    """Return the target's probability of each answer's best class, (B, n): 1 or 0 for targets int64 (B,).

    Args:
        answers: (B, n, K).
        targets: int64 (B,), or (B, K).
    """
    best = answers.detach().argmax(2)  # (B, n, K) -> (B, n)
    return (best == targets[:, None]).float() if targets.ndim == 1 else targets.gather(1, best)
