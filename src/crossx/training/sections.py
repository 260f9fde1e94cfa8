"""The sections of a configuration: model, optim and trainer. Imports no torch, so that ``--help`` is fast."""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, TypeVar, cast, get_args, get_type_hints

from crossx.errors import UsageError, check_choice, counted
from crossx.extras import is_installed
from crossx.suggestions import nearest
from crossx.training.durations import parse_time

Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["constant", "step", "multistep", "cosine", "one_cycle"]
ClassWeights = Literal["none", "balanced"]
Selection = Literal["best", "last", "best_on_test"]

Accelerator = Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"]
Strategy = Literal["auto", "ddp", "ddp_find_unused_parameters_true"]
Precision = Literal["auto", "32", "32-true", "16", "16-mixed", "bf16", "bf16-mixed"]
"""Lightning's names for float32 and mixed precision, and ``auto``. Weights and reductions stay in float32."""
Logger = Literal["tensorboard", "csv", "wandb", "mlflow"]
ClipAlgorithm = Literal["norm", "value"]

LEFT_OUT = {
    "callbacks": "crossx has its own training loop",
    "plugins": "give trainer.precision for another precision",
    "default_root_dir": "give --output",
    "use_distributed_sampler": "crossx shards the data itself",
    "enable_checkpointing": "a run always writes checkpoints",
    "reload_dataloaders_every_n_epochs": "the data do not change during a run",
    "val_check_interval": "crossx validates at the end of an epoch; use trainer.check_val_every_n_epoch",
    "fast_dev_run": "use trainer.limit_train_batches and trainer.max_epochs",
}
"""Arguments of Lightning's Trainer that do not exist here, and what to do instead."""

_NUMBERS = {bool: "true or false", int: "a whole number", float: "a number"}

T = TypeVar("T")


@dataclass
class ModelConfig:
    """The network and the method that trains it.

    Attributes:
        method: The training method: `crossx`, `plain` for the backbone with a linear classifier, or another one.
        backbone: Name of a timm model, `local-dir:FOLDER` or `hf-hub:NAME`.
        pretrained: Start from timm's pretrained weights (downloaded once) instead of random ones.
        backbone_weights: State dict (`.pth` or `.safetensors`) to initialise the backbone from instead.
        backbone_args: Further arguments of `timm.create_model`, such as `{drop_path_rate: 0.1}`.
        options: The method's own options; on the command line and in YAML they are next to `method`.
    """

    method: str = "crossx"
    backbone: str = "resnet50.tv_in1k"
    pretrained: bool = True
    backbone_weights: str | None = None
    backbone_args: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary, as YAML gives it back, with the method's options next to ``method``."""
        values = asdict(self)
        options = values.pop("options")
        # a default may be a tuple
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
        return {**values, **plain}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Rebuild from ``to_dict``'s dictionary. Keys that are not fields are options of the method."""
        for name in ("backbone_args", "options"):
            require_mapping(f"model.{name}", values.get(name) or {})
        own = {item.name for item in fields(cls)} - {"options"}
        values = _with_types(cls, values, "model.")
        options = {**(values.get("options") or {})}
        options.update({key: value for key, value in values.items() if key not in own | {"options"}})
        return cls(**{key: value for key, value in values.items() if key in own}, options=options)


