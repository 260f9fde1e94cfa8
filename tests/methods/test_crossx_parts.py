"""The options of Cross-X that are to make excitations parts."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from crossx_options import ALL, CASES, TARGETS, build, images
from torch.nn import functional as F

from crossx.losses import ClassificationLoss, c3s_loss
from crossx.methods.weights import describe, load_method, save_weights
from crossx.runs import Preprocessing, Run, write_json
from refusals import refusal
from slow import slow_except

every_option = pytest.mark.parametrize("case", CASES)
all_options = pytest.mark.parametrize("case", slow_except(CASES, "all"))


def test_nothing_changes_by_default() -> None:
    """Names of weights and of terms, and a step's numbers bit for bit."""
    method = build()
    assert {name for name in method.state_dict() if not name.startswith("backbone.trunk.")} == {
        "merge.reduce.weight", "merge.smooth.weight", "merge.norm.weight", "merge.norm.bias",
        "merge.norm.running_mean", "merge.norm.running_var", "merge.norm.num_batches_tracked",
        *(f"heads.{head}.{kind}" for head in ("last", "previous", "merged") for kind in ("weight", "bias")),
    }  # fmt: skip
    gates = {name.split(".se.")[1] for name in method.state_dict() if ".osme." in name}
    assert gates == {f"osme.{layer}_{kind}" for layer in ("squeeze", "excite") for kind in ("weight", "bias")}
    objective = method.objective(images(), TARGETS)
    objective.loss.backward()
    same = build()
    features = same.part_features(images())
    heads = {name: same.heads[name](pooled.flatten(1)) for name, pooled in features.items()}
    terms = {
        "data": F.cross_entropy(sum(heads.values()), TARGETS),
        **{
            f"cross_layer_{name}": same.cross_layer(heads["last"], heads[name])
            for name in ("previous", "merged")
        },
        **{f"c3s_{name}": w * c3s_loss(features[name]) for name, w in same.c3s_weights.items()},
    }
    assert list(objective.terms) == list(terms)
    loss = sum(list(terms.values())[1:], terms["data"])
    loss.backward()
    assert torch.equal(objective.loss, loss)
    for own, other in zip(method.parameters(), same.parameters(), strict=True):
        assert torch.equal(own.grad, other.grad)  # type: ignore[arg-type]


@every_option
def test_every_weight_learns(case: str) -> None:
    method = build(**CASES[case])
    objective = method.objective(images(), TARGETS)
    objective.loss.backward()
    assert objective.loss.isfinite()
    assert [
        name for name, p in method.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ] == []


