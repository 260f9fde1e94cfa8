"""Loading what a stranger wrote: every ``model.json`` and every file of weights gives its network or one line."""

import copy
import hashlib
import io
import json
import re
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from crossx.errors import CrossXError, UsageError
from crossx.methods import Method, create_method, list_methods
from crossx.methods.registry import register_method
from crossx.methods.weights import build_method, describe, load_method, save_weights
from crossx.runs import Preprocessing, Run, read_json, write_json
from crossx.schema.model import ARCHITECTURE_ARGUMENTS, check_backbone_args, check_model
from malice import Payload, watched
from refusals import refusal

CLASSES = ("ani", "auklet", "bunting")
PREPROCESSING = Preprocessing(64, 72, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
ARGS = {"channels": [4, 8, 16, 32], "drop_path_rate": 0.1}
IMAGES = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("run"))
    torch.manual_seed(0)
    method = create_method("plain", backbone="resnet10t", num_classes=3, image_size=64, backbone_args=ARGS)
    levels = {"family": ("Cuculidae", "Alcidae", "Cardinalidae")}
    spec = describe(method, classes=CLASSES, preprocessing=PREPROCESSING, dataset="cub", levels=levels)
    write_json(run.spec, spec.to_json())
    save_weights(method, run.weights)
    return run


@pytest.fixture(scope="module")
def values(run: Run) -> dict[str, Any]:
    return read_json(run.spec)


@pytest.fixture(scope="module")
def logits(run: Run) -> Tensor:
    with torch.inference_mode():
        return load_method(run.path)[0](IMAGES)