@dataclass
class OptimConfig:
    """Optimiser, schedule and regularisation.

    Attributes:
        optimizer: `sgd` or `adamw`.
        lr: Peak learning rate.
        momentum: Momentum of SGD.
        nesterov: Use Nesterov momentum (SGD).
        weight_decay: Weight decay; on weights only, see decay_norm_and_bias.
        decay_norm_and_bias: Also decay biases and the scales of norm layers, as the released code does.
        schedule: `constant`, `step` (multiply by gamma every step_size epochs), `multistep` (multiply by gamma at each
            of milestones), `cosine` (decay to min_lr_factor) or `one_cycle` (Smith and Topin, 2018; it also cycles
            the momentum).
        step_size: Epochs between two drops of `step`.
        milestones: Epochs after which `multistep` drops the learning rate.
        gamma: Factor of each drop.
        warmup_epochs: Epochs of linear warm-up (may be fractional), at most half of the training; with `one_cycle` the
            rising part of the cycle.
        warmup_steps: Warm-up in optimiser steps, used if warmup_epochs is 0. It may be longer than the training, which
            then stays below the peak rate: a few Adam steps at full rate harm pretrained features (Ma and Yarats,
            2021). If both are 0, `one_cycle` rises over 30% of training.
        min_lr_factor: Final learning rate of `cosine` as a fraction of the peak.
        new_layers_lr_factor: Learning-rate factor of the layers that do not belong to the backbone.
        layer_decay: Learning-rate factor per layer group, from the head down into the backbone (Clark et al., 2020);
            1 trains all layers at the same rate.
        label_smoothing: Label smoothing of the classification loss, 0 to 1.
        class_weights: `none`, or `balanced` to weight each class in the loss by its inverse frequency.
        mixup: Alpha of Mixup (Zhang et al., 2018); 0 is off.
        cutmix: Alpha of CutMix (Yun et al., 2019); 0 is off. With mixup, each batch gets one of the two.
        freeze_backbone: Train only the new layers; pretrained parameters and batch norm statistics stay fixed.
        freeze_backbone_epochs: Freeze the backbone for the first epochs only, at most half of the training.
        fit_heads: Number of augmented views per training image on whose frozen features the heads are fitted before
            the first step (LP-FT; Kumar et al., 2022); 0 is off. Heads that are not linear in their features start at
            random.
        freeze_stride: Keep the backbone's layers up to its map of this stride as pretrained: 8 for the map with an
            eighth of the image's side. null trains all.
        cached_views: Run the layers of freeze_stride only once for this many augmented views of each training image,
            and train the others on the stored maps; 0 is off. Epoch e sees view e modulo cached_views.
        freeze_batch_norm: Keep the backbone's batch norms (statistics, scales, shifts) as pretrained.
        ema_decay: Decay of an exponential moving average of the weights, such as 0.999. Validation, checkpoints and
            the final model then use the average. null keeps no average.
        channels_last: Use the channels-last memory format, which is faster.
        compile: Compile the method's objective with `torch.compile`.
        recompute_activations: Activation checkpointing: same results, less memory, more time.
        selection: Which epoch's weights become the model: `best` (highest validation top-1; the last epoch if there
            are no validation images), `last`, or `best_on_test` (highest test top-1, as in the released code; test
            accuracy is then optimistic, and the results say so).
        patience: End the training early after this many validations without a better one; 0 is off. Warm-up, frozen
            epochs and phases that are still to come do not count, and a drop of the learning rate starts the count
            over.
    """

    optimizer: Optimizer = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    decay_norm_and_bias: bool = False
    schedule: Schedule = "step"
    step_size: int = 15
    milestones: list[int] = field(default_factory=list)
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    warmup_steps: int = 0
    min_lr_factor: float = 0.0
    new_layers_lr_factor: float = 1.0
    layer_decay: float = 1.0
    label_smoothing: float = 0.0
    class_weights: ClassWeights = "none"
    mixup: float = 0.0
    cutmix: float = 0.0
    freeze_backbone: bool = False
    freeze_backbone_epochs: int = 0
    fit_heads: int = 0
    freeze_stride: int | None = None
    cached_views: int = 0
    freeze_batch_norm: bool = False
    ema_decay: float | None = None
    channels_last: bool = True
    compile: bool = False
    recompute_activations: bool = False
    selection: Selection = "best"
    patience: int = 0

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check what does not need the model.

        Raises:
            UsageError: If an option cannot work, naming it and what it takes.
        """
        _check_choices(
            "optim",
            self,
            optimizer=Optimizer,
            schedule=Schedule,
            class_weights=ClassWeights,
            selection=Selection,
        )
        _check("lr", self.lr, "above 0", self.lr > 0)
        _check("momentum", self.momentum, "in [0, 1)", 0 <= self.momentum < 1)
        _check("gamma", self.gamma, "above 0", self.gamma > 0)
        _check("step_size", self.step_size, "at least 1", self.step_size >= 1)
        _check("layer_decay", self.layer_decay, "in (0, 1]", 0 < self.layer_decay <= 1)
        for option in ("min_lr_factor", "label_smoothing"):
            _check(option, getattr(self, option), "in [0, 1]", 0 <= getattr(self, option) <= 1)
        for option in (
            "weight_decay", "warmup_epochs", "warmup_steps", "new_layers_lr_factor", "mixup", "cutmix", "fit_heads",
            "freeze_backbone_epochs", "cached_views", "patience",
        ):  # fmt: skip
            _check(option, getattr(self, option), "at least 0", getattr(self, option) >= 0)
        if self.ema_decay is not None:
            _check("ema_decay", self.ema_decay, "in (0, 1)", 0 < self.ema_decay < 1)
        if self.nesterov and self.momentum == 0:
            raise UsageError("optim.nesterov needs optim.momentum above 0.")
        if self.compile and self.recompute_activations:
            raise UsageError(
                "optim.recompute_activations cannot be combined with optim.compile, which plans memory itself. Leave "
                "one of them out."
            )
        if self.freeze_stride is not None:
            _check("freeze_stride", self.freeze_stride, "at least 1", self.freeze_stride >= 1)
        if self.cached_views:
            self._check_cached_views()
        if self.schedule == "multistep" and not self.milestones:
            raise UsageError("optim.schedule multistep needs optim.milestones, such as [15, 25].")
        if sorted(set(self.milestones)) != list(self.milestones) or min(self.milestones, default=1) < 1:
            raise UsageError(
                f"optim.milestones must be increasing epochs, starting at 1, not {self.milestones}."
            )

    def _check_cached_views(self) -> None:
        if self.freeze_stride is None:
            raise UsageError(
                "optim.cached_views stores the maps of frozen layers: say which with optim.freeze_stride (8), or leave "
                "it out."
            )
        for option in ("mixup", "cutmix", "compile", "recompute_activations"):
            if getattr(self, option):
                raise UsageError(
                    f"optim.{option} cannot be combined with optim.cached_views, which trains on maps instead of "
                    "images. Leave one of them out."
                )

    def shortened_to(self, epochs: int) -> tuple[OptimConfig, list[str]]:
        """Shorten the phases that do not fit, so that a recipe also works with fewer epochs.

        Args:
            epochs: Number of epochs of the training.

        Returns:
            The options to train with, and a note per option that was changed or has no effect.
        """
        changed: dict[str, Any] = {}
        notes: list[str] = []
        if not epochs:
            return replace(self, warmup_epochs=0.0, warmup_steps=0), notes
        for option, most in (("warmup_epochs", epochs / 2), ("freeze_backbone_epochs", epochs // 2)):
            given = getattr(self, option)
            if given >= epochs:
                changed[option] = most
                notes.append(
                    f"optim.{option} {given:g} is shortened to {most:g} of {counted(epochs, 'epoch')}."
                )
        first_drop = {"step": self.step_size, "multistep": min(self.milestones, default=0)}.get(self.schedule)
        if first_drop is not None and first_drop >= epochs:
            notes.append(
                f"optim.schedule {self.schedule} never drops the learning rate: its first drop is after epoch "
                f"{first_drop} of {epochs}."
            )
        elif first_drop is not None and 0 < self.patience < first_drop:
            notes.append(
                f"optim.patience {self.patience} may end the training before the learning rate first drops, after "
                f"epoch {first_drop}."
            )
        if self.patience and self.schedule in ("cosine", "one_cycle"):
            notes.append(
                f"optim.patience may end the training while the learning rate of {self.schedule} is still high; most "
                "of its accuracy comes at the end."
            )
        return replace(self, **changed), notes

    def in_proportion(self, epochs: int, of: int) -> OptimConfig:
        """Return the options with everything that is counted in epochs in proportion to a shorter training.

        Args:
            epochs: Epochs of the shorter training.
            of: Epochs that the options are meant for.
        """
        ratio = epochs / of
        return replace(
            self,
            step_size=max(1, round(self.step_size * ratio)),
            milestones=sorted({max(1, round(milestone * ratio)) for milestone in self.milestones}),
            warmup_epochs=self.warmup_epochs * ratio,
            freeze_backbone_epochs=round(self.freeze_backbone_epochs * ratio),
        )


@dataclass
class TrainerConfig:
    """Devices, length, logging and checkpoints.

    Attributes:
        max_epochs: Number of epochs; 0, for heads that are fitted before the first step (method `probe`,
            optim.fit_heads), takes no step.
        max_steps: Stop after this many optimiser steps, even within an epoch; -1 is no limit.
        max_time: Train for at most this time: `1h30m`, `90s`, `HH:MM:SS`, `DD:HH:MM:SS` or `{hours: 2}`. After each
            epoch, the number of epochs is planned from the time that they take, and the schedule with it.
        limit_train_batches: Batches per training epoch: a whole number, or a fraction such as 0.5.
        limit_val_batches: Batches per validation, likewise; 0 switches validation off.
        overfit_batches: Train on the same few batches every epoch (a whole number or a fraction), and validate on as
            many, to see whether a network can learn them; 0 is off.
        check_val_every_n_epoch: Validate after every n-th epoch.
        accumulate_grad_batches: Batches per optimiser step.
        gradient_clip_val: Clip gradients to this norm or value; null does not clip.
        gradient_clip_algorithm: `norm` clips the total norm of all gradients, `value` each element.
        checkpoint_every_n_steps: Also write a checkpoint every n optimiser steps, not only after each epoch.
        checkpoint_every_n_minutes: Also write a checkpoint when the last one is n minutes old.
        log_every_n_steps: Batches between two log entries; on a GPU also between two checks that the loss is finite.
        logger: One or a list of tensorboard, csv, wandb and mlflow; true is tensorboard if it is installed, false none.
            metrics.csv is always written.
        enable_progress_bar: Show a progress bar on a terminal, and a line per epoch.
        accelerator: `cpu`, `gpu`, ...; `auto` uses a GPU if there is one.
        devices: Number of devices, a list of their indices, or `auto` for all of them.
        num_nodes: Number of machines.
        strategy: `auto` and `ddp` use PyTorch's DistributedDataParallel on several devices;
            `ddp_find_unused_parameters_true` is for methods that leave parameters without a gradient.
        sync_batchnorm: Compute batch norm statistics over all processes (GPUs only).
        precision: `32`, or mixed precision `bf16-mixed` or `16-mixed`; weights stay in float32. `auto`: `bf16-mixed` on
            a processor with AMX or AVX512_BF16 or a GPU with bfloat16, else `32`; a resumed run keeps what it began
            with.
        deterministic: Use deterministic kernels only; `warn` warns if there is none.
        benchmark: Let cuDNN search for its fastest kernels; null keeps PyTorch's setting.
        detect_anomaly: Find the operation that makes a gradient NaN (slow).
        profile: Measure how long each stage takes and how long the training waits for images; printed at the end and
            written to profile.json.
    """

    max_epochs: int = 30
    max_steps: int = -1
    max_time: str | dict[str, int] | None = None
    limit_train_batches: int | float = 1.0
    limit_val_batches: int | float = 1.0
    overfit_batches: int | float = 0.0
    check_val_every_n_epoch: int = 1
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: ClipAlgorithm = "norm"
    checkpoint_every_n_steps: int | None = None
    checkpoint_every_n_minutes: float | None = None
    log_every_n_steps: int = 50
    logger: list[Logger] | Logger | bool = True
    enable_progress_bar: bool = True
    accelerator: Accelerator = "auto"
    devices: list[int] | str | int = "auto"
    num_nodes: int = 1
    strategy: Strategy = "auto"
    sync_batchnorm: bool = False
    precision: Precision | Literal[32, 16] = "32"
    deterministic: bool | Literal["warn"] = False
    benchmark: bool | None = None
    detect_anomaly: bool = False
    profile: bool = False

    def __post_init__(self) -> None:
        # YAML reads 32 as a number
        self.precision = cast(Precision, str(self.precision or 32))
        self.validate()

    def validate(self) -> None:
        """Check what does not need the data.

        Raises:
            UsageError: If an option cannot work, naming it and what it takes.
        """
        _check_choices(
            "trainer", self,
            accelerator=Accelerator, strategy=Strategy, precision=Precision, gradient_clip_algorithm=ClipAlgorithm,
        )  # fmt: skip
        for name in self.loggers:
            check_choice("logger", name, get_args(Logger))
        for option in ("max_epochs", "accumulate_grad_batches", "check_val_every_n_epoch", "num_nodes"):
            least = 0 if option == "max_epochs" else 1
            if not isinstance(value := getattr(self, option), int) or value < least:
                raise UsageError(f"trainer.{option} must be at least {least}, not {value}.")
        if self.max_steps != -1 and self.max_steps < 1:
            raise UsageError(
                f"trainer.max_steps must be at least 1, or -1 for no limit, not {self.max_steps}."
            )
        for option in ("limit_train_batches", "limit_val_batches", "overfit_batches"):
            value = getattr(self, option)
            if value < 0 or (isinstance(value, float) and value > 1):
                raise UsageError(
                    f"trainer.{option} takes a whole number, or a fraction in [0, 1], not {value}."
                )
        if self.limit_train_batches == 0:
            raise UsageError("trainer.limit_train_batches 0 leaves nothing to train on.")
        for option in ("checkpoint_every_n_steps", "checkpoint_every_n_minutes", "gradient_clip_val"):
            if (value := getattr(self, option)) is not None and not value > 0:
                raise UsageError(f"trainer.{option} must be above 0, not {value}.")
        if self.seconds <= 0:
            raise UsageError(f"trainer.max_time must be above 0, not {self.max_time!r}.")

    @property
    def loggers(self) -> list[str]:
        """Names of the requested loggers."""
        if isinstance(self.logger, bool) or self.logger is None:
            return ["tensorboard", "csv"] if self.logger and is_installed("tensorboard") else []
        return [self.logger] if isinstance(self.logger, str) else [*self.logger]

    @property
    def seconds(self) -> float:
        """``max_time`` in seconds.

        Raises:
            UsageError: If it cannot be parsed.
        """
        return math.inf if self.max_time is None else parse_time(self.max_time, "trainer.max_time")


def _with_types(cls: type, values: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
    """Check plain types, since YAML reads ``007`` as a number and ``1 e-3`` as text.

    Paths are returned as text, and numbers of NumPy, which YAML cannot write, as Python's.
    """
    checked = dict(values)
    for name, hint in get_type_hints(cls).items():
        optional = isinstance(hint, UnionType) and len(get_args(hint)) == 2 and type(None) in get_args(hint)
        if name not in values or (optional and values[name] is None):
            continue
        value, takes = values[name], get_args(hint)[0] if optional else hint
        takes = float if takes == int | float else takes
        if takes is str and isinstance(value, os.PathLike):
            checked[name] = os.fspath(value)
        elif takes is str and not isinstance(value, str):
            raise UsageError(f"{prefix}{name} takes text, not {reprlib.repr(value)}: put it in quotes.")
        elif takes in _NUMBERS:
            if not _is_number(value, takes):
                raise UsageError(f"{prefix}{name} takes {_NUMBERS[takes]}, not {reprlib.repr(value)}.")
            checked[name] = _plain(value)
        elif takes == list[int]:
            if not (isinstance(value, list | tuple) and all(_is_number(item, int) for item in value)):
                raise UsageError(f"{prefix}{name} takes a list such as [1, 2], not {reprlib.repr(value)}.")
            checked[name] = [*map(_plain, value)]
    return checked


def _is_number(value: Any, of: type) -> bool:
    if of is bool or isinstance(value, bool):
        return of is bool and isinstance(value, bool)
    # also those of NumPy
    return isinstance(value, Integral if of is int else Real)


def _plain(number: Any) -> bool | int | float:
    if type(number) in (bool, int, float):
        return cast("bool | int | float", number)
    return int(number) if isinstance(number, Integral) else float(number)


def _check_choices(section: str, options: OptimConfig | TrainerConfig, **choices: Any) -> None:
    """Check that options have one of the values of their ``Literal`` types."""
    for option, values in choices.items():
        check_choice(f"{section}.{option}", getattr(options, option), get_args(values))


def _check(option: str, value: float, allowed: str, good: bool) -> None:
    if not good or not math.isfinite(value):
        raise UsageError(f"optim.{option} must be {allowed}, not {value}.")


def require_mapping(section: str, value: Any) -> Mapping[str, Any]:
    """Return a section; ``UsageError`` if it is no mapping."""
    if not isinstance(value, Mapping):
        raise UsageError(f"{section} must be a mapping of options, not {reprlib.repr(value)}.")
    return value


def build_trainer(values: Mapping[str, Any]) -> TrainerConfig:
    """Build the section ``trainer``; ``UsageError`` as ``build_section``, or what to do instead of ``LEFT_OUT``."""
    for name, instead in LEFT_OUT.items():
        if name in values:
            raise UsageError(f"trainer.{name} cannot be given: {instead}.")
    return build_section(TrainerConfig, values, "trainer.")


def build_section(cls: type[T], values: Mapping[str, Any], prefix: str) -> T:
    """Build a dataclass of options from values of unknown origin.

    Args:
        cls: The dataclass.
        values: Its values; missing ones take their defaults.
        prefix: The section and a period, for the messages.

    Raises:
        UsageError: For an unknown option, with the nearest name, or an invalid value.
    """
    known = [item.name for item in fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            hint = nearest(str(key), known) or f" Known options: {', '.join(known)}."
            raise UsageError(f"unknown option {prefix}{key}.{hint}")
    try:
        return cls(**_with_types(cls, values, prefix))
    except TypeError as error:
        raise UsageError(
            f"{prefix.rstrip('.') or 'configuration'}: an option has the wrong type ({error})."
        ) from error
