"""Compare the files of the built wheel and source distribution with those that git tracks: check_dist.py DIST."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path


def main(dist: Path) -> int:
    """Print what differs, and return the exit code."""
    tracked = set(
        subprocess.run(["git", "ls-files"], check=True, capture_output=True, text=True).stdout.split()
    )
    (wheel,), (source,) = dist.glob("crossx-*.whl"), dist.glob("crossx-*.tar.gz")
    in_wheel = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    with tarfile.open(source) as archive:
        in_source = {name.partition("/")[2] for name in archive.getnames()} - {"PKG-INFO"}
    package = {name.removeprefix("src/") for name in tracked if name.startswith("src/crossx/")}
    failed = False
    for what, found, expected in [(wheel.name, in_wheel, package), (source.name, in_source, tracked)]:
        for name in sorted(expected - found):
            print(f"{what}: {name} is missing", file=sys.stderr)
        for name in sorted(found - expected):
            print(f"{what}: {name} is not tracked by git", file=sys.stderr)
        failed |= found != expected
        print(f"{what}: {len(found)} files")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
