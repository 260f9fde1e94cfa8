"""The precision that ``trainer.precision auto`` stands for on this machine."""

from __future__ import annotations

from dataclasses import replace

import torch

from crossx.errors import UsageError
from crossx.training.sections import Precision, TrainerConfig

GPUS = ("auto", "gpu", "cuda")
CPUS = ("auto", "cpu")


def resolve_precision(options: TrainerConfig) -> tuple[TrainerConfig, str]:
    """Replace the precision ``auto`` by the one that this machine computes fastest in.

    That is ``bf16-mixed`` on a GPU with bfloat16 (compute capability 8 or above) and on a processor with AMX or
    AVX512_BF16, else ``32``: a processor without these instructions is several times slower in bfloat16.

    Returns:
        The options, and the reason for the choice; empty if the precision was given.

    Raises:
        UsageError: With several machines, which may differ.
    """
    if options.precision != "auto":
        return options, ""
    if options.num_nodes > 1:
        raise UsageError(
            "trainer.precision auto is chosen by each machine, and trainer.num_nodes is above 1: give 32 or bf16-mixed."
        )
    precision, reason = _choose(options.accelerator)
    return replace(options, precision=precision), reason


def _choose(accelerator: str) -> tuple[Precision, str]:
    if accelerator in GPUS and torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16-mixed", "the GPU computes in bfloat16"
        return "32", "the GPU has no bfloat16"
    if accelerator in CPUS:
        if has_bfloat16():
            return "bf16-mixed", "the processor computes in bfloat16"
        return "32", "the processor has no bfloat16"
    return "32", f"accelerator {accelerator}"


def has_bfloat16() -> bool:
    """Whether this processor has instructions for products in bfloat16: AVX512_BF16, which AMX includes."""
    supported: bool = torch.cpu._is_avx512_bf16_supported()
    return supported
