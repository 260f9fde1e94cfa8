"""Pretrained trunks. No other package imports timm."""

from crossx.backbones.blocks import synchronize_batch_norms
from crossx.backbones.create import create_backbone
from crossx.backbones.early import EarlyLayers, can_skip
from crossx.backbones.state_dict import WeightsFileError, load_trunk_weights, read_state_dict
from crossx.backbones.trunk import Backbone, Layer, Placement

__all__ = [
    "Backbone",
    "EarlyLayers",
    "Layer",
    "Placement",
    "WeightsFileError",
    "can_skip",
    "create_backbone",
    "load_trunk_weights",
    "read_state_dict",
    "synchronize_batch_norms",
]
