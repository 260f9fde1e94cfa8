import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import crossx
import orientations
from crossx.data.images import ImageError, read_image
from crossx.data.transforms import Normalize, Transform, eval_transform
from crossx.errors import CrossXError, UsageError
from crossx.evaluation.network import DTYPES
from crossx.methods.registry import create_method
from crossx.methods.weights import describe, save_weights
from crossx.predict.predictor import Prediction, Predictor, class_number
from crossx.predict.prefetch import MAX_WORKERS
from crossx.runs import Preprocessing, Run, write_json
from layouts import write_image
from refusals import refusal

CLASSES = ("auk", "jay", "owl")
PREPROCESSING = Preprocessing(64, 72, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    run = Run(tmp_path_factory.mktemp("run"))
    method = create_method("crossx", backbone="test_resnet", num_classes=3)
    spec = describe(method, classes=CLASSES, preprocessing=PREPROCESSING, dataset="folder")
    write_json(run.spec, spec.to_json())
    save_weights(method, run.weights)
    return run


@pytest.fixture(scope="module")
def predictor(run):
    return Predictor.load(run.path, device="cpu")


@pytest.fixture
def images(tmp_path):
    for number in range(5):
        write_image(tmp_path / "birds" / f"{number}.jpg", number % 3, number)
    return sorted((tmp_path / "birds").iterdir())


@pytest.mark.parametrize("value", ["no", 1, None])
def test_a_flip_is_true_or_false(run, value):
    assert (
        refusal(Predictor.load, run.path, "cpu", flip=value) == f"flip must be True or False, not {value!r}."
    )


def test_paths_are_no_prepared_images(predictor, images):
    for given in ([str(images[0])], str(images[0]), [images[0]]):
        for method in (predictor.features, predictor.classify, predictor.answer):
            assert "prepare files with Predictor.prepare" in refusal(method, given)


@pytest.mark.parametrize("options", [{}, {"crops": 5, "flip": True}])
def test_no_images_have_no_answers_and_no_features(run, options):
    predictor = Predictor.load(run.path, "cpu", **options)
    assert predictor.classify([]) == predictor.answer([]) == predictor.predict([]) == []
    assert predictor.features([]).shape == (0, predictor.feature_size)


@torch.inference_mode()
def probabilities(predictor, path):
    image = eval_transform(PREPROCESSING)(read_image(path))
    return predictor.method(Normalize(PREPROCESSING)(image[None])).softmax(1)[0].numpy()


def test_every_source_of_an_orientation_is_prepared_alike(predictor, tmp_path):
    for source, stored in orientations.SOURCES.items():
        path = tmp_path / "bird.jpg"
        path.write_bytes(stored(6))
        with Image.open(path) as picture:
            prepared = [predictor.prepare(item) for item in (path, path.read_bytes(), picture)]
        upright = eval_transform(PREPROCESSING)(read_image(path, pillow=True))
        assert all(torch.equal(image, upright) for image in prepared), source


def test_class_names_are_found_by_their_text():
    assert class_number("cafe\u0301 ", ("auk", "caf\u00e9")) == 1
    assert class_number("caf\u00e9", ("cafe\u0301", "auk")) == 0


def test_load_takes_run_and_checkpoint(run):
    by_run, by_file = crossx.load(run.path), Predictor.load(run.weights)
    assert by_run.classes == by_file.classes == CLASSES
    assert not by_run.method.training
    for key, value in by_run.method.state_dict().items():
        torch.testing.assert_close(value, by_file.method.state_dict()[key])


def test_predictions_are_the_networks_one_by_one(predictor, images):
    predictions = predictor.predict(images, top=2, batch_size=2)
    assert [prediction.path for prediction in predictions] == images
    for prediction in predictions:
        expected = probabilities(predictor, prediction.path)
        order = np.argsort(-expected)[:2]
        assert [label for label, _ in prediction.top] == [CLASSES[i] for i in order]
        assert [value for _, value in prediction.top] == pytest.approx(expected[order], abs=1e-5)
        assert (prediction.label, prediction.probability) == prediction.top[0]
        assert prediction.error is None


def test_paths_pillow_images_and_tensors_agree(predictor, images):
    by_path, by_pillow, by_tensor = predictor.predict(
        [str(images[0]), Image.open(images[0]), read_image(images[0])]
    )
    assert by_path.label == by_pillow.label == by_tensor.label
    assert by_pillow.probability == pytest.approx(by_path.probability, abs=1e-6)
    assert by_tensor.probability == pytest.approx(by_path.probability, abs=1e-6)
    assert (by_path.path, by_pillow.path) == (images[0], None)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "YCbCr"])
