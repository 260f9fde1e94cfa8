import copy

import pytest
import torch
from torch import Tensor, nn

from crossx.layers import OwnStatistics


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)
    )


def batches(mean: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(int(mean))
    return [mean + torch.randn(4, 3, 6, 6, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("training", [True, False])
def test_each_kind_is_as_in_a_network_of_its_own(training: bool) -> None:
    shared = network().train(training)
    alone = {kind: copy.deepcopy(shared) for kind in ("images", "crops")}
    own = OwnStatistics(shared)
    for images, crops in zip(batches(0), batches(5), strict=True):
        torch.testing.assert_close(shared(images), alone["images"](images))
        torch.testing.assert_close(own(shared, crops), alone["crops"](crops))
    images, crops = batches(1)[0], batches(6)[0]
    for module in (shared, own, *alone.values()):
        module.eval()
    torch.testing.assert_close(shared(images), alone["images"](images))
    torch.testing.assert_close(own(shared, crops), alone["crops"](crops))
    different = not torch.equal(shared(crops), own(shared, crops))
    assert different == training


def test_gradients_reach_the_shared_weights() -> None:
    shared, images = network(), batches(0)[0]
    twin = copy.deepcopy(shared)
    OwnStatistics(shared)(shared, images).sum().backward()
    twin(images).sum().backward()
    for ours, theirs in zip(shared.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_state_is_saved_and_the_network_is_not_part_of_it() -> None:
    shared = network()
    own = OwnStatistics(shared)
    own(shared, batches(5)[0])
    assert len(own.state_dict()) == 6
    assert not list(own.parameters())
    other = OwnStatistics(shared)
    other.load_state_dict(own.state_dict())
    shared.eval()
    torch.testing.assert_close(other(shared, batches(5)[1]), own(shared, batches(5)[1]))


@pytest.mark.slow
def test_compiles_without_graph_breaks_and_exports() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()
            self.own = OwnStatistics(self.network)

        def forward(self, images: Tensor) -> Tensor:
            both: Tensor = self.network(images) + self.own(self.network, images)
            return both

    module, images = Both(), batches(5)[0]
    module(images)
    module.eval()
    expected = module(images)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), expected)
    exported = torch.export.export(module, (images,)).module()
    torch.testing.assert_close(exported(images), expected)
