"""Schemas of the JSON files of a run or a shared model, which may be of unknown origin. Imports no torch.

A valid file cannot make crossx open a path, download, import or run code, nor build a network of an unreasonable size:
``model.json`` describes an architecture, and the weights come from the file next to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    create_model,
    model_validator,
)

from crossx.errors import CrossXError, UsageError
from crossx.suggestions import nearest

MAX_IMAGE_SIZE = 4096
"""Side of a network's input, in pixels."""
MAX_CLASSES = 100_000
MAX_SHOWN = 80
"""Characters of a key to quote in an error."""

Text = Annotated[str, Field(max_length=1000)]
LongText = Annotated[str, Field(max_length=4096)]
Number = Annotated[float, Field(ge=-1e12, le=1e12)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Temperature = Annotated[float, Field(ge=1e-12, le=1e12)]


class StrictModel(BaseModel):
    """Base of all schemas: converts no types, and refuses numbers that are not finite."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class ExactModel(StrictModel):
    """Base of schemas that refuse unknown keys."""

    model_config = ConfigDict(extra="forbid")


def _row(kind: Any, most: int, least: int = 0) -> Any:
    """Return the type of a list or tuple with bounds on its length."""
    return Annotated[tuple[kind, ...], Field(strict=False, min_length=least, max_length=most)]


def _either(kind: Any, words: str) -> Any:
    """Return a type whose error is ``should be WORDS``, instead of one error per member of the union."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            raise ValueError(f"should be {words}") from error

    return Annotated[kind, WrapValidator(validate)]


_SCALAR = bool | Annotated[int, Field(ge=-(2**31), le=2**31)] | Number | LongText | None
_OPTION = _either(
    _SCALAR | _row(_SCALAR, 64), "a number, true, false, null, a short text or a short list of them"
)


class PreprocessingFile(ExactModel):
    """``preprocessing`` of ``model.json``, see ``crossx.runs.Preprocessing``."""

    image_size: Annotated[int, Field(ge=1, le=MAX_IMAGE_SIZE)]
    resize_size: Annotated[int, Field(ge=1, le=2 * MAX_IMAGE_SIZE)] | None
    interpolation: Literal["bilinear", "bicubic"]
    mean: _row(Annotated[float, Field(ge=-1e3, le=1e3)], 3, 3)  # type: ignore[valid-type]
    std: _row(Annotated[float, Field(ge=1e-6, le=1e6)], 3, 3)  # type: ignore[valid-type]
    crop_bottom: Annotated[int, Field(ge=0, le=100_000)] = 0
    pipeline: Literal["fast", "strict"] = "fast"

    @model_validator(mode="after")
    def _crop_fits(self) -> PreprocessingFile:
        if self.resize_size is not None and self.resize_size < self.image_size:
            raise ValueError(f"resize_size {self.resize_size} is less than image_size {self.image_size}")
        return self


_VIEWS = Literal["1", "1+flip", "5", "5+flip"]


class RejectionFile(ExactModel):
    """``rejection`` of ``model.json``, see ``crossx.runs.Rejection``."""

    score: Literal["max_probability", "max_logit", "energy", "similarity", "combined"]
    keep: Annotated[float, Field(gt=0, lt=1)]
    images: Count
    thresholds: Annotated[dict[_VIEWS, Number], Field(min_length=1)]
    weight: Annotated[float, Field(ge=0, le=1e12)] | None = None

    @model_validator(mode="after")
    def _has_its_weight(self) -> RejectionFile:
        if self.score == "combined" and self.weight is None:
            raise ValueError("score combined needs a weight")
        return self


class SetsFile(ExactModel):
    """``sets`` of ``model.json``, see ``crossx.runs.PredictionSets``."""

    images: Annotated[int, Field(ge=1, le=2**53)]
    least_probability: Annotated[dict[_VIEWS, _row(Share, 50)], Field(min_length=1)]  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _guaranteed_and_decreasing(self) -> SetsFile:
        # n images guarantee n / (n + 1)
        most = 100 * self.images // (self.images + 1) - 49
        for views, row in self.least_probability.items():
            if len(row) > most:
                raise ValueError(f"least_probability.{views} has {len(row)} numbers for {self.images} images")
            if list(row) != sorted(row, reverse=True):
                raise ValueError(f"least_probability.{views} increases")
        return self


class ModelFile(StrictModel):
    """``model.json``, see ``crossx.runs.ModelSpec``. ``backbone_args`` is checked separately."""

    method: Annotated[str, Field(max_length=100, pattern=r"^[A-Za-z0-9_.-]+$")]
    options: Annotated[dict[Annotated[str, Field(max_length=100)], _OPTION], Field(max_length=100)]  # type: ignore[valid-type]
    backbone: Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_-]+)?$")]
    backbone_args: dict[str, Any]
    classes: _row(Text, MAX_CLASSES, 1)  # type: ignore[valid-type]
    preprocessing: PreprocessingFile
    dataset: Annotated[str, Field(max_length=200, pattern=r"^[^:/\\]*$")]
    levels: Annotated[dict[Text, _row(Text, MAX_CLASSES)], Field(max_length=16)] = {}  # type: ignore[valid-type]
    temperature: Temperature = 1.0
    rejection: RejectionFile | None = None
    sets: SetsFile | None = None

    @model_validator(mode="after")
    def _one_group_per_class(self) -> ModelFile:
        for name, groups in self.levels.items():
            if len(groups) != len(self.classes):
                raise ValueError(
                    f"level {_shown(name)} names {len(groups)} groups for {len(self.classes)} classes"
                )
        return self