def test_pillow_modes_are_read_like_files(predictor, tmp_path, images, mode):
    with Image.open(images[0]) as source:
        image = source.convert(mode if mode != "I;16" else "L")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
        assert image.mode == mode
    path = tmp_path / ("mode.jpg" if mode == "YCbCr" else "mode.tif")
    image.save(path)
    memory, file = predictor.predict([image, path])
    assert memory.error is None
    assert memory.probability == pytest.approx(file.probability, abs=0.05 if mode == "YCbCr" else 1e-6)


def test_pillow_images_are_turned_upright(predictor, tmp_path, images):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    with Image.open(images[0]) as source:
        source.save(path, exif=exif, quality=95)
    turned, memory = predictor.predict([path, Image.open(path)])
    lying = predictor.predict([Image.fromarray(np.asarray(Image.open(path)))])[0]
    assert memory.probability == pytest.approx(turned.probability, abs=1e-6)
    assert memory.probability != pytest.approx(lying.probability, abs=1e-4)


def test_one_image_needs_no_list(predictor, images):
    assert predictor.predict(str(images[0])) == predictor.predict([images[0]])
    assert predictor.predict(read_image(images[0]))[0].label == predictor.predict([images[0]])[0].label


def test_bad_images_do_not_stop_the_rest(predictor, tmp_path, images):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(images[0].read_bytes()[:-60])
    broken = Image.open(bad)
    predictions = predictor.predict([images[0], bad, broken, torch.zeros(3, 8, 8), images[1]], batch_size=2)
    assert [prediction.error is None for prediction in predictions] == [True, False, False, False, True]
    assert [prediction.label for prediction in predictions[1:4]] == [None] * 3
    assert "uint8 RGB" in predictions[3].error
    assert all("\n" not in prediction.error for prediction in predictions[1:4])
    assert predictions[4].label == predictor.predict([images[1]])[0].label


def test_only_bad_images(predictor, tmp_path):
    empty = tmp_path / "empty.png"
    empty.touch()
    assert predictor.predict([empty]) == [Prediction(empty, error="is empty (0 bytes)")]


def test_no_images_no_predictions(predictor):
    assert predictor.predict([]) == []


def test_top_ends_at_the_number_of_classes(predictor, images):
    (prediction,) = predictor.predict(images[:1], top=10)
    assert sorted(label for label, _ in prediction.top) == sorted(CLASSES)
    assert sum(value for _, value in prediction.top) == pytest.approx(1)
    with pytest.raises(UsageError, match="at least 1"):
        predictor.predict(images, top=0)


@pytest.mark.parametrize("value", [0, -1, "3", 2.5, True, None])
@pytest.mark.parametrize("name", ["top", "batch_size"])
@pytest.mark.parametrize("call", ["predict", "iter_predict", "neighbors"])
def test_numbers_that_are_none_are_refused(predictor, images, call, name, value):
    message = refusal(lambda: getattr(predictor, call)(images, **{name: value}))
    assert message == f"{name} must be a whole number of at least 1, not {value!r}."


def test_numbers_of_numpy_are_numbers(predictor, images):
    expected = predictor.predict(images, top=2, batch_size=3)
    assert predictor.predict(images, top=np.int64(2), batch_size=np.int32(3)) == expected


