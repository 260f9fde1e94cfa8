"""Schema of ``model.json``: a network that can be built within bounds, without opening or running anything."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, create_model, field_validator, model_validator

from crossx.class_names import naming_problem
from crossx.errors import UsageError
from crossx.schema.base import (
    Count,
    ExactModel,
    Number,
    Option,
    Problem,
    Share,
    StrictModel,
    Temperature,
    Text,
    check,
    either,
    sequence,
    shown,
)
from crossx.suggestions import nearest

MAX_IMAGE_SIZE = 4096
"""Side of a network's input, in pixels."""
MAX_CLASSES = 100_000

Weight = Annotated[float, Field(ge=0, le=1e12)]


class PreprocessingFile(ExactModel):
    """``preprocessing`` of ``model.json``, see ``crossx.runs.Preprocessing``."""

    image_size: Annotated[int, Field(ge=1, le=MAX_IMAGE_SIZE)]
    resize_size: Annotated[int, Field(ge=1, le=2 * MAX_IMAGE_SIZE)] | None
    interpolation: Literal["bilinear", "bicubic"]
    mean: sequence(Annotated[float, Field(ge=-1e3, le=1e3)], 3, 3)  # type: ignore[valid-type]
    std: sequence(Annotated[float, Field(ge=1e-6, le=1e6)], 3, 3)  # type: ignore[valid-type]
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
    weight: Weight | None = None

    @model_validator(mode="after")
    def _has_its_weight(self) -> RejectionFile:
        if self.score == "combined" and self.weight is None:
            raise ValueError("score combined needs a weight")
        return self


class SetsFile(ExactModel):
    """``sets`` of ``model.json``, see ``crossx.runs.PredictionSets``."""

    images: Annotated[int, Field(ge=1, le=2**53)]
    least_probability: Annotated[dict[_VIEWS, sequence(Share, 50)], Field(min_length=1)]  # type: ignore[valid-type]

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
    options: Annotated[dict[Annotated[str, Field(max_length=100)], Option], Field(max_length=100)]
    backbone: Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_-]+)?$")]
    backbone_args: dict[str, Any]
    classes: sequence(Text, MAX_CLASSES, 1)  # type: ignore[valid-type]
    preprocessing: PreprocessingFile
    dataset: Annotated[str, Field(max_length=200, pattern=r"^[^:/\\]*$")]
    levels: Annotated[dict[Text, sequence(Text, MAX_CLASSES)], Field(max_length=16, default_factory=dict)]  # type: ignore[valid-type]
    temperature: Temperature = 1.0
    rejection: RejectionFile | None = None
    sets: SetsFile | None = None
    combined_weight: Weight | None = None

    @field_validator("classes")
    @classmethod
    def _distinct(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if (problem := naming_problem(names)) is not None:
            raise ValueError(problem)
        return names

    @model_validator(mode="after")
    def _one_group_per_class(self) -> ModelFile:
        for name, groups in self.levels.items():
            if len(groups) != len(self.classes):
                raise ValueError(
                    f"level {shown(name)} names {len(groups)} groups for {len(self.classes)} classes"
                )
        return self


def _several(kind: Any, words: str) -> Any:
    """Return the type of one value, or one per stage; None is timm's default."""
    return either(kind | sequence(kind, 8) | None, f"{words}, or at most 8 of them")


def _whole(most: int, least: int = 0) -> Any:
    return _several(Annotated[int, Field(ge=least, le=most)], f"a whole number from {least} to {most}")


_RATE = either(Annotated[float, Field(ge=0, lt=1)] | None, "a number from 0 to below 1")
_FACTOR = _several(Annotated[float, Field(ge=0, le=64)], "a number from 0 to 64")
_WIDTH = _whole(16_384)
_BLOCKS = _whole(256)
_WINDOW = _whole(256)
_SIDE = _whole(1024, 1)
_FLAG = _several(bool, "true or false")
_NAME = either(Annotated[str, Field(max_length=40, pattern=r"^[A-Za-z0-9_]*$")] | None, "the name of a layer")

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
        (either(Literal[3] | None, "3"), "in_chans"),
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
    check(ModelFile, values, source, what)
    check(BackboneArguments, values["backbone_args"], source, what, "backbone_args")


def check_backbone_args(args: Mapping[str, Any]) -> None:
    """Check before training that ``model.json`` can store these arguments, so that the run can be loaded.

    Raises:
        UsageError: If it cannot, naming the argument.
    """
    try:
        BackboneArguments.model_validate(dict(args))
    except ValidationError as error:
        problem = Problem.of(error)
        name = str(problem.path[0])
        if problem.kind == "extra_forbidden" and len(problem.path) == 1:
            hint = nearest(name, ARCHITECTURE_ARGUMENTS)
            raise UsageError(
                f"backbone_args.{shown(name)} is not kept in model.json, so that the run could not be loaded: leave "
                f"it out.{hint} docs/trust.md lists what is kept."
            ) from error
        raise UsageError(
            f"backbone_args.{problem.where} {problem.reason}, or the run could not be loaded: see docs/trust.md."
        ) from error