def _several(kind: Any, words: str) -> Any:
    """Return the type of one value, or one per stage; None is timm's default."""
    return _either(kind | _row(kind, 8) | None, f"{words}, or at most 8 of them")


def _whole(most: int, least: int = 0) -> Any:
    return _several(Annotated[int, Field(ge=least, le=most)], f"a whole number from {least} to {most}")


_RATE = _either(Annotated[float, Field(ge=0, lt=1)] | None, "a number from 0 to below 1")
_FACTOR = _several(Annotated[float, Field(ge=0, le=64)], "a number from 0 to 64")
_WIDTH = _whole(16_384)
_BLOCKS = _whole(256)
_WINDOW = _whole(256)
_SIDE = _whole(1024, 1)
_FLAG = _several(bool, "true or false")
_NAME = _either(
    Annotated[str, Field(max_length=40, pattern=r"^[A-Za-z0-9_]*$")] | None, "the name of a layer"
)

ARCHITECTURE_ARGUMENTS: Mapping[str, Any] = {
    name: kind
    for kind, names in (
        (
            _RATE,
            "drop_rate drop_path_rate drop_block_rate attn_drop_rate proj_drop_rate pos_drop_rate patch_drop_rate",
        ),
        (
            _FACTOR,
            "mlp_ratio mlp_ratios expand_ratio expansion_ratio attn_ratio bottle_ratio se_ratio width width_mult "
            "width_factor depth_mult widen_factor deepen_factor init_values layer_scale_init_value ls_init_value "
            "head_init_scale norm_eps bn_eps bn_momentum",
        ),
        (
            _WIDTH,
            "channels dims embed_dim embed_dims num_heads num_kv_heads head_dim heads key_dim cardinality base_width "
            "groups stem_width stem_size stem_chs stem_hidden_dim num_features head_hidden_size growth_rate "
            "num_init_features init_channels rel_pos_dim reg_tokens num_reg_tokens",
        ),
        (
            _BLOCKS,
            "layers depth depths block_config stages num_blocks depth_token_only serial_depths parallel_depth",
        ),
        (
            _WINDOW,
            "patch_size window_size window_sizes window_ratio kernel_size kernel_sizes stem_kernel_size "
            "down_kernel_size output_stride block_reduce_first drop_block_size bn_size pool_size sr_ratios",
        ),
        (_SIDE, "img_size"),
        (_either(Literal[3] | None, "3"), "in_chans"),
        (
            _FLAG,
            "qkv_bias qk_norm proj_bias class_token no_embed_class pre_norm final_norm fc_norm use_fc_norm "
            "dynamic_img_size dynamic_img_pad strict_img_size always_partition use_abs_pos_emb use_rel_pos_bias "
            "use_shared_rel_pos_bias use_rot_pos_emb avg_down replace_stem_pool zero_init_last conv_mlp conv_bias "
            "use_grn head_norm_first patch_norm swiglu_mlp scale_mlp scale_attn_norm scale_mlp_norm fix_stem fix_init "
            "preact aa_stem_only scriptable exportable no_jit",
        ),
        (
            _NAME,
            "global_pool act_layer norm_layer aa_layer attn_layer stem_type pad_type weight_init rel_pos_type "
            "rope_type attn_type pos_embed",
        ),
    )
    for name in names.split()
}
"""Arguments of ``timm.create_model`` that a saved model may have, and their types: numbers, switches, names of layers.
None of them opens a path, downloads, or is run as code."""

