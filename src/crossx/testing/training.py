"""The promises of the contract that take trainings: the same after a resume, and on two ranks."""

from __future__ import annotations

import importlib
import operator
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from crossx import plugins
from crossx.errors import Stopped, first_few
from crossx.losses import ClassificationLoss
from crossx.methods import registry
from crossx.methods.base import Method, Objective
from crossx.testing.subject import CLASSES, Subject, compare, fail, known
from crossx.training.config import Config

STOPPED = 4
"""Step at which the tiny training is stopped, the last of two epochs of two steps each."""
RANKS = 2
TIMEOUT = 600


def check_resume(subject: Subject) -> None:
    """Compare a training that was stopped and resumed with one that was not, bit for bit."""
    from crossx.training.fit import fit, resume

    with tempfile.TemporaryDirectory(prefix="crossx-") as folder:
        whole = fit(_tiny_config(subject, Path(folder), "whole"))
        config = _tiny_config(subject, Path(folder), "stopped")
        with _stopped_at(subject.cls, STOPPED):
            try:
                fit(config)
            except Stopped:
                pass
            else:
                fail(f"training computes the objective fewer than {STOPPED} times.")
        resumed = resume(config.run_path())
        expected, found = load_file(whole.weights), load_file(resumed.weights)
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    if different:
        fail(
            f"{first_few(different, 2)} of a training that is stopped and resumed are not those of one that is not: "
            "keep what training needs in parameters and buffers, not in other attributes, and draw random numbers from "
            "torch's generators."
        )
    start = subject.build().state_dict()
    if all(name in expected and torch.equal(expected[name], value) for name, value in start.items()):
        fail("training changes no parameter.")


@contextmanager
def _stopped_at(cls: type[Method], step: int) -> Iterator[None]:
    """Stop a training as Ctrl-C does, when it computes the objective for the given time."""
    name = "part_objective" if cls.uses_parts else "objective"
    own, original = cls.__dict__.get(name), getattr(cls, name)
    calls = 0

    def interrupted(self: Method, *arguments: Tensor) -> Objective:
        nonlocal calls
        calls += 1
        if calls == step:
            raise KeyboardInterrupt
        found: Objective = original(self, *arguments)
        return found

    setattr(cls, name, interrupted)
    try:
        yield
    finally:
        if own is None:
            delattr(cls, name)
        else:
            setattr(cls, name, own)


def _tiny_config(subject: Subject, folder: Path, name: str) -> Config:
    sizes = {"num_classes": len(CLASSES), "images_per_class": 12}
    return Config.from_dict(
        {
            "model": {
                "method": subject.name,
                "backbone": subject.backbone,
                "backbone_args": subject.backbone_args,
                "pretrained": False,
                **subject.options,
            },
            "data": {
                "dataset": "synthetic",
                "root": str(folder / "birds"),
                **sizes,
                "image_size": subject.image_size,
                "batch_size": 8,
                "num_workers": 0,
            },
            "optim": {"selection": "last", "schedule": "constant", "lr": 0.003},
            "trainer": {
                "max_epochs": 2,
                "limit_train_batches": 2,
                "checkpoint_every_n_steps": 1,
                "accelerator": "cpu",
                "devices": 1,
                "logger": False,
                "enable_progress_bar": False,
            },
            "output": str(folder / name),
        }
    )


class _Trained(nn.Module):
    """DDP hooks into ``forward`` only."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.subject = subject
        # batch statistics are a rank's own
        self.method = subject.build().eval()
        self.method.criterion = ClassificationLoss(torch.tensor([0.5, 1.0, 3.0]), 0.1)

    def forward(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        found = self.subject.compute(self.method, images, targets)
        return {"loss": found.loss, **found.terms, **found.measures}

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: parameter.grad for name, parameter in self.method.named_parameters()}


def check_two_ranks(subject: Subject) -> None:
    """Test that losses and gradients on two ranks are those of one process on the whole batch."""
    cls = subject.cls
    if "<" in cls.__qualname__ or subject.file is None:
        fail(f"define {cls.__name__} at the top level of a file, so that other processes can import it.")
    one = _Trained(subject)
    values = one(*subject.batch())
    values["loss"].backward()
    unused = [
        name
        for name, parameter in one.method.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
    if unused:
        fail(
            f"{first_few(unused, 2)} get no gradient, for which the ranks would wait: use them in the objective, or "
            "set requires_grad to False."
        )
    ranks = _run_ranks(subject)
    for name, value in values.items():
        mean = torch.stack([rank[0][name] for rank in ranks]).mean()
        compare(
            f"the mean of {name} over two ranks", mean, value.detach(), atol=1e-6,
            why=" from that of one process on the whole batch: see self.criterion and crossx.distributed.batch_mean",
        )  # fmt: skip
    for name, gradient in one.gradients().items():
        for rank in ranks:
            if gradient is not None:
                compare(
                    f"the gradient of {name} on two ranks", rank[1][name], gradient, atol=1e-5,
                    why=" from that of one process on the whole batch",
                )  # fmt: skip


def _run_ranks(subject: Subject) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Compute the objective in two fresh processes, each on its part of the batch."""
    cls = subject.cls
    where = (cls.__module__, str(subject.file), cls.__qualname__, registry.imported_methods())
    settings = (subject.backbone, subject.backbone_args, subject.image_size, subject.options)
    with tempfile.TemporaryDirectory(prefix="crossx-") as folder:
        (Path(folder) / "subject").write_bytes(pickle.dumps((where, settings)))
        code = "import sys; from crossx.testing.training import run_rank; run_rank(sys.argv[1], int(sys.argv[2]))"
        variables = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", code, folder, str(rank)],
                env={**os.environ, **variables},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(RANKS)
        ]
        try:
            said = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
        except subprocess.TimeoutExpired:
            fail("two ranks wait for each other: do they exchange the same tensors in the same order?")
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.communicate()
        for process, text in zip(processes, said, strict=True):
            if process.returncode:
                last = text.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
                fail(f"a rank fails with {last[0]}.")
        return [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=True) for rank in range(RANKS)]


def run_rank(folder: str, rank: int) -> None:
    """Compute one rank's part, in a process of its own."""
    torch.set_num_threads(1)
    (module, file, qualname, imports), settings = pickle.loads((Path(folder) / "subject").read_bytes())
    registry.import_methods(imports)
    subject = Subject(_find_class(module, file, qualname), *settings)
    meeting = f"file://{Path(folder).resolve() / 'ranks'}"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    with known(subject):
        trained = _Trained(subject)
        parallel = DistributedDataParallel(trained)
        images, targets = subject.batch()
        own = slice(4) if rank == 0 else slice(4, None)
        values = parallel(images[own], targets[own])
        values["loss"].backward()
    gradients = {name: value for name, value in trained.gradients().items() if value is not None}
    torch.save(
        ({name: value.detach() for name, value in values.items()}, gradients), f"{folder}/rank{rank}.pt"
    )
    distributed.destroy_process_group()


def _find_class(module: str, file: str, qualname: str) -> type[Method]:
    """Import a class by its module, or by its file if another process does not find the module."""
    found: Any = sys.modules.get(module) if module != "__main__" else None
    if found is None:
        try:
            found = importlib.import_module(module) if module != "__main__" else None
        except ImportError:
            found = None
    if found is None or getattr(found, "__file__", None) != file:
        path = Path(file)
        found = plugins.Source("", path, plugins.digest(path)).execute()
    cls: type[Method] = operator.attrgetter(qualname)(found)
    return cls