@pytest.mark.parametrize("call", ["predict", "iter_features", "iter_explain", "inputs", "neighbors"])
def test_what_is_no_image_is_refused_before_anything_is_read(predictor, images, call):
    array = np.zeros((12, 20, 3), np.uint8)
    for wrong, named in [
        (array, "uint8, (12, 20, 3)"),
        ([*images, array], "uint8, (12, 20, 3)"),
        (np.stack([array] * 2), "uint8, (2, 12, 20, 3)"),
        (None, "NoneType"),
        ([images[0], None], "NoneType"),
        (3, "int"),
        ([[images[0]]], "list"),
        (io.BytesIO(images[0].read_bytes()), "BytesIO"),
        ([io.BytesIO(images[0].read_bytes())], "BytesIO"),
        (bytearray(images[0].read_bytes()), "bytearray"),
    ]:
        with pytest.raises(UsageError) as caught:
            list(getattr(predictor, call)(wrong))
        assert named in str(caught.value)
        assert ("PIL.Image.fromarray" in str(caught.value)) == ("uint8, (" in named)


@pytest.mark.parametrize("size", [(0, 10), (10, 0), (0, 0)])
def test_a_pillow_image_without_pixels_is_named(predictor, size):
    (prediction,) = predictor.predict(Image.new("RGB", size))
    assert prediction.error == f"the image has no pixels ({size[0]} x {size[1]})."


def test_streaming_decodes_only_a_little_ahead(predictor, images, monkeypatch):
    read = []

    def counted(transform, path):
        read.append(path)
        return read_image(path)

    monkeypatch.setattr(Transform, "read", counted)
    stream = predictor.iter_predict(images * 40, batch_size=4)
    first = next(stream)
    assert first.path == images[0]
    assert len(read) <= 4 + max(4, MAX_WORKERS)
    stream.close()
    assert len(read) < 200


def test_damaged_weights_are_an_error(run, images):
    predictor = Predictor.load(run.path, device="cpu")
    with torch.no_grad():
        next(iter(predictor.method.heads.values())).bias[0] = torch.nan
    with pytest.raises(CrossXError, match="not finite"):
        predictor.predict(images)


@torch.inference_mode()
def test_inputs_are_what_the_network_is_fed(predictor, tmp_path, images):
    batch = predictor.inputs(images[:2])
    assert batch.shape == (2, 3, 64, 64)
    for row, path in zip(predictor.method(batch).softmax(1), images, strict=False):
        np.testing.assert_allclose(row.numpy(), probabilities(predictor, path), atol=1e-5)
    empty = tmp_path / "empty.png"
    empty.touch()
    with pytest.raises(CrossXError, match=r"empty\.png: is empty \(0 bytes\)\.$"):
        predictor.inputs([images[0], empty])
    with pytest.raises(CrossXError, match="no images"):
        predictor.inputs([])


def test_explanations_belong_to_their_images(predictor, tmp_path, images):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    given = [images[0], bad, *images[1:]]
    explained = list(predictor.iter_explain(given, maps="both", target="owl", batch_size=2))
    assert [one.path for one in explained] == given
    assert explained[1].pixels is explained[1].explanation is None
    assert "\n" not in explained[1].error
    for one in explained[:1] + explained[2:]:
        expected = probabilities(predictor, one.path)
        np.testing.assert_allclose(one.explanation.probabilities, expected, atol=1e-5)
        assert one.explanation.target == 2
        seen = eval_transform(PREPROCESSING)(read_image(one.path)).permute(1, 2, 0).numpy()
        assert np.array_equal(one.pixels, seen)
        with torch.no_grad():
            maps = predictor.method.activation_maps(predictor.inputs(one.path))
        np.testing.assert_allclose(
            one.explanation.maps["last part 2"], maps["last"][0, 1], rtol=1e-3, atol=1e-4
        )


def test_an_unknown_class_is_refused(predictor, images):
    with pytest.raises(UsageError, match=r"unknown class 'ow'. Did you mean 'owl'\? .* its 3 classes\.$"):
        next(predictor.iter_explain(images, maps="class", target="ow"))


