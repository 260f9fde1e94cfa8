import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed

from crossx.errors import CrossXError, UsageError
from crossx.methods import create_method, list_methods
from crossx.methods.start import Start, Transfer
from crossx.methods.weights import describe, save_weights
from crossx.runs import Preprocessing, Run, write_json

SMALL = {
    "crossx": {"reduction": 4},
    "dfl": {"num_filters": 3, "filter_init": "random", "filter_norm": "batch"},
    "kernel_pooling": {"sketch_size": 64},
    "mamc": {"embedding_size": 8},
    "nts": {"num_proposals": 3, "num_crops": 2},
}
THREE = ("ant", "bee", "cat")


def build(method, classes=THREE, *, seed=0, backbone="test_resnet", image_size=64, **options):
    """A network with random weights, running statistics included, and its description."""
    torch.manual_seed(seed)
    args = options.pop("backbone_args", {})
    made = create_method(
        method,
        backbone=backbone,
        num_classes=len(classes),
        image_size=image_size,
        backbone_args=args,
        **{**SMALL.get(method, {}), **options},
    )
    for name, buffer in made.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    prep = Preprocessing(image_size, None, "bilinear", (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    return made.eval(), describe(made, classes=classes, preprocessing=prep, dataset="folder")


def write(folder: Path, method, spec) -> str:
    """The files of a shared model: a run without run.json."""
    run = Run(folder)
    save_weights(method, run.weights)
    write_json(run.spec, spec.to_json())
    return str(folder)


def take(folder, source, target):
    """Copy into the network ``target`` what fits; return the transfer and the state of before."""
    before = {name: value.clone() for name, value in target[0].state_dict().items()}
    transfer = Transfer(Start.read(write(folder, *source)), *target)
    transfer.copy(target[0])
    return transfer, before


REORDERED, FEWER = ("cat", "ant", "bee"), ("cat", "ant")


@pytest.mark.parametrize(
    ("method", "classes"),
    # with fewer classes, DFL's classifier also lacks the filters of the others
    [(name, REORDERED) for name in list_methods()]
    + [(name, FEWER) for name in list_methods() if name != "dfl"],
)
@pytest.mark.slow
def test_every_class_keeps_its_logits(tmp_path, method, classes):
    source, target = build(method), build(method, classes, seed=1)
    transfer, _ = take(tmp_path, source, target)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        theirs, ours = source[0].head_logits(images), target[0].head_logits(images)
    assert theirs.keys() == ours.keys()
    for head, logits in ours.items():
        for label, name in enumerate(classes):
            torch.testing.assert_close(logits[:, label], theirs[head][:, THREE.index(name)])
    assert transfer.is_complete
    assert transfer.taken == {name for name, _ in target[0].named_parameters()}


@pytest.mark.parametrize("method", list_methods())
@pytest.mark.slow
def test_other_classes_get_a_new_head_on_the_same_features(tmp_path, method):
    source, target = build(method), build(method, ("dog", "eel", "fly", "gnu"), seed=1)
    transfer, before = take(tmp_path, source, target)
    theirs, ours = source[0].state_dict(), target[0].state_dict()
    new = {line.split()[0] for line in transfer.new}
    assert new
    for name, value in ours.items():
        expected = before[name] if name in new else theirs[name]
        assert torch.equal(value, expected), name
    assert not [name for name in new if name.startswith("backbone.")]
    assert all(line.endswith(": other classes") for line in transfer.new)
    assert {id(parameter) for parameter in target[0].new_parameters()} >= {
        id(target[0].get_parameter(name)) for name in new if not re.search("running|num_batches", name)
    }


@pytest.mark.parametrize("method", ["plain", "crossx", "dfl"])
def test_classes_of_the_same_name_are_taken_and_others_start_anew(tmp_path, method):
    classes = ("dog", "cat", "eel", "ant")
    source, target = build(method), build(method, classes, seed=1)
    transfer, before = take(tmp_path, source, target)
    assert not transfer.is_complete
    theirs, ours = source[0].state_dict(), target[0].state_dict()
    checked = 0
    for name in ours:
        rows = 3 if name.startswith("filters.") else 1
        if not name.startswith(("classifier.", "heads.", "filters.")) or ours[name].ndim == 0:
            assert torch.equal(ours[name], theirs[name]), name
            continue
        columns = name == "heads.part.weight"
        for label, its_name in enumerate(classes):
            mine = ours[name][rows * label : rows * (label + 1)]
            if its_name not in THREE:
                assert torch.equal(mine, before[name][rows * label : rows * (label + 1)]), name
                continue
            there = THREE.index(its_name)
            other = theirs[name][rows * there : rows * (there + 1)]
            if columns:
                # three filters of each class are the inputs
                kept = [3 * label + k for label in (1, 3) for k in range(3)]
                other = other[:, [3 * label + k for label in (2, 0) for k in range(3)]]
                fresh = [column for column in range(12) if column not in kept]
                assert torch.equal(mine[:, fresh], before[name][label : label + 1][:, fresh])
                mine = mine[:, kept]
            assert torch.equal(mine, other), name
            checked += 1
    assert checked
    assert "2 of 4 classes taken" in transfer.describe()
    assert not [name for name in transfer.taken if name.startswith(("classifier", "heads", "filters.conv"))]


@pytest.mark.parametrize(
    ("backbone", "source", "target", "options"),
    [
        ("test_resnet", "plain", "crossx", {}),
        ("test_resnet", "crossx", "dfl", {}),
        ("test_resnet", "crossx", "plain", {}),
        ("test_efficientnet", "plain", "dfl", {"filter_stride": 8}),
        ("test_efficientnet", "dfl", "crossx", {"filter_stride": 8}),
        ("legacy_seresnet18", "plain", "crossx", {}),
        ("legacy_seresnet18", "crossx", "plain", {}),
    ],
)
@pytest.mark.slow
def test_another_method_takes_the_whole_backbone(tmp_path, backbone, source, target, options):
    """Also where a method moves or gates layers of the trunk: its maps are the same."""
    first = build(source, backbone=backbone, **(options if source == "dfl" else {}))
    second = build(target, backbone=backbone, seed=1, **(options if target == "dfl" else {}))
    transfer, _ = take(tmp_path, first, second)
    lacking = [line for line in transfer.new if line.startswith("backbone.")]
    # Cross-X leaves out the attention of the last block, which its own gates replace
    lost = [line for line in lacking if ".osme." not in line]
    assert len(lost) == (4 if (backbone, source) == ("legacy_seresnet18", "crossx") else 0), lost
    assert all("layer4.1.se" in line for line in lost)
    if not lost and "crossx" not in (source, target):
        images = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            assert torch.equal(first[0].backbone(images)["last"], second[0].backbone(images)["last"])
    values = {float(value.sum()) for value in first[0].backbone.trunk.state_dict().values()}
    for name, value in second[0].backbone.trunk.state_dict().items():
        if ".osme." not in name and f"backbone.trunk.{name}" not in {line.split()[0] for line in lost}:
            assert float(value.sum()) in values, name


def test_heads_are_taken_between_variants_of_a_network_alone(tmp_path):
    plain, maxent = build("plain"), build("maxent", seed=1)
    assert take(tmp_path / "a", plain, maxent)[0].is_complete
    assert torch.equal(plain[0].classifier.weight, maxent[0].classifier.weight)
    width = plain[0].classifier.in_features
    mamc = build("mamc", seed=1, embedding_size=width // 2)
    assert mamc[0].classifier.weight.shape == plain[0].classifier.weight.shape
    transfer, before = take(tmp_path / "b", plain, mamc)
    assert torch.equal(mamc[0].classifier.weight, before["classifier.weight"])
    assert "classifier.bias (3,): of method plain there" in transfer.new


def test_another_image_size(tmp_path):
    source, target = build("plain"), build("plain", image_size=96, seed=1)
    assert take(tmp_path / "plain", source, target)[0].is_complete
    source, target = build("mamc"), build("mamc", image_size=128, seed=1)
    transfer, _ = take(tmp_path / "mamc", source, target)
    assert [line.split()[0] for line in transfer.new] == ["embed.weight"]
    assert re.search(r"embed\.weight \(2, 8, \d+\): there \(2, 8, \d+\)", transfer.describe())


def test_position_embeddings_are_resampled_to_another_image_size(tmp_path):
    source = build("plain", backbone="test_vit", image_size=160)
    target = build("plain", backbone="test_vit", image_size=192, backbone_args={"img_size": 192}, seed=1)
    transfer, _ = take(tmp_path, source, target)
    assert transfer.is_complete
    theirs, ours = source[0].backbone.trunk, target[0].backbone.trunk
    expected = resample_abs_pos_embed(theirs.pos_embed, [12, 12], num_prefix_tokens=theirs.num_prefix_tokens)
    assert torch.equal(ours.pos_embed, expected)
    assert torch.equal(ours.blocks[0].attn.qkv.weight, theirs.blocks[0].attn.qkv.weight)


def test_another_backbone_is_refused_with_both_names(tmp_path):
    source, target = build("plain"), build("plain", backbone="test_vit", image_size=160)
    with pytest.raises(
        UsageError, match=r"'test_resnet', and this run's is 'test_vit'.*--model.backbone test_resnet"
    ):
        take(tmp_path, source, target)


@pytest.mark.parametrize(("first", "second", "heads"), [("plain", "probe", 0), ("probe", "plain", 2)])
def test_a_method_that_fits_its_head_does_not_take_that_of_another(tmp_path, first, second, heads):
    transfer, _ = take(tmp_path, build(first), build(second, seed=1))
    taken = [name for name in transfer.taken if not name.startswith("backbone.")]
    assert len(taken) == heads
    assert transfer.is_complete == bool(heads)


@pytest.mark.parametrize("statistics", ["shared", "own"])
def test_own_statistics_start_like_the_trunk_or_as_those_of_the_other_network(tmp_path, statistics):
    options = {"num_proposals": 3, "num_crops": 2}
    source = build("nts", crop_statistics=statistics, **options)
    target = build("nts", seed=1, crop_statistics="own", **options)
    transfer, _ = take(tmp_path, source, target)
    assert transfer.is_complete
    for own, name in target[0].crop_statistics.names.items():
        of_trunk = source[0].backbone.get_buffer(name)
        expected = source[0].crop_statistics.get_buffer(own) if statistics == "own" else of_trunk
        assert torch.equal(expected, of_trunk) == (statistics == "shared" or own.endswith("tracked"))
        assert torch.equal(target[0].crop_statistics.get_buffer(own), expected), name


def test_the_message_is_one_line_of_bounded_length(tmp_path):
    target = build("nts", ("dog",), seed=1)
    transfer, _ = take(tmp_path, build("crossx"), target)
    text = transfer.describe()
    assert len(transfer.new) > 10
    assert re.search(r"and \d+ more", text)
    assert "\n" not in text
    assert len(text) < 800


def test_what_cannot_be_started_from(tmp_path):
    source = build("plain")
    run = Run(Path(write(tmp_path / "run", *source)))
    (tmp_path / "empty").mkdir()
    exported, loose = tmp_path / "net.onnx", tmp_path / "loose.pth"
    exported.write_bytes(b"x")
    torch.save({"a": torch.ones(1)}, loose)
    for given, message in (
        ("nowhere", "no such run folder"),
        (str(tmp_path / "empty"), "not a run folder"),
        (str(exported), "an exported file cannot be trained"),
        (str(loose), "belongs to no run .*--model.backbone_weights.*import-released"),
    ):
        with pytest.raises(CrossXError, match=message) as refused:
            Start.read(given)
        assert "\n" not in str(refused.value)
    content = run.weights.read_bytes()
    run.weights.write_bytes(content[:-100])
    with pytest.raises(CrossXError, match=r"model\.safetensors: not a weights file"):
        Start.read(str(run.path))
    write(run.path, source[0], replace(source[1], classes=("ant", "bee")))
    with pytest.raises(CrossXError, match=r"do not fit the network of model\.json"):
        Start.read(str(run.path))
    with torch.no_grad():
        source[0].classifier.bias[1] = torch.nan
    with pytest.raises(CrossXError, match=r"1 tensor is not finite \(classifier.bias, ...\)"):
        Start.read(write(run.path, *source))


@pytest.mark.parametrize("damage", ["not finite", "another size"])
def test_class_means_are_not_taken_whatever_is_in_them(tmp_path: Path, damage: str) -> None:
    source = build("plain")
    source[0].expect_class_means(torch.ones(1))
    run = Run(Path(write(tmp_path / "run", *source)))
    weights = load_file(run.weights)
    means = weights["class_means"]
    weights["class_means"] = means / 0 if damage == "not finite" else means[:, 1:].contiguous()
    save_file(weights, run.weights)
    state = Start.read(str(run.path)).state
    assert "class_means" not in state
    assert state.keys() == source[0].state_dict().keys() - {"class_means"}
