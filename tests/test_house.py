"""The rules the source tree keeps: which room may import which, what may never be called, what must agree."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
NAME = "topkapi"
ROOMS = ("model", "engine", "service", "training", "python")
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# So long that no subject is cut in two for it, so short that a file is still read in one sitting.
LONGEST_FILE = 600
# What serving and training need, and what the tools of development need beside it.
LOCKS = ("requirements.lock", "requirements-dev.lock")
# Extras that only some need, and that are not installed from the lock.
UNLOCKED = {"datasets", "deduplicate", "evaluate", "otel", "ray", "sweep", "tensorboard", "trackio", "wandb"}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """(absolute dotted name, whether it is imported when the module is) of every import in a file.

    Names below `if TYPE_CHECKING:` count as not imported at run time.
    """
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]

    def walk(node: ast.AST, at_import: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            yield from ((f"{module}.{alias.name}", at_import) for alias in node.names)
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for field, value in ast.iter_fields(node):
            type_checking = field == "body" and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from walk(child, at_import and not lazy and not type_checking)

    return list(walk(parsed(path), True))


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def requirements(*extras: str) -> list[Requirement]:
    project = PYPROJECT["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines]


def locked(*names: str) -> dict[str, list[Requirement]]:
    texts = [(ROOT / name).read_text() for name in names or LOCKS]
    lines = (line for text in texts for line in text.splitlines() if not line.startswith("#"))
    pins: dict[str, list[Requirement]] = {}
    for requirement in map(Requirement, lines):
        pins.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return pins


def violations(rule: Callable[[Path], Iterator[str]]) -> list[str]:
    return [f"{path.relative_to(ROOT)}: {problem}" for path in SOURCES for problem in rule(path)]


def module_of(path: Path) -> str:
    return ".".join((NAME, *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


@cache
def arrows() -> dict[str, set[str]]:
    """The modules of the tree that each imports, at whatever time and for whatever reason."""
    modules = {module_of(path): path for path in SOURCES}
    drawn: dict[str, set[str]] = {}
    for module, path in modules.items():
        targets = (name if name in modules else name.rpartition(".")[0] for name, _ in imports(path))
        drawn[module] = {target for target in targets if target in modules} - {module}
    return drawn


def test_rooms_import_only_what_they_may() -> None:
    """service -> engine -> model <- training; the one command reaches training only when a training command runs.

    The Python API stands above all of them, and nothing imports it.
    """
    above = {
        "model": ("engine", "service", "training", "python"),
        "engine": ("service", "training", "python"),
        "service": ("training", "python"),
        "training": ("service", "python"),
        "python": (),
    }

    def rule(path: Path) -> Iterator[str]:
        for name, at_import in imports(path):
            if path == ROOT / "service" / "commands" / "cli.py" and not at_import:
                continue
            if any(within(name, f"{NAME}.{room}") for room in above[path.relative_to(ROOT).parts[0]]):
                yield name

    assert violations(rule) == []


def test_nothing_goes_in_circles() -> None:
    """Neither modules nor the folders they lie in; what is imported for annotations alone counts as well."""
    TopologicalSorter(arrows()).prepare()
    for depth in range(2, 6):
        rooms: dict[str, set[str]] = {}
        for module, targets in arrows().items():
            room = ".".join(module.split(".")[:depth])
            others = {".".join(target.split(".")[:depth]) for target in targets}
            rooms.setdefault(room, set()).update(other for other in others if not within(module, other))
        TopologicalSorter(rooms).prepare()


@pytest.mark.parametrize(("floor", "rooms", "doors"), [("training", 16, 65), ("service.api", 8, 20)])
def test_a_floor_has_few_rooms_and_few_arrows_between_them(floor, rooms, doors) -> None:
    inside = f"{NAME}.{floor}."
    drawn = {
        (module.removeprefix(inside).split(".")[0], target.removeprefix(inside).split(".")[0])
        for module, targets in arrows().items()
        for target in targets
        if module.startswith(inside) and target.startswith(inside)
    }
    between = {(one, other) for one, other in drawn if one != other}
    assert len({module.removeprefix(inside).split(".")[0] for module in arrows() if module.startswith(inside)}) <= rooms
    assert len(between) <= doors


def test_what_some_rooms_may_not_know() -> None:
    """The engine knows no text, the API no tensors, and what dialects share no dialect."""
    web = ("fastapi", "starlette", "pydantic", "gradio")
    dialects = tuple(f"service.api.{name}" for name in ("native", "openai", "anthropic", "tgi", "llama", "sglang"))
    unknown = {
        "engine": (*web, "model.text", "model.conversation"),
        "service/api": ("torch", "gradio", "service.ui"),
        "service/api/http": dialects,
        "service/ui": ("torch",),
    }

    def rule(path: Path) -> Iterator[str]:
        for room, others in unknown.items():
            if path.is_relative_to(ROOT / room):
                for name, _ in imports(path):
                    if any(within(name.removeprefix(f"{NAME}."), other) for other in others):
                        yield name

    assert violations(rule) == []


def test_nothing_is_unpickled_or_evaluated() -> None:
    """Weights and settings come from strangers: no format that can run code is ever read."""
    # PyTorch's restricted loader runs no code; it is called in one file, which runs in a process of its own.
    restricted = ROOT / "model" / "importing" / "restricted.py"
    modules = ("pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib")
    calls = {"eval", "exec", "torch.load", "torch.save", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}

    def rule(path: Path) -> Iterator[str]:
        yield from (name for name, _ in imports(path) if name in calls or any(within(name, m) for m in modules))
        for node in ast.walk(parsed(path)):
            if path == restricted and ast.unparse(node).startswith("torch.load("):
                if "weights_only=True" not in ast.unparse(node):
                    yield f"line {node.lineno} loads more than weights"
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in calls:
                yield f"line {node.lineno} calls {ast.unparse(node.func)}"
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
                yield f"line {node.value.lineno} allows pickle"

    assert violations(rule) == []


def test_a_file_fits_in_the_head_and_says_what_it_is_for() -> None:
    def rule(path: Path) -> Iterator[str]:
        text = path.read_text()
        if (lines := text.count("\n")) > LONGEST_FILE:
            yield f"{lines} lines"
        if text.strip() and not ast.get_docstring(parsed(path)):
            yield "no module docstring"

    assert violations(rule) == []


def test_every_import_is_a_declared_dependency() -> None:
    """What a module needs to be imported is in the core (for training: or in its extra); lazily, any extra will do.

    What an extra's classes are derived from it needs at once: such a module is imported lazily itself.
    """
    core = {canonicalize_name(requirement.name) for requirement in requirements()}
    train = {canonicalize_name(requirement.name) for requirement in requirements("train")}
    ray = {canonicalize_name(requirement.name) for requirement in requirements("ray")}
    optional = {canonicalize_name(requirement.name) for requirement in requirements("train", *UNLOCKED, "gguf")}
    # Each of these is built on the other and never comes without.
    providers = packages_distributions() | {"starlette": ["fastapi"], "h11": ["uvicorn"], "pydantic_core": ["pydantic"]}

    def rule(path: Path) -> Iterator[str]:
        eager = train if path.is_relative_to(ROOT / "training") else core
        if path.name == "ray_serve.py":
            eager = eager | ray
        for name, at_import in imports(path):
            top = name.split(".")[0]
            if top not in sys.stdlib_module_names and top != NAME:
                distributions = {canonicalize_name(name) for name in providers.get(top, [top])}
                if not distributions & (eager if at_import else optional):
                    yield f"{name} is not declared"

    assert violations(rule) == []


def test_the_locks_satisfy_every_declared_range() -> None:
    serving, all_pins = locked(LOCKS[0]), locked()
    needed = [(requirement, serving) for requirement in requirements("train", "gguf")]
    for requirement, pins in [*needed, *((requirement, all_pins) for requirement in requirements("dev"))]:
        chosen = pins.get(canonicalize_name(requirement.name), [])
        assert chosen, f"{requirement.name} is not locked"
        for pin in chosen:
            version = next(iter(pin.specifier)).version
            assert requirement.specifier.contains(version), f"{pin} is outside {requirement}"


def test_what_serves_is_locked_apart_from_what_tests() -> None:
    serving, tools = locked(LOCKS[0]), locked(LOCKS[1])
    needed = {canonicalize_name(requirement.name) for requirement in requirements("train", "gguf")}
    only_tools = {canonicalize_name(requirement.name) for requirement in requirements("dev")} - needed
    assert only_tools - {"httpx", "setuptools"} <= tools.keys() - serving.keys(), "those two serve as well"
    for name in serving.keys() & tools.keys():
        versions = {str(pin.specifier) for pins in (serving, tools) for pin in pins[name]}
        assert len(versions) == 1, f"{name} would be installed twice: {versions}"
    assert "setuptools" in serving, "topkapi itself is built with it"


def test_the_locks_pin_exactly_and_name_no_place_to_fetch_from() -> None:
    text = "".join((ROOT / name).read_text() for name in LOCKS)
    assert not re.search(r"https?:|file:|--(extra-)?index|--find-links|/", text.replace("make lock", ""))
    for name, pins in locked().items():
        for pin in pins:
            assert [specifier.operator for specifier in pin.specifier] == ["=="], pin
        assert not re.match(r"(cuda|nvidia-[cn]|triton)", name), f"{name} belongs to one torch build only"
    (torch,) = locked()["torch"]
    assert "+" not in str(torch), "which build of torch is installed is the installer's choice"


def test_the_pinned_torch_is_the_one_make_lock_asks_for() -> None:
    (torch,) = locked()["torch"]
    assert str(torch) in PYPROJECT["tool"]["uv"]["constraint-dependencies"]


def test_the_files_that_install_agree() -> None:
    makefile = (ROOT / "Makefile").read_text()
    extras = set(PYPROJECT["project"]["optional-dependencies"])
    assert set(re.findall(r"--extra (\w+)", makefile)) == extras - UNLOCKED
    assert all(name in makefile for name in LOCKS)
    assert PYPROJECT["project"]["scripts"] == {"topkapi": "topkapi.service.commands.cli:main"}
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    (minimum,) = re.findall(r"version_info < \((\d+, \d+)\)", makefile)
    assert PYPROJECT["project"]["requires-python"] == ">=" + minimum.replace(", ", ".")


def test_every_package_is_found() -> None:
    """A package that setuptools does not find would be missing from a wheel though it works in the checkout."""
    from setuptools import find_packages

    found = set(find_packages(str(ROOT), include=PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"]))
    for path in SOURCES:
        package = ".".join((NAME, *path.relative_to(ROOT).parent.parts))
        assert package in found, f"{package} lacks an __init__.py"


def test_what_the_documents_name_exists() -> None:
    named = re.compile(r"`((?:model|engine|service|training|python|tests|benchmarks|docs)/[\w/.-]+)`")
    missing = [
        f"{page.name}: {path}"
        for page in (*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md")
        if page.name != "LOG.md"
        for path in named.findall(page.read_text())
        # The page on extending has its reader write that one.
        if not (ROOT / path).exists() and path != "service/api/parrot.py"
    ]
    assert missing == []


def test_the_tests_that_are_named_anywhere_exist() -> None:
    there = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    pages = [path for path in (ROOT / "docs").glob("*.md") if path.name != "LOG.md"]
    for path in (*SOURCES, *(ROOT / "tests").rglob("*.py"), *pages, ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        named = set(re.findall(r"\btest_\w+\.py\b", path.read_text("utf-8")))
        assert named <= there, f"{path.relative_to(ROOT)} names {sorted(named - there)}"


def test_the_tests_that_the_makefile_names_are_there() -> None:
    told = subprocess.run(["make", "-n", "test-processor"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    named = set(re.findall(r"(?<!\S)tests/\S+", told))
    assert len(named) > 5 and all((ROOT / each).exists() for each in named)
