"""The chat of TGI's own client, `text-generation`, against OpenAI's route: whole, as a stream, and with tools."""

import asyncio
from collections.abc import Callable

import openai
import pytest
from huggingface_hub import InferenceClient
from text_generation import AsyncClient, Client
from text_generation.errors import BadRequestError
from text_generation.types import Tool

from tests.service.api.openai.openai_cases import USER, WEATHER
from tests.service.api.openai.test_chat import with_tools

__all__ = ["with_tools"]

SETTINGS = {"max_tokens": 9, "seed": 1, "temperature": 0.8}


@pytest.fixture(scope="module")
def client(served) -> Client:
    return Client(served.url, timeout=60)


def test_a_chat_needs_no_alias(served, client) -> None:
    answer = client.chat(USER, n=2, **SETTINGS)
    own = served.answer("/v1/chat/completions", messages=USER, n=2, **SETTINGS)
    assert [choice.message.content for choice in answer.choices] == [
        choice["message"]["content"] for choice in own["choices"]
    ]
    assert answer.model == "chat" and answer.usage["completion_tokens"] <= 18
    assert asyncio.run(AsyncClient(served.url).chat(USER, **SETTINGS)).choices[0].finish_reason
    with pytest.raises(BadRequestError, match="temperature"):
        client.chat(USER, temperature=-1.0)


def test_a_streamed_chat_is_the_whole_one(served, client) -> None:
    whole = client.chat(USER, **SETTINGS).choices[0]
    chunks = [chunk.choices[0] for chunk in client.chat(USER, stream=True, logprobs=True, **SETTINGS)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == whole.message.content
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == [whole.finish_reason]

    async def streamed() -> str:
        stream = await AsyncClient(served.url).chat(USER, stream=True, **SETTINGS)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(streamed()) == whole.message.content


def test_a_streamed_call(with_tools) -> None:
    client = Client(with_tools.url, timeout=60)
    chunks = client.chat(USER, tools=[Tool(**WEATHER)], tool_choice="required", max_tokens=120, seed=4, stream=True)
    calls = [call for chunk in chunks if (call := chunk.choices[0].delta.tool_calls)]
    assert calls[0].function.name == "weather" and {call.id for call in calls} == {calls[0].id}
    assert '"city"' in "".join(call.function.arguments for call in calls)


def test_other_clients_may_say_tgi_too(served) -> None:
    """As TGI's documentation has it; their streams stay OpenAI's."""
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(model="tgi", messages=USER, stream=True, max_tokens=3)
        roles = [chunk.choices[0].delta.role for chunk in stream]
        assert roles[0] == "assistant" and set(roles[1:]) == {None}
        assert client.completions.create(model="tgi", prompt="a", max_tokens=1).model == "chat"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="other", messages=USER)
    hub = InferenceClient(base_url=served.url)
    parts = hub.chat_completion(USER, stream=True, max_tokens=3)
    assert len([part.choices[0].delta.content for part in parts]) > 1


def test_a_checkpoint_of_that_name_is_meant(serve: Callable, tiny_checkpoint: Callable) -> None:
    with serve(tiny_checkpoint("chat"), tiny_checkpoint("tgi", seed=3)) as both:
        assert Client(both.url, timeout=60).chat(USER, max_tokens=2).model == "tgi"
