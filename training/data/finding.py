"""Which files the data of a run are: files, folders, globs, and datasets of Hugging Face, by their splits."""

from __future__ import annotations

import glob
import importlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from topkapi.model.errors import DataError
from topkapi.model.nearest import nearest
from topkapi.model.user_files import LONGEST_SETTINGS, expanded, read_file, what_it_is

_COMPRESSED = ("", ".bz2", ".gz", ".zst")
LINES = tuple(f".jsonl{each}" for each in _COMPRESSED)
PLAIN = tuple(f"{kind}{each}" for kind in (".txt", ".md") for each in _COMPRESSED)
TABLES = tuple(f"{kind}{each}" for kind in (".csv", ".tsv") for each in _COMPRESSED)
COLUMNS = (".parquet", ".arrow")

# A dataset by its name, as `datasets.load_dataset` knows it: `hf:NAME:SPLIT`, `hf:OWNER/NAME/CONFIGURATION:SPLIT`.
DATASET = "hf:"
_REACH_SECONDS = 5.0
# More files that are left out are told by their kinds.
_NAMED = 20

Part = Literal["train", "validation"]
# What parts of a dataset are called in names of files, as `datasets` reads them.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SEPARATORS = re.compile(r"[-._ 0-9/]+")
# Of a dataset that was saved, and of one in parts, what it is.
_SAVED, _IN_PARTS = ("state.json", "dataset_info.json"), "dataset_dict.json"


@dataclass(frozen=True)
class Kind:
    """The files that something is read from, by the ends of their names, and what to say of others."""

    endings: tuple[str, ...]
    what: str
    refusal: str

    def of(self, path: Path) -> str | None:
        """The ending of such a file; None for others."""
        name = path.name.lower()
        return next((ending for ending in self.endings if name.endswith(ending)), None)

    def error(self, path: Path) -> DataError:
        """The error for a file that is none of them."""
        hint = f"files must end in {', '.join(self.endings)}; a recipe (.yaml) comes before the flags"
        if self is EXAMPLES and TEXTS.of(path) in PLAIN:
            hint = f"topkapi pretrain trains on plain text; examples are in files that end in {', '.join(self.endings)}"
        return DataError(f"{path} {self.refusal}", field="data", hint=hint)


TEXTS = Kind((*PLAIN, *LINES, *TABLES, *COLUMNS), "training text", "is not a kind of file that can be read")
EXAMPLES = Kind((".json", *LINES, *TABLES, *COLUMNS), "examples", "is not a kind of file that holds examples")


@dataclass
class Found:
    """The files of each pattern; of datasets in parts those to validate on; what is left out, in words."""

    sources: list[list[Path]] = field(default_factory=list)
    validation: list[Path] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def files(self) -> list[Path]:
        """All files once, in the order of the patterns."""
        return list(dict.fromkeys(file for source in self.sources for file in source))


def find_files(
    patterns: Sequence[str], hint: str | None = None, *, kind: Kind = TEXTS, part: Part = "train"
) -> list[Path]:
    """The files that `patterns` (paths, folders, globs) name, in the order given, folders and globs sorted.

    Raises `DataError` for a pattern that names nothing, with `hint`, and for a file of a kind that is not read.
    """
    return find_data(patterns, hint, kind=kind, part=part).files


def find_data(patterns: Sequence[str], hint: str | None = None, *, kind: Kind = TEXTS, part: Part = "train") -> Found:
    """As `find_files`, with what else was found. Of a dataset in parts the `part` is taken (to validate on: the part
    for it, else the one to test on); nothing is trained on a part to test on, unless it is what a pattern names."""
    found = Found()
    for pattern in patterns:
        path = expanded(pattern)
        if pattern.startswith(DATASET):
            files = _dataset_files(pattern.removeprefix(DATASET))
        elif path.is_dir():
            files = _folder(path, kind, part, found)
        elif path.is_file():
            files = [path]
        else:
            files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
            if not files:
                raise no_such_file(pattern, "no such file, folder or glob", hint=hint)
        if wrong := next((file for file in files if not kind.of(file)), None):
            raise kind.error(wrong)
        found.sources.append(list(dict.fromkeys(files)))
    return found


