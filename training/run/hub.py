"""`--push REPO`: the best checkpoint of a finished run, on the Hugging Face hub; with `--push-every N` others before.

The token is the one that `huggingface_hub` finds, in HF_TOKEN or where `hf auth login` left it; it is handed to nobody
else and never shown.
"""

from __future__ import annotations

import os
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from topkapi.model.errors import SettingsError, TopkapiError
from topkapi.training.run.card import card, hub_library
from topkapi.training.run.console import Console
from topkapi.training.run.directory import RunDirectory

# Checkpoints on their way, and the mark of a run that wrote the card of its repository.
_PUSHING, _OWN_CARD = ".pushing", ".own-card"


class NotPushed(TopkapiError):
    """The run is complete and stored here; the hub did not take its checkpoint."""

    kind = "not_pushed"


def check_push(repository: str) -> None:
    """Raise `SettingsError`, before anything is computed, for a push that could only fail."""
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
        if not (best / "README.md").exists() and _may_write_card(run, api, name):
            api.upload_file(
                repo_id=name,
                path_or_fileobj=_card(run, best.resolve(), name).encode(),
                path_in_repo="README.md",
                commit_message="What it is, and its figures",
            )
    except Exception as error:
        console.warn([f"the checkpoint is there without a card (README.md): {_reason(hub, error)}"])


class Pusher:
    """Uploads checkpoints of a run while it goes on, one after another in a thread: each is a commit and a tag,
    `step-N`, and the card tells the course of the run up to it.

    What can't be uploaded costs nothing of the run: it is told, and the next one is tried.
    """

    def __init__(self, run: RunDirectory, repository: str, every: int, console: Console) -> None:
        self._run, self._repository, self._every, self._console = run, repository, every, console
        self._hub = hub_library("pushing", "push")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="push")

    def __call__(self, step: int) -> None:
        """Upload the checkpoint of `step`, if it is one of those, some time soon."""
        if step % self._every:
            return
        # Links cost no space, and stay when the run prunes the checkpoint.
        copy = self._run.path / _PUSHING / f"step-{step}"
        shutil.rmtree(copy, ignore_errors=True)
        try:
            shutil.copytree(self._run.checkpoint(step), copy, copy_function=_link)
            course = _course(self._run.path)
        except OSError as error:
            self._console.warn([f"the checkpoint of step {step} was not pushed: {error}"])
            return
        self._thread.submit(self._push, step, copy, course)

    def finish(self) -> None:
        """Return when everything is uploaded, or has failed."""
        self._thread.shutdown()
        shutil.rmtree(self._run.path / _PUSHING, ignore_errors=True)

    def _push(self, step: int, checkpoint: Path, course: str) -> None:
        try:
            api = self._hub.HfApi()
            name = api.create_repo(self._repository, private=True, exist_ok=True).repo_id
            if not (checkpoint / "README.md").exists() and _may_write_card(self._run.path, api, name):
                text = card(checkpoint, name.rpartition("/")[2]) + course
                (checkpoint / "README.md").write_text(text, encoding="utf-8")
            message = f"step-{step} of {self._run.path.resolve().name}"
            made = api.upload_folder(repo_id=name, folder_path=checkpoint, commit_message=message)
            api.create_tag(name, tag=f"step-{step}", revision=made.oid, exist_ok=True)
            self._console.message(f"pushed step {step} to: {api.endpoint}/{name}/tree/step-{step}")
        except Exception as error:  # whatever it is, the run goes on
            reason = _reason(self._hub, error)
            self._console.warn([f"the checkpoint of step {step} was not pushed to {self._repository}: {reason}"])
        finally:
            shutil.rmtree(checkpoint, ignore_errors=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _may_write_card(run: Path, api: Any, name: str) -> bool:
    """Whether the repository has no card, or one that this run wrote."""
    mark = run / _OWN_CARD
    if not mark.exists() and "README.md" in api.list_repo_files(name):
        return False
    mark.touch()
    return True


def _card(run: Path, checkpoint: Path, name: str) -> str:
    return card(checkpoint, name.rpartition("/")[2]) + (_course(run) if (run / _OWN_CARD).exists() else "")


def _course(run: Path) -> str:
    """The evaluations of a run so far, as the last section of its card."""
    records = [record for record in RunDirectory(run).records("metrics.jsonl") if "train_loss" in record]
    names = list(dict.fromkeys(name for record in records for name in record))
    lines = [[name.replace("_", " ") for name in names], ["---:"] * len(names)]
    for record in records:
        values = (record.get(name) for name in names)
        lines.append(
            ["" if value is None else f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" for value in values]
        )
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n## The run so far\n\n" + "\n".join(rows) + "\n"


def _reason(hub: Any, error: Exception) -> str:
    """What went wrong, in a line, without the secret."""
    reason = " ".join(str(error).split()) or type(error).__name__
    token = hub.get_token()
    return reason.replace(token, "…") if token else reason
