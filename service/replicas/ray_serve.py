"""Replicas on Ray Serve: as many as the settings say, started, watched and replaced by it, on one machine or many.

This module alone imports Ray, which is heavy, and an extra; it is imported where there are to be replicas.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
import threading
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.request_router import RequestRouter
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from topkapi.model.errors import SettingsError
from topkapi.service.app import create_api
from topkapi.service.garbage import set_aside
from topkapi.service.loading import load
from topkapi.service.logs import set_up
from topkapi.service.models import Models
from topkapi.service.replicas.front import ReplicaLost, stand_before
from topkapi.service.replicas.replica import Passed, Replica, for_replicas
from topkapi.service.settings import Settings

APPLICATION = "topkapi"

STORE_BYTES = 256 * 2**20
"""For messages on their way; of events, none is large."""

LOOPBACK = {"_node_ip_address": "127.0.0.1"}
"""On one machine nobody else is to reach Ray."""

QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
"""What Ray Serve says itself: who asked for what is the front's to log, if anybody's."""

END_SECONDS = 3.0
"""How long is waited for replicas to end on a cluster, which goes on ending them."""

LONGEST_SECONDS = 3600.0
"""How long a replica that is not needed any more may take for its last answers."""

CHECK_SECONDS = 2
"""How often a replica is asked whether it is well."""


class RayReplicas:
    """The replicas behind a handle of Ray Serve."""

    def __init__(self, handle: Any = None) -> None:
        self._handle = self._asking = handle
        self._on_cluster: str | None = None
        """What they are called on a cluster, which runs them until it is told not to."""
        if handle is not None:
            self._take(handle)

    def start(self, settings: Settings, locations: Sequence[str], port: int) -> None:
        """Start them on this machine, or on the cluster that RAY_ADDRESS names, and wait until they serve.

        There they are known by this machine's name and the `port` that is listened to: other servers' replicas are left
        alone, and those of a server that was here before, and could not end its own, are replaced.
        """
        started: Future[None] = Future()

        def run() -> None:
            try:
                self._start(settings, locations, port)
            except BaseException as error:
                started.set_exception(error)
            else:
                started.set_result(None)
            # Linux ends Ray's processes with the thread that started them: this one lives as long as the process.
            threading.Event().wait()

        threading.Thread(target=run, name="ray", daemon=True).start()
        started.result()

    def end(self) -> None:
        """End them where they would outlive this process: on a cluster."""
        if self._on_cluster is None:
            return

        def run() -> None:
            with contextlib.suppress(Exception):
                serve.delete(self._on_cluster)

        # Not waited for, it would not even be asked for: this process ends next.
        ending = threading.Thread(target=run, name="ray", daemon=True)
        ending.start()
        ending.join(END_SECONDS)

    def _start(self, settings: Settings, locations: Sequence[str], port: int) -> None:
        for name in ("ray", "ray.serve"):
            logging.getLogger(name).setLevel(logging.ERROR)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Else Ray's workers give way to everything else on the machine.
        os.environ.setdefault("RAY_worker_niceness", "0")
        here: dict[str, Any] = {}
        name = APPLICATION
        if "RAY_ADDRESS" in os.environ:
            name = self._on_cluster = f"{APPLICATION}-{socket.gethostname()}-{port}"
        else:
            # Replicas share the cores that there are, however many are asked for.
            most = (settings.max_replicas or settings.replicas) * threads_of(settings)
            cores = max(os.cpu_count() or 1, most)
            here = {"include_dashboard": False, "num_cpus": cores, "object_store_memory": STORE_BYTES} | LOOPBACK
        try:
            # Its lines are none of JSON; they lie in its own logs.
            ray.init(configure_logging=False, log_to_driver=settings.log_format == "text", **here)
            serve.start(http_options={"location": "NoServer"}, logging_config=QUIET)
            handle = serve.run(replicas_of(settings, locations), name=name, route_prefix=None)
        except Exception as error:
            # Ray has no exception of its own for most of what may keep it from starting.
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            hint = "its logs lie in /tmp/ray/session_latest/logs; on a busy machine it may be given up too soon"
            raise SettingsError(f"Ray Serve did not start the replicas ({why})", hint=hint) from error
        self._take(handle)

    def _take(self, handle: Any) -> None:
        """Be ready to ask: what a handle sets up when it is first used takes a while."""
        self._handle, self._asking = handle, handle.options(method_name="answer", stream=True)

    async def ask(self, request: Passed, replica: str | None) -> AsyncGenerator[list[Message], None]:
        """As `Replicas.ask`."""
        response = self._asking.remote(request, replica)
        try:
            async for batch in response:
                yield batch
        except (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError):
            message = "the process that computed the answer is gone, and its streams with it"
            raise ReplicaLost(message, hint="send the request again: another one answers") from None
        finally:
            response.cancel()

    async def metrics(self, seconds: float) -> dict[str, str]:
        """As `Replicas.metrics`."""
        broadcast = self._handle.broadcast("metrics")
        try:
            found = await broadcast.results_async(timeout_s=seconds, return_exceptions=True)
        except TimeoutError:
            return {}
        return dict(each for each in found if not isinstance(each, BaseException))


class RayReplica:
    """What Ray Serve runs as often as there are to be replicas."""

    def __init__(self, settings: Settings, locations: Sequence[str]) -> None:
        set_up(settings.log_format, access=False, texts=settings.log_texts)
        models = Models(settings)
        self._name = models.replica = str(serve.get_replica_context().replica_id.unique_id)
        load(models, locations)
        set_aside()
        self._replica = Replica(models)

    def check_health(self) -> None:
        """Raise where only a new process can help, which Ray Serve then starts."""
        self._replica.check()

    async def metrics(self) -> tuple[str, str]:
        """The replica's name and what it counts."""
        return self._name, self._replica.metrics()

    async def answer(self, request: Passed, replica: str | None) -> AsyncGenerator[list[Message], None]:
        """As `Replica.answer`; the router has read for which `replica` it is."""
        async with contextlib.aclosing(self._replica.answer(request)) as batches:
            async for batch in batches:
                yield batch


