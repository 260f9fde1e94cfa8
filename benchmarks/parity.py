"""Compare the logits of imported released checkpoints with the released code's own, on the same random weights.

    python benchmarks/parity.py --peer-root DIR

DIR is a clone of https://github.com/cswluo/CrossX. For ResNet-50 and SENet-50, GMP and GAP on stage L-1, P = 2 and 3,
prints each head's and the prediction's largest difference over the largest logit, for one 448 x 448 image in float32.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from pathlib import Path

import torch

from crossx.interop.released_checkpoint import build_released

NETWORKS = {
    ("resnet50", "max"): "crossxresnetmix",
    ("resnet50", "avg"): "crossxresnetavg",
    ("senet50", "max"): "crossxsenetmix",
    ("senet50", "avg"): "crossxsenetavg",
}
HEADS = ("last", "previous", "merged")


def randomise_norms(network: torch.nn.Module) -> None:
    """Batch norms start as the identity, which would hide statistics that are not carried over."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, 0, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1)
            torch.nn.init.normal_(module.bias, 0, 0.1)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-root", required=True, type=Path)
    sys.path.insert(0, str(parser.parse_args().peer_root))
    warnings.simplefilter("ignore", SyntaxWarning)
    torch.manual_seed(0)
    print(f"{'network':<9} {'L-1':<4} P  " + "  ".join(f"{name:<10}" for name in (*HEADS, "prediction")))
    for (network, pooling), module in NETWORKS.items():
        for num_parts in (2, 3):
            peer = getattr(importlib.import_module(module), network)(num_classes=200, nparts=num_parts).eval()
            randomise_norms(peer)
            method = build_released(peer.state_dict(), pooling, True, Path(module))
            images = torch.randn(1, 3, 448, 448)
            theirs = dict(zip(HEADS, peer(images)[:3], strict=True))
            ours = method.head_logits(images)
            values = [difference(ours[name], theirs[name]) for name in HEADS]
            values.append(difference(method(images), sum(theirs.values())))
            print(
                f"{network:<9} {pooling:<4} {num_parts}  " + "  ".join(f"{value:<10.1e}" for value in values)
            )


if __name__ == "__main__":
    main()
