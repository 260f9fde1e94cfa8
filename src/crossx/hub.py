"""Name, download and upload models on the Hugging Face Hub. Imports no torch.

Only safetensors and JSON are downloaded, so a model of unknown origin cannot run code.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from crossx.errors import CrossXError, UsageError, first_line

log = logging.getLogger(__name__)

LIBRARY = "crossx"
CONFIG, SPEC, WEIGHTS = "config.json", "model.json", "model.safetensors"
TAKEN = (CONFIG, SPEC, WEIGHTS)
"""The files to download. The Hub counts requests of ``config.json`` as downloads."""
PREFIX = "hf-hub:"
LOCAL_SUFFIXES = (".ckpt", ".safetensors", ".pt", ".pth", ".onnx", ".xml", ".pt2")
"""Suffixes of names that mean a file."""
_NAME = re.compile(r"\w([\w.-]{0,94}\w)?", re.ASCII)


@dataclass(frozen=True)
class HubModel:
    """The name of a model on the Hub.

    Attributes:
        repository: ``user/name``.
        revision: Branch, tag or commit; None for the main branch.
        explicit: Whether it was given with ``hf-hub:``, so that it cannot mean a folder.
    """

    repository: str
    revision: str | None = None
    explicit: bool = False

    @classmethod
    def parse(cls, text: str, *, on_hub: bool = False) -> HubModel | None:
        """Parse ``user/name`` or ``user/name@revision``, with or without ``hf-hub:``; None if it can only be a path.

        Args:
            text: The name or path.
            on_hub: Whether it cannot be a path, whatever folders there are.

        Raises:
            UsageError: If something else follows ``hf-hub:``.
        """
        explicit = text.startswith(PREFIX)
        repository, at, revision = text.removeprefix(PREFIX).partition("@")
        user, _, name = repository.partition("/")
        named = _is_repository(repository) and bool(revision) == bool(at)
        if explicit and not named:
            raise UsageError(
                f"{text!r} names no model: write {PREFIX}USER/NAME or {PREFIX}USER/NAME@REVISION."
            )
        # if there is a folder USER, a missing run in it is a typo, and no request is sent
        local = user in (".", "..", "~") or name.endswith(LOCAL_SUFFIXES) or os.path.isdir(user)
        return (
            cls(repository, revision or None, explicit)
            if named and (explicit or on_hub or not local)
            else None
        )

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}" if self.revision else self.repository


def _is_repository(text: str) -> bool:
    """Whether the Hub may have such a repository, ``user/name``; the rules of its client, ``validate_repo_id``."""
    parts = text.split("/")
    return (
        len(parts) == 2
        and all(_NAME.fullmatch(part) for part in parts)
        and not ("--" in text or ".." in text or text.endswith(".git"))
    )


@contextmanager
def download(repository: str, files: tuple[str, ...], revision: str | None = None) -> Iterator[None]:
    """Log that a download begins, and fail at once if the Hub cannot be reached.

    The Hub's own client would silently retry for a minute. If one of the files is in the cache, the block runs offline
    instead.

    Args:
        repository: ``user/name``.
        files: Names of a file that the block needs; one of them is enough.
        revision: Branch, tag or commit.

    Raises:
        OSError: If the Hub cannot be reached and none of the files is in the cache.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    cached = any(
        isinstance(try_to_load_from_cache(repository, file, revision=revision), str) for file in files
    )
    offline = bool(constants.HF_HUB_OFFLINE)
    try:
        if not cached and not offline:
            announce(repository, constants.ENDPOINT)
        elif not offline:
            _connect(constants.ENDPOINT, constants.HF_HUB_ETAG_TIMEOUT)
    except OSError:
        if not cached:
            raise
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def announce(name: str, address: str) -> None:
    """Log that a download begins, and check that the server can be reached.

    Raises:
        OSError: If it cannot.
    """
    from huggingface_hub import constants

    log.info(f"downloading {name} from {address}")
    _connect(address, constants.HF_HUB_ETAG_TIMEOUT)


