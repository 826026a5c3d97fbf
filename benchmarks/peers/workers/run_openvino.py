"""OpenVINO GenAI's continuous batching: `run_openvino.py DIRECTORY`."""

from __future__ import annotations

import sys
import time

import numpy
import openvino
import openvino_genai
from protocol import Generate, drive


def load() -> Generate:
    """Its defaults decide precision, cache and scheduling, for they are chosen by processor."""
    pipeline = openvino_genai.ContinuousBatchingPipeline(sys.argv[1], openvino_genai.SchedulerConfig(), "CPU")
    counter = iter(range(10**9))

    def generate(prompts: list[list[int]], tokens: int) -> list[list[float]]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = tokens, True, False
        began = time.perf_counter()
        handles = [
            pipeline.add_request(next(counter), openvino.Tensor(numpy.array([prompt], numpy.int64)), config)
            for prompt in prompts
        ]
        times: list[list[float]] = [[] for _ in prompts]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            now = time.perf_counter() - began
            for handle, mine in zip(handles, times, strict=True):
                while handle.can_read():
                    for output in handle.read().values():
                        mine.extend([now] * len(output.generated_ids))
        return times

    return generate


if __name__ == "__main__":
    drive(f"OpenVINO GenAI {openvino_genai.__version__}", load)
