"""Building blocks of networks; torch only."""

from crossx.layers.feature_pyramid import MergedFeatures
from crossx.layers.filter_bank import FilterBank, energy_peaks
from crossx.layers.osme import OSME, ResidualOSME
from crossx.layers.pooling import global_pool
from crossx.layers.recompute import recompute

__all__ = [
    "OSME",
    "FilterBank",
    "MergedFeatures",
    "ResidualOSME",
    "energy_peaks",
    "global_pool",
    "recompute",
]
