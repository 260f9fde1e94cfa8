import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import resnet50

from crossx.errors import CrossXError, UsageError
from crossx.methods.weights import load_method
from crossx.released import build_released, import_released
from layouts import write_cub, write_nabirds

OSME_BLOCKS = {"layer3.5": 1024, "layer4.2": 2048}


def linear(state: dict[str, Tensor], key: str, inputs: int, outputs: int) -> None:
    state[f"{key}.weight"] = torch.randn(outputs, inputs) / inputs**0.5
    state[f"{key}.bias"] = torch.randn(outputs) / 10


@functools.cache
def released_state(senet: bool, num_parts: int) -> dict[str, Tensor]:
    """Random weights for 6 classes in the layout of the released checkpoints; the trunk's keys are torchvision's."""
    torch.manual_seed(num_parts)
    trunk = resnet50()
    state = {key: value for key, value in trunk.state_dict().items() if not key.startswith("fc.")}
    for key in state:
        if key.endswith(("running_mean", "bias")):
            state[key] = torch.randn_like(state[key]) / 10
    for block in [key.removesuffix(".conv3.weight") for key in state if key.endswith("conv3.weight")]:
        channels = len(state[f"{block}.conv3.weight"])
        hidden = 16 if senet else channels // 256
        gates = [f"{block}.se.fc"] if senet else []
        if block in OSME_BLOCKS:
            slot = "se" if senet else "me"
            gates = [f"{block}.{slot}.parts.{p}" for p in range(num_parts)]
            gates += [f"{block}.se.dresponse"] if senet else []
        for gate in gates:
            linear(state, f"{gate}.0", channels, hidden)
            linear(state, f"{gate}.2", hidden, channels)
    for p in range(1, num_parts + 1):
        state[f"conv2_{p}.weight"] = torch.randn(1024, 2048, 1, 1) / 2048**0.5
        state[f"conv3_{p}.weight"] = torch.randn(1024, 1024, 3, 3) / 9216**0.5
        norm = torch.nn.BatchNorm2d(1024)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        state |= {f"bn3_{p}.{key}": value for key, value in norm.state_dict().items()}
    for head, channels in (("fc_ulti", 2048), ("fc_plty", 1024), ("fc_cmbn", 1024)):
        linear(state, head, channels * num_parts, 6)
    return state


def batch_norm(state: dict[str, Tensor], key: str, x: Tensor) -> Tensor:
    mean, var = state[f"{key}.running_mean"], state[f"{key}.running_var"]
    return F.batch_norm(x, mean, var, state[f"{key}.weight"], state[f"{key}.bias"])


def gate(state: dict[str, Tensor], key: str, x: Tensor) -> Tensor:
    hidden = F.relu(F.linear(x.mean((2, 3)), state[f"{key}.0.weight"], state[f"{key}.0.bias"]))
    return torch.sigmoid(F.linear(hidden, state[f"{key}.2.weight"], state[f"{key}.2.bias"]))[:, :, None, None]


def plain_forward(state: dict[str, Tensor], x: Tensor, num_parts: int, pooling: str) -> dict[str, Tensor]:
    """The released network from its equations, straight from the state dict; no module of ours or of timm's."""
    x = F.relu(batch_norm(state, "bn1", F.conv2d(x, state["conv1.weight"], stride=2, padding=3)))
    x = F.max_pool2d(x, 3, 2, 1)
    attention: dict[str, list[Tensor]] = {}
    for stage, count in (("layer1", 3), ("layer2", 4), ("layer3", 6), ("layer4", 3)):
        for index in range(count):
            block = f"{stage}.{index}"
            stride = 2 if index == 0 and stage != "layer1" else 1
            fx = F.relu(batch_norm(state, f"{block}.bn1", F.conv2d(x, state[f"{block}.conv1.weight"])))
            fx = F.conv2d(fx, state[f"{block}.conv2.weight"], stride=stride, padding=1)
            fx = F.relu(batch_norm(state, f"{block}.bn2", fx))
            fx = batch_norm(state, f"{block}.bn3", F.conv2d(fx, state[f"{block}.conv3.weight"]))
            shortcut = x
            if index == 0:
                shortcut = F.conv2d(x, state[f"{block}.downsample.0.weight"], stride=stride)
                shortcut = batch_norm(state, f"{block}.downsample.1", shortcut)
            own = fx
            if block in OSME_BLOCKS:
                slot = "me" if f"{block}.me.parts.0.0.weight" in state else "se"
                attention[stage] = [
                    F.relu(gate(state, f"{block}.{slot}.parts.{p}", fx) * fx + shortcut)
                    for p in range(num_parts)
                ]
                if slot == "se":
                    own = gate(state, f"{block}.se.dresponse", fx) * fx
            elif f"{block}.se.fc.0.weight" in state:
                own = gate(state, f"{block}.se.fc", fx) * fx
            x = F.relu(own + shortcut)
    previous, last = attention["layer3"], attention["layer4"]
    merged = []
    for p in range(num_parts):
        up = F.interpolate(F.conv2d(last[p], state[f"conv2_{p + 1}.weight"]), previous[p].shape[-2:])
        smooth = F.conv2d(previous[p] + up, state[f"conv3_{p + 1}.weight"], padding=1)
        merged.append(batch_norm(state, f"bn3_{p + 1}", smooth))
    pool = F.adaptive_max_pool2d if pooling == "max" else F.adaptive_avg_pool2d
    pooled = {
        "fc_ulti": [F.adaptive_avg_pool2d(u, 1) for u in last],
        "fc_plty": [pool(u, 1) for u in previous],
        "fc_cmbn": [F.adaptive_avg_pool2d(u, 1) for u in merged],
    }
    names = {"fc_ulti": "last", "fc_plty": "previous", "fc_cmbn": "merged"}
    return {
        names[head]: F.linear(torch.cat(f, 1).flatten(1), state[f"{head}.weight"], state[f"{head}.bias"])
        for head, f in pooled.items()
    }


