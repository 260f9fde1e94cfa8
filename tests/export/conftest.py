"""The one slow step of the tests of exported files, taken once for each network."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn


@pytest.fixture(scope="module")
def one_onnx_export() -> Iterator[None]:
    """Give what torch.onnx.export gave for the same weights before: OpenVINO's file and int8 are made of it, too."""
    exported: dict[tuple[Any, ...], Any] = {}
    export = torch.onnx.export

    def once(network: nn.Module, *args: Any, **options: Any) -> Any:
        state = network.state_dict()
        key = tuple((name, value.dtype, value.double().sum().item()) for name, value in state.items())
        if key not in exported:
            exported[key] = export(network, *args, **options)
        return exported[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", once)
        yield
