"""The checks of `crossx.testing` find what is broken in a method, and only that."""

import unittest
from collections.abc import Iterable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossx.methods import Objective, Plain, list_methods, registry
from crossx.testing import check_method, checks

SLOW = ("torch.export", "ONNX", "resume", "two ranks")


class Sound(Plain):
    """Nothing is wrong with it, and it is not registered."""

    def __init__(self, backbone: object, num_classes: int, *, scale: float = 1.0) -> None:
        super().__init__(backbone, num_classes)  # type: ignore[arg-type]
        self.scale = scale

    def objective(self, images: Tensor, targets: Tensor) -> Objective:
        logits = self(images)
        return Objective.of({"data": self.criterion(logits, targets), "same": 0 * logits.mean()}, logits)


class NoDefault(Sound):
    def __init__(self, backbone: object, num_classes: int, *, scale: float) -> None:
        super().__init__(backbone, num_classes, scale=scale)


class NoHint(Sound):
    def __init__(self, backbone: object, num_classes: int, *, scale=1.0) -> None:  # type: ignore[no-untyped-def]
        super().__init__(backbone, num_classes, scale=scale)


class AnyHint(Sound):
    def __init__(self, backbone: object, num_classes: int, *, scale: object = 1.0) -> None:
        super().__init__(backbone, num_classes)


class WrongDefault(Sound):
    def __init__(self, backbone: object, num_classes: int, *, scale: int = "one") -> None:  # type: ignore[assignment]
        super().__init__(backbone, num_classes)


class Reserved(Sound):
    def __init__(self, backbone: object, num_classes: int, *, pretrained: bool = False) -> None:
        super().__init__(backbone, num_classes)


class Unnamed(Sound):
    def __init__(self, backbone: object, num_classes: int, **options: float) -> None:
        super().__init__(backbone, num_classes)


class Positional(Sound):
    def __init__(self, backbone: object, num_classes: int, depth: int = 1) -> None:
        super().__init__(backbone, num_classes)


class Unchecked(Sound):
    def __init__(self, backbone: object, num_classes: int, *, width: int = 4) -> None:
        super().__init__(backbone, num_classes)
        self.extra = nn.Linear(width, 1)


class OneMoreClass(Sound):
    def head_logits(self, images: Tensor) -> dict[str, Tensor]:
        return {"last": F.pad(super().head_logits(images)["last"], (0, 1))}


class NotFinite(Sound):
    def head_logits(self, images: Tensor) -> dict[str, Tensor]:
        return {"last": super().head_logits(images)["last"] / 0}


class NoHeads(Sound):
    def head_logits(self, images: Tensor) -> dict[str, Tensor]:
        return {}

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.embeddings(images))


class OtherForward(Sound):
    def forward(self, images: Tensor) -> Tensor:
        return 2 * super().forward(images)


class OtherLogits(Sound):
    def objective(self, images: Tensor, targets: Tensor) -> Objective:
        found = super().objective(images, targets)
        return found._replace(logits=found.logits + 1)


class Random(Sound):
    def head_logits(self, images: Tensor) -> dict[str, Tensor]:
        return {"last": self.classifier(F.dropout(self.embeddings(images), 0.5))}


class MapEmbeddings(Sound):
    def embeddings(self, images: Tensor) -> Tensor:
        return self.backbone(images)["last"]

    def head_logits(self, images: Tensor) -> dict[str, Tensor]:
        return {"last": self.classifier(self.embeddings(images).mean((2, 3)))}


class OtherLoss(Sound):
    def objective(self, images: Tensor, targets: Tensor) -> Objective:
        found = super().objective(images, targets)
        return found._replace(loss=2 * found.loss)


class AttachedMeasure(Sound):
    def objective(self, images: Tensor, targets: Tensor) -> Objective:
        found = super().objective(images, targets)
        return found._replace(measures={"mean": found.logits.mean()})


class PerImage(Sound):
    def objective(self, images: Tensor, targets: Tensor) -> Objective:
        logits = self(images)
        return Objective.of({"data": F.cross_entropy(logits, targets, reduction="none")}, logits)


