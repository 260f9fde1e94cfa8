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
from crossx.losses.ranking import RankingLoss, ranking_loss, scale_ranking_loss
from crossx.losses.reinforce import reinforce_loss
from crossx.losses.separation import separation_loss

__all__ = [
    "C3SLoss",
    "ClassificationLoss",
    "CrossLayerLoss",
    "EntropyLoss",
    "MAMCLoss",
    "RankingLoss",
    "c3s_loss",
    "centre_correlations",
    "classification_loss",
    "concentration_loss",
    "cross_layer_loss",
    "diversity_loss",
    "entropy_loss",
    "mamc_loss",
    "mamc_terms",
    "part_correlations",
    "ranking_loss",
    "reinforce_loss",
    "scale_ranking_loss",
    "separation_loss",
    "summarize_correlations",
]
