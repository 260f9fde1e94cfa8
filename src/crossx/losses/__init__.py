"""Losses: tensors in, scalar out; a pure function and a thin module each."""

from crossx.losses.c3s import C3SLoss, c3s_loss, part_correlations, summarize_correlations
from crossx.losses.classification import ClassificationLoss, classification_loss
from crossx.losses.cross_layer import CrossLayerLoss, cross_layer_loss
from crossx.losses.ranking import RankingLoss, ranking_loss

__all__ = [
    "C3SLoss",
    "ClassificationLoss",
    "CrossLayerLoss",
    "RankingLoss",
    "c3s_loss",
    "classification_loss",
    "cross_layer_loss",
    "part_correlations",
    "ranking_loss",
    "summarize_correlations",
]
