"""Building blocks of networks; torch and torchvision only."""

from crossx.layers.anchors import anchor_boxes, select_boxes
from crossx.layers.crops import crop_boxes
from crossx.layers.feature_pyramid import MergedFeatures
from crossx.layers.navigator import Navigator
from crossx.layers.osme import OSME, ResidualOSME
from crossx.layers.pooling import global_pool
from crossx.layers.recompute import recompute

__all__ = [
    "OSME",
    "MergedFeatures",
    "Navigator",
    "ResidualOSME",
    "anchor_boxes",
    "crop_boxes",
    "global_pool",
    "recompute",
    "select_boxes",
]
