"""``crossx import-released FILE``."""

from __future__ import annotations

from typing import Annotated, Literal

from crossx.cli.options import RunPath
from crossx.cli.values import File, Name
from crossx.commands import command


def import_released(
    file: File,
    *,
    dataset: Name,
    output: RunPath,
    previous_pooling: Literal["max", "avg"] | None = None,
    root: Annotated[str, "--data.root", "DIR"] | None = None,
) -> None:
    """Create a run from a checkpoint that the authors of Cross-X released.

    The checkpoints are at https://github.com/cswluo/CrossX.

    Args:
        file: The released checkpoint.
        dataset: What it was trained on: cub, nabirds, cars, dogs or aircraft.
        output: Run folder to create.
        previous_pooling: Pooling on stage L-1 (default: the dataset's own, max for birds, avg for the others).
        root: The dataset, whose class names are taken in the released order (default: classes are numbered).

    Examples:
        crossx import-released cubbirds_CrossX-ResNet50.model --dataset cub --output runs/released_cub --data.root CUB
        crossx test runs/released_cub
    """
    from crossx import released

    run = released.import_released(file, dataset, output, previous_pooling=previous_pooling, data_root=root)
    spec = run.read_spec()
    print(f"{run.path}: {spec.method} on {spec.backbone}, {len(spec.classes)} classes of {spec.dataset}")
    if root is None:
        print("note: the classes are numbered in the released order; --data.root gives them their names.")
    print(f"next: {command('test', run.path, '--data.root', 'DIR')}")
