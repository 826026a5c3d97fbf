"""The server's settings: flags of `topkapi serve`, or environment variables with the prefix `TOPKAPI_`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from topkapi.model.errors import SettingsError
from topkapi.model.wrong_values import told

DtypeName = Literal["auto", "float32", "bfloat16", "int8", "int4"]


class Settings(BaseSettings):
    """Every field is also an environment variable: `port` is `TOPKAPI_PORT`."""

    model_config = SettingsConfigDict(env_prefix="TOPKAPI_", extra="forbid")

    host: str = "127.0.0.1"
    """Address to listen on. The default is reachable from this machine only; 0.0.0.0 is every interface."""

    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 picks a free one."""

    checkpoints: Path | None = None
    """Directory whose checkpoints are served when the command names none."""

    root_path: str | None = None
    """Path under which a reverse proxy serves this server, such as /topkapi; it may strip it or leave it on."""

    model_directory: Path | None = None
    """Directory from which requests may load checkpoints; without one, no request can load or unload any."""

    dtype: DtypeName = "auto"
    """Precision of the matrices: `auto` keeps what is stored; fewer bits are faster (see docs/formats.md)."""

    draft: Path | None = None
    """Smaller checkpoint with the same vocabulary that guesses ahead: the same answers, sooner."""

    threads: Annotated[int, Field(ge=1, le=os.cpu_count() or 1)] | None = None
    """CPU threads for the network's arithmetic; PyTorch's own choice where not given."""

    max_queue: Annotated[int, Field(ge=1)] = 256
    """Requests that may wait per checkpoint; one more is refused with 429."""

    step_timeout: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 300.0
    """Seconds after which one pass of the network counts as hanging, and the process ends for it; 0 never does."""

    request_timeout: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)] = 30.0
    """Seconds that a request's head may take to come in, and its body beyond what it takes at 1 KiB per second."""

    idle_timeout: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)] = 15.0
    """Seconds that a connection may stay open between two requests, and before its first."""

    max_connections: Annotated[int, Field(ge=1)] = 512
    """Connections that may be open together; one more is answered with 503 and closed."""

    max_body_bytes: Annotated[int, Field(ge=1024)] = 32 * 2**20
    """Largest accepted request body; a larger one is refused with 413."""

    cors_origins: Annotated[tuple[str, ...], NoDecode] = ()
    """Origins whose web pages may call the API, separated by commas; none by default."""

    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = ()
    """Host names by which the server may be called besides localhost and its address; * is any, *.example.org those
    below that one."""

    ignore_unknown_fields: bool = False
    """Whether fields that would be refused as unknown are left out instead, and named in X-Ignored-Parameters."""

    stream_grace: Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)] = 15.0
    """Seconds for which a stream goes on after its connection was lost and may be resumed; 0 ends it at once."""

    stream_keep_alive: Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)] = 15.0
    """Seconds without an event after which a stream says by a comment that it is still there; 0 never does."""

    stream_bytes: Annotated[int, Field(ge=0)] = 64 * 2**20
    """Most bytes of events kept so that streams can be resumed."""

    access_log: bool = False
    """Whether every request is logged."""

    studio: bool = True
    """Whether the browser studio is served at `/`."""

    @field_validator("root_path")
    @classmethod
    def _path(cls, path: str | None) -> str | None:
        path = path.rstrip("/") if path else None
        if path and not re.fullmatch(r"(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+", path):
            raise ValueError("must be a path such as /topkapi")
        return path

    @field_validator("cors_origins", "allowed_hosts", mode="before")
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

    @field_validator("model_directory")
    @classmethod
    def _is_directory(cls, directory: Path | None) -> Path | None:
        if directory is not None and not directory.expanduser().is_dir():
            raise ValueError("there is no such directory")
        return directory

    @classmethod
    def read(cls, **flags: Any) -> Settings:
        """The settings in force: flags that were given, then the environment, then the defaults.

        Raises `SettingsError` naming the flag or variable at fault.
        """
        try:
            return cls(**{name: value for name, value in flags.items() if value is not None})
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            source = f"--{name.replace('_', '-')}" if flags.get(name) is not None else f"TOPKAPI_{name.upper()}"
            raise SettingsError(told(source, first, cls.model_fields.get(name)), field=name) from None