def held_out_files(found: Found, recipe_files: Sequence[str], fraction: float, kind: Kind) -> list[Path]:
    """What to validate on: the files that the recipe names, else the part for it of the one dataset that is trained on.

    A part that is not used, for there are other sources or no validation is wished, is added to `left_out`.
    """
    if recipe_files:
        named = find_data(recipe_files, kind=kind, part="validation")
        found.left_out += named.left_out
    if found.validation and (recipe_files or len(found.sources) > 1 or not fraction):
        count = len(found.validation)
        found.left_out.append(f"a part to validate on ({count} file{'s' * (count != 1)})")
        found.validation.clear()
    return named.files if recipe_files else found.validation


def named(files: Sequence[Path]) -> list[str]:
    """A name for each file: its own, with as many of its folders as tell it from the others."""
    names = [file.name for file in files]
    depth = 1
    while len(set(names)) < len(set(files)) and depth < max(len(file.parts) for file in files):
        depth += 1
        counts = Counter(names)
        names = [
            "/".join(file.parts[-depth:]) if counts[name] > 1 else name for file, name in zip(files, names, strict=True)
        ]
    return names


def _folder(path: Path, kind: Kind, part: Part, found: Found) -> list[Path]:
    """The files of a folder; what it leaves out is told in `found`."""
    parts, others = _parts(path, kind)
    found.left_out += _in_words(others)
    if part == "train":
        files = parts.pop("train", [])
        found.validation += parts.pop("validation", [])
    else:
        files = parts.pop("validation", []) or parts.pop("test", []) or parts.pop("train", [])
    for name, unused in parts.items():
        if unused:
            found.left_out.append(f"the part {name} of {path} ({len(unused)} file{'s' * (len(unused) != 1)})")
    if files:
        return files
    held_out = [*parts, *(["validation"] if found.validation else [])]
    if part == "train" and held_out:
        raise DataError(
            f"{path} has no part to train on, only {', '.join(sorted(held_out))}",
            field="data",
            hint="name the part's own folder, or its files, to train on it all the same",
        )
    raise DataError(f"no {kind.what} in the folder {path}", field="data", hint=kind.error(path).hint)


def _parts(path: Path, kind: Kind) -> tuple[dict[str, list[Path]], list[Path]]:
    """The files of a folder by the parts of the dataset that they are, and those that are not read."""
    if (path / _IN_PARTS).is_file():
        names = _facts(path / _IN_PARTS).get("splits")
        parts: dict[str, list[Path]] = {}
        for name in names if isinstance(names, list) else []:
            part = next((each for each, words in _SPLITS.items() if str(name) in words), str(name))
            parts[part] = [*parts.get(part, []), *_saved_files(path / str(name))]
        return parts, []
    files, others = _walk(path, kind)
    words = {file: _SEPARATORS.split(str(file.relative_to(path)).lower()) for file in files}
    splits = {
        file: next((name for name, each in _SPLITS.items() if set(each) & set(of)), None) for file, of in words.items()
    }
    if "train" in splits.values():
        parts = {}
        for file, split in splits.items():
            parts.setdefault(split or "train", []).append(file)
        return parts, others
    # Without a part to train on only names that say nothing else are those of the others: `test.txt` beside `a.txt`.
    parts = {"train": []}
    for file, split in splits.items():
        name = file.name.lower().removesuffix(kind.of(file) or "")
        alone = split is not None and set(_SEPARATORS.split(name)) <= {*_SPLITS[split], "of", ""}
        parts.setdefault(split if alone and split else "train", []).append(file)
    return parts, others


def _walk(folder: Path, kind: Kind) -> tuple[list[Path], list[Path]]:
    """The files of `kind` in a folder and all below it, and the others."""
    if all((folder / name).is_file() for name in _SAVED):
        return _saved_files(folder), []
    files: list[Path] = []
    others: list[Path] = []
    for each in sorted(folder.iterdir()):
        if each.name.startswith("."):
            continue
        if each.is_dir():
            below = _walk(each, kind)
            files += below[0]
            others += below[1]
        elif not each.is_file() or (each.suffix == ".arrow" and each.name.startswith(("cache-", "indices-"))):
            # `datasets` keeps what it computes from a dataset beside it.
            continue
        elif kind.of(each) and each.name.lower() != "readme.md":
            files.append(each)
        else:
            others.append(each)
    return files, others