class Detached(Sound):
    def objective(self, images: Tensor, targets: Tensor) -> Objective:
        found = super().objective(images, targets)
        return found._replace(loss=found.loss.detach())


class HalfDetached(Sound):
    def objective(self, images: Tensor, targets: Tensor) -> Objective:
        logits = self.classifier(self.embeddings(images).detach())
        return Objective.of({"data": self.criterion(logits, targets)}, logits)


class Backwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return 1.01 * gradient


class WrongBackward(Sound):
    def objective(self, images: Tensor, targets: Tensor) -> Objective:
        logits = self(images)
        return Objective.of({"data": Backwards.apply(self.criterion(logits, targets))}, logits)


class Centred(Sound):
    def embeddings(self, images: Tensor) -> Tensor:
        found = super().embeddings(images)
        return found - 0.1 * found.mean(0)


class Counting(Sound):
    def __init__(self, backbone: object, num_classes: int) -> None:
        super().__init__(backbone, num_classes)
        self.register_buffer("seen", torch.zeros(()))

    def head_logits(self, images: Tensor) -> dict[str, Tensor]:
        self.seen += len(images)
        return super().head_logits(images)


class NotSaved(Sound):
    def __init__(self, backbone: object, num_classes: int) -> None:
        super().__init__(backbone, num_classes)
        self.direction = torch.randn(num_classes)

    def head_logits(self, images: Tensor) -> dict[str, Tensor]:
        return {"last": super().head_logits(images)["last"] + self.direction}


class LossOnly(Sound):
    def objective(self, images: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override]
        return self.criterion(self(images), targets)


class NoMaps(Sound):
    def activation_maps(self, images: Tensor) -> dict[str, Tensor]:
        return {}


class FlatMaps(Sound):
    def activation_maps(self, images: Tensor) -> dict[str, Tensor]:
        return {"last": super().activation_maps(images)["last"][:, 0]}


class InfiniteMaps(Sound):
    def activation_maps(self, images: Tensor) -> dict[str, Tensor]:
        return {"last": super().activation_maps(images)["last"].log() - torch.inf}


class WrongBoxes(Sound):
    def boxes(self, images: Tensor) -> Tensor | None:
        return torch.tensor([[[4.0, 4.0, 1.0, 9.0]]]).expand(len(images), 1, 4)


class WrongClassMaps(Sound):
    def class_activation_maps(self, images: Tensor, classes: Tensor) -> dict[str, Tensor] | None:
        maps = super().class_activation_maps(images, classes)
        assert maps is not None
        return {"last": maps["last"].relu()}


class SameClassMaps(Sound):
    def class_activation_maps(self, images: Tensor, classes: Tensor) -> dict[str, Tensor] | None:
        return super().class_activation_maps(images, torch.ones_like(classes))


class WrongLinearHeads(Sound):
    def head_logits(self, images: Tensor) -> dict[str, Tensor]:
        return {"last": 2 * super().head_logits(images)["last"]}

    def class_activation_maps(self, images: Tensor, classes: Tensor) -> dict[str, Tensor] | None:
        return None


class OtherFeatures(Sound):
    def head_features(self, images: Tensor) -> dict[str, Tensor]:
        return {"first": self.embeddings(images)}


