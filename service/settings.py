"""The server's settings: flags of `topkapi serve`, environment variables with the prefix `TOPKAPI_`, or a YAML file."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from topkapi.model.errors import SettingsError
from topkapi.model.flags import flag_of
from topkapi.model.user_files import expanded
from topkapi.model.wrong_values import told
from topkapi.service.settings_file import read_settings

DtypeName = Literal["auto", "float32", "bfloat16", "int8", "int4", "w8a8", "w4a8"]
RUNS = Path("runs")
CacheDtypeName = Literal["auto", "float32", "float16", "int8"]


def setting(default: Any, meaning: str, *, flag: Mapping[str, Any] | None = MappingProxyType({}), **rules: Any) -> Any:
    """A setting: an environment variable and, unless `flag` is None, a flag; `flag` is what argparse is told of it."""
    about: Any = None if flag is None else {"about": dict(flag)}
    return Field(default, description=meaning, json_schema_extra=about, **rules)


in_seconds = partial(setting, flag={"metavar": "SECONDS"}, allow_inf_nan=False)


class Settings(BaseSettings):
    """Every field is also an environment variable: `port` is `TOPKAPI_PORT`."""

    model_config = SettingsConfigDict(env_prefix="TOPKAPI_", extra="forbid")

    config: Path | None = setting(
        None,
        "YAML file with settings by their names; flags and variables come before it [none]",
        flag={"metavar": "FILE"},
    )
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 for every interface", flag={"metavar": "HOST"})
    port: int = setting(8000, "port to listen on; 0 for a free one", flag={"metavar": "PORT"}, ge=0, le=65535)
    checkpoints: Path | None = setting(
        None, "directory whose checkpoints are served when the command names none", flag=None
    )
    root_path: str | None = setting(
        None, "path under which a reverse proxy serves this server, which may strip it [none]", flag={"metavar": "PATH"}
    )
    model_directory: Path | None = setting(
        None, "directory from which requests may load and unload checkpoints [none]", flag={"metavar": "DIR"}
    )
    runs_directory: Path = setting(RUNS, "directory whose training runs requests may look at", flag={"metavar": "DIR"})
    hub_models: bool = setting(
        False, "let requests load models of the Hugging Face hub, which are downloaded, and unload what is loaded"
    )
    keys: Path | None = setting(
        None, "file with the keys of those who may call the server, as topkapi key new makes them [none]"
    )
    api_key: SecretStr | None = setting(None, "a key with every right, or its hash [none]", flag=None)
    insecure: bool = setting(False, "serve beyond this machine without keys: to whoever can reach the address")
    stream_grace: float = in_seconds(
        15.0, "how long a stream goes on without its connection and may be resumed; 0 ends it at once", ge=0, le=3600
    )
    stream_keep_alive: float = in_seconds(
        15.0, "how long a stream may be silent before a comment says that it is still there; 0 never", ge=0, le=3600
    )
    stream_bytes: int = setting(64 * 2**20, "most bytes of events kept so that streams can be resumed", flag=None, ge=0)
    max_queue: int = setting(256, "requests that may wait per checkpoint; one more is refused with 429", ge=1)
    max_queue_tokens: int | None = setting(
        None, "tokens of prompts that may wait per checkpoint [those of 64 contexts]", ge=1
    )
    max_queue_seconds: float = in_seconds(
        120.0, "that a request may wait to begin; what would wait longer is refused with 429 at once; 0: any time", ge=0
    )
    max_connections: int = setting(
        512, "connections that may be open together; one more is answered with 503 and closed", ge=1
    )
    max_body_bytes: int = setting(32 * 2**20, "largest accepted body; above it 413", flag=None, ge=1024)
    step_timeout: float = in_seconds(
        300.0, "after which a pass of the network counts as hanging, and the process ends for it; 0 never does", ge=0
    )
    request_timeout: float = in_seconds(
        30.0, "that a request's head may take to come in, and its body beyond what it takes at 1 KiB/s", gt=0, le=3600
    )
    write_timeout: float = in_seconds(
        60.0, "that a client may leave what it was sent unread; then its connection ends; 0: any time", ge=0
    )
    drain_seconds: float = in_seconds(
        20.0, "that running requests may take to end after SIGTERM, while new ones get 503; 0 ends them at once", ge=0
    )
    idle_timeout: float = in_seconds(15.0, "that a connection may be open without a request", gt=0, le=3600)
    cors_origins: Annotated[tuple[str, ...], NoDecode] = setting(
        (), "origins whose web pages may call the API [none]", flag={"metavar": "URL,…"}
    )
    trusted_proxies: Annotated[tuple[str, ...], NoDecode] = setting(
        ("127.0.0.1", "::1"),
        "addresses of proxies whose word is taken for where a request came from (X-Forwarded-For)",
        flag={"metavar": "ADDRESS,…"},
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = setting(
        (),
        "host names by which it may be called besides localhost and its own address; *.example.org for those below "
        "that one, * for any [none]",
        flag={"metavar": "NAME,…"},
    )
    studio: bool = setting(True, "serve the browser studio")
    access_log: bool = setting(False, "log every request but those of probes")
    log_format: Literal["text", "json"] = setting(
        "text", "lines for people, or one JSON object a line", flag={"choices": ("text", "json")}
    )
    log_texts: bool = setting(False, "log what unexpected errors say, which may quote a request")
    traces: bool = setting(False, "send OpenTelemetry traces of requests to where OTEL_EXPORTER_OTLP_ENDPOINT says")
    ignore_unknown_fields: bool = setting(
        False, "leave unknown fields of requests out, naming them in X-Ignored-Parameters, instead of refusing"
    )
    dtype: DtypeName = setting(
        "auto", "precision of the matrices; auto: as stored", flag={"choices": get_args(DtypeName)}
    )
    kv_cache_dtype: CacheDtypeName = setting(
        "auto",
        "precision of keys and values; auto: float16 where matrices have eight bits or fewer, else float32",
        flag={"choices": get_args(CacheDtypeName)},
    )
    threads: int | None = setting(None, "CPU threads [chosen by PyTorch]", ge=1, le=os.cpu_count() or 1)
    replicas: int = setting(
        1,
        "processes that each serve all the checkpoints, started and watched by Ray Serve where there are several",
        ge=1,
    )
    max_replicas: int | None = setting(
        None, "processes to grow to while more requests are under way than --requests-per-replica [no more]", ge=1
    )
    requests_per_replica: int = setting(
        16, "requests, running or waiting, that each replica is to have before another one is started", ge=1
    )
    replica_seconds: float = in_seconds(
        600.0, "that replicas have less to do than that before one of them is ended", ge=0
    )
    draft: Path | None = setting(
        None,
        "smaller checkpoint with the same vocabulary that guesses ahead: the same answers, sooner [none]",
    )

    adapters: Annotated[tuple[str, ...], NoDecode] = setting(
        (),
        "LoRA adapters that requests may name, NAME=DIR or NAME@CHECKPOINT=DIR, or directories that hold some [none]",
        flag={"metavar": "NAME=DIR,…"},
    )
    adapter_memory: int = setting(
        1024, "MiB of memory for adapters; those used longest ago go first", flag={"metavar": "MIB"}, ge=1, le=2**24
    )
    follow: bool = setting(
        False, "swap in what a training run's best or last leads to, a few seconds after it was saved"
    )

    @field_validator("root_path")
    @classmethod
    def _path(cls, path: str | None) -> str | None:
        path = path.rstrip("/") if path else None
        if path and not re.fullmatch(r"(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+", path):
            raise ValueError("must be a path such as /topkapi")
        return path

    @field_validator("cors_origins", "allowed_hosts", "trusted_proxies", "adapters", mode="before")
    @classmethod
    def _split(cls, listed: object) -> object:
        if isinstance(listed, str):
            return tuple(each.strip() for each in listed.split(",") if each.strip())
        return listed

    @field_validator("allowed_hosts")
    @classmethod
    def _are_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if host != "*" and not re.fullmatch(
                r"(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?|[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*", host
            ):
                raise ValueError(
                    "a host is a name or an address without a port, such as example.org, *.example.org or *"
                )
        return hosts

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ValueError("an origin is a scheme and a host, such as https://example.org, or *")
        return origins

    @field_validator("api_key", "config", "keys", mode="before")
    @classmethod
    def _empty_is_none(cls, given: object) -> object:
        # What compose passes on of a variable that nobody has set.
        return None if given == "" else given

    @field_validator("api_key")
    @classmethod
    def _is_key(cls, key: SecretStr | None) -> SecretStr | None:
        form = r"sha256:[0-9a-f]{64}|(?!sha256:)[!-~]{16,512}"
        if key is not None and not re.fullmatch(form, key.get_secret_value()):
            raise ValueError("no key")
        return key

    @field_validator("keys")
    @classmethod
    def _is_there(cls, path: Path | None) -> Path | None:
        path = None if path is None else expanded(path)
        if path is not None and (os.path.isdir(path) or not os.path.exists(path)):
            raise ValueError("must be a file")
        return path

    @field_validator("trusted_proxies")
    @classmethod
    def _are_addresses(cls, proxies: tuple[str, ...]) -> tuple[str, ...]:
        for proxy in proxies:
            try:
                _ = proxy == "*" or ipaddress.ip_network(proxy)
            except ValueError:
                raise ValueError("a proxy is an address, a network such as 10.0.0.0/8, or *") from None
        return proxies

    @field_validator("model_directory", "runs_directory")
    @classmethod
    def _is_directory(cls, directory: Path | None) -> Path | None:
        # Where runs are written by default there may be none yet.
        if directory not in (None, RUNS) and not os.path.isdir(expanded(directory)):
            raise ValueError("there is no such directory")
        return directory

    @property
    def replicated(self) -> bool:
        """Whether more than this process serves."""
        return self.replicas > 1 or self.max_replicas is not None

    @classmethod
    def read(cls, **flags: Any) -> Settings:
        """The settings in force: flags that were given, then the environment, then the file, then the defaults.

        Raises `SettingsError` naming the flag, the variable or the file's line at fault.
        """
        return cls.with_sources(**flags)[0]

    @classmethod
    def with_sources(cls, **flags: Any) -> tuple[Settings, dict[str, str]]:
        """The settings in force, and where each comes from: a flag, a variable, a file, or `default`."""
        given = {name: value for name, value in flags.items() if value is not None}
        variables = {name.lower() for name in os.environ}
        environment = {name for name in cls.model_fields if f"topkapi_{name}" in variables}
        path = given.get("config") or os.environ.get("TOPKAPI_CONFIG")
        named = flag_of("config") if given.get("config") else "TOPKAPI_CONFIG"
        in_file = {} if not path else read_settings(expanded(path), list(cls.model_fields), named)
        sources = dict.fromkeys(cls.model_fields, "default")
        sources |= {name: f"{name} in {path}" for name in in_file}
        sources |= {name: f"TOPKAPI_{name.upper()}" for name in environment}
        sources |= {name: flag_of(name) for name in given}
        weaker = {name: value for name, value in in_file.items() if name not in environment}
        try:
            return cls(**weaker | given), sources
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            if name == "api_key":
                # What was given stays unsaid.
                told_of = "is not 16 to 512 letters, digits and signs without spaces, nor sha256: and the hash of such"
                hint = "topkapi key new NAME prints a key and its hash"
                raise SettingsError(f"{sources[name]} {told_of}", field=name, hint=hint) from None
            source = sources.get(name, name)
            raise SettingsError(told(source, first, cls.model_fields.get(name)), field=name) from None