class RayFront:
    """What stands before the replicas where Ray Serve's own proxies listen."""

    def __init__(self, settings: Settings, handle: Any) -> None:
        set_up(settings.log_format, access=settings.access_log, texts=settings.log_texts)
        models = Models(settings)
        app = create_api(models, settings)
        stand_before(RayReplicas(handle), app, models)
        self._app: ASGIApp = _Unnamed(app)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """As Ray Serve asks for."""
        return self._app


class _Unnamed:
    """Leaves out of answers the request's name where Ray Serve's proxies, which pass it on, say it as well."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        given = dict(scope.get("headers", ())).get(b"x-request-id")

        async def unnamed(message: Message) -> None:
            if message["type"] == "http.response.start":
                name = (b"x-request-id", given)
                kept = [each for each in message["headers"] if (each[0].lower(), each[1]) != name]
                message = {**message, "headers": kept}
            await send(message)

        await self._app(scope, receive, unnamed)


class HolderFirst(RequestRouter):  # type: ignore[misc]
    """Of two replicas at random the one with fewer requests, but for what one replica alone can answer."""

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """As Ray Serve asks for."""
        wanted = None
        if pending_request is not None:
            # Where none of them takes it, it is tried again, later each time.
            pending_request.routing_context.should_backoff = True
            wanted = pending_request.args[1] if len(pending_request.args) == 2 else None
        holders = [each for each in candidate_replicas if wanted and each.replica_id.unique_id == wanted]
        return [holders or random.sample(candidate_replicas, min(2, len(candidate_replicas)))]


def threads_of(settings: Settings) -> int:
    """The CPU threads of a replica: those of the settings, or its part of this machine's cores."""
    return settings.threads or max(1, (os.cpu_count() or 1) // (settings.max_replicas or settings.replicas))


def replicas_of(settings: Settings, locations: Sequence[str]) -> Any:
    """The replicas as an application of Ray Serve, without a front."""
    number: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.max_replicas is not None:
        number = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=settings.replicas,
                max_replicas=settings.max_replicas,
                # What runs, and what waits in a replica's own queue.
                target_ongoing_requests=settings.requests_per_replica,
                downscale_delay_s=settings.replica_seconds,
            )
        }
    threads = threads_of(settings)
    made = serve.deployment(
        RayReplica,
        name="replicas",
        # Each replica bounds what waits itself, by requests, tokens and time, and refuses with an honest Retry-After.
        max_ongoing_requests=settings.max_connections,
        ray_actor_options={"num_cpus": threads},
        # A replica that is not needed any more ends what it has begun.
        graceful_shutdown_timeout_s=settings.drain_seconds + 5 if settings.max_replicas is None else LONGEST_SECONDS,
        health_check_period_s=CHECK_SECONDS,
        logging_config=QUIET,
        request_router_config=RequestRouterConfig(request_router_class=HolderFirst),
        **number,
    )
    return made.bind(for_replicas(settings, threads), list(locations))


def application(settings: Settings, locations: Sequence[str]) -> Any:
    """Front and replicas as an application that Ray Serve's own proxies stand before."""
    front = serve.deployment(
        serve.ingress()(RayFront),
        name="front",
        max_ongoing_requests=settings.max_connections,
        ray_actor_options={"num_cpus": 0},
        logging_config=QUIET,
    )
    return front.bind(settings, replicas_of(settings, locations))