def _connect(url: str, timeout: float) -> None:
    """Connect to a server, or to the proxy on the way to it."""
    address = urlsplit(url)
    proxies = getproxies()
    proxy = proxies.get(address.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(address.hostname or ""):
        address = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = address.port or {"https": 443, "http": 80}.get(address.scheme, 1080)
    with socket.create_connection((address.hostname or "", port), timeout):
        pass


def download_model(model: HubModel) -> Path:
    """Download a model into the Hub's cache, if it is not there yet, and return its folder.

    Raises:
        CrossXError: If there is no such model or revision, access is denied, it is not a crossx model, or the Hub
            cannot be reached and the model is not in the cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        """A progress bar that disappears when done, and is shown only in a terminal."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "leave": False, "disable": None})  # type: ignore[no-untyped-call]

    try:
        with download(model.repository, (WEIGHTS,), model.revision):
            folder = snapshot_download(
                model.repository,
                revision=model.revision,
                allow_patterns=list(TAKEN),
                library_name=LIBRARY,
                library_version=metadata.version(LIBRARY),
                tqdm_class=Bar,
            )
    except Exception as error:
        reason = _why_not_downloaded(model, error)
        place = "" if model.explicit else "no such run folder or checkpoint file, and "
        raise CrossXError(f"{model}: {place}{reason}") from error
    missing = [name for name in (SPEC, WEIGHTS) if not os.path.exists(os.path.join(folder, name))]
    if missing:
        raise CrossXError(
            f"{model}: the model on the Hugging Face Hub was not made by crossx (no {missing[0]}). Only models "
            "shared by `crossx share` can be loaded."
        )
    return Path(folder)


def upload_model(
    folder: Path,
    model: HubModel,
    *,
    files: list[str],
    private: bool = False,
    token: str | None = None,
) -> str:
    """Upload a model in one commit, creating the repository and the branch if needed.

    Args:
        folder: The folder of the files.
        model: The destination; its revision is a branch.
        files: Names of the files in ``folder`` to upload.
        private: Whether a new repository is private.
        token: An access token; by default the one of ``hf auth login`` or ``HF_TOKEN``.

    Returns:
        The address of the repository.

    Raises:
        CrossXError: If the Hub cannot be reached or refuses the upload.
    """
    from huggingface_hub import HfApi

    version = metadata.version(LIBRARY)
    api = HfApi(token=token, library_name=LIBRARY, library_version=version)
    try:
        address = api.create_repo(model.repository, private=private or None, exist_ok=True)
        if model.revision:
            api.create_branch(model.repository, branch=model.revision, exist_ok=True)
        api.upload_folder(
            repo_id=model.repository,
            folder_path=folder,
            revision=model.revision,
            allow_patterns=files,
            commit_message=f"Upload a model of crossx {version}",
        )
    except Exception as error:
        raise CrossXError(f"{model}: not uploaded: {_why_not_uploaded(error)}") from error
    return str(address)


def _why_not_downloaded(model: HubModel, error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return (
            f"the model on the Hugging Face Hub is gated: ask for access at {_address(model)} and log in with "
            "`hf auth login`."
        )
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return (
            "no such model on the Hugging Face Hub. Check the path or the name; for a private model log in with "
            "`hf auth login`."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the model on the Hugging Face Hub has no revision {model.revision!r}: see {_address(model)}/tree."
    if isinstance(error, errors.LocalEntryNotFoundError):
        if _is_offline():
            return (
                "the model was not downloaded before, and HF_HUB_OFFLINE forbids downloading it now. Check the path, "
                "or unset HF_HUB_OFFLINE."
            )
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    reason = f"the model cannot be downloaded from the Hugging Face Hub ({_one_line(error)})"
    return f"{reason}. Check the name and the network."


def _why_not_uploaded(error: Exception) -> str:
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError):
        return (
            f"the Hugging Face Hub refuses ({_one_line(error)}). Log in with `hf auth login`, or set HF_TOKEN to a "
            "token that may write there."
        )
    if isinstance(error, errors.HFValidationError):
        return f"{_one_line(error)}."
    if _is_offline():
        return "HF_HUB_OFFLINE is set. Unset it, or use --output DIR."
    return f"the Hugging Face Hub does not take it ({_one_line(error)}). Try again later."


def _one_line(error: Exception) -> str:
    """Return the message of a library and of the server on one line."""
    server = " ".join(str(getattr(error, "server_message", None) or "").split())
    return ": ".join(filter(None, (first_line(error).rstrip(":"), server.rstrip("."))))


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _address(model: HubModel) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{model.repository}"
