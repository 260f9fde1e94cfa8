"""Check the built wheel and source distribution: check_dist.py DIST [--tag v1.2.3].

Their files are those that git tracks, their version is that of CITATION.cff and of the tag, and their description has
only links that work outside the repository.
"""

import argparse
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path


def wrong_files(wheel: Path, source: Path) -> list[str]:
    """Return a line for each file that is missing or that git does not track."""
    tracked = set(
        subprocess.run(["git", "ls-files"], check=True, capture_output=True, text=True).stdout.split()
    )
    in_wheel = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    with tarfile.open(source) as archive:
        in_source = {name.partition("/")[2] for name in archive.getnames()} - {"PKG-INFO"}
    package = {name.removeprefix("src/") for name in tracked if name.startswith("src/crossx/")}
    wrong = []
    for what, found, expected in [(wheel.name, in_wheel, package), (source.name, in_source, tracked)]:
        wrong += [f"{what}: {name} is missing" for name in sorted(expected - found)]
        wrong += [f"{what}: {name} is not tracked by git" for name in sorted(found - expected)]
        print(f"{what}: {len(found)} files")
    return wrong


def read_metadata(wheel: Path) -> Message:
    """Return the metadata of a wheel, whose payload is the long description."""
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_bytes(archive.read(name))


def wrong_metadata(metadata: Message, citation: str, tag: str | None = None) -> list[str]:
    """Return a line for each contradiction."""
    version = metadata["Version"]
    wrong = []
    if f"\nversion: {version}\n" not in citation:
        wrong.append(f"CITATION.cff has another version than {version}")
    if tag is not None and tag != f"v{version}":
        wrong.append(f"the tag {tag} is not v{version}, the version of pyproject.toml")
    if tag is not None and not any(
        url.startswith("Repository, ") for url in metadata.get_all("Project-URL", [])
    ):
        wrong.append("the URL of the repository is not known: set CROSSX_REPOSITORY")
    payload = metadata.get_payload(decode=True)
    description = payload.decode("utf-8") if isinstance(payload, bytes) else ""
    if not description.strip():
        wrong.append("the long description is empty")
    targets = re.findall(r"\]\(([^)\s]+)\)", description)
    wrong += [
        f"the long description has the relative link {to}" for to in targets if not to.startswith("https://")
    ]
    return wrong


def main() -> int:
    """Print what is wrong, and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dist", type=Path)
    parser.add_argument("--tag", help="tag of the release")
    arguments = parser.parse_args()
    (wheel,), (source,) = arguments.dist.glob("crossx-*.whl"), arguments.dist.glob("crossx-*.tar.gz")
    citation = Path("CITATION.cff").read_text(encoding="utf-8")
    wrong = wrong_files(wheel, source) + wrong_metadata(read_metadata(wheel), citation, arguments.tag)
    print(*wrong, sep="\n", end="\n" if wrong else "", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
