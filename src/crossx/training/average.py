"""The moving average of the weights (``optim.ema_decay``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from crossx.training.task import Task


class Average:
    """An exponential moving average of the weights and statistics of a network, warmed up.

    Args:
        task: The network, on its device.
        decay: Decay after the warm-up, see ``warmed_up_decay``.
    """

    def __init__(self, task: Task, decay: float) -> None:
        self._decay, self._step = decay, 0
        self._model = AveragedModel(task, multi_avg_fn=self._update, use_buffers=True)
        # read at every step; on a GPU that would synchronise
        self._model.n_averaged = self._model.n_averaged.cpu()

    @property
    def task(self) -> Task:
        """The network with the averaged weights."""
        return cast(Task, self._model.module)

    @property
    def updates(self) -> int:
        """Number of updates so far."""
        return int(self._model.n_averaged)

    def update(self, task: Task, step: int) -> None:
        """Add the weights after an optimiser step, counted from 1."""
        self._step = step
        self._model.update_parameters(task)

    def load(self, weights: Mapping[str, Any], updates: int) -> None:
        """Restore the averaged weights of a checkpoint."""
        self.task.load_state_dict(weights)
        self._model.n_averaged.fill_(updates)

    @contextmanager
    def copying_changes(self, task: Task) -> Iterator[None]:
        """Replace in the average what the block changes in the network; their average would be neither."""
        before = {key: value.clone() for key, value in task.state_dict().items()}
        yield
        averages = self.task.state_dict()
        for key, value in task.state_dict().items():
            if not torch.equal(value, before[key]):
                averages[key].copy_(value)

    def _update(self, averages: Any, values: Any, count: Tensor | int) -> None:
        if averages[0].is_floating_point():
            get_ema_multi_avg_fn(warmed_up_decay(self._decay, self._step - 1))(averages, values, count)
        else:
            # integers: PyTorch's average of an integer with itself may round down
            torch._foreach_copy_(averages, values)


def warmed_up_decay(decay: float, updates: int) -> float:
    """Return the decay of a moving average after ``updates`` updates, warmed up.

    From https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage. With a constant decay of 0.999,
    the initial weights would still have a weight of 82% after 200 steps.
    """
    return min(decay, (1 + updates) / (10 + updates))
