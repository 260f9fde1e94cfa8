"""Building blocks of networks; torch and torchvision only."""

from crossx.layers.affine_view import AffineView
from crossx.layers.anchors import anchor_boxes, select_boxes
from crossx.layers.channel_groups import (
    ChannelGrouping,
    attention_maps,
    attention_pool,
    channel_peaks,
    object_box,
    peak_boxes,
)
from crossx.layers.crops import crop_boxes, square_corners
from crossx.layers.feature_pyramid import MergedFeatures
from crossx.layers.filter_bank import FilterBank, energy_peaks
from crossx.layers.joining import join_normalized
from crossx.layers.kernel_pooling import BilinearPooling, TaylorSeriesKernel, signed_sqrt
from crossx.layers.modes import evaluation_mode
from crossx.layers.navigator import Navigator
from crossx.layers.osme import OSME, Gating, ResidualOSME, gate_maps
from crossx.layers.own_statistics import OwnStatistics, without_statistics
from crossx.layers.part_assignment import (
    PartAssignment,
    draw_prototypes,
    enlarge,
    join_stages,
    prototype_scores,
)
from crossx.layers.part_linear import PartLinear
from crossx.layers.pooling import global_pool
from crossx.layers.recompute import recompute
from crossx.layers.resize import shrink
from crossx.layers.separate_parts import MergedLogits, SeparateGates, SeparateOSME, convolution
from crossx.layers.tensor_sketch import TensorSketch
from crossx.layers.zoom import box_mask, zoom

__all__ = [
    "OSME",
    "AffineView",
    "BilinearPooling",
    "ChannelGrouping",
    "FilterBank",
    "Gating",
    "MergedFeatures",
    "MergedLogits",
    "Navigator",
    "OwnStatistics",
    "PartAssignment",
    "PartLinear",
    "ResidualOSME",
    "SeparateGates",
    "SeparateOSME",
    "TaylorSeriesKernel",
    "TensorSketch",
    "anchor_boxes",
    "attention_maps",
    "attention_pool",
    "box_mask",
    "channel_peaks",
    "convolution",
    "crop_boxes",
    "draw_prototypes",
    "energy_peaks",
    "enlarge",
    "evaluation_mode",
    "gate_maps",
    "global_pool",
    "join_normalized",
    "join_stages",
    "object_box",
    "peak_boxes",
    "prototype_scores",
    "recompute",
    "select_boxes",
    "shrink",
    "signed_sqrt",
    "square_corners",
    "without_statistics",
    "zoom",
]
