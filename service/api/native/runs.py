"""`/runs`: training runs while they go on and afterwards, read from their directories; nothing is ever changed."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import Query
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from topkapi.service.api.http.describing import errors_of
from topkapi.service.api.http.registration import Routes
from topkapi.service.api.native import schemas
from topkapi.service.models import Models
from topkapi.service.runs import MOST_RUNS, Kind, Page, Runs

CURSOR = r"^[0-9]{1,15}(-[0-9a-f]{8})?$"


class RunSummary(BaseModel):
    """A training run. `state` is running, finished (it wrote its report) or stopped before that.

    Losses are those of the last evaluation, in nats per token, `best_…` those of the checkpoint that the run holds for
    its best; `steps_per_epoch` and `total_steps` are null until they can be told, `updated` is when a file of the run
    was last written, in seconds since 1970.
    """

    name: str
    state: Literal["running", "finished", "stopped"]
    step: int
    total_steps: int | None
    steps_per_epoch: float | None
    tokens: int
    train_loss: float | None
    validation_loss: float | None
    best_step: int | None
    best_validation_loss: float | None
    tokens_per_s: float | None
    updated: int


class RunsResponse(BaseModel):
    """The answer of `GET /runs`: the latest first, of which `left_out` more are not told."""

    runs: list[RunSummary]
    left_out: int


class RunCheckpoint(BaseModel):
    """A checkpoint that a run kept. `path` is what `POST /models` loads it by, null where it lies elsewhere."""

    step: int
    best: bool
    last: bool
    path: str | None


class RunDetails(RunSummary):
    """A training run with its settings (`config.yaml`), the bytes of what it recorded, whether there is a report, and
    the checkpoints it kept."""

    settings: dict[str, Any]
    sizes: dict[str, int]
    report: bool
    checkpoints: list[RunCheckpoint]


class RunRecords(BaseModel):
    """Lines of one of the run's files, whole ones alone. `next` is what to ask for `after` the next time; `more` is
    whether there is more at this moment.

    `restarted` says that the file is not the one that was read before (a run was resumed from an earlier save, or
    replaced): what was read is void, and these records are the first ones. `skipped` lines were no JSON objects.
    """

    records: list[dict[str, Any]]
    next: str
    more: bool
    restarted: bool
    skipped: int


class RecordsQuery(BaseModel):
    """Which records."""

    model_config = ConfigDict(extra="forbid")

    after: Annotated[
        str, Field(pattern=CURSOR, description="The `next` of the answer before; from the beginning without.")
    ] = "0"
    every: Annotated[
        int,
        Field(ge=1, le=1_000_000, description="Of records about one update, only those of steps that it divides."),
    ] = 1


UNKNOWN = errors_of(schemas.ErrorBody, more={
    404: "There is no such run, or it has nothing of the kind",
    422: "The name or a parameter is not valid",
})  # fmt: skip


def add_runs(routes: Routes, models: Models) -> None:
    """The routes over the training runs of the directory that the settings name."""
    runs = Runs(models.settings.runs_directory, models.settings.model_directory)
    get = partial(routes.answering, method="GET", tags=["runs"])

    @get("/runs", "The training runs", RunsResponse, errors={})
    async def list_runs() -> Response:
        return await asyncio.to_thread(_listed, runs)

    @get("/runs/{name}", "A training run", RunDetails, errors=UNKNOWN)
    async def one_run(name: str) -> Response:
        return JSONResponse(await asyncio.to_thread(runs.details, name))

    @get("/runs/{name}/report", "The report of a training run", errors=UNKNOWN,
         stream={"text/markdown": {"schema": {"type": "string"}}}, description="Markdown",
         response_class=Response)  # fmt: skip
    async def report(name: str) -> Response:
        return Response(await asyncio.to_thread(runs.report, name), media_type="text/markdown")

    @get("/runs/{name}/{kind}", "What a training run recorded", RunRecords, errors=UNKNOWN)
    async def records(name: str, kind: Kind, query: Annotated[RecordsQuery, Query()]) -> Response:
        return _page(await asyncio.to_thread(runs.page, name, kind, query.after, query.every))


def _listed(runs: Runs) -> Response:
    names = runs.names()
    summaries = [runs.summary(name) for name in names[:MOST_RUNS]]
    return JSONResponse({"runs": summaries, "left_out": len(names) - len(summaries)})


def _page(page: Page) -> Response:
    """The lines go out as they were checked: written one by one, none keeps other requests waiting."""
    about = f'"next": "{page.next}", "more": {str(page.more).lower()}, "restarted": {str(page.restarted).lower()}'
    body = f'{{"records": [{", ".join(page.records)}], {about}, "skipped": {page.skipped}}}'
    return Response(body.encode(), media_type="application/json")
