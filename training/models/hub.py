"""Files of a model repository on the Hugging Face hub: listed, fetched and checked.

huggingface_hub itself drops what it has of a file when it is interrupted (since 1.18), so files are fetched with its
http_get, which goes on from the bytes that are there. HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE work as everywhere.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import HfHubHTTPError, OfflineModeIsEnabled, build_hf_headers

from featinv_nodes.core.errors import FeatInvError

# the bases: what the HTTP library under this version of huggingface_hub raises where there is no answer at all
ERRORS = (OSError, ValueError, *HfHubHTTPError.__bases__)


class Unreachable(FeatInvError):
    """The hub gave no answer, or offline mode is on."""


@dataclass(frozen=True)
class HubFile:
    """A file as the hub lists it. name: its path in the repository. size: bytes. checksum: sha256 of a large file,
    git's blob sha1 of a small one."""

    name: str
    size: int
    checksum: str

    def matches(self, file: Path) -> bool:
        """Whether a local file has this content; reads all of it."""
        if not file.is_file() or file.stat().st_size != self.size:
            return False
        digest = hashlib.sha256() if len(self.checksum) == 64 else hashlib.sha1(b"blob %d\0" % self.size)
        return _read_into(digest, file) == self.checksum


class Repository:
    """The current main branch of a model repository; `files` by name.

    Raises Unreachable without an answer, and FeatInvError for a repository that is unknown or may not be read.
    """

    def __init__(self, name: str) -> None:
        """name: owner/name."""
        self.name = name
        with _explained(name):
            info = HfApi().model_info(name, files_metadata=True, timeout=30)
        self.commit = info.sha
        listed = [HubFile(s.rfilename, s.size, s.lfs.sha256 if s.lfs else s.blob_id) for s in info.siblings or []]
        self.files = {file.name: file for file in listed if file.checksum}

    def fetch(self, file: HubFile, target: Path) -> None:
        """Fetches a file whole or not at all. What arrives stands beside it as .part, where the next call goes on.

        Raises FeatInvError, and drops what arrived, if its checksum is not the hub's.
        """
        part = target.with_name(f"{target.name}.{file.checksum[:8]}.part")
        with _explained(self.name):
            target.parent.mkdir(parents=True, exist_ok=True)
            with part.open("ab") as stream:
                if stream.tell() < file.size:
                    url = hf_hub_url(self.name, file.name, revision=self.commit)
                    http_get(
                        url, stream, resume_size=stream.tell(), headers=build_hf_headers(), displayed_filename=file.name
                    )
        if not file.matches(part):
            part.unlink()
            raise FeatInvError(
                f"{self.name}: {file.name} arrived with another checksum than the hub states; it was deleted, try again"
            )
        os.replace(part, target)


def fetch_release(url: str, target: Path) -> bool:
    """Fetches a file outside the hub whose name ends with the first digits of its SHA-256 (NAME-DIGITS.pth), whole or
    not at all, as Repository.fetch does. A file that is there is checked and never replaced. Returns whether anything
    was fetched.

    Raises FeatInvError without an answer, and for a file of another checksum.
    """
    digits = target.stem.rpartition("-")[2]
    if target.exists():
        if not _read_into(hashlib.sha256(), target).startswith(digits):
            raise FeatInvError(f"{target} is not the file that its name says; move it away, and try again")
        return False
    part = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not part.is_file() or not _read_into(hashlib.sha256(), part).startswith(digits):
            with part.open("ab") as stream:
                http_get(url, stream, resume_size=stream.tell(), displayed_filename=target.name)
    except ERRORS as error:
        about = f"{type(error).__name__}: {error}".splitlines()[0]
        raise Unreachable(
            f"{url} could not be fetched ({about}): check the network and the space in {target.parent}, and try again;"
            " what has arrived is kept"
        ) from error
    if not _read_into(hashlib.sha256(), part).startswith(digits):
        part.unlink()
        raise FeatInvError(f"{url} arrived with another checksum than its name states; it was deleted, try again")
    os.replace(part, target)
    return True


def _read_into(digest: hashlib._Hash, file: Path) -> str:
    """The hexadecimal digest of a file's content, after what the digest has seen already."""
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Errors of the hub, the network and the disk as one line that says what to do."""
    try:
        yield
    except ERRORS as error:
        raise _explanation(repository, error) from error


def _explanation(repository: str, error: Exception) -> FeatInvError:
    endpoint = HfApi().endpoint
    status = getattr(getattr(error, "response", None), "status_code", None)
    about = f"{type(error).__name__}: {error}".splitlines()[0]
    if isinstance(error, OfflineModeIsEnabled):
        return Unreachable(f"{repository} cannot be fetched in offline mode: unset HF_HUB_OFFLINE")
    if status in (401, 403):  # the hub also says so of names that do not exist
        hint = (
            "check the name; for a gated or private model accept its terms there and set HF_TOKEN to a token that may"
            " read it"
        )
        return FeatInvError(f"{endpoint}/{repository} may not be read ({status}): {hint}")
    if status == 404:
        return FeatInvError(f"{endpoint}/{repository} is not there (404): check the name")
    if getattr(error, "errno", None) == errno.ENOSPC:
        return FeatInvError(f"{repository}: the disk is full; make room and try again, what has arrived is kept")
    if status is None and (isinstance(error, ValueError) or getattr(error, "errno", None)):
        return FeatInvError(f"{repository}: {about}")  # the local disk, or an answer that is not a hub's
    return Unreachable(
        f"{endpoint} gave no usable answer for {repository} ({about}): check the network or HF_ENDPOINT and try again,"
        " what has arrived is kept"
    )
