"""Starting points from clusters of a trunk's features."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from crossx.layers import prototype_scores
from crossx.losses import border_loss, centroid_concentration_loss, image_presence_loss

ITERATIONS = 50
"""Iterations of k-means."""
INTERIOR = 0.95
"""Share of the outermost positions that look less like the inside of an image than the object does."""
SPREAD = 4.0
"""Mean squared distance between prototypes at the start: at one of them, its share is about e^4 times another's."""
SHRINKAGE = 0.01
"""Share of the mean variance that is added to the variance of each channel, so that it can be inverted."""
REFINING_STEPS = 300
REFINING_RATE = 0.002
REFINING_IMAGES = 32
"""Steps, learning rate of Adam and images per step of ``refined_prototypes``."""
PRESENCE, CONCENTRATION, BORDER = 2.0, 10.0, 1.0
"""Weights of its terms: those that were chosen for the training of gates on a frozen trunk (docs/results/parts.md)."""


def cluster_centers(features: Tensor, count: int, seed: int) -> Tensor:
    """Return the k-means centres, (count, C), of features (n, C), n at least 1.

    If there are at most ``count`` distinct features, they are the centres and some are repeated; duplicates diverge in
    training because the classifier weights them differently.
    """
    features = features.unique(dim=0)
    if len(features) <= count:
        return features[torch.arange(count) % len(features)]
    # imported here because it takes half a second and only training needs it
    from scipy.cluster.vq import kmeans2

    with warnings.catch_warnings():
        # an empty cluster keeps its last centre
        warnings.filterwarnings("ignore", "One of the clusters is empty")
        centers, _ = kmeans2(features.double().numpy(), count, iter=ITERATIONS, minit="++", rng=seed)
    return torch.from_numpy(centers).to(features.dtype)


def object_positions(features: Tensor, outermost: Tensor) -> Tensor:
    """Return which positions look like the object: what is seldom in the outermost positions of an image.

    Fisher's linear discriminant of inner and outermost positions; the object's are above all but a few of the latter.
    Objects are seldom at the border, while the background is everywhere, so that inner positions that look like the
    border are background (the border is labelled, the inside is not).

    Args:
        features: (N, C), of all positions of many images.
        outermost: Which of them are in the outermost rows and columns of their image, bool (N,), some but not all.

    Returns:
        bool (N,); at least one is true.
    """
    features = features.double() - features.double().mean(0)
    number = len(features)
    shares = torch.stack([~outermost, outermost]).double() / number
    means = shares @ features / shares.sum(1, keepdim=True)  # (2, C)
    # within the two groups: the second moment less that of their means
    variance = features.T @ features / number - (means.T * shares.sum(1)) @ means
    variance.diagonal().add_(SHRINKAGE * variance.diagonal().mean() + 1e-12)
    scores = features @ torch.linalg.solve(variance, means[0] - means[1])
    found: Tensor = ~outermost & (scores > scores[outermost].quantile(INTERIOR))
    if not found.any():
        found = ~outermost & (scores == scores[~outermost].max())
    return found


def starting_prototypes(features: Tensor, outermost: Tensor, num_parts: int, seed: int = 0) -> Tensor:
    """Return prototypes of the parts of an object and, last, of the background; see ``PartAssignment``.

    Those of the parts are the centres of clusters of the object's positions, that of the background is the mean of all
    others. All are moved towards their mean until they are close enough for a softmax of distances to be soft.

    Args:
        features: (N, C), of all positions of many images.
        outermost: Which of them are outermost; see ``object_positions``.
        num_parts: P.
        seed: Seed of the clustering.

    Returns:
        (P + 1, C), float32.
    """
    on_object = object_positions(features, outermost)
    centers = cluster_centers(features[on_object], num_parts, seed)
    prototypes = torch.cat([centers, features[~on_object].mean(0, keepdim=True)]).double()
    mean = prototypes.mean(0)
    distances = torch.pdist(prototypes).square().mean()
    scale = (SPREAD / distances.clamp(min=SPREAD)).sqrt()
    return (mean + scale * (prototypes - mean)).float()


@torch.enable_grad()
def refined_prototypes(start: Tensor, maps: Tensor, activations: Tensor, seed: int = 0) -> Tensor:
    """Move prototypes so that each part is concentrated, present in every image, and not at the border.

    The terms are those of Cross-X's spatial gates on presence, concentration and border, on fixed features: classes
    have no part in it, and nothing else is trained.

    Args:
        start: Prototypes of the parts and, last, of the background, (P + 1, C); see ``starting_prototypes``.
        maps: z of many images, float32 (N, C, h, w).
        activations: O, the activation of the whole object, not negative, (N, h, w).
        seed: Seed of the images of each step.

    Returns:
        (P + 1, C), float32.
    """
    prototypes = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([prototypes], lr=REFINING_RATE)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(REFINING_STEPS):
        chosen = torch.randint(len(maps), (REFINING_IMAGES,), generator=generator)
        loss = part_loss(prototypes, maps[chosen], activations[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return prototypes.detach()


def part_loss(prototypes: Tensor, maps: Tensor, activations: Tensor) -> Tensor:
    """Return what ``refined_prototypes`` lowers, for the same arguments: the weighted sum of its terms."""
    shares = prototype_scores(maps, prototypes).softmax(1)
    parts, background = shares[:, :-1], shares[:, -1]
    return (
        PRESENCE * image_presence_loss(parts, activations)
        + CONCENTRATION * centroid_concentration_loss(parts)
        + BORDER * border_loss(background)
    )