BackboneArguments: type[BaseModel] = create_model(  # type: ignore[call-overload]
    "BackboneArguments",
    __base__=ExactModel,
    block_args=(dict[Literal["attn_layer"], _NAME] | None, None),  # type: ignore[valid-type]
    **{name: (kind, None) for name, kind in ARCHITECTURE_ARGUMENTS.items()},
)


def check_model(values: Mapping[str, Any], source: Path | str) -> None:
    """Check the contents of ``model.json``.

    Raises:
        CrossXError: If a value is missing, of the wrong type or out of bounds, naming it.
    """
    what = "a model description of crossx"
    _check(ModelFile, values, source, what)
    _check(BackboneArguments, values["backbone_args"], source, what, "backbone_args")


def check_backbone_args(args: Mapping[str, Any]) -> None:
    """Check before training that ``model.json`` can store these arguments, so that the run can be loaded.

    Raises:
        UsageError: If it cannot, naming the argument.
    """
    try:
        BackboneArguments.model_validate(dict(args))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
            hint = nearest(name, ARCHITECTURE_ARGUMENTS)
            raise UsageError(
                f"backbone_args.{_shown(name)} is not kept in model.json, so that the run could not be loaded: leave "
                f"it out.{hint} docs/trust.md lists what is kept."
            ) from error
        raise UsageError(
            f"backbone_args.{_where(first['loc'])} {_reason(first)}, or the run could not be loaded: see docs/trust.md."
        ) from error


class GitFile(StrictModel):
    """Git state of the working folder, in ``run.json`` and results."""

    commit: Text
    dirty: bool


class EnvironmentFile(StrictModel):
    """Software that a run was made with."""

    python: Text | None = None
    platform: Text | None = None
    versions: dict[Text, Text] = {}
    git: GitFile | None = None


class SelectionFile(StrictModel):
    """How the epoch of the weights was selected."""

    how: Text | None = None
    split: Text | None = None
    metric: Text | None = None
    epoch: Annotated[int, Field(ge=1, le=10**9)] | None = None
    value: Number | None = None


class CalibrationFile(StrictModel):
    """``calibration`` of ``run.json``: the images that the run was calibrated on, and the temperature."""

    n: Count | None = None
    split: Text | None = None
    dataset: Text | None = None
    data_root: LongText | None = None
    temperature: Annotated[float, Field(gt=0)] | None = None


class InitFile(StrictModel):
    """``init`` of ``run.json``: the weights that a run started from."""

    run: LongText
    hub: Text | None = None
    id: Text | None = None
    weights: Text
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    method: Text
    backbone: Text
    dataset: Text
    num_classes: Count
    pretrained: LongText | None = None
    taken: Count
    new: list[str] = []


class ImportFile(StrictModel):
    """A file or module that registered the method of a run."""

    module: Annotated[str, Field(max_length=1000, pattern=r"^[\w.]*$")]
    path: LongText
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ProvenanceFile(StrictModel):
    """What ``run.json`` and results have in common."""

    method: Text | None = None
    backbone: Text | None = None
    pretrained: bool | None = None
    backbone_weights: LongText | None = None
    dataset: Text | None = None
    data_root: LongText | None = None
    seed: Seed | None = None
    selection: SelectionFile | None = None
    skipped: list[str] | None = None
    environment: EnvironmentFile | None = None
    calibration: CalibrationFile | None = None


class EndedFile(StrictModel):
    """What ended a training: an option, and the last epoch."""

    by: Text
    epoch: Count


class RunFile(ProvenanceFile):
    """``run.json``: provenance. Older runs lack some keys."""

    id: Text | None = None
    status: Text | None = None
    init: InitFile | None = None
    imports: Annotated[list[ImportFile], Field(max_length=64)] | None = None
    extended_after: list[Count] | None = None
    ended: EndedFile | None = None
    tuned: LongText | None = None
    images: dict[Text, Count] | None = None
    data: dict[Text, _OPTION] | None = None  # type: ignore[valid-type]
    class_names: Text | None = None


class IntervalsFile(StrictModel):
    """Confidence intervals of results."""

    top1: _row(Number, 2, 2) = None  # type: ignore[valid-type]
    class_mean: _row(Number, 2, 2) = None  # type: ignore[valid-type]
    confidence: Share = 0.95
    resamples: Count = 0


class PairFile(StrictModel):
    """A confusion."""

    target: Text
    prediction: Text
    n: Count
    fraction: Share


