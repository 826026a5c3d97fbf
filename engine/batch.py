"""Many jobs at once for who waits for all of them: the engine's steps without its thread and its queue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice

from topkapi.engine.engine import Engine
from topkapi.engine.request import Event, Failed, Finished, GenerateJob, Token
from topkapi.engine.steps import DecoderNetwork
from topkapi.model.decoding.stopping import check_prompt, token_limit
from topkapi.model.errors import InvalidRequest, TopkapiError
from topkapi.model.generation import GenerationResult
from topkapi.model.transformer import Decoder


def run_batch(
    model: Decoder,
    jobs: Sequence[GenerateJob],
    *,
    together: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[GenerationResult]:
    """The answer to each job, up to `together` of them at a time: as `generate` would give it, several times as fast.

    `progress(jobs done, jobs)` is called as answers end. Raises `InvalidRequest` for a job that could never run or that
    wants several answers, and what a job failed by.
    """
    for job in jobs:
        check_prompt(job.prompt, model.config)
        if job.parameters.n != 1:
            raise InvalidRequest("each job of a batch has one answer", field="n", hint="give the job several times")
    limits = [token_limit(len(job.prompt), job.parameters, model.config) for job in jobs]
    longest = max((len(job.prompt) + max(1, limit) for job, limit in zip(jobs, limits, strict=True)), default=1)
    network = DecoderNetwork(model, min(together, max(1, len(jobs))), longest)
    engine = Engine(model, name="batch", max_running=network.slots, network=network)
    tokens: list[list[int]] = [[] for _ in jobs]
    results: dict[int, GenerationResult] = {}
    failures: list[TopkapiError] = []

    def receive(number: int, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Failed):
                failures.append(event.error)
            if isinstance(event, Token):
                tokens[number].append(event.token_id)
            if isinstance(event, Finished):
                assert event.reason in ("stop", "length", "deadline"), "nobody cancels, and what fails is raised"
                results[number] = GenerationResult(tokens[number], event.reason, event.stop_reason)

    waiting = iter(enumerate(jobs))
    done = 0
    while len(results) < len(jobs):
        # As many as can run, and one that takes the first slot to be free.
        for number, job in islice(waiting, max(0, network.slots + 1 - engine.running - engine.waiting)):
            engine.submit(job, partial(receive, number))
        engine.step()
        if failures:
            raise failures[0]
        if progress is not None and len(results) > done:
            progress(len(results), len(jobs))
        done = len(results)
    return [results[number] for number in range(len(jobs))]
