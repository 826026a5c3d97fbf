"""Downloads that go on where they were stopped, into the cache that all of Hugging Face's programs share.

`huggingface_hub` (2.x) begins anew after every interruption; here what has come lies in `blobs/DIGEST.incomplete`,
under the lock that the library takes, too, and becomes `blobs/DIGEST` when its SHA-256 is the hub's: nothing that is
not whole has a name that a reader would take.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from topkapi.model.errors import CheckpointError
from topkapi.model.files import sha256
from topkapi.model.hub.remote import RemoteFile, Repository, cache_directory, no_room, refusals_told

Say = Callable[[str], None]
"""Takes a line for whoever waits."""


def tell(line: str) -> None:
    """A line on standard error, where it is in nobody's way."""
    print(line, file=sys.stderr, flush=True)


def repository_directory(repository: str) -> Path:
    """Where the cache keeps a repository."""
    return cache_directory() / f"models--{repository.replace('/', '--')}"


def amount(size: int) -> str:
    """Bytes for people."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size} bytes"


def missing(repository: Repository, files: Iterable[str]) -> dict[str, int]:
    """Those of the `files` that the cache lacks, with the bytes that are still to come."""
    place = repository_directory(repository.name.repository)
    wanted = {}
    for file in files:
        if (place / "snapshots" / repository.commit / file).exists():
            continue
        remote = repository.files[file]
        blob = place / "blobs" / str(remote.sha256 or remote.git_sha1)
        if not blob.exists():
            partial = _incomplete(blob)
            wanted[file] = max(0, remote.size - (partial.stat().st_size if partial.exists() else 0))
    return wanted


def check_room(repository: Repository, needed: int) -> None:
    """Raise `CheckpointError` where the disk has not that many bytes free."""
    place = cache_directory()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise no_room(
            repository.name,
            f"{repository.name} needs {amount(needed)}, and {amount(free)} are free where it would lie "
            f"({cache_directory()})",
        )


def download(repository: Repository, file: str) -> Path:
    """One file of a repository, whole and checked, by its path in the cache. Raises `CheckpointError`."""
    import huggingface_hub

    remote = repository.files[file]
    with refusals_told(repository.name):
        if remote.sha256 is not None:
            _large(repository, file, remote, remote.sha256)
        # Small files come with this; of large ones it finds that they are there.
        path = Path(huggingface_hub.hf_hub_download(repository.name.repository, file, revision=repository.commit))
        if remote.sha256 is None and remote.git_sha1 is not None and _git_sha1(path) != remote.git_sha1:
            _forget(path)
            raise _damaged(repository, file)
    return path


def _large(repository: Repository, file: str, remote: RemoteFile, digest: str) -> None:
    import huggingface_hub.utils

    utils: Any = huggingface_hub.utils

    name = repository.name.repository
    place = repository_directory(name)
    blob = place / "blobs" / digest
    if blob.exists():
        return
    lock = cache_directory() / ".locks" / place.name / f"{digest}.lock"
    for directory in (blob.parent, lock.parent):
        directory.mkdir(parents=True, exist_ok=True)
    url = huggingface_hub.hf_hub_url(name, file, revision=repository.commit)
    with utils.WeakFileLock(lock):
        for _ in range(2):
            if blob.exists():
                return
            partial = _incomplete(blob)
            if partial.exists() and partial.stat().st_size > remote.size:
                partial.unlink()
            if not _get(url, partial, remote.size, file):
                # Its rest comes with the next try.
                continue
            if partial.stat().st_size == remote.size and sha256(partial) == digest:
                partial.chmod(0o666 & ~_umask(blob.parent))
                partial.replace(blob)
                return
            # What lay here may have been another program's; from its beginning it is the hub's.
            partial.unlink()
        partial.unlink(missing_ok=True)
    raise _damaged(repository, file)


class _Bounded:
    """A file that takes no more than a number of bytes: what is sent beyond them is not what was announced."""

    def __init__(self, file: BinaryIO, most: int) -> None:
        self._file, self._most, self.overrun = file, most, False

    def write(self, data: bytes) -> int:
        if self._file.tell() + len(data) > self._most:
            self.overrun = True
            raise ValueError("more comes than was announced")
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _get(url: str, partial: Path, size: int, file: str) -> bool:
    """Append what is still lacking of the file at `url`; False where less came, though the connection ended well."""
    import huggingface_hub.utils
    from huggingface_hub.file_download import get_hf_file_metadata, http_get

    utils: Any = huggingface_hub.utils
    headers = utils.build_hf_headers(library_name="topkapi")
    location = get_hf_file_metadata(url, headers=headers).location or url
    if urlsplit(location).netloc != urlsplit(url).netloc:
        # Large files lie elsewhere, behind a signed address; the token is the hub's alone.
        headers.pop("authorization", None)
    # Each byte comes as it is stored, or ranges would not fit together.
    headers["accept-encoding"] = "identity"
    with partial.open("ab") as target:
        bounded: Any = _Bounded(target, size)
        try:
            http_get(
                location,
                bounded,
                resume_size=target.tell(),
                headers=headers,
                expected_size=size,
                displayed_filename=file,
            )
        except ValueError:
            if not bounded.overrun:
                raise
            # What is here is cut off, and its digest another one.
            target.truncate(0)
            return True
        except OSError as error:
            # The library's own word for less than was announced.
            if "Consistency check failed" not in str(error):
                raise
            return False
        finally:
            target.flush()
            os.fsync(target.fileno())
    return True


def _incomplete(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.incomplete")


def _umask(directory: Path) -> int:
    """What the directory's own rights leave out, which is what its maker's umask was."""
    return 0o666 & ~directory.stat().st_mode


def _git_sha1(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _forget(path: Path) -> None:
    Path(os.path.realpath(path)).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _damaged(repository: Repository, file: str) -> CheckpointError:
    return CheckpointError(
        f"{repository.name}: {file} does not come as the hub says it is (its digest differs), and was not kept",
        hint="try again; if it stays so, what lies between here and the hub (HF_ENDPOINT, a proxy) changes files",
    )