class SizeFile(StrictModel):
    """The part of ``preprocessing`` in results that is read."""

    image_size: Count | None = None


class ResultsFile(ProvenanceFile):
    """``SPLIT.json``, the results of ``crossx test``. Each verb checks the keys that it needs with ``require``."""

    top1: Share | None = None
    top5: Share | None = None
    class_mean: Share | None = None
    ece: Share | None = None
    ece_calibrated: Share | None = None
    n: Annotated[int, Field(ge=1, le=10**12)] | None = None
    num_classes: Count | None = None
    heads: dict[Text, Share] | None = None
    levels: dict[Text, Share] | None = None
    temperature: Temperature | None = None
    confused_pairs: list[PairFile] | None = None
    intervals: IntervalsFile | None = None
    options: dict[str, Any] | None = None
    weights: LongText | None = None
    split: Text | None = None
    run_status: Text | None = None
    seen_in_training: bool | None = None
    preprocessing: SizeFile | None = None


class HistoryRow(StrictModel):
    """A row of ``metrics.json``: numbers by name, and the name of the phase if the method has phases."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[Text, Number]

    epoch: Number
    phase: Text | None = None


class HistoryFile(StrictModel):
    """``metrics.json``: one row per epoch."""

    epochs: list[HistoryRow]


class AblationRunFile(StrictModel):
    """A tested training in the ``results.json`` of ``crossx ablate``."""

    variant: Text
    training: dict[Text, Any]
    images: Text
    correct: Annotated[str, Field(pattern=r"^[0-9a-f]*$")]
    n: Annotated[int, Field(ge=1, le=10**9)]
    top1: Share
    top5: Share
    class_mean: Share
    ece: Share
    interval: _row(Number, 2, 2)  # type: ignore[valid-type]
    heads: dict[Text, Share]
    val_top1: list[Share | None]
    seconds: Number | None
    selection: dict[Text, Any]

    @model_validator(mode="after")
    def _check_sizes(self) -> AblationRunFile:
        if len(self.correct) != 2 * -(-self.n // 8):
            raise ValueError(f"correct has {len(self.correct)} digits for {self.n} images")
        epoch = self.selection.get("epoch")
        # a training without epochs has none to select
        known = epoch is None if not self.val_top1 else epoch in range(1, len(self.val_top1) + 1)
        if not known or isinstance(epoch, (bool, float)):
            raise ValueError(f"selection.epoch is not one of {len(self.val_top1)} epochs")
        return self


FILES: Mapping[type[BaseModel], str] = {
    AblationRunFile: "a training in the results of `crossx ablate`",
    RunFile: "provenance of a run",
    ResultsFile: "results of `crossx test`",
    HistoryFile: "a training history",
}


def check_file(kind: type[BaseModel], values: Mapping[str, Any], source: Path | str) -> None:
    """Check the contents of another JSON file of a run.

    Raises:
        CrossXError: If a value is of the wrong type or out of bounds, naming it.
    """
    _check(kind, values, source, FILES[kind])


def require(values: Mapping[str, Any], keys: Iterable[str], source: Path | str) -> None:
    """Check that results have the required keys; ``a.b`` is a key within ``a``.

    Raises:
        CrossXError: If one is missing or null.
    """
    for key in keys:
        value: Any = values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None:
            raise CrossXError(f"{source}: has no {key}: write it again with `crossx test`.")


def _check(kind: type[BaseModel], values: Any, source: Path | str, what: str, within: str = "") -> None:
    try:
        kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = _where((within, *first["loc"]) if within else first["loc"])
        reason = f"{where}: {_reason(first)}" if where else _reason(first)
        raise CrossXError(f"{source}: not {what} ({reason}).") from error


def _reason(error: Mapping[str, Any]) -> str:
    known = {
        "missing": "is missing",
        "extra_forbidden": "is not known here",
        "string_pattern_mismatch": "is no plain name",
    }
    if error["type"] in known:
        return known[error["type"]]
    message = str(error["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    message = message.partition(" or instance of ")[0]
    for theirs, ours in (("valid tuple", "list"), ("Tuple", "List"), ("valid dictionary", "mapping")):
        message = message.replace(theirs, ours)
    return message[:1].lower() + message[1:]


def _where(loc: Iterable[int | str]) -> str:
    return _shown(".".join(map(str, loc)))


def _shown(text: str) -> str:
    short = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
    return "".join(c if c.isprintable() else "?" for c in short)