def test_unknown_devices_are_refused(run):
    with pytest.raises(UsageError, match="unknown device 'gpu'"):
        Predictor.load(run.path, device="gpu")
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(UsageError, match=f"torch sees {torch.cuda.device_count()} GPUs"):
        Predictor.load(run.path, device=missing)


def test_prepare_and_classify_are_the_two_steps_of_predict(predictor, images):
    prepared = [
        predictor.prepare(item) for item in (images[0], images[1].read_bytes(), read_image(images[2]))
    ]
    assert {(image.dtype, tuple(image.shape)) for image in prepared} == {(torch.uint8, (3, 64, 64))}
    expected = [prediction.top for prediction in predictor.predict(images[:3], top=2)]
    assert predictor.classify(prepared, top=2) == expected
    assert predictor.classify(torch.stack(prepared), top=2) == expected
    assert predictor.classify([]) == []


def test_prepare_says_why_there_is_no_image(predictor, tmp_path):
    with pytest.raises(ImageError) as caught:
        predictor.prepare(tmp_path / "none.jpg")
    assert caught.value.reason == "no such file"
    with pytest.raises(CrossXError, match="uint8 RGB"):
        predictor.prepare(torch.zeros(3, 8, 8))


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_probabilities_are_scaled_by_the_temperature_and_labels_are_not(predictor, images, temperature):
    scaled = Predictor.from_method(predictor.method, replace(predictor.spec, temperature=temperature), "cpu")
    for one, raw in zip(scaled.predict(images, top=3), predictor.predict(images, top=3), strict=True):
        powers = np.array([value for _, value in raw.top]) ** (1 / temperature)
        assert [label for label, _ in one.top] == [label for label, _ in raw.top]
        assert [value for _, value in one.top] == pytest.approx(powers / powers.sum(), abs=1e-6)
    for one, raw in zip(scaled.iter_explain(images), scaled.predict(images), strict=True):
        assert one.explanation.probabilities.max() == pytest.approx(raw.probability, abs=1e-6)


def test_images_of_many_sizes_in_one_batch_are_as_one_by_one(predictor, tmp_path):
    sizes = [(48, 40), (40, 300), (641, 480), (1, 1), (73, 72), (2000, 30)]
    paths = [tmp_path / f"{width}x{height}.png" for width, height in sizes]
    for number, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        write_image(path, number % 3, number, size)
    together = predictor.predict(paths, top=3, batch_size=len(paths))
    for path, prediction in zip(paths, together, strict=True):
        (alone,) = predictor.predict(path, top=3)
        assert [label for label, _ in prediction.top] == [label for label, _ in alone.top]
        assert [p for _, p in prediction.top] == pytest.approx([p for _, p in alone.top], abs=1e-6)


def resized_square(path):
    """The image resized and cut to the square of 72 pixels that 5 crops are taken from."""
    return eval_transform(replace(PREPROCESSING, image_size=72))(read_image(path))


def naive_views(square, flip, crops):
    """Views by plain slicing, in any order."""
    corners = [(0, 0), (0, 8), (8, 0), (8, 8)] if crops == 5 else []
    views = [square[:, top : top + 64, left : left + 64] for top, left in [(4, 4), *corners]]
    return views + [torch.flip(view, dims=[2]) for view in views] if flip else views


@pytest.mark.parametrize(("flip", "crops"), [(True, 1), (False, 5), (True, 5)])
@torch.inference_mode()
def test_views_are_averaged_as_by_a_plain_loop(predictor, images, flip, crops):
    spec = replace(predictor.spec, temperature=0.4)
    averaging = Predictor.from_method(predictor.method, spec, "cpu", flip=flip, crops=crops)
    normalize = Normalize(PREPROCESSING)
    for path, found, feature in zip(
        images, averaging.predict(images, top=3), averaging.iter_features(images), strict=True
    ):
        views = [normalize(view[None]) for view in naive_views(resized_square(path), flip, crops)]
        assert len(views) == crops * (1 + flip)
        expected = np.mean([(predictor.method(view)[0] / 0.4).softmax(0).numpy() for view in views], axis=0)
        assert dict(found.top) == pytest.approx(dict(zip(CLASSES, expected, strict=True)), abs=1e-5)
        vector = np.mean([predictor.method.embeddings(view)[0].numpy() for view in views], axis=0)
        np.testing.assert_allclose(feature.vector, vector / np.linalg.norm(vector), atol=1e-5)