def one_line(call: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(CrossXError) as caught:
        call(*args)
    line = str(caught.value)
    assert "\n" not in line
    assert line.isprintable()
    assert len(line) < 1000
    return line


def outcome(run: Run, text: str, logits: Tensor, loaded: set[str] | None = None) -> str:
    """Load the run with another ``model.json``: "right" for the network of the weights, else the one line.

    A network that is in ``loaded``, and differs in names alone, is not loaded again.
    """
    run.spec.write_text(text, encoding="utf-8", errors="surrogatepass")
    with watched(run.path) as seen:
        try:
            spec = run.read_spec()
            network = repr(
                (spec.method, spec.options, spec.backbone, spec.backbone_args, spec.preprocessing.image_size)
            )
            if loaded is not None and network in loaded and len(spec.classes) == len(CLASSES):
                return "right"
            method, spec = load_method(run.path)
            with torch.inference_mode():
                answer = method(IMAGES)
        except CrossXError as error:
            line = str(error)
            assert "\n" not in line
            assert line.isprintable()
            assert len(line) < 1000
        else:
            line = "right"
            if loaded is not None:
                loaded.add(network)
            assert answer.shape == (1, len(spec.classes))
            # whatever else the file says, the weights and the architecture are those of the file next to it
            torch.testing.assert_close(answer, logits)
    assert seen == []
    return line


HUGE = 10**400
STRANGE: list[Any] = [
    None, True, False, 0, 1, -1, 3, 10**6, HUGE, 0.5, -0.5, 1e308, float("nan"), float("inf"), "", "x", "1", "resnet18",
    "hf-hub:evil/model", "local-dir:/etc", "timm/../x", "/etc/passwd", "../model.json", "\ud800", "\x1b[2J\n",
    "a" * 10**5, [], {}, [None], [-1], [0, 0, 0], [10**6] * 3, ["x"] * 3, {"x": 1}, [[[[]]]],
]  # fmt: skip
"""What each value is replaced with."""


def places(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Give the path of every value in ``model.json``, of lists that of the first."""
    if path:
        yield path
    if isinstance(values, dict):
        for key, value in values.items():
            yield from places(value, (*path, key))
    elif isinstance(values, list) and values:
        yield from places(values[0], (*path, 0))


def changed(
    values: dict[str, Any], path: tuple[Any, ...], value: Any = None, *, delete: bool = False
) -> dict[str, Any]:
    values = copy.deepcopy(values)
    holder: Any = values
    for key in path[:-1]:
        holder = holder[key]
    if delete:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return values


@pytest.mark.slow
def test_every_value_replaced_by_every_strange_one(run: Run, values: dict[str, Any], logits: Tensor) -> None:
    tried, right = 0, 0
    loaded: set[str] = set()
    for path in places(values):
        versions = [changed(values, path, delete=True), *(changed(values, path, value) for value in STRANGE)]
        for version in versions:
            tried += 1
            right += outcome(run, json.dumps(version), logits, loaded) == "right"
    assert tried > 800
    # a class is called something else, a temperature of 1, a dataset of another name, ...
    assert 50 < right < tried / 3


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("/etc/passwd"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_values_anywhere(run: Run, values: dict[str, Any], logits: Tensor, data: st.DataObject) -> None:
    version = values
    for _ in range(data.draw(st.integers(1, 3))):
        version = changed(version, data.draw(st.sampled_from(list(places(version)))), data.draw(JSON))
        if not isinstance(version.get("backbone_args"), dict):
            break
    outcome(run, json.dumps(version), logits)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "null", "[]", "3", "{", "{}", '"x"', "\ufeff{}", "\x00", "NaN",
        '{"schema": 1}', '{"schema": 1, "schema": 1}',
        '{"schema": ' + "1" * 5000 + "}",
        '{"schema": "' + "1" * 5000 + '"}',
        '{"schema": 1, "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"schema": 1, "x": ' + '{"a":' * 100_000 + "1" + "}" * 100_000 + "}",
    ],
)  # fmt: skip
def test_text_that_is_no_description(run: Run, logits: Tensor, text: str) -> None:
    assert outcome(run, text, logits) != "right"


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('"temperature": 1.0', '"temperature": NaN', "NaN is not a JSON number"),
        ('"temperature": 1.0', '"temperature": 1e999', "temperature: should be"),
        ('"temperature": 1.0', '"temperature": ' + "9" * 4301, "not valid JSON"),
        ('"temperature": 1.0', '"temperature": 1.0, "temperature": 1.0', "a key is given twice"),
        ('"drop_path_rate": 0.1', '"drop_path_rate": 0.1, "drop_path_rate": 0.1', "a key is given twice"),
    ],
)
def test_numbers_and_keys_that_json_leaves_open(
    run: Run, values: dict[str, Any], logits: Tensor, old: str, new: str, reason: str
) -> None:
    text = json.dumps(values)
    assert old in text
    assert reason in outcome(run, text.replace(old, new), logits)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"options": {"pretrained": True}}, "method 'plain' has no option 'pretrained'"),
        ({"options": {"backbone_weights": "/etc/passwd"}}, "has no option 'backbone_weights'"),
        ({"options": {"num_classes": 10**9}}, "has no option 'num_classes'"),
        ({"options": {"image_size": 10**6}}, "has no option 'image_size'"),
        ({"method": "crossx", "options": {"num_parts": 10**9}}, "its weights do not fit"),
        ({"method": "crossx", "options": {"num_parts": "2"}}, "option num_parts is of the wrong type"),
        ({"method": "crossx", "options": {"num_parts": 0}}, "num_parts must be at least 1"),
        ({"method": "crossx", "options": {"reduction": 0}}, "reduction must be between"),
        ({"method": "crossx", "options": {"c3s_weights": [1]}}, "c3s_weights"),
        (
            {"method": "crossx", "options": {"previous_pooling": "median"}},
            "unknown previous_pooling 'median'",
        ),
        ({"method": "nts", "options": {"crop_size": 10**6}}, "crop_size must be between 2 and 4096"),
        ({"method": "kernel_pooling", "options": {"sketch_size": 10**9}}, "its weights do not fit"),
        ({"method": "dfl", "options": {"num_filters": 10**9}}, "its weights do not fit"),
        ({"method": "mamc", "options": {"embedding_size": 2**31}}, "its weights do not fit"),
        *(
            ({"backbone_args": {name: value}}, f"backbone_args.{name}: is not known here")
            for name, value in {
                "cache_dir": "/tmp",
                "checkpoint_path": "/etc/passwd",
                "pretrained": True,
                "pretrained_cfg": {"file": "/etc/passwd"},
                "pretrained_cfg_overlay": {"url": "http://127.0.0.1:9/x"},
                "pretrained_strict": False,
                "num_classes": 3,
                "features_only": True,
                "device": "cuda",
                "hybrid_backbone": "x",
                "kwargs_filter": ["x"],
            }.items()
        ),
        ({"backbone_args": {"in_chans": 1}}, "backbone_args.in_chans: should be 3"),
        ({"backbone_args": {"channels": [16_384] * 4}}, "its weights do not fit"),
        (
            {"backbone_args": {"channels": [10**9] * 4}},
            "backbone_args.channels: should be a whole number from 0 to",
        ),
        ({"backbone_args": {"channels": [4] * 1000}}, "backbone_args.channels: should be"),
        ({"backbone_args": {"layers": [10**6] * 4}}, "backbone_args.layers: should be"),
        ({"backbone_args": {"norm_layer": "os.system"}}, "backbone_args.norm_layer: should be"),
        ({"backbone_args": {"block_args": {"attn_layer": "../x"}}}, "backbone_args.block_args"),
        ({"backbone": "resnet18", "backbone_args": {}}, "its weights do not fit"),
        ({"backbone": "vit_giant_patch14_224", "backbone_args": {}}, "image_size 64 does not work"),
        (
            {"backbone": "vit_tiny_patch16_224", "backbone_args": {"img_size": 10**6}},
            "backbone_args.img_size",
        ),
        ({"backbone": "resnet10t.evil"}, "unknown weights 'resnet10t.evil'"),
        ({"classes": [str(number) for number in range(50_000)], "levels": {}}, "its weights do not fit"),
        (
            {"classes": [str(number) for number in range(100_001)], "levels": {}},
            "classes: list should have at most",
        ),
    ],
)
def test_attacks_are_refused_by_name(
    run: Run, values: dict[str, Any], logits: Tensor, changes: dict[str, Any], reason: str
) -> None:
    assert reason in outcome(run, json.dumps({**values, **changes}), logits)


@pytest.mark.parametrize("key", ["image_size", "resize_size", "crop_bottom", "mean", "std", "interpolation"])
@pytest.mark.parametrize("value", [10**6, -1, [0, 0, 0], [float("1e300")] * 3, "lanczos"])
def test_preprocessing_out_of_bounds(
    run: Run, values: dict[str, Any], logits: Tensor, key: str, value: Any
) -> None:
    if key == "mean" and value == [0, 0, 0]:
        value = [0, 0]
    version = changed(values, ("preprocessing", key), value)
    assert f"preprocessing.{key}" in outcome(run, json.dumps(version), logits)


def test_a_network_larger_than_its_weights_takes_no_memory(
    run: Run, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []
    build = build_method

    def recorded(spec: Any) -> Any:
        built.append(torch.get_default_device().type)
        return build(spec)

    monkeypatch.setattr("crossx.methods.weights.build_method", recorded)
    write_json(run.spec, values)
    load_method(run.path)
    assert built == ["meta", "cpu"]
    write_json(run.spec, {**values, "backbone_args": {"channels": [16_384] * 4, "layers": [4] * 4}})
    assert "its weights do not fit" in one_line(load_method, run.path)
    assert built == ["meta", "cpu", "meta"]


def test_buffers_that_no_weights_stand_for_are_bounded(
    run: Run, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crossx.methods.weights.MAX_DERIVED", 1000)
    swin = {"backbone": "swin_tiny_patch4_window7_224", "backbone_args": {}}
    preprocessing = {**values["preprocessing"], "image_size": 224, "resize_size": 256}
    write_json(run.spec, {**values, **swin, "preprocessing": preprocessing})
    assert "GB of tables in addition to its weights" in one_line(load_method, run.path)


# files of weights


def header_of(data: bytes) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])


def with_header(data: bytes, header: Any) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


@pytest.fixture
def broken(run: Run, values: dict[str, Any], tmp_path: Path) -> Callable[[bytes], str]:
    """Load the run with other bytes for weights, and return the line."""
    write_json(tmp_path / "model.json", values)

    def load(data: bytes) -> str:
        (tmp_path / "model.safetensors").write_bytes(data)
        return one_line(load_method, tmp_path)

    return load


def test_safetensors_headers_that_lie(run: Run, broken: Callable[[bytes], str]) -> None:
    data = run.weights.read_bytes()
    header = header_of(data)
    key = "backbone.trunk.conv1.0.weight"
    entry = header[key]
    for change in (
        *(
            {"shape": shape}
            for shape in ([10**6] * 3, [2**63], [2**32, 2**32], [-1], [0], [], [10**400], "x", None)
        ),
        *(
            {"dtype": dtype}
            for dtype in ("F16", "F64", "I64", "I32", "BOOL", "C64", "F8_E4M3", "X9", "", 3, None)
        ),
        *({"data_offsets": at} for at in ([0, 2**62], [2**62, 0], [-1, 4], [0], [0, 0], "x", None)),
        {"extra": 1, "shape": None},
    ):
        broken(with_header(data, {**header, key: {**entry, **change}}))
    for other in (
        {},
        [],
        3,
        "{",
        "",
        {key: entry},
        {**header, "extra": entry},
        {**header, key: {}},
        "[" * 10_000,
    ):
        broken(with_header(data, other))


def test_safetensors_cut_short_or_overwritten(run: Run, broken: Callable[[bytes], str]) -> None:
    data = run.weights.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
        broken(data[:length])
    broken(data + b"\0")
    for length in (0, 2**20, 2**40, 2**63, 2**64 - 1):
        broken(struct.pack("<Q", length) + data[8:])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_in_safetensors(
    run: Run, broken: Callable[[bytes], str], where: float, bit: int
) -> None:
    data = bytearray(run.weights.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    start = 8 + length
    data[start + int(where * (len(data) - start))] ^= 1 << bit
    assert "model.safetensors: damaged, its checksum is not that of what was written" in broken(bytes(data))


def test_weights_of_another_program_have_no_checksum_to_check(
    run: Run, values: dict[str, Any], tmp_path: Path
) -> None:
    state = load_state(run)
    write_json(tmp_path / "model.json", values)
    save_file({key: value + 1 for key, value in state.items()}, tmp_path / "model.safetensors")
    loaded = load_method(tmp_path)[0].state_dict()
    assert all(torch.equal(loaded[key], value + 1) for key, value in state.items())


def test_the_checksum_is_that_of_names_types_shapes_and_bytes(run: Run) -> None:
    expected = hashlib.sha256()
    for key, value in sorted(load_state(run).items()):
        expected.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode() + value.numpy().tobytes())
    assert header_of(run.weights.read_bytes())["__metadata__"] == {"sha256": expected.hexdigest()}


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_weights_of_a_type_that_no_network_has(
    run: Run, dtype: torch.dtype, tmp_path: Path, broken: Callable[[bytes], str]
) -> None:
    state = load_state(run)
    key = "classifier.weight"
    state[key] = torch.zeros(state[key].shape, dtype=dtype)
    save_file(state, tmp_path / "model.safetensors")
    line = broken((tmp_path / "model.safetensors").read_bytes())
    assert f"{key} holds {dtype}, expected torch.float32" in line


def load_state(run: Run) -> dict[str, Tensor]:
    write_values = read_json(run.spec)
    assert write_values
    from safetensors.torch import load_file

    return load_file(run.weights)


@pytest.mark.parametrize("length", [0, 1, 1000, -1])
def test_weights_that_are_cut_off_name_the_checkpoint(run: Run, tmp_path: Path, length: int) -> None:
    damaged = Run(shutil.copytree(run.path, tmp_path / "run"))
    whole = damaged.weights.read_bytes()
    damaged.weights.write_bytes(whole[:length])
    assert "--resume" not in one_line(load_method, damaged.path)
    damaged.checkpoints.mkdir()
    damaged.last.write_bytes(whole[:length])
    remedy = f"`crossx fit --resume {damaged.path}` restores it from a checkpoint."
    assert remedy in one_line(load_method, damaged.path)
    # of the checkpoint itself it would not be true
    assert remedy not in one_line(load_method, damaged.last)
    damaged.last.write_bytes(b"PK\x03\x04" + whole[:length])
    assert len(one_line(load_method, damaged.last)) < len(str(damaged.last)) + 120


def test_half_weights_are_those_of_a_network(run: Run, values: dict[str, Any], tmp_path: Path) -> None:
    state = {
        key: value.half() if value.is_floating_point() else value for key, value in load_state(run).items()
    }
    write_json(tmp_path / "model.json", values)
    save_file(state, tmp_path / "model.safetensors")
    loaded = load_method(tmp_path)[0].state_dict()
    assert all(torch.equal(loaded[key], value.to(loaded[key].dtype)) for key, value in state.items())


def saved(values: Any) -> bytes:
    file = io.BytesIO()
    torch.save(values, file)
    return file.getvalue()


def compressed(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as good, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as small:
        for entry in good.infolist():
            small.writestr(entry.filename, good.read(entry))
    return file.getvalue()


def test_a_flipped_bit_in_the_tensors_of_a_checkpoint(
    run: Run, values: dict[str, Any], tmp_path: Path
) -> None:
    write_json(tmp_path / "model.json", values)
    checkpoint = tmp_path / "model.ckpt"
    checkpoint.write_bytes(saved(load_state(run)))
    load_method(checkpoint)
    with zipfile.ZipFile(checkpoint) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    data = bytearray(checkpoint.read_bytes())
    # behind the entry's header, which is short
    data[largest.header_offset + largest.file_size // 2] ^= 0x40
    checkpoint.write_bytes(data)
    assert f"{checkpoint}: damaged: " in one_line(load_method, checkpoint)


def test_checkpoints_that_pretend(run: Run, values: dict[str, Any], tmp_path: Path) -> None:
    write_json(tmp_path / "model.json", values)
    state = load_state(run)
    key = "classifier.weight"
    wide = {**state, key: torch.zeros(1).expand(state[key].shape)}
    everything = {
        name: torch.zeros((), dtype=value.dtype).expand(value.shape) for name, value in state.items()
    }
    for data, reason in (
        (saved(everything), "larger than the file"),
        (compressed(saved({**state, key: torch.zeros(10**6)})), "its content is compressed"),
        (saved({**state, key: torch.zeros(state[key].shape, device="meta")}), "not a plain state dict"),
        (saved({**state, key: torch.zeros(state[key].shape).to_sparse()}), "not a plain state dict"),
        (saved({**state, 3: torch.zeros(1)}), "not a plain state dict"),
        (saved({**state, key: 3}), "not a plain state dict"),
        (saved([state]), "not a plain state dict"),
        (saved({**state, key: Payload(tmp_path / "pwned")}), "not a plain state dict"),
        (saved({**state, key: state[key][:1]}), "its weights do not fit"),
        (b"", "not a"),
        (b"\x80\x04.", "not a"),
    ):
        (tmp_path / "model.ckpt").write_bytes(data)
        assert reason in one_line(load_method, tmp_path / "model.ckpt")
    assert not (tmp_path / "pwned").exists()
    # one expanded tensor in a file that is large enough is as good as any
    (tmp_path / "model.ckpt").write_bytes(saved(wide))
    load_method(tmp_path / "model.ckpt")


# what may be kept


@pytest.mark.parametrize("name", list_methods())
def test_every_method_describes_itself_within_bounds(name: str) -> None:
    with torch.device("meta"):
        method = create_method(name, backbone="resnet10t", num_classes=3, image_size=64, backbone_args=ARGS)
    spec = describe(method, classes=CLASSES, preprocessing=PREPROCESSING, dataset="cub")
    check_model(json.loads(json.dumps(spec.to_json())), "model.json")


def test_no_argument_that_is_kept_could_open_or_download() -> None:
    taken = {"cache_dir", "checkpoint_path", "pretrained", "features_only", "num_classes"}
    assert not {name for name in ARCHITECTURE_ARGUMENTS if name in taken or name.startswith("pretrained")}
    for name in ARCHITECTURE_ARGUMENTS:
        for value in ("/etc/passwd", "a.b", "http://x", "hf-hub:x", {"url": "x"}, [["x"]]):
            assert name in refusal(check_backbone_args, {name: value})


def test_the_documentation_lists_what_is_kept() -> None:
    page = (Path(__file__).parents[2] / "docs" / "trust.md").read_text(encoding="utf-8")
    listed = page.partition("| value ")[2].partition("`{attn_layer")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == set(ARCHITECTURE_ARGUMENTS)


def test_an_argument_that_is_not_kept_is_refused_with_the_nearest() -> None:
    assert "Did you mean 'drop_path_rate'?" in refusal(check_backbone_args, {"drop_path_rat": 0.1})
    with torch.device("meta"):
        method = create_method(
            "plain", backbone="resnet10t", num_classes=3, backbone_args={"norm_layer": torch.nn.BatchNorm2d}
        )
    with pytest.raises(UsageError, match=r"backbone_args\.norm_layer should be the name of a layer"):
        describe(method, classes=CLASSES, preprocessing=PREPROCESSING, dataset="cub")


def test_a_folder_backbone_is_rebuilt_without_the_folder(tmp_path: Path) -> None:
    """timm builds a network of one size for the input that the config names, which model.json keeps."""
    config = {
        "architecture": "vit_tiny_patch16_224",
        "model_args": {"depth": 4, "embed_dim": 24, "num_heads": 3},
        "pretrained_cfg": {"input_size": [3, 64, 64], "fixed_input_size": True},
    }
    folder = tmp_path / "folder"
    write_json(folder / "config.json", config)
    method = create_method("plain", backbone=f"local-dir:{folder}", num_classes=3, image_size=64).eval()
    spec = describe(method, classes=CLASSES, preprocessing=PREPROCESSING, dataset="cub")
    run = Run(tmp_path / "run")
    write_json(run.spec, spec.to_json())
    save_weights(method, run.weights)
    with watched(run.path) as seen:
        loaded, _ = load_method(run.path)
    assert seen == []
    torch.testing.assert_close(loaded(IMAGES), method(IMAGES))


def test_options_without_types_are_taken_as_they_are(run: Run, values: dict[str, Any]) -> None:
    class Untyped(Method):
        def __init__(self, backbone: Any, num_classes: int, *, width=4) -> None:  # type: ignore[no-untyped-def]
            super().__init__(backbone, num_classes)

    register_method("untyped")(Untyped)
    from crossx.methods import registry

    try:
        registry.check_options("untyped", {"width": "any"})
    finally:
        del registry._REGISTRY["untyped"]
