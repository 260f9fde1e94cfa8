"""Building blocks of networks; torch only."""

from crossx.layers.feature_pyramid import MergedFeatures
from crossx.layers.osme import OSME, ResidualOSME
from crossx.layers.part_linear import PartLinear
from crossx.layers.pooling import global_pool
from crossx.layers.recompute import recompute

__all__ = ["OSME", "MergedFeatures", "PartLinear", "ResidualOSME", "global_pool", "recompute"]
