"""A method of one's own, as a file, a module or a package, and verbs that use it."""

from collections.abc import Callable
from pathlib import Path

from crossx import plugins
from crossx.cli.main import main

Forget = Callable[[], None]
OWN = '''\
"""A method of one's own."""
from crossx.methods import Plain, register_method


@register_method("own")
class Own(Plain):
    """A backbone with a scale.

    Args:
        scale: Factor of the logits.
    """

    def __init__(self, backbone, num_classes, *, scale: float = 1.0):
        super().__init__(backbone, num_classes)
        self.scale = scale

    def head_logits(self, images):
        return {"last": self.scale * self.classifier(self.embeddings(images))}
'''
MARKED = "import os; os.mkdir({marker!r})\n"
OPTIONS = """
    --model.backbone=test_resnet --model.pretrained=false --data.root=photos --data.image_size=64 --data.num_workers=0
    --data.batch_size=2 --data.val_fraction=0 --data.test_fraction=0.34 --trainer.max_epochs=1
    --trainer.accelerator=cpu --trainer.logger=false --trainer.enable_progress_bar=false
"""
TINY = OPTIONS.split()


def package(root: Path, name: str, source: str, entry: str) -> Path:
    """Write a package as pip installs it: a module, and the entry point ``entry`` in its metadata."""
    (root / f"{name}.py").write_text(source)
    about = root / f"{name}-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.2\n")
    (about / "entry_points.txt").write_text(f"[{plugins.GROUP}]\n{entry}\n")
    return root


def run_verb(*words: str) -> int:
    return main([str(word) for word in words])


def train(source: str = "mine.py", *words: str) -> None:
    """Train the method ``own`` of a file or module as the run ``run``."""
    named = ["--import", source] if source else []
    assert run_verb("fit", *named, "--model.method", "own", *words, *TINY, "--output", "run") == 0
