"""What the hub says of a repository, and what it means when it says no.

Everything goes through `huggingface_hub`: its cache, its token, `HF_ENDPOINT`, `HF_HUB_OFFLINE` and `HF_HOME` hold
here, too. It is imported when it is needed, for it takes a moment.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from topkapi.model.errors import CheckpointError
from topkapi.model.hub.names import HubName

_COMMIT, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")


class NotReached(CheckpointError):
    """The hub does not answer; what is here already may serve all the same."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: bytes, and of what it holds the SHA-256 (large files) or git's SHA-1 (all others)."""

    size: int
    sha256: str | None
    git_sha1: str | None


@dataclass(frozen=True)
class Repository:
    """A repository at one commit."""

    name: HubName
    commit: str
    files: Mapping[str, RemoteFile]
    licence: str | None


def cache_directory() -> Path:
    """Where `huggingface_hub` keeps what it downloads."""
    import huggingface_hub.constants

    return Path(huggingface_hub.constants.HF_HUB_CACHE).expanduser()


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids to ask the hub."""
    import huggingface_hub.constants

    return bool(huggingface_hub.constants.HF_HUB_OFFLINE)


def endpoint() -> str:
    """The hub's address: HF_ENDPOINT, or https://huggingface.co."""
    import huggingface_hub.constants

    return str(huggingface_hub.constants.ENDPOINT)


def ask(name: HubName) -> Repository:
    """What the hub has under that name. Raises `CheckpointError` saying what to do, `NotReached` where it is silent."""
    import huggingface_hub

    with refusals_told(name):
        found = huggingface_hub.HfApi().model_info(name.repository, revision=name.revision, files_metadata=True)
    if not (isinstance(found.sha, str) and _COMMIT.fullmatch(found.sha)):
        raise CheckpointError(f"{endpoint()} does not say which commit {name} is at", hint="check HF_ENDPOINT")
    files = {}
    for each in found.siblings or []:
        large = each.lfs
        digest = large.sha256 if large else each.blob_id
        # Names and digests become paths on this machine.
        if not _is_inside(each.rfilename) or not (digest is None or (_SHA256 if large else _COMMIT).fullmatch(digest)):
            raise CheckpointError(
                f"{endpoint()} says of {name} what no hub would: {each.rfilename!r:.100}, digest {digest!r:.100}",
                hint="nothing was downloaded; check HF_ENDPOINT",
            )
        files[each.rfilename] = RemoteFile(
            int((large.size if large else each.size) or 0),
            large.sha256 if large else None,
            None if large else each.blob_id,
        )
    return Repository(name, found.sha, files, _licence(found))


def _is_inside(file: str) -> bool:
    """Whether a file's name stays in its directory, wherever that is."""
    path = PurePosixPath(file)
    return (
        bool(path.parts)
        and not path.is_absolute()
        and ".." not in path.parts
        and "\\" not in file
        and file.isprintable()
    )


def _licence(found: Any) -> str | None:
    said = getattr(found.card_data, "license", None) if found.card_data else None
    if isinstance(said, list):
        said = ", ".join(map(str, said))
    named = getattr(found.card_data, "license_name", None) if found.card_data else None
    if isinstance(said, str) and said != "other":
        return said
    tagged = (tag.removeprefix("license:") for tag in found.tags or [] if tag.startswith("license:"))
    return named if isinstance(named, str) else said or next(tagged, None)


@contextmanager
def refusals_told(name: HubName) -> Iterator[None]:
    """What goes wrong with the hub as a `CheckpointError` with the step to take."""
    from huggingface_hub import errors

    try:
        yield
    except CheckpointError:
        raise
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{name.repository} is gated: whoever wants it must accept its terms first",
            hint=f"accept them at {endpoint()}/{name.repository}, then log in with: hf auth login (or set HF_TOKEN)",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{name.repository} has no revision {name.revision or 'main'!r}",
            hint=f"its branches and commits are at {endpoint()}/{name.repository}/commits; without @ it is the newest",
        ) from error
    except errors.RepositoryNotFoundError as error:
        search = name.repository.partition("/")[2]
        raise CheckpointError(
            f"the Hugging Face hub has no model {name.repository}, or a private one",
            hint=f"see how it is spelt: {endpoint()}/models?search={search}; a private one needs: hf auth login (or "
            "HF_TOKEN); a checkpoint of your own is given by its directory or .gguf file",
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise NotReached("HF_HUB_OFFLINE is set", hint=_fetch_hint(name)) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise CheckpointError(
                f"{endpoint()} does not let this user have {name.repository} (status {status})",
                hint="log in with: hf auth login, or set HF_TOKEN to a token that may read it",
            ) from error
        raise NotReached(f"{endpoint()} answers with status {status}", hint=_again_hint(name)) from error
    except Exception as error:
        raise _told(error, name) from error


def _told(error: Exception, name: HubName) -> CheckpointError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return no_room(name, f"the disk is full: {cache_directory()}")
    if isinstance(error, OSError) and error.errno is not None:
        return CheckpointError(
            f"{error.filename or cache_directory()} cannot be written: {error.strerror}",
            hint="let this user write there, or set HF_HOME to a directory of theirs",
        )
    # Connections that fail are told by errors of the library's HTTP client, of which there has been more than one.
    return NotReached(f"{endpoint()} cannot be reached ({type(error).__name__}: {reason})", hint=_again_hint(name))


def no_room(name: HubName, message: str) -> CheckpointError:
    """The error for a disk that is too small for what was asked for."""
    return CheckpointError(
        message,
        hint=f"free some (topkapi list shows what models take, topkapi rm NAME deletes one), or set HF_HOME to a "
        f"larger disk; then topkapi pull {name} goes on where it stopped",
    )


def _again_hint(name: HubName) -> str:
    return f"check the connection (and HF_ENDPOINT, proxies); then: topkapi pull {name} (what has come of it is kept)"


def _fetch_hint(name: HubName) -> str:
    return f"run topkapi pull {name} without HF_HUB_OFFLINE, or copy {cache_directory()} from a machine that has it"
