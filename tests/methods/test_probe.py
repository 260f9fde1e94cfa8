from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from torch import Tensor
from torch.nn import functional as F

from crossx.errors import UsageError
from crossx.methods import create_method
from crossx.methods.linear import PENALTY
from crossx.methods.probe import PENALTIES, Probe

CLASSES = 3


def build(backbone: str = "test_resnet", **options: object) -> Probe:
    torch.manual_seed(0)
    method = create_method("probe", backbone=backbone, num_classes=CLASSES, **options)
    assert isinstance(method, Probe)
    return method


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    """30 images whose class is a colour channel, with noise that hides some."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(CLASSES, (30,), generator=generator)
    images = torch.randn(30, 3, 64, 64, generator=generator)
    images[torch.arange(30), targets] += 0.03
    return images, targets


def batches(images: tuple[Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(images[0].split(8), images[1].split(8), strict=True)


def embed(method: Probe, images: Tensor) -> np.ndarray:
    """Return timm's own features in float64."""
    trunk = method.backbone.trunk.eval()
    with torch.no_grad():
        return trunk.forward_head(trunk.forward_features(images), pre_logits=True).double().numpy()


def scipy_logits(
    features: np.ndarray, targets: np.ndarray, penalty: float, queries: np.ndarray
) -> np.ndarray:
    """Return the logits of logistic regression on centred features of unit mean square norm."""
    mean = features.mean(0)
    scale = np.sqrt(((features - mean) ** 2).sum(1).mean())
    x, truth = (features - mean) / scale, np.eye(CLASSES)[targets]

    def function(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = flat[:-CLASSES].reshape(CLASSES, -1), flat[-CLASSES:]
        log_p = log_softmax(x @ weight.T + bias, axis=1)
        error = (np.exp(log_p) - truth) / len(x)
        loss = -(truth * log_p).sum() / len(x) + penalty / 2 * (weight**2).sum()
        return loss, np.concatenate(((error.T @ x + penalty * weight).ravel(), error.sum(0)))

    start = np.zeros(CLASSES * (x.shape[1] + 1))
    options = {"gtol": 1e-10, "ftol": 1e-16, "maxiter": 10_000, "maxfun": 100_000}
    found = minimize(function, start, jac=True, method="L-BFGS-B", options=options).x
    return ((queries - mean) / scale) @ found[:-CLASSES].reshape(CLASSES, -1).T + found[-CLASSES:]


@pytest.mark.parametrize("penalty", [1e-3, 0.1])
def test_the_head_is_scipys_logistic_regression(images: tuple[Tensor, Tensor], penalty: float) -> None:
    method = build(penalty=penalty)
    method.prepare(batches(images))
    features = embed(method, images[0])
    expected = scipy_logits(features, images[1].numpy(), penalty, features)
    with torch.no_grad():
        logits = method.eval()(images[0]).numpy()
    np.testing.assert_allclose(softmax(logits, 1), softmax(expected, 1), atol=2e-3)


@pytest.mark.slow
def test_the_penalty_is_the_best_on_a_fifth_of_each_class_and_the_head_is_fitted_on_all(
    images: tuple[Tensor, Tensor],
) -> None:
    method = build()
    method.prepare(batches(images))
    features, targets = embed(method, images[0]), images[1].numpy()
    held = np.zeros(len(targets), bool)
    for label in range(CLASSES):
        own = np.flatnonzero(targets == label)
        held[own[: int(0.2 * len(own))]] = True
    assert 3 <= held.sum() < 10
    scores = []
    for penalty in PENALTIES:
        logits = scipy_logits(features[~held], targets[~held], penalty, features[held])
        loss = -log_softmax(logits, axis=1)[np.arange(held.sum()), targets[held]].mean()
        scores.append(((logits.argmax(1) == targets[held]).mean(), -loss, penalty))
    chosen = max(scores)[2]
    expected = scipy_logits(features, targets, chosen, features)
    with torch.no_grad():
        logits = method.eval()(images[0]).numpy()
    np.testing.assert_allclose(softmax(logits, 1), softmax(expected, 1), atol=5e-3)
    others = [scipy_logits(features, targets, other, features) for other in PENALTIES if other != chosen]
    errors = [np.abs(softmax(logits, 1) - softmax(other, 1)).max() for other in others]
    assert min(errors) > np.abs(softmax(logits, 1) - softmax(expected, 1)).max()


def test_classes_too_small_to_hold_images_out_take_the_penalty_of_fit_heads(
    images: tuple[Tensor, Tensor],
) -> None:
    own = [images[1].eq(label).nonzero().flatten()[:4] for label in range(CLASSES)]
    few = torch.cat(own)
    chosen, given = build(), build(penalty=PENALTY)
    for method in (chosen, given):
        method.prepare([(images[0][few], images[1][few])])
    assert torch.equal(chosen.classifier.weight, given.classifier.weight)


@pytest.mark.parametrize("neighbors", [1, 5, 100])
def test_neighbors_are_those_of_a_loop(images: tuple[Tensor, Tensor], neighbors: int) -> None:
    method = build(head="knn", neighbors=neighbors, temperature=0.2)
    queries = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    method.prepare(batches(images))
    stored, seen = embed(method, images[0]), embed(method, queries)
    with torch.no_grad():
        probabilities = method.eval()(queries).softmax(1).numpy()
    for query, found in zip(seen, probabilities, strict=True):
        cosines = [query @ x / np.linalg.norm(query) / np.linalg.norm(x) for x in stored]
        nearest = sorted(range(len(stored)), key=lambda i: -cosines[i])[:neighbors]
        votes = np.zeros(CLASSES)
        for index in nearest:
            votes[images[1][index]] += np.exp(cosines[index] / 0.2)
        np.testing.assert_allclose(found, votes / votes.sum(), atol=1e-4)


@pytest.mark.parametrize("head", ["logistic", "sgd"])
def test_the_trunk_is_frozen(images: tuple[Tensor, Tensor], head: str) -> None:
    method = build(head=head).train()
    before = {key: value.clone() for key, value in method.backbone.state_dict().items()}
    classifier = method.classifier.weight.clone()
    method.prepare(batches(images))
    assert torch.equal(method.classifier.weight, classifier) == (head == "sgd")
    objective = method.objective(*images)
    objective.loss.backward()
    assert {key for key, value in method.named_parameters() if value.grad is not None} == {
        "classifier.weight",
        "classifier.bias",
    }
    torch.testing.assert_close(method.backbone.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "knn", "penalty": 0.1}, "penalty belongs to head logistic, not knn"),
        ({"neighbors": 3}, "neighbors belongs to head knn, not logistic"),
        ({"head": "sgd", "temperature": 0.1}, "temperature belongs to head knn, not sgd"),
        ({"head": "svm"}, "unknown head 'svm'"),
        ({"penalty": 0.0}, "penalty must be above 0, not 0.0"),
        ({"penalty": float("nan")}, "penalty must be above 0, not nan"),
        ({"head": "knn", "neighbors": 0}, "neighbors must be above 0, not 0"),
        ({"head": "knn", "temperature": -1.0}, "temperature must be above 0"),
        ({"layer": "fc6"}, "backbone 'test_resnet' has no fc6: only AlexNet and VGG"),
        ({"layer": "fc8"}, "unknown layer 'fc8'"),
    ],
)
def test_options_that_cannot_work(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(**options)


def test_fc6_of_vgg_is_the_first_hidden_layer() -> None:
    # a small one: 7 x 7 positions of 512 channels are 100 million weights
    method = build("vgg11", layer="fc6", backbone_args={"mlp_ratio": 0.01}).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        trunk = method.backbone.trunk
        maps = F.adaptive_avg_pool2d(trunk.features(images), 7)
        weight = trunk.pre_logits.fc1.weight
        expected = torch.relu(maps.flatten(1) @ weight.flatten(1).T + trunk.pre_logits.fc1.bias)
        torch.testing.assert_close(method.embeddings(images), expected, rtol=1e-4, atol=1e-5)
