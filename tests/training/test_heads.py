import copy

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from crossx.losses import ClassificationLoss
from crossx.methods import create_method, linear, list_methods
from crossx.methods.linear import PENALTY, fit_linear
from crossx.training.fit import fit
from crossx.training.heads import fit_heads

CLASSES = 3


def scipy_logistic_regression(features, targets, penalty):
    """Minimise the same function in float64 with SciPy, from the formula."""
    count, width = features.shape
    truth = np.eye(CLASSES)[targets]

    def function(flat):
        weight, bias = flat[: CLASSES * width].reshape(CLASSES, width), flat[CLASSES * width :]
        log_p = log_softmax(features @ weight.T + bias, axis=1)
        error = (np.exp(log_p) - truth) / count
        loss = -(truth * log_p).sum() / count + penalty / 2 * (weight**2).sum()
        return loss, np.concatenate(((error.T @ features + penalty * weight).ravel(), error.sum(0)))

    start = np.zeros(CLASSES * (width + 1))
    found = minimize(function, start, jac=True, method="L-BFGS-B", options={"gtol": 1e-9, "ftol": 1e-15}).x
    return found[: CLASSES * width].reshape(CLASSES, width), found[CLASSES * width :]


@pytest.fixture
def batches():
    """Four batches of eight images whose class is a colour channel."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(4):
        images = torch.randn(8, 3, 64, 64, generator=generator)
        targets = torch.randint(CLASSES, (8,), generator=generator)
        images[torch.arange(8), targets] += 1
        made.append((images, targets))
    return lambda: iter(made)


def build(name, **options):
    torch.manual_seed(0)
    return create_method(name, backbone="test_resnet", num_classes=CLASSES, **options)


def test_logistic_regression_equals_scipys():
    features = np.random.default_rng(0).normal(size=(60, 5))
    targets = np.arange(60) % CLASSES
    fitted = fit_linear(
        {"last": torch.tensor(features)},
        CLASSES,
        0.01,
        lambda logits: F.cross_entropy(logits["last"], torch.tensor(targets)),
    )
    weight, bias = fitted["last"]
    expected_weight, expected_bias = scipy_logistic_regression(features, targets, 0.01)
    np.testing.assert_allclose(weight, expected_weight, atol=2e-4)
    np.testing.assert_allclose(bias - bias.mean(), expected_bias - expected_bias.mean(), atol=2e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain", {}),
        ("maxent", {"gamma": 0.0}),
        ("kernel_pooling", {"sketch_size": 64}),
        ("crossx", {"cross_layer_weights": [0.0, 0.0]}),
    ],
)
def test_heads_are_the_logistic_regression_on_the_scaled_embeddings(name, options, batches):
    method = build(name, **options)
    assert fit_heads(method, batches)
    method.eval()
    images = torch.cat([images for images, _ in batches()])
    targets = torch.cat([targets for _, targets in batches()])
    with torch.no_grad():
        features = method.embeddings(images).double()
        logits = method(images)
    centred = features - features.mean(0)
    # each head's features have the mean square length that is its share of the whole width
    blocks = centred.split([head.in_features for head in method.linear_heads().values()], 1)
    scaled = torch.cat([block / (block.square().mean() * centred.shape[1]).sqrt() for block in blocks], 1)
    weight, bias = scipy_logistic_regression(scaled.numpy(), targets.numpy(), PENALTY)
    expected = scaled.numpy() @ weight.T + bias
    assert (logits.argmax(1) == targets).all()
    np.testing.assert_allclose(softmax(logits.numpy(), 1), softmax(expected, 1), atol=1e-3)


def sklearn_accuracy(features, targets):
    """Training accuracy of scikit-learn's logistic regression on standardised features."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=100.0, max_iter=2000))
    return model.fit(features, targets).score(features, targets)


