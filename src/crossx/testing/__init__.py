"""Tests of a method against the contract, for methods in packages of their own.

::

    from crossx.testing import check_method, checks

    def test_method():
        check_method(MyMethod, channels=8)

    @pytest.mark.parametrize("check", checks(MyMethod, channels=8), ids=str)
    def test_each_promise(check):
        check()

Needs no pytest. The networks and images are tiny; all checks together take well under a minute on one core.
"""

from __future__ import annotations

import os
import random
import unittest
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from crossx import plugins
from crossx.methods.base import Method
from crossx.testing import promises, training
from crossx.testing.subject import BrokenError, Subject, known

__all__ = ["Check", "check_method", "checks"]


@dataclass(frozen=True)
class Check:
    """One promise of the contract; calling it tests the promise.

    Raises, when called:
        AssertionError: If the method breaks it: one line that says how.
        unittest.SkipTest: If a library that it needs is not installed; pytest shows it as skipped.
    """

    name: str
    subject: Subject = field(repr=False)
    function: Callable[[Subject], None] = field(repr=False)

    def __str__(self) -> str:
        return self.name

    def __call__(self) -> None:
        """Test the promise."""
        about = f"{self.subject.cls.__name__}: {self.name}:"
        with _random_state_kept(), known(self.subject), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self.function(self.subject)
            except unittest.SkipTest:
                raise
            except BrokenError as failure:
                raise AssertionError(f"{about} {failure}") from None
            except Exception as error:
                reason = plugins.failure(error, self.subject.file)
                raise AssertionError(f"{about} fails with {reason}.") from error


def checks(
    cls: type[Method],
    *,
    backbone: str = "test_resnet",
    backbone_args: Mapping[str, Any] | None = None,
    image_size: int = 64,
    **options: Any,
) -> list[Check]:
    """Return the checks of a method, to run them one by one, such as by ``pytest.mark.parametrize``.

    Args:
        cls: The method's class, at the top level of a module. It need not be registered.
        backbone: A timm model, as small as the method takes it.
        backbone_args: Further arguments of ``timm.create_model``.
        image_size: Side of the images in pixels.
        **options: Options of the method; best those that make its own layers small.
    """
    subject = Subject(cls, backbone, dict(backbone_args or {}), image_size, options)
    return [Check(name, subject, function) for name, function in _CHECKS.items()]


def check_method(cls: type[Method], **settings: Any) -> None:
    """Test everything that a method owes to the contract.

    If ``outputs`` fails, the checks after it are not run: they would fail for the same reason.

    Args:
        cls: The method's class, at the top level of a module. It need not be registered.
        **settings: The arguments of ``checks``, options of the method among them.

    Raises:
        AssertionError: If it breaks a promise: one line for each.
    """
    broken = []
    for check in checks(cls, **settings):
        try:
            check()
        except unittest.SkipTest as skipped:
            warnings.warn(f"{check} was not checked: {skipped}", stacklevel=2)
        except AssertionError as error:
            broken.append(str(error))
            if str(check) == "outputs":
                broken.append(f"{cls.__name__}: the checks after outputs were not run. Fix these first.")
                break
    if broken:
        raise AssertionError("\n".join(broken))


@contextmanager
def _random_state_kept() -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    seeds = {name: os.environ.get(name) for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")}
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            for name, value in seeds.items():
                if value is None:
                    os.environ.pop(name, None)


_CHECKS: Mapping[str, Callable[[Subject], None]] = {
    "options": promises.check_options,
    "outputs": promises.check_outputs,
    "terms": promises.check_terms,
    "gradients": promises.check_gradients,
    "batch independence": promises.check_batch,
    "files": promises.check_files,
    "maps": promises.check_maps,
    "class maps": promises.check_class_maps,
    "linear heads": promises.check_linear_heads,
    "soft targets": promises.check_soft_targets,
    "preparation": promises.check_preparation,
    "torch.export": promises.check_export,
    "ONNX": promises.check_onnx,
    "resume": training.check_resume,
    "two ranks": training.check_two_ranks,
}