@every_option
def test_heads_see_the_features_and_class_maps_are_exact(case: str) -> None:
    method = build(**CASES[case]).eval()
    logits = method(images())
    weight = torch.cat([head.weight for head in method.linear_heads().values()], 1)
    bias = sum(head.bias for head in method.heads.values())
    torch.testing.assert_close(method.embeddings(images()) @ weight.T + bias, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(method.objective(images(), TARGETS).logits, logits, rtol=1e-4, atol=1e-5)
    maps = method.class_activation_maps(images(), TARGETS)
    for name, of_head in method.head_logits(images()).items():
        expected = of_head.gather(1, TARGETS[:, None])[:, 0] - method.heads[name].bias[TARGETS]
        torch.testing.assert_close(maps[name].mean((2, 3)).sum(1), expected, rtol=1e-4, atol=1e-5)
        looks = method.activation_maps(images())[name]
        assert looks.shape[1] == 2
        assert maps[name].shape == (3, 2 + (case == "whole"), *looks.shape[2:])


@all_options
def test_recomputing_activations_is_the_same_training(case: str) -> None:
    plain, saving = build(**CASES[case]), build(**CASES[case])
    saving.backbone.recompute_activations()
    for method in (plain, saving):
        torch.manual_seed(0)
        method.objective(images(), TARGETS).loss.backward()
    for (name, own), other in zip(saving.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(saving.state_dict(), plain.state_dict())


@all_options
def test_soft_targets_and_smoothed_labels(case: str) -> None:
    method = build(**CASES[case]).eval()
    hard = method.objective(images(), TARGETS)
    soft = method.objective(images(), F.one_hot(TARGETS, 3).float())
    torch.testing.assert_close(dict(soft.terms), dict(hard.terms))
    method.criterion = ClassificationLoss(torch.tensor([0.5, 1.0, 3.0]), 0.1)
    smooth = method.objective(images(), TARGETS)
    assert smooth.loss.isfinite()
    changed = {name for name, term in hard.terms.items() if not torch.equal(term, smooth.terms[name])}
    assert changed == {name for name in hard.terms if name == "data" or name.startswith("part_")}


@all_options
def test_half_precision(case: str) -> None:
    method = build(**CASES[case])
    with torch.autocast("cpu", torch.bfloat16):
        objective = method.objective(images(), TARGETS)
    objective.loss.backward()
    assert objective.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in method.parameters())
    with torch.no_grad():
        assert method.eval().half()(images(1).half()).isfinite().all()


@pytest.mark.parametrize("number", [1, 2])
def test_odd_images_two_classes_and_one_part(number: int) -> None:
    odd, targets = images(number, 67, 75), torch.tensor([1, 0])[:number]
    method = build(num_classes=2, num_parts=1, **{**ALL, "c3s_centred": False}).eval()
    assert method(odd).shape == (number, 2)
    objective = method.objective(odd, targets)
    objective.loss.backward()
    assert all(p.grad.isfinite().all() for p in method.parameters())
    assert {len(maps[0]) for maps in method.activation_maps(odd).values()} == {1}


@pytest.mark.parametrize(
    ("backbone", "size"),
    slow_except(
        [("mobilenetv2_035", 64), ("convnext_femto", 64), ("vgg11", 64), ("vit_tiny_patch16_224", 224)],
        ("mobilenetv2_035", 64),
    ),
)
def test_every_kind_of_backbone(backbone: str, size: int) -> None:
    method = build(backbone, num_parts=2, **ALL)
    objective = method.objective(images(2, size, size), TARGETS[:2])
    objective.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
    maps = method.eval().class_activation_maps(images(1, size, size), TARGETS[:1])
    assert set(maps) == {"last", "previous", "merged"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gates": "compete"}, "Did you mean 'competing'"),
        ({"gate_sharpness": 0.0}, "gate_sharpness must be above 0"),
        ({"gate_sharpness": math.nan}, "gate_sharpness must be above 0"),
        ({"gate_sharpness": "10"}, "option gate_sharpness is of the wrong type"),
        ({"background": True}, "background needs competing gates"),
        ({"background": 1}, "option background is of the wrong type"),
        ({"gates": "competing", "num_parts": 1}, "need num_parts 2 or more, or a background"),
        ({"gates": "competing", "num_parts": 0}, "num_parts must be at least 1"),
        ({"gates": "competing", "osme_placement": "residual"}, "the shortcut would bypass competing gates"),
        ({"separation_weights": [1, 1], "osme_placement": "residual"}, "the shortcut would bypass"),
        ({"presence_weights": [0, 1], "osme_placement": "residual"}, "the shortcut would bypass"),
        ({"separation_weights": [1, 1], "num_parts": 1}, "separation_weights need num_parts 2 or more"),
        ({"c3s_centred": True, "num_parts": 1}, "c3s_centred needs num_parts 2 or more"),
        ({"c3s_centred": True, "c3s_weights": [0, 0, 0]}, "c3s_centred changes nothing"),
        (
            {"c3s_centred": True, "c3s_weights": [0, 0.5, 0.5], "use_previous": False, "use_merged": False},
            "c3s_centred changes nothing",
        ),
        ({"gate_sharpness": 3.0}, "gate_sharpness 3 needs competing gates"),
        ({"gate_sharpness": 3.0, "gates": "spatial"}, "gate_sharpness 3 needs competing gates"),
        ({"gates": "spatial", "background": True}, "spatial gates have one already"),
        ({"gates": "spatial", "osme_placement": "residual"}, "the shortcut would bypass spatial gates"),
        ({"assignment_start": "clusters"}, "assignment_start clusters needs spatial gates"),
        (
            {"assignment_start": "refined", "gates": "competing"},
            "assignment_start refined needs spatial gates",
        ),
        ({"assignment_start": "kmeans", "gates": "spatial"}, "assignment_start"),
        ({"detach_shares": True}, "detach_shares needs spatial gates"),
        ({"detach_shares": True, "gates": "spatial"}, "nothing would train the prototypes"),
        (
            {
                "detach_shares": True,
                "gates": "spatial",
                "presence_weights": [0, 2],
                "use_previous": False,
                "use_merged": False,
            },
            "nothing would train the prototypes",
        ),
        ({"assignment_lr_factor": 2.0}, "assignment_lr_factor 2 needs spatial gates"),
        (
            {"assignment_lr_factor": 0.0, "gates": "spatial"},
            "assignment_lr_factor must be above 0 and finite",
        ),
        (
            {"assignment_lr_factor": math.inf, "gates": "spatial"},
            "assignment_lr_factor must be above 0 and finite",
        ),
        ({"whole": True}, "whole needs spatial gates"),
        ({"whole": True, "gates": "competing"}, "whole needs spatial gates"),
        ({"concentration_weight": 1.0}, "concentration_weight needs spatial gates"),
        ({"border_weight": 1.0, "gates": "competing"}, "border_weight needs spatial gates"),
        ({"border_weight": math.nan, "gates": "spatial"}, "border_weight must be at least 0 and finite"),
        ({"concentration_weight": -1.0, "gates": "spatial"}, "concentration_weight must be at least 0"),
        ({"separation_weights": [1.0]}, r"separation_weights takes 2 numbers \(last, previous\)"),
        ({"presence_weights": [1, 1, 1]}, "presence_weights takes 2 numbers"),
        ({"equivariance_weights": [-1, 1]}, "equivariance_weights must not be negative"),
        ({"equivariance_weights": 1.0}, "option equivariance_weights is of the wrong type"),
        ({"part_weights": [1, 1]}, "part_weights takes 3 numbers"),
        ({"part_weights": [1, math.inf, 1]}, "part_weights must be finite"),
        ({"part_weights": [math.nan, 1, 1]}, "part_weights must be finite"),
        ({"c3s_weights": [math.nan, 1, 1]}, "c3s_weights must be finite"),
    ],
)
def test_options_that_cannot_work(options: dict[str, object], message: str) -> None:
    assert re.search(message, refusal(build, **options))


