import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from crossx.evaluation.parts.keypoints import (
    adjusted_rand_index,
    assignments,
    centroids,
    find_centroids,
    keypoint_agreement,
    label_keypoints,
    regression_errors,
    summarize_errors,
)
from crossx.evaluation.parts.measures import Bootstrap, mass

SIDE = 56


def made_up(images, seed, parts=3, keypoints=4):
    generator = torch.Generator().manual_seed(seed)
    maps = (3 * torch.randn(images, parts + 1, 7, 7, generator=generator)).softmax(1)[:, :parts]
    points = torch.rand(images, keypoints, 2, generator=generator)
    return maps, points, torch.rand(images, keypoints, generator=generator) > 0.3


def test_labels_nmi_and_ari_against_scikit_learn():
    maps, points, visible = made_up(20, 0)
    scores = assignments(maps, are_shares=True)
    large = F.interpolate(scores, (SIDE, SIDE), mode="bilinear")
    found, true = [], []
    for image, k in itertools.product(range(20), range(4)):
        if visible[image, k]:
            x, y = (math.floor(value) for value in (points[image, k] * SIDE).tolist())
            found.append(int(large[image, :, y, x].argmax()))
            true.append(k)
    labels = label_keypoints(scores, points, SIDE)
    assert labels[visible].tolist() == found
    result = keypoint_agreement(labels, labels, visible, 4, Bootstrap(20))
    for name, expected in (
        ("nmi", normalized_mutual_info_score(true, found)),
        ("ari", adjusted_rand_score(true, found)),
    ):
        assert result[name]["value"] == pytest.approx(expected, abs=1e-9)
        assert result[name]["frame"] == result[name]["value"]
        assert result[name]["interval"][0] <= result[name]["interval"][1]


def test_scaled_maps_give_the_background_what_is_below_half_of_their_range():
    maps = torch.tensor([[[[0.0, 4.0, 1.0]], [[9.0, 5.0, 5.0]]]])
    assert assignments(maps, are_shares=False).argmax(1).tolist() == [[[1, 0, 2]]]
    assert assignments(torch.ones(1, 2, 2, 2), are_shares=False).argmax(1).unique().tolist() == [2]


def test_chance_keeps_the_labels_of_each_image():
    labels = torch.arange(4).repeat(30, 1)
    visible = torch.rand(30, 4, generator=torch.Generator().manual_seed(0)) > 0.4
    result = keypoint_agreement(labels, torch.zeros_like(labels), visible, 4, Bootstrap(30))
    for name in ("nmi", "ari"):
        assert result[name]["value"] == pytest.approx(1)
        assert abs(result[name]["chance"]) < 0.3
        assert result[name]["frame"] == pytest.approx(0)
    # one label per image: permuting changes nothing
    single = torch.arange(30).remainder(4)[:, None].expand(30, 4)
    same = keypoint_agreement(single, single, visible, 4, Bootstrap(30))
    assert same["nmi"]["chance"] == pytest.approx(same["nmi"]["value"])


@pytest.mark.parametrize("table", [[[5, 0], [0, 0]], [[1, 0], [0, 0]], [[0, 0], [0, 0]], [[2, 3], [0, 0]]])
def test_degenerate_tables(table):
    pairs = [(k, row) for row in range(2) for k in range(2) for _ in range(table[row][k])]
    true, found = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    expected = adjusted_rand_score(true, found) if pairs else 1.0
    assert float(adjusted_rand_index(torch.tensor(table))) == pytest.approx(expected)


def test_centroids_against_a_loop():
    maps, *_ = made_up(3, 1)
    found = centroids(maps, SIDE)
    for image, p in itertools.product(range(3), range(3)):
        values = maps[image, p].double().numpy()
        rows, columns = np.mgrid[:7, :7] * (SIDE / 7)
        expected = [(columns * values).sum() / values.sum(), (rows * values).sum() / values.sum()]
        assert found[image, p].tolist() == pytest.approx(expected, abs=1e-3)
    assert centroids(torch.zeros(1, 1, 7, 7), SIDE).flatten().tolist() == pytest.approx([24, 24])
    of_shares, active = find_centroids(maps, SIDE, are_shares=True)
    assert torch.equal(of_shares, found)
    assert torch.equal(active, maps.amax((2, 3)) > 0.5)
    others, always = find_centroids(-maps, SIDE, are_shares=False)
    torch.testing.assert_close(others, centroids(mass(-maps), SIDE))
    assert always.all()


