"""`--push REPO`: the best checkpoint of a finished run, on the Hugging Face hub.

The token is the one that `huggingface_hub` finds, in HF_TOKEN or where `hf auth login` left it; it is handed to nobody
else and never shown.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from topkapi.model.errors import SettingsError, TopkapiError
from topkapi.training.run.card import card, hub_library
from topkapi.training.run.console import Console


class NotPushed(TopkapiError):
    """The run is complete and stored here; the hub did not take its checkpoint."""

    kind = "not_pushed"


def check_push(repository: str | None) -> None:
    """Raise `SettingsError`, before anything is computed, for a push that could only fail."""
    if repository is None:
        return
    hub = hub_library("pushing", "push")
    try:
        hub.utils.validate_repo_id(repository)
    except ValueError as error:
        raise SettingsError(
            f"{repository!r} cannot be the name of a repository: {error}", field="push", hint="use NAME or OWNER/NAME"
        ) from None
    if hub.constants.HF_HUB_OFFLINE:
        raise SettingsError("HF_HUB_OFFLINE is set, so nothing can be pushed", field="push", hint="leave out --push")
    if hub.get_token() is None:
        raise SettingsError(
            "pushing needs a token of the Hugging Face hub", field="push", hint="set HF_TOKEN, or run: hf auth login"
        )


def push(run: Path, repository: str, console: Console) -> None:
    """Upload the best checkpoint of the run in `run` to `repository`, which is made, private, if it is not there.

    Raises `NotPushed` with the command that tries again.
    """
    hub, best = hub_library("pushing", "push"), run / "best"
    try:
        api = hub.HfApi()
        name = api.create_repo(repository, private=True, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=name, folder_path=best.resolve(), commit_message=f"{best.resolve().name} of {run.resolve().name}"
        )
    except Exception as error:
        # Whatever it is, hours of training end well: it is told in a line, without the secret.
        raise NotPushed(
            f"the checkpoint was not pushed to {repository}: {_reason(hub, error)}",
            hint=f"the run is complete; try again with: hf upload {repository} {shlex.quote(str(best))}",
        ) from None
    console.message(f"pushed to: {api.endpoint}/{name}")
    try:
        # A card that somebody has written stays.
        if not (best / "README.md").exists() and "README.md" not in api.list_repo_files(name):
            api.upload_file(
                repo_id=name,
                path_or_fileobj=card(best.resolve(), name.rpartition("/")[2]).encode(),
                path_in_repo="README.md",
                commit_message="What it is, and its figures",
            )
    except Exception as error:
        console.warn([f"the checkpoint is there without a card (README.md): {_reason(hub, error)}"])


def _reason(hub: Any, error: Exception) -> str:
    """What went wrong, in a line, without the secret."""
    reason = " ".join(str(error).split()) or type(error).__name__
    token = hub.get_token()
    return reason.replace(token, "…") if token else reason
