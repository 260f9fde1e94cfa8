"""The options of Cross-X that are to make excitations parts, and networks with them."""

import torch
from torch import Tensor

from crossx.methods import CrossX, create_method

COMPETING = {"gates": "competing", "background": True}
OPTIONS = {
    "competing": {"gates": "competing"},
    "background": COMPETING,
    "centred": {"c3s_centred": True},
    "separation": {"separation_weights": [0.5, 0.25]},
    "presence": {"presence_weights": [0.5, 0.25]},
    "equivariance": {"equivariance_weights": [0.5, 0.25]},
    "part": {"part_weights": [0.5, 0.25, 0.125]},
}
ALL = {name: value for options in OPTIONS.values() for name, value in options.items()}
SPATIAL = {
    "gates": "spatial",
    "concentration_weight": 10.0,
    "border_weight": 2.0,
    **{
        name: value
        for option in ("separation", "presence", "part")
        for name, value in OPTIONS[option].items()
    },
}
WHOLE = SPATIAL | {"whole": True}
FOLLOWING = SPATIAL | {"detach_assignment": True, "detach_shares": True, "assignment_lr_factor": 10.0}
CASES = {**OPTIONS, "all": ALL, "spatial": SPATIAL, "whole": WHOLE, "following": FOLLOWING}
TARGETS = torch.tensor([0, 2, 1])


def build(backbone: str = "test_resnet", num_classes: int = 3, **options: object) -> CrossX:
    torch.manual_seed(0)
    method = create_method("crossx", backbone=backbone, num_classes=num_classes, **options)
    assert isinstance(method, CrossX)
    return method


def images(number: int = 3, height: int = 96, width: int = 64) -> Tensor:
    return torch.randn(number, 3, height, width, generator=torch.Generator().manual_seed(1))
