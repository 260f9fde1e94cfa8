"""``crossx import-released FILE``."""

from __future__ import annotations

from collections.abc import Sequence

from crossx.cli.options import VerbParser


def run(arguments: Sequence[str]) -> int:
    """Make a run of a released checkpoint."""
    parser = VerbParser(
        "import-released",
        "Make a run of a checkpoint that the authors of Cross-X released (https://github.com/cswluo/CrossX).",
        [
            "crossx import-released cubbirds_CrossX-ResNet50.model --dataset cub --output runs/released_cub \\\n"
            "      --data.root CUB_200_2011",
            "crossx test runs/released_cub",
        ],
    )
    parser.add_argument("file", metavar="FILE", help="the released checkpoint")
    parser.add_argument(
        "--dataset",
        required=True,
        metavar="NAME",
        help="what it was trained on: cub, nabirds, cars, dogs or aircraft",
    )
    parser.add_argument("--output", required=True, metavar="RUN", help="run folder to make")
    parser.add_argument(
        "--previous_pooling",
        choices=("max", "avg"),
        help="pooling on stage L-1 (default: the dataset's own, max for birds, avg for the others)",
    )
    parser.add_argument(
        "--data.root",
        dest="root",
        metavar="DIR",
        help="the dataset, to take the class names from in the released order (default: classes are numbered)",
    )
    options = parser.parse(arguments)

    from crossx.released import import_released

    made = import_released(
        options.file,
        options.dataset,
        options.output,
        previous_pooling=options.previous_pooling,
        data_root=options.root,
    )
    spec = made.read_spec()
    print(f"{made.path}: {spec.method} on {spec.backbone}, {len(spec.classes)} classes of {spec.dataset}")
    if options.root is None:
        print("note: the classes are numbered in the released order; --data.root gives them their names.")
    print(f"next: crossx test {made.path} --data.root DIR")
    return 0