# several heads on overlapping features, some of which are several vectors per image
@pytest.mark.parametrize("name", ["dfl", "dt_ram", "fcan", "ma_cnn", "nts", "ra_cnn"])
def test_every_head_is_fitted_on_its_own_features(name, batches):
    method = build(name)
    assert fit_heads(method, batches)
    method.eval()
    images = torch.cat([images for images, _ in batches()])
    targets = torch.cat([targets for _, targets in batches()])
    with torch.no_grad():
        own = method.head_features(images)
        assert own.keys() == method.linear_heads().keys()
        for head, features in own.items():
            logits = method.linear_heads()[head](features)  # (N, ..., K)
            labels = targets.repeat_interleave(logits[0].numel() // CLASSES)
            found = (logits.flatten(0, -2).argmax(1) == labels).float().mean()
            assert found >= sklearn_accuracy(features.flatten(0, -2), labels) - 0.05


@pytest.mark.parametrize("name", ["crossx", "maxent"])
def test_fitted_heads_are_a_minimum_of_the_objective(name, batches):
    """No small step from them lowers the terms that they are fitted by, on the whole training set."""
    method = build(name)
    fit_heads(method, batches)
    method.eval()
    images = torch.cat([images for images, _ in batches()])
    targets = torch.cat([targets for _, targets in batches()])
    with torch.no_grad():
        method_terms = method.head_terms(method.head_logits(images), targets)
        best = sum(method_terms.values())
        objective = method.objective(images, targets)
        for key, value in method_terms.items():
            torch.testing.assert_close(objective.terms[key], value)
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            moved = copy.deepcopy(method)
            for head in moved.linear_heads().values():
                head.bias += 0.1 * torch.randn(CLASSES, generator=generator)
            assert sum(moved.head_terms(moved.head_logits(images), targets).values()) > best


def test_only_heads_and_new_statistics_change(batches):
    method = build("crossx")
    method.train()
    modes = {name: module.training for name, module in method.named_modules()}
    before = {name: value.clone() for name, value in method.state_dict().items()}
    assert fit_heads(method, batches)
    changed = {name for name, value in method.state_dict().items() if not torch.equal(value, before[name])}
    of_heads = {name for name in before if name.startswith("heads.")}
    assert changed == of_heads | {
        f"merge.norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert {name: module.training for name, module in method.named_modules()} == modes
    assert method.merge.norm.momentum == 0.1
    # the merged maps' own mean and variance, computed from the maps
    method.eval()
    maps = []
    with torch.no_grad():
        for images, _ in batches():
            stages = method.backbone(images)
            method.merge.norm = torch.nn.Identity()
            maps.append(method.merge(stages["previous"], stages["last"]).flatten(1, 2))
    means = torch.stack([batch.mean((0, 2, 3)) for batch in maps]).mean(0)
    variances = torch.stack([batch.var((0, 2, 3)) for batch in maps]).mean(0)
    fitted = build("crossx")
    fit_heads(fitted, batches)
    torch.testing.assert_close(fitted.merge.norm.running_mean, means, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fitted.merge.norm.running_var, variances, rtol=1e-4, atol=1e-5)


def test_the_joined_head_of_nts_starts_as_that_of_the_image(batches):
    method = build("nts")
    fit_heads(method, batches)
    method.eval()
    images, _ = next(batches())
    with torch.no_grad():
        heads = method.head_logits(images)
    torch.testing.assert_close(heads["joined"], heads["raw"])


def test_label_smoothing_and_class_weights_count(batches):
    method = build("plain")
    method.criterion = ClassificationLoss(torch.tensor([1.0, 1.0, 50.0]), 0.0)
    fit_heads(method, batches)
    with torch.no_grad():
        images, targets = next(batches())
        method.eval()
        assert F.cross_entropy(method(images), targets) < 0.1
        # noise looks like the class that counts most
        assert method(torch.zeros(1, 3, 64, 64)).argmax() == 2


def test_no_more_features_are_kept_than_fit(batches, monkeypatch):
    method = build("plain")
    seen = []
    original = method.head_features
    monkeypatch.setattr(method, "head_features", lambda images: seen.append(len(images)) or original(images))
    monkeypatch.setattr(linear, "MAX_VALUES", 16 * method.classifier.in_features)
    assert fit_heads(method, batches)
    assert seen == [8, 8]


# dfl predicts with what its filters say directly, too, and dt_ram with its further steps
@pytest.mark.parametrize("name", sorted(set(list_methods()) - {"dfl", "dt_ram", "pdisconet"}))
def test_linear_heads_classify_their_features(name):
    method = build(name, **({"image_size": 64} if name == "mamc" else {})).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = method.head_features(images)
        logits = {name: head(features[name]) for name, head in method.linear_heads().items()}
        logits = {name: own.mean(1) if own.ndim == 3 else own for name, own in logits.items()}
        torch.testing.assert_close(method.combine_heads(logits), method(images))


def test_a_method_without_linear_heads_is_left_alone(batches):
    method = build("pdisconet")
    before = {name: value.clone() for name, value in method.state_dict().items()}
    assert not fit_heads(method, batches)
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


def test_a_run_starts_from_fitted_heads(make_config):
    """One step at a learning rate of almost nothing: what is validated are the fitted heads."""
    optim = {"fit_heads": 2, "lr": 1e-9, "freeze_batch_norm": True}
    run = fit(make_config(optim=optim, trainer={"max_epochs": 1, "limit_train_batches": 1}))
    assert run.read_info()["selection"]["value"] == 1


def test_a_run_whose_method_has_none_says_so(make_config, caplog):
    options = {"method": "pdisconet", "num_parts": 2}
    fit(
        make_config(
            model=options, optim={"fit_heads": 2}, trainer={"max_epochs": 1, "limit_train_batches": 1}
        )
    )
    assert "method 'pdisconet' has no linear heads to fit; its heads start at random" in caplog.text
