"""The one contract that every method fulfils, and the registry that finds them by name."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from operator import add
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor, nn

from crossx.backbones import Backbone, create_backbone
from crossx.errors import UsageError, first_line, nearest, unknown
from crossx.losses import ClassificationLoss


class Objective(NamedTuple):
    """What training minimises.

    Attributes:
        loss: Scalar to minimise: the sum of ``terms``.
        terms: Name to weighted scalar, for the logs. On several ranks ``loss`` and each term are the rank's part of
            the whole batch's: their average over the ranks is what one process would give.
        logits: (B, K), the prediction of ``forward`` on the same batch, for the metrics.
        measures: Name to detached scalar, logged like the terms and no part of the loss; their average over the ranks,
            too, is what one process would give.
    """

    loss: Tensor
    terms: Mapping[str, Tensor]
    logits: Tensor
    measures: Mapping[str, Tensor] = {}

    @classmethod
    def of(
        cls, terms: Mapping[str, Tensor], logits: Tensor, measures: Mapping[str, Tensor] | None = None
    ) -> Objective:
        """Return the objective whose loss is the sum of ``terms``."""
        return cls(reduce(add, terms.values()), terms, logits, measures or {})


class Method(nn.Module, ABC):
    """A network and its objective. The trainer, evaluation, explanation and export know nothing else.

    Args:
        backbone: The trunk; ``self.backbone`` afterwards. What is not its pretrained parameters counts as new layers
            (``new_parameters``), with a learning-rate factor of their own.
        num_classes: K.
    """

    supports_soft_targets: ClassVar[bool] = True
    """Whether ``objective`` takes (B, K) class probabilities as targets (Mixup, CutMix)."""

    sampling: ClassVar[Literal["uniform", "balanced", "pairs"] | None] = None
    """The ``data.sampling`` that ``objective`` needs; None where any will do."""

    curve_titles: ClassVar[dict[str, str]] = {"data": "Classification term"}
    """First words of terms and measures -> title of their chart in a report; others are titled by their name."""

    citation: str = ""
    """BibTeX of the publication, for the card of a shared model; empty where there is none."""

    name: str = ""
    """The registered name; set by ``create_method``."""

    options: Mapping[str, Any] = {}
    """Every option of the method with its value, defaults included; set by ``create_method``."""

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise UsageError(f"num_classes must be at least 1, not {num_classes}.")
        self.backbone = backbone
        self.num_classes = num_classes
        self.criterion = ClassificationLoss()
        """The classification loss; training replaces it for label smoothing or class weights."""

    @classmethod
    def published_name(cls, name: str, options: Mapping[str, Any]) -> str:
        """Return the name under which the method was published with these options; ``name`` is the registered one."""
        return name

    @abstractmethod
    def head_logits(self, images: Tensor) -> dict[str, Tensor]:
        """Return head name -> logits (B, K) for images (B, 3, H, W); ``combine_heads`` makes the prediction of them."""

    @abstractmethod
    def objective(self, images: Tensor, targets: Tensor) -> Objective:
        """Return what training minimises.

        Args:
            images: (B, 3, H, W), normalised.
            targets: int64 (B,), or float (B, K) where ``supports_soft_targets``.
        """

    @abstractmethod
    def activation_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Return stage name -> activation maps (B, P, h, w), channel means as in Fig. 5."""

    def class_activation_maps(self, images: Tensor, classes: Tensor) -> dict[str, Tensor] | None:
        """Return head name -> class activation maps (CAM; Zhou et al. 2016, https://arxiv.org/abs/1512.04150).

        They are exact: summed over the parts and averaged over the places, a head's maps are its logit of the class
        without the bias.

        Args:
            images: (B, 3, H, W), normalised.
            classes: int64 (B,), the class to explain in each image.

        Returns:
            Head name -> (B, P, h, w), or None where the heads are not linear in the pooled maps (the default).
        """
        return None

    def boxes(self, images: Tensor) -> Tensor | None:
        """Return the regions that the prediction looks at again, best first; None (the default) where there are none.

        Args:
            images: (B, 3, H, W), normalised.

        Returns:
            (B, n, 4), left, top, right, bottom in pixels of the images; a region may reach beyond the image.
        """
        return None

    @abstractmethod
    def embeddings(self, images: Tensor) -> Tensor:
        """Return one feature vector an image, (B, D): what the heads classify."""

    def linear_heads(self) -> dict[str, nn.Linear]:
        """Return head name -> its linear layer, in the order in which ``embeddings`` joins their inputs.

        Only for methods whose ``head_logits`` are these layers applied to their own part of the embeddings: such heads
        can be fitted on frozen features (``optim.fit_heads``). The default is none.
        """
        return {}

    def head_terms(self, heads: Mapping[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Return the terms of the objective that depend on the images through ``head_logits`` only.

        Args:
            heads: What ``head_logits`` returns.
            targets: int64 (B,), or float (B, K) where ``supports_soft_targets``.
        """
        return {"data": self.criterion(self.combine_heads(heads), targets)}

    def combine_heads(self, heads: Mapping[str, Tensor]) -> Tensor:
        """Return the prediction (B, K) of what ``head_logits`` returns: the sum (Eq. 7), unless overridden."""
        return reduce(add, heads.values())

    def forward(self, images: Tensor) -> Tensor:
        """Return the prediction, logits (B, K), for images (B, 3, H, W)."""
        return self.combine_heads(self.head_logits(images))

    def prepare(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """See the training set before step 0. Does nothing unless a method needs it.

        Called once a run, on the method's device. What it finds must be left in parameters and buffers, which a resumed
        run takes from its checkpoint; modes and running statistics stay as they are. On several ranks each is given all
        batches, in the same order.

        Args:
            batches: Images (B, 3, H, W), normalised, on the method's device, and targets int64 (B,), augmented and
                ordered as in a first epoch. It need not be read to the end.
        """

    def check_image_size(self, size: int) -> None:
        """Check that images of ``size`` x ``size`` pixels can be trained on.

        Raises:
            UsageError: If they cannot.
        """
        self.backbone.check_image_size(size)

    def new_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that start from scratch, as against the pretrained trunk's."""
        pretrained = {id(parameter) for parameter in self.backbone.pretrained_parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in pretrained]


M = TypeVar("M", bound=type[Method])

_REGISTRY: dict[str, type[Method]] = {}


def register_method(name: str) -> Callable[[M], M]:
    """Class decorator that makes a method known as ``name``.

    A method's options are the keyword-only arguments of its ``__init__``, each with a default.
    """

    def register(cls: M) -> M:
        if name in _REGISTRY:
            raise ValueError(f"method {name!r} is registered twice")
        _REGISTRY[name] = cls
        return cls

    return register


def list_methods() -> list[str]:
    """Return the registered names, sorted."""
    return sorted(_REGISTRY)


def method_class(name: str) -> type[Method]:
    """Return the class registered as ``name``.

    Raises:
        UsageError: If there is none; the nearest name is suggested.
    """
    if name not in _REGISTRY:
        raise unknown("method", name, _REGISTRY)
    return _REGISTRY[name]


def published_name(name: str, options: Mapping[str, Any]) -> str:
    """Return the name under which the method registered as ``name`` was published with these options."""
    return method_class(name).published_name(name, options)


def method_options(name: str) -> dict[str, Any]:
    """Return option name -> default of the method registered as ``name``."""
    parameters = inspect.signature(method_class(name).__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def check_options(name: str, options: Iterable[str]) -> None:
    """Check that the method registered as ``name`` has these options.

    Raises:
        UsageError: If it lacks one; the nearest is suggested.
    """
    known = method_options(name)
    for option in options:
        if option not in known:
            raise UsageError(
                f"method {name!r} has no option {option!r}.{nearest(option, known)} "
                f"It has: {', '.join(sorted(known)) or 'none'}."
            )


def check_option_types(name: str, options: Mapping[str, Any]) -> None:
    """Check options that were read from a file against the types that the method's constructor names.

    Raises:
        UsageError: If the method registered as ``name`` has no such option, or a value is of another type.
    """
    check_options(name, options)
    try:
        hints = get_type_hints(method_class(name).__init__)
    except NameError:  # a type that is imported for type checkers alone
        hints = {}
    for option, value in options.items():
        hint = hints.get(option, Any)
        checker = TypeAdapter(hint, config=ConfigDict(strict=True, arbitrary_types_allowed=True))
        try:
            checker.validate_python(value)
        except ValidationError as error:
            raise UsageError(f"method {name!r}: option {option} is of the wrong type.") from error


def create_method(
    name: str,
    *,
    backbone: str,
    num_classes: int,
    pretrained: bool = False,
    backbone_weights: str | None = None,
    backbone_args: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    **options: Any,
) -> Method:
    """Build a method on a backbone.

    Args:
        name: A registered method, see ``list_methods``.
        backbone: A timm model name; ``local-dir:`` and ``hf-hub:`` names too.
        num_classes: K.
        pretrained: Whether to start from timm's pretrained weights.
        backbone_weights: A plain state dict to start from instead (a ``.pth`` or ``.safetensors`` file).
        backbone_args: Further arguments of ``timm.create_model``.
        image_size: Side of the images to build for, in pixels, where the method's layers depend on it; by default the
            backbone's own.
        **options: The method's own options, see ``method_options``.

    Raises:
        UsageError: For an unknown method, backbone or option, or an option that cannot work.
        CrossXError: If pretrained weights cannot be had.
    """
    cls = method_class(name)
    check_options(name, options)
    trunk = create_backbone(
        backbone,
        pretrained=pretrained,
        weights=backbone_weights,
        args=dict(backbone_args or {}),
        image_size=image_size,
    )
    try:
        method = cls(trunk, num_classes, **options)
    except TypeError as error:
        # a suite or a file that a person wrote; the command line checks types itself
        raise UsageError(f"method {name!r}: an option is of the wrong type ({first_line(error)}).") from error
    method.name, method.options = name, {**method_options(name), **options}
    return method
