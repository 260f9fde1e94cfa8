"""Losses: each is a pure function from tensors to a scalar, and a thin module over it."""

from crossx.losses.c3s import (
    C3SLoss,
    c3s_loss,
    centre_correlations,
    part_correlations,
    summarize_correlations,
)
from crossx.losses.channel_grouping import concentration_loss, diversity_loss
from crossx.losses.classification import ClassificationLoss, classification_loss
from crossx.losses.cross_layer import CrossLayerLoss, cross_layer_loss
from crossx.losses.entropy import EntropyLoss, entropy_loss
from crossx.losses.mamc import MAMCLoss, mamc_loss, mamc_terms
from crossx.losses.map_correlation import map_correlations, separation_loss, view_loss
from crossx.losses.part_discovery import (
    assignment_entropy_loss,
    background_presence_loss,
    border_loss,
    centroid_concentration_loss,
    equivariance_loss,
    image_presence_loss,
    orthogonality_loss,
    outermost,
    presence_loss,
    relative_presence,
    total_variation_loss,
)
from crossx.losses.ranking import RankingLoss, ranking_loss, scale_ranking_loss
from crossx.losses.reinforce import reinforce_loss

__all__ = [
    "C3SLoss",
    "ClassificationLoss",
    "CrossLayerLoss",
    "EntropyLoss",
    "MAMCLoss",
    "RankingLoss",
    "assignment_entropy_loss",
    "background_presence_loss",
    "border_loss",
    "c3s_loss",
    "centre_correlations",
    "centroid_concentration_loss",
    "classification_loss",
    "concentration_loss",
    "cross_layer_loss",
    "diversity_loss",
    "entropy_loss",
    "equivariance_loss",
    "image_presence_loss",
    "mamc_loss",
    "mamc_terms",
    "map_correlations",
    "orthogonality_loss",
    "outermost",
    "part_correlations",
    "presence_loss",
    "ranking_loss",
    "reinforce_loss",
    "relative_presence",
    "scale_ranking_loss",
    "separation_loss",
    "summarize_correlations",
    "total_variation_loss",
    "view_loss",
]
