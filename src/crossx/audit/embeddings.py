"""A pretrained backbone as the network of an audit."""

from __future__ import annotations

import torch

from crossx.data.config import DataConfig
from crossx.data.transforms import preprocessing_for
from crossx.errors import CrossXError, UsageError, first_line
from crossx.evaluation.device import select_device
from crossx.methods.registry import create_method
from crossx.methods.weights import describe
from crossx.predict.predictor import Predictor

BACKBONE = "resnet50.tv_in1k"
"""The default of `crossx fit`."""


def load_backbone(name: str, device: str = "auto") -> Predictor:
    """Return a predictor whose features are those of a pretrained backbone, at the image size of its pretraining.

    Args:
        name: See ``create_backbone``.
        device: See ``select_device``.

    Raises:
        UsageError: If there is no such backbone or device.
        CrossXError: If its weights cannot be loaded.
    """
    chosen = select_device(device)
    try:
        method = create_method("plain", backbone=name, num_classes=1, pretrained=True)
    except UsageError:
        raise
    except CrossXError as error:
        reason = first_line(error).partition(". Check the network")[0]
        raise CrossXError(
            f"{reason}. Check the network, or give --backbone local-dir:FOLDER with pretrained weights, or --run RUN."
        ) from error
    # it starts at random, and features of equal networks have equal checksums
    for head in method.linear_heads().values():
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    own = method.backbone.data_config
    preprocessing = preprocessing_for(DataConfig(image_size=int(own["input_size"][-1])), own)
    spec = describe(method, classes=("image",), preprocessing=preprocessing, dataset="folder", levels={})
    return Predictor.from_method(method, spec, chosen)
