"""What somebody typed as a checkpoint becomes a path: an existing one wins, else it is a name on the hub.

The one way from names to files. What is here whole is taken as it is, without asking the hub; `pull` brings the newest.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from topkapi.model.config import ModelConfig
from topkapi.model.errors import CheckpointError
from topkapi.model.hub.cache import cached, note_revision
from topkapi.model.hub.download import Say, amount, check_room, download, missing, repository_directory, tell
from topkapi.model.hub.files import ADAPTER, Choice, choose, indexed
from topkapi.model.hub.names import BOTH_WAYS, HubName, hub_name, meant
from topkapi.model.hub.remote import NotReached, Repository, ask, cache_directory, is_offline
from topkapi.model.reading import read_json

LARGE = 50_000_000
"""Bytes of a download that is announced."""

_LARGEST_TEXT = 1 << 26
"""Bytes of the largest vocabulary that is read."""


def local_path(given: str | Path, say: Say = tell, *, pickles: bool = False) -> Path:
    """The path of a checkpoint that was given as a path or by its name on the hub, from where it is then downloaded.

    A path is returned as it is, be something there or not; `pickles`: see `pull`. Raises `CheckpointError` for a name
    under which nothing can be had, with what to do.
    """
    name = meant(given)
    if name is None:
        return Path(os.path.expanduser(given))
    found = cached(name, pickles=pickles)
    if found is not None and (found.certain or is_offline()):
        return found.path
    try:
        return pull(name, say, pickles=pickles)
    except NotReached as error:
        if found is None:
            raise CheckpointError(f"{name} is not on this machine, and {error.message}", hint=error.hint) from error
        say(f"{error.message}: taking {found.path.name}, which is here")
        return found.path


def name_given(text: str) -> HubName:
    """The name on the hub that was given where only one will do. Raises `CheckpointError` for anything else."""
    name = hub_name(text)
    if name is None:
        raise CheckpointError(f"{text} is no name of a model on the Hugging Face hub", hint=BOTH_WAYS)
    return name


def pull(name: HubName, say: Say = tell, *, pickles: bool = False) -> Path:
    """Download the newest of what `name` names, or what is still lacking of it, and return its path.

    With `pickles`, weights that `topkapi import` reads are downloaded where there are no others. Raises
    `CheckpointError` with what to do, `NotReached` where the hub is silent; what has come by then is kept, and the next
    call goes on with it.
    """
    if is_offline():
        raise NotReached(
            "HF_HUB_OFFLINE is set",
            hint=f"unset it and run: topkapi pull {name}; or copy {cache_directory()} from a machine that has it",
        )
    repository = ask(name)
    choice = choose(name, repository.files, pickles=pickles)
    if choice.gguf is not None and find_spec("gguf") is None:
        raise CheckpointError("reading GGUF files needs the gguf package", hint="pip install 'topkapi[gguf]'")
    texts = [file for file in choice.texts if file in repository.files]
    for file in texts:
        if repository.files[file].size > _LARGEST_TEXT:
            raise CheckpointError(
                f"{name}: {file} has {amount(repository.files[file].size)}, which no model's has",
                hint="the repository is damaged, or not meant for use: choose another one",
            )
    check_room(repository, sum(missing(repository, texts).values()))
    for file in texts:
        download(repository, file)
    snapshot = repository_directory(name.repository) / "snapshots" / repository.commit
    weights = _weights(choice, repository, snapshot)
    if choice.gguf is None and ADAPTER not in choice.texts and not choice.pickled:
        # A network that is not supported is refused before its weights are waited for.
        ModelConfig.from_hugging_face(read_json(snapshot / "config.json"))
    lacking = missing(repository, weights)
    total = sum(lacking.values())
    check_room(repository, total)
    if total >= LARGE:
        say(
            f"{name}: {amount(total)} to download, licence {repository.licence or 'not stated'}, commit "
            f"{repository.commit[:12]}, to {cache_directory()}"
        )
    try:
        for file in weights:
            download(repository, file)
    except KeyboardInterrupt:
        say(f"\nstopped: topkapi pull {name} goes on with what has come")
        raise
    note_revision(name, repository.commit)
    if ADAPTER in choice.texts:
        _pull_base(snapshot, say)
    return snapshot / choice.gguf if choice.gguf else snapshot


def _weights(choice: Choice, repository: Repository, snapshot: Path) -> tuple[str, ...]:
    if choice.gguf is not None:
        return (choice.gguf,)
    weights = choice.weights
    if choice.index is not None:
        weights = indexed(read_json(snapshot / choice.index), repository.name)
    absent = [file for file in weights if file not in repository.files]
    if absent:
        raise CheckpointError(
            f"{repository.name}: the index of its tensors names {absent[0]}, which the repository does not have",
            hint="the repository is damaged; use another one of the model",
        )
    return weights


def _pull_base(snapshot: Path, say: Say) -> None:
    """The checkpoint that an adapter was trained on, where it names one of the hub."""
    base = read_json(snapshot / ADAPTER).get("base_model_name_or_path")
    if isinstance(base, str) and base and meant(base) is not None:
        local_path(base, say)