@pytest.mark.parametrize(
    "senet", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["resnet", "senet"]
)
@pytest.mark.parametrize(
    ("num_parts", "pooling"), [(2, "max"), pytest.param(3, "avg", marks=pytest.mark.slow)]
)
@torch.inference_mode()
def test_logits_equal_a_plain_forward(senet: bool, num_parts: int, pooling: str) -> None:
    state = released_state(senet, num_parts)
    method = build_released(state, pooling, True, Path("x"))  # type: ignore[arg-type]
    images = torch.randn(1, 3, 64, 96)
    expected = plain_forward(state, images, num_parts, pooling)
    actual = method.head_logits(images)
    for name, logits in expected.items():
        torch.testing.assert_close(actual[name], logits, rtol=1e-4, atol=1e-4 * logits.abs().max().item())


def save(state: dict[str, Tensor], path: Path, prefix: str = "") -> Path:
    torch.save({prefix + key: value for key, value in state.items()}, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(
        released_state(False, 2), tmp_path_factory.mktemp("released") / "released.pkl", prefix="module."
    )


@torch.inference_mode()
@pytest.mark.slow
def test_import_makes_an_ordinary_run_with_numbered_classes(checkpoint: Path, tmp_path: Path) -> None:
    run = import_released(checkpoint, "cub", tmp_path / "run")
    method, spec = load_method(run.path)
    assert spec.classes[:2] == ("class 000", "class 001")
    assert (spec.preprocessing.resize_size, spec.preprocessing.image_size) == (600, 448)
    assert run.read_info()["class_names"] == "numbered in the released order"
    images = torch.randn(1, 3, 64, 64)
    expected = sum(plain_forward(released_state(False, 2), images, 2, "max").values())
    torch.testing.assert_close(method(images), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@torch.inference_mode()
def test_dogs_leaves_the_merged_head_out_and_pools_by_average(checkpoint: Path, tmp_path: Path) -> None:
    run = import_released(checkpoint, "dogs", tmp_path / "run")
    images = torch.randn(1, 3, 64, 64)
    heads = plain_forward(released_state(False, 2), images, 2, "avg")
    actual = load_method(run.path)[0](images)
    torch.testing.assert_close(actual, heads["last"] + heads["previous"], rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@torch.inference_mode()
def test_previous_pooling_can_be_chosen(checkpoint: Path, tmp_path: Path) -> None:
    run = import_released(checkpoint, "cub", tmp_path / "run", previous_pooling="avg")
    assert run.read_spec().options["previous_pooling"] == "avg"


@pytest.mark.slow
@torch.inference_mode()
def test_class_names_come_in_the_official_order(checkpoint: Path, tmp_path: Path) -> None:
    # Node ids without leading zeros sort as text: 1003 comes before 295.
    root = write_nabirds(tmp_path / "nabirds", classes=6)
    run = import_released(checkpoint, "nabirds", tmp_path / "run", data_root=root)
    method, spec = load_method(run.path)
    folders = [str(int(folder.name)) for folder in sorted((root / "images").iterdir())]
    images = torch.randn(1, 3, 64, 64)
    released = sum(plain_forward(released_state(False, 2), images, 2, "max").values())[0]
    by_folder = dict(zip(sorted(folders), released.tolist(), strict=True))
    expected = [by_folder[folder] for folder in sorted(folders, key=int)]
    torch.testing.assert_close(method(images)[0], torch.tensor(expected), rtol=1e-4, atol=1e-3)
    assert spec.levels.keys() == {"order", "family", "species"}


@pytest.mark.slow
def test_number_of_classes_must_fit(checkpoint: Path, tmp_path: Path) -> None:
    root = write_cub(tmp_path / "cub", classes=3)
    with pytest.raises(CrossXError, match="3 classes, the checkpoint has 6"):
        import_released(checkpoint, "cub", tmp_path / "run", data_root=root)


@pytest.mark.slow
def test_what_is_no_released_checkpoint(tmp_path: Path) -> None:
    file = save(resnet50().state_dict(), tmp_path / "resnet50.pth")
    with pytest.raises(CrossXError, match="not a released Cross-X checkpoint"):
        import_released(file, "cub", tmp_path / "run")
    state = dict(released_state(False, 2))
    del state["layer1.0.conv1.weight"], state["layer1.0.conv2.weight"]
    with pytest.raises(CrossXError, match="2 tensors are missing"):
        import_released(save(state, tmp_path / "half.pkl"), "cub", tmp_path / "run")
    with pytest.raises(UsageError, match=r"unknown dataset 'cubs'. Did you mean 'cub'"):
        import_released(file, "cubs", tmp_path / "run")
    assert not (tmp_path / "run").exists()
