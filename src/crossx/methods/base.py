"""The contract that every method fulfils."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from crossx.backbones import Backbone
from crossx.errors import UsageError, check_count, first_line
from crossx.layers import PartLinear, shrink
from crossx.losses import ClassificationLoss

CLASS_MEANS = "class_means"
"""Name of the buffer of ``Method.class_means``."""


class Objective(NamedTuple):
    """The loss of one batch, with everything that training logs.

    On several ranks, ``loss``, each term and each measure are this rank's contribution: their average over the ranks
    is the value that a single process would compute on the whole batch.

    Attributes:
        loss: Scalar to minimise, the sum of ``terms``.
        terms: Name -> weighted scalar.
        logits: (B, K), the prediction of ``forward`` for the same batch.
        measures: Name -> detached scalar that is logged but not part of the loss.
    """

    loss: Tensor
    terms: Mapping[str, Tensor]
    logits: Tensor
    measures: Mapping[str, Tensor] = {}

    @classmethod
    def of(
        cls, terms: Mapping[str, Tensor], logits: Tensor, measures: Mapping[str, Tensor] | None = None
    ) -> Objective:
        """Build an objective whose loss is the sum of ``terms``."""
        return cls(reduce(add, terms.values()), terms, logits, measures or {})


@dataclass(frozen=True)
class Phase:
    """A part of a training with trainable parameters and a learning rate of its own; see ``Method.phase_at``.

    Attributes:
        name: Identifies the phase in checkpoints and metrics.
        trains: Prefixes of the names of the parameters that are trained; the empty one is that of all.
        lr_factor: Multiplies all learning rates.
    """

    name: str = "all"
    trains: tuple[str, ...] = ("",)
    lr_factor: float = 1.0


class Method(nn.Module, ABC):
    """A network and its objective: all that training, evaluation, explanation and export rely on.

    The options of a method are the keyword-only arguments of its ``__init__``. Each needs a default and a type hint,
    from which ``create_method`` checks values.

    Args:
        backbone: The trunk, kept as ``self.backbone``. All parameters except its pretrained ones, and those of its
            clones, count as new (``new_parameters``) and have their own learning-rate factor.
        num_classes: K.
    """

    name: ClassVar[str] = ""
    """The registered name; set by ``register_method``."""

    curve_titles: ClassVar[dict[str, str]] = {"data": "Classification term"}
    """Titles of the charts in a report, by the first words of a term's or measure's name (``c3s`` for ``c3s_last``)."""

    citation: str = ""
    """BibTeX entry of the publication, for the model card; empty if there is none."""

    supports_soft_targets: ClassVar[bool] = True
    """Whether ``objective`` accepts (B, K) class probabilities as targets (Mixup, CutMix)."""

    sampling: ClassVar[Literal["uniform", "balanced", "pairs"] | None] = None
    """The ``data.sampling`` that ``objective`` requires; None if any will do."""

    stops_gradients: ClassVar[bool] = False
    """Whether ``objective`` stops gradients on purpose, as policy gradients and targets made by the network itself do;
    ``crossx.testing`` then does not compare its gradient with finite differences."""

    uses_parts: ClassVar[bool] = False
    """Whether training batches have parts, for ``part_objective``. An option ``part_names`` chooses them and their
    order; if it is None, training sets it to the names of the dataset's parts."""

    map_name: ClassVar[str] = "map"
    """What the method's paper calls one of its ``activation_maps``."""

    maps_are_shares: ClassVar[bool] = False
    """Whether ``activation_maps`` are shares of each position, from 0 to 1, whose rest is the background's."""

    options: Mapping[str, Any] = {}
    """Every option with its value, defaults included; set by ``create_method``."""

    phase: Phase = Phase()
    """The current phase; set by training, before ``start_phase``. Predictions must not depend on it."""

    view_size: int | None = None
    """Side of the global view in pixels, for which the backbone is built; None if that is the image itself. Set by
    ``create_method`` if the method has an option of this name, which says that it makes crops of larger images."""

    class_means: Tensor | None
    """Mean feature of each class's training images, (K, D), of length 1 (``crossx.evaluation.unknowns``); None if
    they were not computed. A buffer, so that it is stored with the weights."""

    taken: frozenset[str] | None = None
    """Names of the parameters taken from another network (``crossx.methods.start``); None without one."""

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__()
        check_count("num_classes", num_classes)
        self.backbone = backbone
        self.num_classes = num_classes
        self.register_buffer(CLASS_MEANS, None)
        self.criterion = ClassificationLoss()
        """The classification loss; training replaces it to add label smoothing or class weights."""

    @classmethod
    def published_name(cls, options: Mapping[str, Any]) -> str:
        """Return the name of the publication that these options reproduce: the registered name unless overridden."""
        return cls.name

    @abstractmethod
    def head_logits(self, images: Tensor) -> dict[str, Tensor]:
        """Return head name -> logits (B, K) for images (B, 3, H, W); see ``combine_heads``."""

    @abstractmethod
    def objective(self, images: Tensor, targets: Tensor) -> Objective:
        """Return the loss of a batch.

        Args:
            images: (B, 3, H, W), normalised.
            targets: int64 (B,), or float (B, K) if ``supports_soft_targets``.
        """

    def part_objective(self, images: Tensor, targets: Tensor, parts: Tensor) -> Objective:
        """Return the loss of a batch with parts; by default that of ``objective``.

        Training calls this if ``uses_parts``; evaluation and prediction have no parts.

        Args:
            images: (B, 3, H, W), normalised.
            targets: int64 (B,).
            parts: float (B, N, 3): x and y in pixels of the images, from the outer edge of the first pixel, and 1 if
                the part is visible in the image, else 0 (with x and y 0).
        """
        return self.objective(images, targets)

    @abstractmethod
    def activation_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Return stage name -> activation maps (B, P, h, w), averaged over channels as in Fig. 5."""

    @abstractmethod
    def embeddings(self, images: Tensor) -> Tensor:
        """Return one feature vector per image, (B, D): the input of the heads."""

    def class_activation_maps(self, images: Tensor, classes: Tensor) -> dict[str, Tensor] | None:
        """Return head name -> class activation maps (CAM; Zhou et al. 2016, https://arxiv.org/abs/1512.04150).

        The maps are exact: summed over the parts and averaged over the spatial positions, they give the head's logit
        for the class without its bias.

        Args:
            images: (B, 3, H, W), normalised.
            classes: int64 (B,), the class to explain in each image.

        Returns:
            Head name -> (B, P, h, w), or None if the heads are not linear in the pooled maps (the default).
        """
        return None

    def boxes(self, images: Tensor) -> Tensor | None:
        """Return the regions that the prediction uses, best first; None if the method has no regions (the default).

        Args:
            images: (B, 3, H, W), normalised.

        Returns:
            (B, n, 4): left, top, right, bottom in pixels. A region may extend beyond the image.
        """
        return None

    def linear_heads(self) -> Mapping[str, nn.Linear | PartLinear]:
        """Return head name -> linear layer: heads that can be fitted on frozen features (``optim.fit_heads``).

        Override this only if ``head_logits`` applies these layers to ``head_features``. The default is none.
        """
        return {}

    def head_features(self, images: Tensor) -> dict[str, Tensor]:
        """Return head name -> what the layer of ``linear_heads`` sees, (B, D).

        By default, ``embeddings`` concatenates these inputs in the order of the heads. It may also be (B, n, D): n
        vectors, mapped by one layer or by the layers of a ``PartLinear``, whose logits ``head_logits`` averages.

        Args:
            images: (B, 3, H, W), normalised.
        """
        heads = self.linear_heads()
        widths = [head.weight.shape[-1] for head in heads.values()]
        return dict(zip(heads, self.embeddings(images).split(widths, 1), strict=True))

    def start_from_fitted(self) -> None:
        """Change heads after ``optim.fit_heads`` has fitted them, by default not at all.

        Override this where a head also sees what layers without training choose.
        """

    def heads_and_features(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return ``head_logits``, and the features that class means are taken of, in one pass.

        The default takes ``linear_heads`` for all heads. Override this if ``head_logits`` has others; otherwise the
        method has no class means.

        Args:
            images: (B, 3, H, W), normalised.

        Returns:
            Name -> (B, K), and (B, D), the input of the linear head ``last``, else that of ``joined``, else those of
            all linear heads, concatenated. There is at least one linear head.
        """
        inputs, heads = self.head_features(images), {}
        for name, layer in self.linear_heads().items():
            logits = layer(inputs[name].to(layer.weight.dtype))
            heads[name] = logits.mean(1) if logits.ndim == 3 else logits  # (B, n, K) -> (B, K)
        # (B, ..., D_h) -> (B, D)
        return heads, torch.cat([inputs[name].flatten(1) for name in self._heads_of_class_means()], 1)

    def logits_and_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the prediction, (B, K), with the features of ``heads_and_features``."""
        heads, features = self.heads_and_features(images)
        return self.combine_heads(heads), features

    @property
    def width_of_class_means(self) -> int:
        """D of the features that class means are taken of; heads that see several vectors need one named ``joined``."""
        heads = self.linear_heads()
        return sum(heads[name].weight.shape[-1] for name in self._heads_of_class_means())

    def _heads_of_class_means(self) -> list[str]:
        heads = self.linear_heads()
        return next(([name] for name in ("last", "joined") if name in heads), [*heads])

    def head_terms(self, heads: Mapping[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Return the terms of the objective that depend on the images only through the logits of the heads.

        Args:
            heads: The result of ``head_logits``, or that of ``linear_heads`` on ``head_features``.
            targets: int64 (B,), or float (B, K) if ``supports_soft_targets``.
        """
        return {"data": self.criterion(self.combine_heads(heads), targets)}

    def head_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the classification loss of logits (B, K), or (B, n, K): the mean over n vectors of each image.

        Args:
            logits: Float.
            targets: int64 (B,), or float (B, K).
        """
        if logits.ndim == 3:
            targets = targets.repeat_interleave(logits.shape[1], 0)  # (B, ...) -> (B*n, ...)
        loss: Tensor = self.criterion(logits.flatten(0, -2), targets)  # (B, n, K) -> (B*n, K)
        return loss

    def combine_heads(self, heads: Mapping[str, Tensor]) -> Tensor:
        """Combine the result of ``head_logits`` into the prediction (B, K); by default the sum (Eq. 7)."""
        return reduce(add, heads.values())

    def forward(self, images: Tensor) -> Tensor:
        """Return the prediction, logits (B, K), for images (B, 3, H, W)."""
        return self.combine_heads(self.head_logits(images))

    def inference_form(self, image_size: int) -> nn.Module:
        """Return a network with the logits of ``forward`` that other runtimes compute faster; by default the method.

        Exported graphs are made from it. The method itself may be unusable afterwards.

        Args:
            image_size: Side in pixels of the images, the only size that the network has to accept.
        """
        return self

    def view(self, images: Tensor) -> Tensor:
        """Return the images (B, 3, H, W) as the backbone sees them: resized to ``view_size`` pixels if it is set."""
        return images if self.view_size is None else shrink(images, self.view_size)

    def prepare(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Initialise from the training set before the first step; by default do nothing.

        Called once per run, on the method's device. Keep results in parameters and buffers, which a resumed run
        restores from its checkpoint, and leave modes and running statistics unchanged. Every rank receives all
        batches in the same order.

        Args:
            batches: Normalised images (B, 3, H, W), targets int64 (B,) and, if ``uses_parts``, parts (B, N, 3) on the
                method's device, augmented and ordered as in a first epoch. They need not be read to the end.
        """

    def phase_at(self, epoch: int, epochs: int) -> Phase:
        """Return the phase of an epoch; by default all epochs are one phase that trains everything.

        Phases may follow each other (a curriculum) or alternate. Training keeps the parameters outside
        ``Phase.trains`` as they are, with the running statistics of batch norms of which no parameter is trained.

        Args:
            epoch: The epoch, counted from 0.
            epochs: Epochs of the whole training.
        """
        return Phase()

    def start_phase(self, phase: Phase, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Change parameters and buffers before the first step of a phase; by default do nothing.

        Called when the phase of an epoch has another name than that of the epoch before, and for the first epoch after
        ``prepare``; not when a run is resumed within a phase. Every rank calls it, with the same random numbers.

        Keep what predictions need in parameters and buffers, counters in integer buffers: the weights of an earlier
        phase may become the model, and averaged weights are averages of the others.

        Args:
            phase: The phase that starts, ``self.phase``.
            batches: As for ``prepare``.
        """

    def adapt_to(self, state: Mapping[str, Tensor]) -> None:
        """Give buffers whose size depends on the training images the size that they have in a state dict.

        By default do nothing. Called before ``state`` is compared with the method's own state dict; it may be of
        unknown origin.
        """

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.expect_class_means(state_dict.get(f"{prefix}{CLASS_MEANS}"))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def expect_class_means(self, means: Tensor | None) -> None:
        """Make room for class means of a file, or for none; another shape than (K, D) is left for the comparison."""
        if means is None or not self.linear_heads():
            self.class_means = None
            return
        device = next(self.parameters()).device
        self.class_means = torch.zeros(self.num_classes, self.width_of_class_means, device=device)

    def check_image_size(self, size: int) -> None:
        """Check that the method accepts images of ``size`` x ``size`` pixels.

        Raises:
            UsageError: If it does not.
        """
        view = self.view_size
        if view is not None and view > size:
            raise UsageError(
                f"view_size {view} is larger than the images, which have {size} pixels. Use --data.image_size {view} "
                "or more, or a smaller --model.view_size."
            )
        self.backbone.check_image_size(view or size)

    def trunks(self) -> list[Backbone]:
        """Return the trunk and its clones (``Backbone.clone``), in the order of the method's modules."""
        return [module for module in self.modules() if isinstance(module, Backbone)]

    def _check_second_size(self, what: str, second: int, size: int) -> None:
        """Check that the backbone also accepts what it is given besides images.

        Args:
            what: ``crop`` for the option ``crop_size``.
            second: Its side in pixels.
            size: Side of the images, or of their global view.

        Raises:
            UsageError: If it does not.
        """
        try:
            self.backbone.map_size(second)
        except UsageError as error:
            raise UsageError(
                f"method {self.name!r} uses {what}s of {second} pixels, which backbone {self.backbone.name!r} does not "
                f"accept ({first_line(error.__cause__ or error)}). Use --model.{what}_size {size}, or for a ViT "
                "--model.backbone_args.dynamic_img_size true."
            ) from error

    def lr_factors(self) -> Mapping[str, float]:
        """Return prefixes of names of parameters outside the trunk -> factors of their learning rate; by default none.

        They multiply ``optim.new_layers_lr_factor``, or what layers from another network have instead.
        """
        return {}

    def new_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that start from scratch.

        The others are those taken from another network, or, without one, the pretrained ones of the trunks.
        """
        if self.taken is not None:
            return [parameter for name, parameter in self.named_parameters() if name not in self.taken]
        pretrained = {id(parameter) for trunk in self.trunks() for parameter in trunk.pretrained_parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in pretrained]
