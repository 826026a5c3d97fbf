"""What the commands check and say before torch is imported: settings, flags, paths and files.

Importing torch, and what serves, takes seconds, on a busy machine many. What is refused is refused before, and whoever
waits reads what for.
"""

from __future__ import annotations

import argparse
import errno
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from topkapi.model.config import ModelConfig
from topkapi.model.decoding.grammar_source import check_syntax
from topkapi.model.decoding.parameters import check_together, check_values, from_generation_config
from topkapi.model.errors import InvalidRequest, SettingsError
from topkapi.model.flags import flag_of
from topkapi.model.reading import read_json
from topkapi.model.windows import window_sizes
from topkapi.service.commands.bench_shape import RANDOM_CONTEXT, Shape, check_shapes
from topkapi.service.commands.flags import given_parameters, given_settings
from topkapi.service.commands.inputs import loading, read_text, standard_input
from topkapi.service.garbage import importing
from topkapi.service.keys import KeyRing, is_loopback
from topkapi.service.locations import (
    adapter_locations,
    all_at_hand,
    check_followed,
    check_locations,
    default_checkpoints,
    name_of_location,
    split_location,
)
from topkapi.service.settings import Settings
from topkapi.service.tracing import check_tracing
from topkapi.service.version import VERSION


def serve(arguments: argparse.Namespace) -> int:
    """`topkapi serve`."""
    settings = given_settings(arguments)
    check_exposure(settings)
    check_replicas(settings)
    if settings.traces:
        check_tracing()
    # The port is taken first: finding out that it is in use should not take as long as loading.
    with bind(settings.host, settings.port) as listener:
        locations, settings = all_at_hand(arguments.checkpoint or default_checkpoints(settings), settings)
        check_locations(locations, settings)
        adapter_locations(settings)
        if settings.follow:
            check_followed(locations, settings)
        if settings.log_format == "text":
            print(f"Topkapi {VERSION}: loading {', '.join(map(name_of_location, locations))}", flush=True)
        with importing():
            from topkapi.service.server import serve
        return serve(settings, listener, locations)


def generate(arguments: argparse.Namespace) -> int:
    """`topkapi generate`."""
    settings, location, config = _checkpoint(arguments)
    parameters = given_parameters(arguments)
    if arguments.system is not None and not arguments.chat:
        raise InvalidRequest("--system needs --chat", field="system", hint="add --chat")
    if not arguments.json:
        _shown_only_in_json(parameters, "--json")
    _check_parameters(parameters, location, config)
    text = arguments.prompt if arguments.prompt is not None else standard_input("a prompt").content
    with loading(name_of_location(location)), importing():
        from topkapi.service.commands import terminal
    return terminal.generate(arguments, settings, location, text, parameters)


def score(arguments: argparse.Namespace) -> int:
    """`topkapi score`."""
    settings, location, config = _checkpoint(arguments)
    window_sizes(None if config is None else config.context_length, arguments.window, arguments.stride)
    if arguments.top < 0:
        raise InvalidRequest(f"--top must be at least 0, not {arguments.top}", field="top")
    if arguments.top and not arguments.json:
        raise InvalidRequest("alternatives are shown in JSON alone", field="top", hint="add --json, or leave --top out")
    names = arguments.file or ["-"]
    texts = [(name, standard_input("a text") if name == "-" else read_text(Path(name))) for name in names]
    with loading(name_of_location(location)), importing():
        from topkapi.service.commands import terminal
    return terminal.score(arguments, settings, location, texts)


def chat(arguments: argparse.Namespace) -> int:
    """`topkapi chat`."""
    settings, location, config = _checkpoint(arguments)
    parameters = given_parameters(arguments)
    _shown_only_in_json(parameters, "topkapi generate --json")
    if parameters.get("n", 1) != 1:
        raise InvalidRequest("a conversation has one answer at a time", field="n", hint="leave --n out")
    _check_parameters(parameters, location, config)
    with loading(name_of_location(location)), importing():
        from topkapi.service.commands import terminal
    return terminal.chat(arguments, settings, location, parameters)


def bench(arguments: argparse.Namespace) -> int:
    """`topkapi bench`."""
    given = {name: value for name in ("tokens", "prompt_tokens", "repeats")
             if (value := getattr(arguments, name)) is not None}  # fmt: skip
    shape, streams = Shape(**given), arguments.streams or [Shape.streams]
    if arguments.plot is not None:
        from topkapi.service.commands.bench_plot import check_plot

        check_plot(arguments.plot)
    if arguments.url is not None:
        return _bench_server(arguments, streams, shape)
    settings = given_settings(arguments)
    if arguments.checkpoint is None:
        config = None
        context: int | None = RANDOM_CONTEXT
    else:
        (arguments.checkpoint,), settings = all_at_hand([arguments.checkpoint], settings)
        (config,) = check_locations([arguments.checkpoint], settings)
        context = None if config is None else config.context_length
    check_shapes(streams, shape, context)
    with (
        loading("GPT-2's shape" if arguments.checkpoint is None else name_of_location(arguments.checkpoint)),
        importing(),
    ):
        from topkapi.service.commands.bench import bench
    return bench(settings, arguments.checkpoint, streams, shape, as_json=arguments.json, plot=arguments.plot)