def regression_data(images, seed):
    generator = np.random.default_rng(seed)
    centres = generator.random((images, 3, 2))
    active = generator.random((images, 3)) > 0.2
    points = centres[:, [0, 1, 2, 0]] * 0.6 + generator.random((images, 4, 2)) * 0.3
    return centres, active, points, generator.random((images, 4)) > 0.3


def test_regression_against_scikit_learn():
    test, train = regression_data(25, 0), regression_data(40, 1)
    test[3][:, 3] = False  # shown by no image to measure
    train[3][:, 2] = False  # by none to fit
    errors = regression_errors(*test, train)
    assert np.isnan(errors[:, 2:]).all()
    assert (np.isfinite(errors[:, :2]) == test[3][:, :2]).all()
    for k in range(2):
        inputs, outputs = StandardScaler(), StandardScaler()
        chosen, asked = train[3][:, k], test[3][:, k]
        fit = inputs.fit_transform(train[0][chosen].reshape(-1, 6)) * train[1][chosen].repeat(2, 1)
        model = LinearRegression(fit_intercept=False).fit(fit, outputs.fit_transform(train[2][chosen, k]))
        given = inputs.transform(test[0][asked].reshape(-1, 6)) * test[1][asked].repeat(2, 1)
        predicted = outputs.inverse_transform(model.predict(given))
        expected = np.sqrt(((predicted - test[2][asked, k]) ** 2).sum(1))
        np.testing.assert_allclose(errors[asked, k], expected, atol=1e-9)
    result = summarize_errors(errors, errors, errors, Bootstrap(25))
    assert result["value"] == pytest.approx(np.nanmean(errors))
    assert result["interval"][0] < result["value"] < result["interval"][1]
    assert summarize_errors(np.full((25, 2), np.nan), errors, errors, Bootstrap(25)) is None


@pytest.mark.parametrize(("images", "measured"), [(5, False), (7, False), (8, True)])
def test_an_exact_fit_is_not_measured(images, measured):
    """Six regressors and the mean fit seven images exactly, whatever the keypoints are."""
    test, train = regression_data(9, 2), regression_data(images, 3)
    for of_images in (test, train):
        of_images[3][:] = True
    generator = np.random.default_rng(0)
    train[1][:] = True
    train[2][:] = generator.random(train[2].shape)
    inputs, outputs = StandardScaler(), StandardScaler()
    fit = inputs.fit_transform(train[0].reshape(images, 6))
    model = LinearRegression(fit_intercept=False).fit(fit, outputs.fit_transform(train[2][:, 0]))
    residual = np.abs(model.predict(fit) - outputs.transform(train[2][:, 0])).max()
    assert (residual > 1e-6) == measured
    assert np.isfinite(regression_errors(*test, train)).all() == measured
    assert np.isfinite(regression_errors(*test, train)).any() == measured


def test_one_part_has_no_agreement():
    labels = torch.tensor([[0], [1], [0]])
    assert keypoint_agreement(labels, labels, torch.ones(3, 1, dtype=torch.bool), 3, Bootstrap(3)) == {
        "nmi": None,
        "ari": None,
    }


def test_constant_centroids_predict_the_mean():
    test, train = regression_data(9, 2), regression_data(30, 3)
    constant = (np.full((9, 3, 2), 0.3), np.ones((9, 3), bool), *test[2:])
    fit = (np.full((30, 3, 2), 0.3), np.ones((30, 3), bool), *train[2:])
    errors = regression_errors(*constant, fit)
    mean = train[2][train[3][:, 1], 1].mean(0)
    expected = np.hypot(*(test[2][:, 1] - mean).T)
    np.testing.assert_allclose(errors[:, 1], np.where(test[3][:, 1], expected, np.nan))
