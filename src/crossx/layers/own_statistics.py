"""Batch norm statistics of another kind of input for a network that is shared by several kinds."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def without_statistics(network: nn.Module, *inputs: Tensor) -> Any:
    """Return ``network(*inputs)`` without adding them to the running statistics of its batch norms."""
    copies = {
        name: buffer.clone()
        for name, buffer in network.named_buffers()
        if name.rpartition(".")[2] in STATISTICS
    }
    return functional_call(network, copies, inputs)


class OwnStatistics(nn.Module):
    """Running statistics of a network's batch norms for one kind of input, such as crops instead of whole images.

    Weights and the statistics of a batch in training are shared as before. Only the running means and variances, which
    evaluation uses, are the kind's own: averages over several kinds fit none of them. They start as copies of the
    network's and are exported as constants.

    Args:
        network: The shared network. It is not kept: pass it to every call.

    Attributes:
        names: Name of a buffer here -> that of the network's buffer whose place it takes.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.names = {
            name.replace(".", "__"): name
            for name, _ in network.named_buffers()
            if name.rpartition(".")[2] in STATISTICS
        }
        buffers = dict(network.named_buffers())
        for own, name in self.names.items():
            self.register_buffer(own, buffers[name].clone())

    def forward(self, network: nn.Module, *inputs: Tensor) -> Any:
        """Return ``network(*inputs)``, computed with and (in training) added to these statistics."""
        statistics = {name: getattr(self, own) for own, name in self.names.items()}
        return functional_call(network, statistics, inputs)
