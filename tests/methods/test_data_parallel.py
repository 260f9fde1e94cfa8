"""Two ranks against one process on the whole batch, through DDP and the whole method."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from crossx import methods
from crossx.backbones import synchronize_batch_norms
from crossx.losses import ClassificationLoss
from crossx.methods import Method, create_method, list_methods
from distributed import run_on_two_ranks


class Case(NamedTuple):
    """How a batch of six is trained on.

    Attributes:
        first: Images that the first rank has, in each micro-batch.
        weighted: Whether classes are weighted, and labels smoothed.
        method: Its name.
        options: Its options.
        dtype: Of parameters and images.
    """

    first: tuple[int, ...]
    weighted: bool = False
    method: str = "crossx"
    options: Mapping[str, Any] = {}
    dtype: torch.dtype = torch.float32


PAPER, RELEASED = {"c3s_form": "paper"}, {"c3s_form": "released"}
PARTS = {
    "gates": "competing",
    "background": True,
    "c3s_centred": True,
    "separation_weights": [1, 1],
    "presence_weights": [1, 1],
    "equivariance_weights": [1, 1],
    "part_weights": [1, 1, 1],
}
CASES = {
    "paper, even": Case((3,), options=PAPER),
    "released, even": Case((3,), options=RELEASED),
    "paper, uneven": Case((4,), options=PAPER),
    "released, uneven": Case((4,), options=RELEASED),
    "paper, one image": Case((5,), weighted=True, options=PAPER),
    "released, one image": Case((5,), weighted=True, options=RELEASED),
    "paper, accumulated": Case((3, 5), options=PAPER),
    "released, accumulated": Case((4, 3), weighted=True, options=RELEASED),
    "mamc, even": Case((3,), method="mamc"),
    "every option for parts": Case((4,), weighted=True, options=PARTS),
    **{
        f"{name}, uneven and weighted": Case(
            (4,),
            weighted=True,
            method=name,
            # in float32, an activation of its many steps may be on the other side of 0, depending on the processor
            dtype=torch.float64 if name == "dt_ram" else torch.float32,
        )
        for name in list_methods()
    },
}


def compute(method: Method, images: Tensor, targets: Tensor) -> methods.Objective:
    """Return the objective that is trained, with parts made of the pixels."""
    if not method.uses_parts:
        return method.objective(images, targets)
    numbers = images.flatten(1)[:, :33].unflatten(1, (11, 3)).abs()
    parts = torch.cat([(20 * numbers[..., :2]).clamp(max=63), (numbers[..., 2:] > 0.5).float()], 2)
    return method.part_objective(images, targets, parts)


class Objective(nn.Module):
    """DDP hooks into ``forward`` alone."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        objective = compute(self.method, images, targets)
        return {"loss": objective.loss, **objective.terms, **objective.measures}


def build(case: Case) -> Method:
    """Batch norm in evaluation mode: each rank's own batch statistics are no part of the method."""
    torch.manual_seed(0)
    method = create_method(case.method, backbone="test_resnet", num_classes=3, image_size=64, **case.options)
    if case.weighted:
        method.criterion = ClassificationLoss(torch.tensor([0.5, 1.0, 3.0]), 0.1)
    return method.eval().to(case.dtype)


def micro_batches(case: Case) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    targets = torch.tensor([0, 1, 2, 2, 1, 0])
    return [(torch.randn(6, 3, 64, 64, generator=generator).to(case.dtype), targets) for _ in case.first]


def on_ranks(rank: int, folder: Path) -> None:
    results = {}
    for name, case in CASES.items():
        objective = DistributedDataParallel(Objective(build(case)))
        terms = []
        for (images, targets), first in zip(micro_batches(case), case.first, strict=True):
            own = slice(first) if rank == 0 else slice(first, None)
            last = len(terms) == len(case.first) - 1
            with nullcontext() if last else objective.no_sync():
                terms.append(objective(images[own], targets[own]))
                (terms[-1]["loss"] / len(case.first)).backward()
        gradients = {name: p.grad for name, p in objective.module.method.named_parameters()}
        results[name] = [{key: term.detach() for key, term in step.items()} for step in terms], gradients
    torch.save(results, folder / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    run_on_two_ranks(on_ranks, folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_two_ranks_train_like_one_process_on_the_whole_batch(ranks: list[dict], name: str) -> None:
    case = CASES[name]
    method = build(case)
    for step, (images, targets) in enumerate(micro_batches(case)):
        objective = compute(method, images, targets)
        (objective.loss / len(case.first)).backward()
        for key, term in {"loss": objective.loss, **objective.terms, **objective.measures}.items():
            values = [rank[name][0][step][key] for rank in ranks]
            torch.testing.assert_close(sum(values) / 2, term.detach(), rtol=1e-4, atol=1e-6)
            if key.startswith(("c3s", "s_")):
                # S is that of the global batch, on every rank
                assert values[0] == values[1]
    for key, parameter in method.named_parameters():
        for rank in ranks:
            torch.testing.assert_close(rank[name][1][key], parameter.grad, rtol=1e-4, atol=1e-6)


def with_synchronized_norms(rank: int, folder: Path) -> None:
    case = CASES["paper, even"]
    method = build(case).train()
    synchronize_batch_norms(method)
    objective = DistributedDataParallel(Objective(method.cuda()))
    images, targets = (tensor.chunk(2)[rank].cuda() for tensor in micro_batches(case)[0])
    objective(images, targets)["loss"].backward()
    if rank == 0:
        torch.save({name: p.grad.cpu() for name, p in method.named_parameters()}, folder / "gradients.pt")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="synchronised batch norm needs two GPUs")
def test_synchronized_batch_norm_trains_like_one_process(tmp_path: Path) -> None:
    run_on_two_ranks(with_synchronized_norms, tmp_path, "nccl")
    gradients = torch.load(tmp_path / "gradients.pt")
    method = build(CASES["paper, even"]).train().cuda()
    images, targets = micro_batches(CASES["paper, even"])[0]
    method.objective(images.cuda(), targets.cuda()).loss.backward()
    for name, parameter in method.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad.cpu(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backbone", ["resnet10t", "mobilenetv2_035"])
def test_synchronizing_changes_no_number_in_evaluation(backbone: str) -> None:
    """The second backbone has timm's norms that hold an activation."""
    torch.manual_seed(0)
    method = create_method("crossx", backbone=backbone, num_classes=3)
    frozen = method.backbone.trunk.bn1.eval()
    images, keys = torch.randn(2, 3, 64, 64), list(method.state_dict())
    synchronize_batch_norms(method)
    kinds = [type(module).__name__ for module in method.modules()]
    assert any(kind.startswith("SyncBatchNorm") for kind in kinds)
    assert method.backbone.trunk.bn1 is frozen
    assert list(method.state_dict()) == keys
    torch.manual_seed(0)
    before = create_method("crossx", backbone=backbone, num_classes=3)
    assert torch.equal(method.eval()(images), before.eval()(images))