def test_survives_its_files(tmp_path: Path) -> None:
    method, run = build(**ALL).eval(), Run(tmp_path)
    preprocessing = Preprocessing(64, None, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    spec = describe(
        method, classes=("ani", "auklet", "bunting"), preprocessing=preprocessing, dataset="folder"
    )
    write_json(run.spec, spec.to_json())
    save_weights(method, run.weights)
    loaded = load_method(run.path)[0]
    assert loaded.options == {
        name: list(v) if isinstance(v, tuple) else v for name, v in method.options.items()
    }
    assert torch.equal(loaded(images()), method(images()))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_exports(case: str) -> None:
    method = build(**CASES[case]).eval()
    exported = torch.export.export(method, (images(2),)).module()
    torch.testing.assert_close(exported(images(2)), method(images(2)), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_onnx_is_the_same_for_every_number_of_images(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="torch.onnx needs onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    method, path = build(**ALL).eval(), tmp_path / "method.onnx"
    shapes = {"images": {0: torch.export.Dim("batch", min=1)}}
    with torch.no_grad():
        torch.onnx.export(method, (images(2),), dynamo=True, dynamic_shapes=shapes, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for number in (1, 2, 5):
        given = images(number)
        (logits,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
        np.testing.assert_allclose(logits, method(given).detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_training_compiles_in_one_graph(case: str) -> None:
    torch.compiler.reset()
    method, same = build(**CASES[case]), build(**CASES[case])
    compiled = torch.compile(method.objective, fullgraph=True, backend="eager")
    torch.manual_seed(0)  # for the views
    loss = compiled(images(), TARGETS).loss
    torch.manual_seed(0)
    torch.testing.assert_close(loss, same.objective(images(), TARGETS).loss)
    torch.testing.assert_close(method.state_dict(), same.state_dict())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_learns_a_batch_by_heart(case: str) -> None:
    method = build(**CASES[case])
    optimizer = torch.optim.SGD(method.parameters(), lr=0.01, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        objective = method.objective(images(), TARGETS)
        objective.loss.backward()
        optimizer.step()
    assert torch.equal(objective.logits.argmax(1), TARGETS)