def _bench_server(arguments: argparse.Namespace, streams: list[int], shape: Shape) -> int:
    """`topkapi bench --url`, which computes nothing itself and needs no torch."""
    for name in ("dtype", "kv_cache_dtype", "threads", "draft"):
        if getattr(arguments, name, None) is not None:
            raise SettingsError(
                f"--{name} is for what is computed here, and --url is computed by the server", field=name,
                hint="start the server with it",
            )  # fmt: skip
    from topkapi.service.commands.bench_sweep import bench_server, progress, told

    with progress(arguments.json) as said:
        found = bench_server(arguments.url, arguments.checkpoint, streams, shape, said)
    told(found, arguments.json, arguments.plot)
    return 0


def check_exposure(settings: Settings) -> None:
    """Raise `SettingsError` where everybody could use the server who can reach its address, unless that is wanted."""
    # What is wrong with the keys shows before anything is loaded.
    if not KeyRing.of(settings).required and not settings.insecure and not is_loopback(settings.host):
        raise SettingsError(
            f"at {settings.host} other machines could use this server, and there are no keys",
            field="host",
            hint="topkapi key new NAME --append FILE makes one for --keys FILE, or set TOPKAPI_API_KEY; with "
            "--insecure everybody is served",
        )


def check_deployed(settings: Settings) -> None:
    """Raise `SettingsError` where others listen for the server, wherever that is, and would let everybody use it."""
    if not KeyRing.of(settings).required and not settings.insecure:
        raise SettingsError(
            "whoever reaches the proxies of Ray Serve could use this server, and there are no keys",
            field="keys",
            hint="set TOPKAPI_KEYS to a file of keys, or TOPKAPI_API_KEY; TOPKAPI_INSECURE=true serves everybody",
        )
    _check_kept(settings)


def check_replicas(settings: Settings) -> None:
    """Raise `SettingsError` for what can't be had with several processes."""
    if not settings.replicated:
        return
    most = settings.max_replicas
    if most is not None and most < settings.replicas:
        message = f"max_replicas is {most}, and {flag_of('replicas')} {settings.replicas}"
        raise SettingsError(message, field="max_replicas", hint="leave max_replicas out for a fixed number")
    _check_kept(settings)
    if find_spec("ray") is None:
        raise SettingsError("replicas need Ray Serve", field="replicas", hint="pip install 'topkapi[ray]'")


def _check_kept(settings: Settings) -> None:
    """Raise `SettingsError` for what would change the checkpoints of replicas."""
    for name, loads in (
        ("model_directory", "requests load"),
        ("hub_models", "requests load"),
        ("follow", "runs replace"),
    ):
        if getattr(settings, name):
            message = f"with {flag_of(name)} {loads} checkpoints, and replicas keep those that they were started with"
            raise SettingsError(message, field=name, hint=f"leave {flag_of(name)} out, or serve from one process")


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to host and port. Raises `SettingsError` saying why it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError):
        raise SettingsError(f"{host!r} is not an address of this machine", hint="use --host 127.0.0.1") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Listening at once makes a second server on the port fail now instead of after loading.
        listener.listen(2048)
    except OSError as error:
        listener.close()
        reasons = {
            errno.EADDRINUSE: (f"port {port} on {host} is in use", "choose another one with --port, or 0 for any"),
            errno.EACCES: (f"port {port} is reserved for the system", "choose one above 1023 with --port"),
            errno.EADDRNOTAVAIL: (f"{host} is not an address of this machine", "use --host 127.0.0.1"),
        }
        message, hint = reasons.get(error.errno or 0, (f"cannot listen on {host}:{port}: {error.strerror}", None))
        raise SettingsError(message, field="port", hint=hint) from None
    return listener


def _checkpoint(arguments: argparse.Namespace) -> tuple[Settings, str, ModelConfig | None]:
    """The settings, the checkpoint that is asked for, and its configuration where that can be read at once."""
    settings = given_settings(arguments)
    given = arguments.checkpoint or default_checkpoints(settings)[0]
    (location,), settings = all_at_hand([given], settings)
    (config,) = check_locations([location], settings)
    return settings, location, config


def _check_parameters(parameters: dict[str, Any], location: str, config: ModelConfig | None) -> None:
    """Raise `InvalidRequest` for parameters that the checkpoint could not be given, as far as can be said before it is
    read: what is wrong with its tokenizer or in the light of a file's own defaults shows once it is."""
    check_syntax(parameters)
    if config is None:
        check_values(parameters)
    else:
        generation = read_json(split_location(location)[1] / "generation_config.json")
        check_together(parameters, from_generation_config(generation), vocab_size=config.vocab_size)


def _shown_only_in_json(parameters: dict[str, Any], remedy: str) -> None:
    for name in ("trace", "logprobs"):
        if parameters.get(name) not in (None, False):
            raise InvalidRequest(f"{name} is not part of plain text", field=name, hint=f"use {remedy}")
