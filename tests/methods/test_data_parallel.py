from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from crossx.methods import CrossX, create_method
from distributed import run_on_two_ranks

FORMS = ("paper", "released")


class Objective(torch.nn.Module):
    """DDP hooks into ``forward`` alone."""

    def __init__(self, method: CrossX) -> None:
        super().__init__()
        self.method = method

    def forward(self, images: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        objective = self.method.objective(images, targets)
        return {"loss": objective.loss, **objective.terms}


def build(form: str) -> CrossX:
    """Batch norm in evaluation mode: each rank's own batch statistics are no part of the method."""
    torch.manual_seed(0)
    method = create_method("crossx", backbone="resnet10t", num_classes=3, c3s_form=form)
    assert isinstance(method, CrossX)
    return method.eval()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, 64, 64, generator=generator), torch.tensor([0, 1, 2, 2, 1, 0])


def one_step(rank: int, folder: Path) -> None:
    images, targets = batch()
    results = {}
    for form in FORMS:
        objective = DistributedDataParallel(Objective(build(form)))
        terms = objective(images[3 * rank : 3 * rank + 3], targets[3 * rank : 3 * rank + 3])
        terms["loss"].backward()
        gradients = {name: p.grad for name, p in objective.module.method.named_parameters()}
        results[form] = ({name: term.detach() for name, term in terms.items()}, gradients)
    torch.save(results, folder / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[dict[str, torch.Tensor], ...]]]:
    folder = tmp_path_factory.mktemp("ranks")
    run_on_two_ranks(one_step, folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("form", FORMS)
def test_two_ranks_train_like_one_process_on_the_whole_batch(ranks: list, form: str) -> None:
    method = build(form)
    objective = method.objective(*batch())
    objective.loss.backward()
    for name, term in objective.terms.items():
        values = [rank[form][0][name] for rank in ranks]
        if name.startswith("c3s"):
            # S is that of the global batch, on every rank.
            torch.testing.assert_close(values[0], term.detach())
            torch.testing.assert_close(values[1], term.detach())
        else:
            torch.testing.assert_close((values[0] + values[1]) / 2, term.detach())
    for name, parameter in method.named_parameters():
        for rank in ranks:
            torch.testing.assert_close(rank[form][1][name], parameter.grad, rtol=1e-4, atol=1e-6)