class OneOfTwoHeads(Sound):
    def head_logits(self, images: Tensor) -> dict[str, Tensor]:
        heads = super().head_logits(images)
        return {**heads, "other": heads["last"].tanh()}

    def heads_and_features(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return Plain.head_logits(self, images), self.embeddings(images)

    def class_activation_maps(self, images: Tensor, classes: Tensor) -> dict[str, Tensor] | None:
        return None


class OtherOfTwoHeads(OneOfTwoHeads):
    def heads_and_features(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        heads, features = super().heads_and_features(images)
        return {**heads, "other": heads["last"].sin()}, features


class NothingToFit(Sound):
    def head_terms(self, heads: Mapping[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        return {}


class HardTargets(Sound):
    def objective(self, images: Tensor, targets: Tensor) -> Objective:
        logits = self(images)
        return Objective.of({"data": -logits.log_softmax(1)[range(len(targets)), targets].mean()}, logits)


class OtherSoftTargets(Sound):
    def objective(self, images: Tensor, targets: Tensor) -> Objective:
        logits = self(images)
        loss = self.criterion(logits, targets) + 0.1 * targets.dim()
        return Objective.of({"data": loss}, logits)


class LeavesTraining(Sound):
    def prepare(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.eval()


class MovesStatistics(Sound):
    def prepare(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        for images, _ in batches:
            self(images)


class Branching(Sound):
    def head_logits(self, images: Tensor) -> dict[str, Tensor]:
        found = super().head_logits(images)["last"]
        return {"last": found if found.mean() > 0 else 2 * found}


class PairsOnly(Sound):
    def head_logits(self, images: Tensor) -> dict[str, Tensor]:
        found = super().head_logits(images)["last"]
        return {"last": found + 1 if len(images) == 2 else found}


class Remembering(Sound):
    calls = 0

    def objective(self, images: Tensor, targets: Tensor) -> Objective:
        self.calls += 1
        logits = self(images)
        return Objective.of({"data": (1 + self.calls) * self.criterion(logits, targets)}, logits)


class OwnMean(Sound):
    def objective(self, images: Tensor, targets: Tensor) -> Objective:
        logits = self(images)
        return Objective.of({"data": F.cross_entropy(logits, targets)}, logits)


class Unused(Sound):
    def __init__(self, backbone: object, num_classes: int) -> None:
        super().__init__(backbone, num_classes)
        self.unused = nn.Linear(2, 2)


def local() -> type[Plain]:
    class Local(Sound):
        pass

    return Local


MUTANTS: list[tuple[type[Plain], str, str]] = [
    (NoDefault, "options", "option scale has no default."),
    (NoHint, "options", "option scale has no type hint"),
    (AnyHint, "options", "option scale accepts an object of any type"),
    (WrongDefault, "options", "the default of option scale, 'one', is not of its own type."),
    (Reserved, "options", "an option cannot be called pretrained"),
    (Unnamed, "options", "__init__ takes **options"),
    (Positional, "options", "depth is no option: write it after `*`"),
    (Unchecked, "options", "option width -1 is neither accepted nor refused with UsageError: RuntimeError: "),
    (OneMoreClass, "outputs", "head_logits['last'] returns (6, 4) for 6 images of 3 classes"),
    (NotFinite, "outputs", "head_logits['last'] is not finite."),
    (NoHeads, "outputs", "head_logits returns an empty dictionary, not a dictionary with at least one head"),
    (OtherForward, "outputs", "forward against combine_heads of head_logits: differs by up to "),
    (LossOnly, "outputs", "objective returns Tensor, not an Objective."),
    (OtherLogits, "outputs", "the objective's logits against forward: differs by up to 1."),
    (Random, "outputs", "differs"),
    (MapEmbeddings, "outputs", "embeddings returns (6, "),
    (OtherLoss, "terms", "the sum of the terms (data, same) against the loss: differs by up to "),
    (AttachedMeasure, "terms", "the measure mean is not detached."),
    (PerImage, "terms", "loss is (6,), not a scalar tensor."),
    (Detached, "gradients", "the loss depends on no parameter"),
    (HalfDetached, "gradients", "in the parameters of backbone, backward gives 0 and finite differences "),
    (WrongBackward, "gradients", "in the parameters of backbone, backward gives "),
    (Centred, "batch independence", "with the other images of its batch, in evaluation mode."),
    (Counting, "batch independence", "predictions in evaluation mode change seen."),
    (NotSaved, "files", "a saved and loaded network predicts otherwise"),
    (NoMaps, "maps", "activation_maps returns an empty dictionary, not "),
    (FlatMaps, "maps", "activation_maps['last'] is (6, "),
    (InfiniteMaps, "maps", "activation_maps['last'] is not finite."),
    (WrongBoxes, "maps", "end before they begin"),
    (WrongClassMaps, "class maps", "logits less the mean of the class maps: differs by up to "),
    (SameClassMaps, "class maps", "logits less the mean of the class maps: differs by up to "),
    (WrongLinearHeads, "linear heads", "linear_heads['last'] of its features against head_logits: differs"),
    (OtherFeatures, "linear heads", "head_features has first, linear_heads the heads last."),
    (OneOfTwoHeads, "linear heads", "heads_and_features has the heads last, head_logits last, other."),
    (OtherOfTwoHeads, "linear heads", "heads_and_features['other'] against head_logits: differs by up to "),
    (NothingToFit, "linear heads", "head_terms is empty"),
    (HardTargets, "soft targets", "set supports_soft_targets = False"),
    (OtherSoftTargets, "soft targets", "of the classes: differs by up to 0.1"),
    (LeavesTraining, "preparation", "prepare changes the mode of a module"),
    (MovesStatistics, "preparation", "prepare changes the running statistics "),
    (local(), "two ranks", "define Local at the top level of a file"),
    (Unused, "two ranks", "unused.weight, unused.bias get no gradient"),
]  # fmt: skip
SLOW_MUTANTS: list[tuple[type[Plain], str, str]] = [
    (Branching, "torch.export", "fails with "),
    (PairsOnly, "ONNX", "fails with "),
    (Remembering, "resume", "of a training that is stopped and resumed are not those of one that is not"),
    (OwnMean, "two ranks", "the mean of loss over two ranks: differs by up to "),
]


@pytest.mark.parametrize(
    ("mutant", "name", "words"),
    [*MUTANTS, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_MUTANTS)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_method_is_found_by_the_right_check(mutant: type[Plain], name: str, words: str) -> None:
    (check,) = (check for check in checks(mutant) if str(check) == name)
    with pytest.raises(AssertionError) as caught:
        check()
    message = str(caught.value)
    assert message.startswith(f"{mutant.__name__}: {name}: ")
    assert words in message
    assert "\n" not in message
    assert not [other for other in list_methods() if other.startswith("checked_")]


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, marks=[pytest.mark.slow] * (str(check) in SLOW), id=str(check))
        for check in checks(Sound, scale=2.0)
    ],
)
def test_a_sound_method_passes(check: object) -> None:
    check()  # type: ignore[operator]


def test_all_broken_promises_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from crossx import testing

    def skipped(subject: object) -> None:
        raise unittest.SkipTest("needs crossx[export].")

    kept = {name: check for name, check in testing._CHECKS.items() if name in ("outputs", "terms", "maps")}
    monkeypatch.setattr(testing, "_CHECKS", {**kept, "ONNX": skipped})
    with pytest.warns(UserWarning, match="ONNX was not checked: needs"):
        check_method(Sound, scale=2.0)

    class Broken(OtherLoss, FlatMaps):
        pass

    registered, state = dict(registry._REGISTRY), torch.random.get_rng_state()
    with pytest.warns(UserWarning, match="ONNX"), pytest.raises(AssertionError) as caught:
        check_method(Broken)
    assert [line.split(":")[1] for line in str(caught.value).splitlines()] == [" terms", " maps"]
    assert registered == registry._REGISTRY
    assert Broken.name == "plain"
    assert torch.equal(torch.random.get_rng_state(), state)


def test_wrong_outputs_are_told_without_what_follows_from_them() -> None:
    with pytest.raises(AssertionError) as caught:
        check_method(NoHeads)
    assert [line.partition(":")[2] for line in str(caught.value).splitlines()] == [
        " outputs: head_logits returns an empty dictionary, not a dictionary with at least one head.",
        " the checks after outputs were not run. Fix these first.",
    ]


def test_what_is_no_method_is_told() -> None:
    with pytest.raises(AssertionError, match="Linear: is no subclass"):
        check_method(nn.Linear)  # type: ignore[arg-type]


def test_an_option_of_another_type_is_told() -> None:
    with pytest.raises(
        AssertionError,
        match=r"outputs: fails with UsageError: .*: option scale is of",
    ):
        checks(Sound, scale="x")[1]()