def test_explanations_have_the_probabilities_of_all_views(predictor, images):
    spec = replace(predictor.spec, temperature=0.4)
    averaging = Predictor.from_method(predictor.method, spec, "cpu", flip=True, crops=5)
    for one, expected in zip(
        averaging.iter_explain(images, maps="class"), averaging.predict(images, top=3), strict=True
    ):
        found = dict(zip(CLASSES, one.explanation.probabilities.tolist(), strict=True))
        assert found == pytest.approx(dict(expected.top), abs=1e-6)
        assert CLASSES[one.explanation.target] == expected.label


@pytest.mark.parametrize(
    "call", ["iter_predict", "iter_images", "iter_features", "iter_image_features", "iter_explain"]
)
def test_a_batch_of_none_is_refused(predictor, images, call):
    assert "batch_size" in refusal(lambda: next(getattr(predictor, call)(images, batch_size=0)))


def test_explanations_and_inputs_are_of_the_centre_crop(predictor, images):
    averaging = Predictor.from_method(predictor.method, predictor.spec, "cpu", flip=True, crops=5)
    torch.testing.assert_close(averaging.inputs(images), predictor.inputs(images))
    (one,), (other,) = (list(p.iter_explain(images[0])) for p in (averaging, predictor))
    assert np.array_equal(one.pixels, other.pixels)


def test_features_are_the_networks_embeddings_of_length_1(predictor, tmp_path, images):
    bad = tmp_path / "bad.jpg"
    bad.touch()
    first, broken, second = predictor.iter_features([images[0], bad, images[1]])
    assert (broken.path, broken.vector, broken.error) == (bad, None, "is empty (0 bytes)")
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(predictor.method.embeddings(predictor.inputs(images[:2])))
    np.testing.assert_allclose(np.stack([first.vector, second.vector]), expected.numpy(), atol=1e-5)
    assert first.vector.shape == (predictor.feature_size,)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 0), ("bf16", 0.05), ("fp16", 0.005)])
def test_lower_precisions_give_nearly_the_same(predictor, images, precision, tolerance):
    seen = []
    lower = Predictor.from_method(predictor.method, predictor.spec, "cpu", precision=precision)
    hook = lower.method.heads["last"].register_forward_hook(lambda *call: seen.append(call[2].dtype))
    found = lower.predict(images, top=3)
    hook.remove()
    assert set(seen) == {DTYPES[precision]}
    for one, expected in zip(found, predictor.predict(images, top=3), strict=True):
        assert dict(one.top) == pytest.approx(dict(expected.top), abs=tolerance)


def test_what_leaves_the_range_of_fp16_is_computed_in_fp32(run, images):
    predictor = Predictor.load(run.path, "cpu", precision="fp16")
    with torch.no_grad():
        predictor.method.heads["last"].bias += 1e5
    wide = Predictor.from_method(predictor.method, predictor.spec, "cpu", precision="fp32")
    assert predictor.predict(images) == wide.predict(images)


def test_the_default_precision_on_a_cpu_is_float32(predictor):
    assert predictor.precision == torch.float32


def test_options_that_cannot_be_are_refused(run, predictor):
    with pytest.raises(UsageError, match=r"unknown precision 'fp61'\. Did you mean 'fp16'"):
        Predictor.load(run.path, "cpu", precision="fp61")
    with pytest.raises(UsageError, match="crops must be 1 or 5, not 3"):
        Predictor.load(run.path, "cpu", crops=3)
    whole = replace(predictor.spec, preprocessing=replace(PREPROCESSING, resize_size=64))
    with pytest.raises(UsageError, match="resizes images to the 64 pixels that it crops"):
        Predictor.from_method(predictor.method, whole, "cpu", crops=5)