def _saved_files(folder: Path) -> list[Path]:
    """The files of a dataset that `save_to_disk` wrote, in their order."""
    listed = _facts(folder / "state.json").get("_data_files")
    names = [each.get("filename") for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    files = [folder / Path(str(name)).name for name in names]
    if missing := next((file for file in files if not file.is_file()), None):
        raise DataError(f"the dataset in {folder} lacks its file {missing.name}", field="data", hint="copy it again")
    return files


def _facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(read_file(path, LONGEST_SETTINGS, field="data"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error})", field="data", hint="save the dataset again") from None
    return facts if isinstance(facts, dict) else {}


def _in_words(files: Sequence[Path]) -> list[str]:
    if len(files) <= _NAMED:
        return [str(file) for file in files]
    kinds = Counter(file.suffix.lower() or "no ending" for file in files)
    return [f"{count:,} files with {ending}" for ending, count in sorted(kinds.items())]


def no_such_file(
    name: str, message: str = "no such file", *, field: str = "data", hint: str | None = None
) -> DataError:
    """The error for a file that is not there, which names one of nearly the same name, else gives `hint`."""
    path = expanded(name)
    if other := what_it_is(path):
        return DataError(f"{name} {other}", field=field, hint="name a file")
    beside = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    if near := nearest(path.name, beside):
        hint = f"did you mean {path.with_name(near)}?"
    elif hint is None:
        hint = "paths are relative to the folder that the command is given in" if beside else None
        hint = hint or f"there is no folder {path.parent}"
    return DataError(f"{message}: {name}", field=field, hint=hint)


def _dataset_files(name: str) -> list[Path]:
    """The Arrow files of a dataset that `datasets` has on this machine, or can fetch."""
    datasets = extra_package("datasets", "datasets", "a dataset by its name")
    where, _, split = name.partition(":")
    owner, _, rest = where.partition("/")
    dataset, _, configuration = rest.partition("/")
    path = f"{owner}/{dataset}" if rest else owner
    if "[" in split:
        raise DataError(
            f"a part of a split, {split}, can't be taken of a dataset by its name",
            field="data",
            hint=f"name all of {split.partition('[')[0]}, or save the part with save_to_disk and give its folder",
        )
    with _offline_if_unreachable(datasets, path) as unreachable:
        try:
            loaded = datasets.load_dataset(path, configuration or None, split=split or "train")
        except Exception as error:  # whatever its loaders and its HTTP client raise
            if unreachable:
                raise DataError(
                    f"the dataset {name} is not on this machine, and the hub cannot be reached: {unreachable}",
                    field="data",
                    hint="connect to the network, or give files or folders instead",
                ) from None
            reason = " ".join(str(error).split())
            raise DataError(
                f"the dataset {name} cannot be loaded: {reason[:300]}",
                field="data",
                hint=f"write {DATASET}NAME:SPLIT or {DATASET}OWNER/NAME/CONFIGURATION:SPLIT",
            ) from None
    return [Path(file["filename"]) for file in loaded.cache_files]


@contextmanager
def _offline_if_unreachable(datasets: Any, path: str) -> Iterator[str | None]:
    """Yield why the hub cannot be reached, None if it can or need not be; then `datasets` looks on this machine only.

    Left to itself its client tries six times, over half a minute.
    """
    if datasets.config.HF_HUB_OFFLINE or Path(path).exists():
        yield None
        return
    hub = extra_package("huggingface_hub", "datasets", "a dataset by its name")
    reason = None
    try:
        hub.get_session().head(hub.constants.ENDPOINT, timeout=_REACH_SECONDS)
    except Exception as error:  # whatever its HTTP client raises
        reason = str(error) or type(error).__name__
    before = hub.constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = hub.constants.HF_HUB_OFFLINE = before or reason is not None
    try:
        yield reason
    finally:
        datasets.config.HF_HUB_OFFLINE = hub.constants.HF_HUB_OFFLINE = before


def extra_package(name: str, extra: str, purpose: str) -> Any:
    """An optional package. Raises `DataError` naming the extra that brings it."""
    try:
        module: ModuleType = importlib.import_module(name)
    except ImportError:
        raise DataError(
            f"{purpose} needs the package {name}", field="data", hint=f"pip install 'topkapi[{extra}]'"
        ) from None
    return module
