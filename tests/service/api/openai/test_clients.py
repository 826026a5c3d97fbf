"""The clients people have, unchanged, against a real server: openai, LangChain, LiteLLM, and npm's openai."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
import torch
from openai.types.chat import ChatCompletionChunk
from pydantic import BaseModel

from tests.service.api.openai.openai_cases import TOOL_TEMPLATE, USER, WEATHER
from tests.tiny import run_by
from topkapi.model.conversation.chat_template import ChatTemplate
from topkapi.model.storage.checkpoint import load_checkpoint, save_checkpoint

README = Path(__file__).resolve().parents[4] / "README.md"
LONG = [{"role": "user", "content": "hello " * 2500}]
ENDLESS = {"extra_body": {"ignore_eos": True}}


class Weather(BaseModel):
    """The weather of a city."""

    days: int


@pytest.fixture(scope="module")
def server(serve: Callable, tiny_checkpoint: Callable[..., Path], tmp_path_factory) -> Iterator:
    """A server of one checkpoint that takes tools, with room for long answers."""
    tiny = load_checkpoint(tiny_checkpoint("plain", context=2048))
    path = save_checkpoint(
        tmp_path_factory.mktemp("clients") / "tiny",
        model=tiny.model,
        tokenizer=tiny.tokenizer,
        chat=ChatTemplate(TOOL_TEMPLATE),
        generation={},
        details={"note": "random weights"},
    )
    with serve(path) as served:
        yield served


@pytest.fixture
def client(server) -> Iterator[openai.OpenAI]:
    """OpenAI's own client."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def broken(server, monkeypatch) -> Callable[[], None]:
    """Breaks the network when called, in the middle of a stream say; mended afterwards."""

    def fail(works: object) -> torch.Tensor:
        raise RuntimeError("out of luck")

    network = server.models.get().engine.network
    # Or its stream would be over sooner.
    run_by(monkeypatch, network, network.run)
    return lambda: run_by(monkeypatch, network, fail)


def test_the_openai_client(client) -> None:
    answer = client.completions.create(model="tiny", prompt="Once", max_tokens=5, seed=1, logprobs=2, echo=True)
    assert answer.choices[0].text.startswith("Once") and answer.usage.completion_tokens == 5
    assert len(answer.choices[0].logprobs.tokens) == answer.usage.total_tokens
    chat = client.chat.completions.create(model="tiny", messages=USER, max_completion_tokens=5, n=2, seed=1)
    assert [choice.index for choice in chat.choices] == [0, 1] and chat.choices[0].finish_reason == "length"
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "topkapi"
    vectors = client.embeddings.create(model="tiny", input=["a", "b"])
    assert len(vectors.data) == 2 and len(vectors.data[0].embedding) == 32
    response = client.responses.create(
        model="tiny", input="hi", max_output_tokens=5, instructions="Be brief.", **ENDLESS
    )
    assert response.status == "incomplete" and response.output_text == response.output[0].content[0].text


def test_the_openai_clients_streams(client) -> None:
    whole = client.chat.completions.create(model="tiny", messages=USER, max_tokens=9, seed=1, **ENDLESS)
    stream = client.chat.completions.create(
        model="tiny",
        messages=USER,
        max_tokens=9,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
        **ENDLESS,
    )
    *chunks, last = stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert last.usage.completion_tokens == 9 and not last.choices
    parts = client.completions.create(model="tiny", prompt="Once", max_tokens=9, seed=1, stream=True, **ENDLESS)
    text = client.completions.create(model="tiny", prompt="Once", max_tokens=9, seed=1, **ENDLESS).choices[0].text
    assert "".join(part.choices[0].text for part in parts) == text
    with client.responses.stream(model="tiny", input="hi", max_output_tokens=5, **ENDLESS) as events:
        kinds = [event.type for event in events]
    assert kinds[0] == "response.created" and kinds[-1] == "response.incomplete"


def test_the_openai_clients_structured_answers_and_tools(client) -> None:
    parsed = client.chat.completions.parse(model="tiny", messages=USER, response_format=Weather, seed=1, max_tokens=200)
    assert isinstance(parsed.choices[0].message.parsed, Weather)
    answer = client.responses.parse(model="tiny", input="hi", text_format=Weather, max_output_tokens=200)
    assert isinstance(answer.output_parsed, Weather)
    called = client.chat.completions.create(
        model="tiny", messages=USER, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, seed=2
    )
    (call,) = called.choices[0].message.tool_calls
    assert json.loads(call.function.arguments).keys() == {"city", "days"}
    with client.chat.completions.stream(
        model="tiny", messages=USER, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, seed=2
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.arguments == call.function.arguments


def test_the_openai_client_understands_what_is_wrong(client) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=USER, temperature=-1)
    assert refused.value.param == "temperature" and "at least 0" in refused.value.message
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-5", messages=USER)
    assert unknown.value.code == "model_not_found" and "tiny" in unknown.value.message
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="tiny", messages=LONG)
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError, match="fill no gaps"):
        client.completions.create(model="tiny", prompt="a", suffix="b")


@pytest.mark.one_process("breaks the network")
def test_an_error_in_mid_stream_reaches_the_openai_client(client, server, broken) -> None:
    stream = client.chat.completions.create(model="tiny", messages=USER, stream=True, **ENDLESS)
    seen: list[ChatCompletionChunk] = []
    with pytest.raises(openai.APIError, match="out of luck") as failed:
        for chunk in stream:
            seen.append(chunk)
            if len(seen) == 3:
                broken()
    assert len(seen) >= 3 and failed.value.type == "server_error"
    server.wait_until_idle()


@pytest.mark.one_process("breaks the network")
def test_a_response_that_fails_in_mid_stream_says_so(client, server, broken) -> None:
    events = []
    for event in client.responses.create(model="tiny", input="hi", stream=True, **ENDLESS):
        events.append(event)
        if len(events) == 6:
            broken()
    assert events[-1].type == "response.failed" and "out of luck" in events[-1].response.error.message
    assert [event.sequence_number for event in events] == list(range(len(events)))


@pytest.mark.one_process("has the engine end in the middle of an answer")
def test_an_answer_that_the_server_breaks_off_is_not_passed_off_as_whole(serve, tiny_checkpoint) -> None:
    with (
        serve(tiny_checkpoint("going", context=2048)) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client,
    ):
        stream = client.completions.create(model="going", prompt="a", max_tokens=2000, stream=True, **ENDLESS)
        with pytest.raises(openai.APIError, match="the server is stopping"):
            for number, _ in enumerate(stream):
                if number == 3:
                    served.models.close()


def test_a_stream_that_is_left_frees_the_engine(client, server) -> None:
    stream = client.completions.create(model="tiny", prompt="a", max_tokens=2000, stream=True, **ENDLESS)
    next(iter(stream))
    stream.close()
    server.wait_until_idle()


def test_the_async_openai_client(server) -> None:
    async def work() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            create = client.chat.completions.create
            body = {"model": "tiny", "messages": USER, "max_tokens": 9}
            answers = await asyncio.gather(*(create(seed=seed, **body) for seed in (1, 2, 1)))
            texts = [answer.choices[0].message.content for answer in answers]
            assert texts[0] == texts[2] != texts[1]
            stream = await create(seed=1, stream=True, **body)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            assert "".join(pieces) == texts[0]
            slow = asyncio.create_task(create(model="tiny", messages=USER, **ENDLESS))
            while not server.running:
                await asyncio.sleep(0.01)
            slow.cancel()
            with pytest.raises(asyncio.CancelledError):
                await slow

    asyncio.run(work())
    server.wait_until_idle()


def test_the_readmes_example(server) -> None:
    (example,) = re.findall(r"^```python\n(from openai .*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    script = example.replace("http://127.0.0.1:8000", server.url).replace("topkapi-chat", "tiny")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_langchain(server) -> None:
    from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

    at = {"base_url": f"{server.url}/v1", "api_key": "none", "model": "tiny", "seed": 1, "max_retries": 0}
    chat = ChatOpenAI(max_completion_tokens=6, **at)
    answer = chat.invoke("hi")
    assert answer.usage_metadata["output_tokens"] == 6
    assert "".join(chunk.content for chunk in chat.stream("hi")) == answer.content
    structured = ChatOpenAI(max_completion_tokens=200, **at).with_structured_output(Weather)
    assert isinstance(structured.invoke("hi"), Weather)
    tools = ChatOpenAI(max_completion_tokens=200, **at).bind_tools([Weather], tool_choice="Weather")
    (call,) = tools.invoke("hi").tool_calls
    assert call["name"] == "Weather" and isinstance(call["args"]["days"], int)
    assert OpenAI(max_tokens=3, **at).invoke("Once")
    vectors = OpenAIEmbeddings(
        base_url=at["base_url"], api_key="none", model="tiny", check_embedding_ctx_length=False
    ).embed_documents(["a", "b"])
    assert len(vectors) == 2 and vectors[0] != vectors[1]


@pytest.mark.slow
def test_litellm(server, monkeypatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    at = {"model": "openai/tiny", "api_base": f"{server.url}/v1", "api_key": "none", "num_retries": 0}
    answer = litellm.completion(messages=USER, max_tokens=6, seed=1, **at)
    assert answer.usage.completion_tokens == 6
    stream = litellm.completion(messages=USER, max_tokens=6, seed=1, stream=True, **at)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == answer.choices[0].message.content
    with pytest.raises(litellm.BadRequestError, match="at least 0"):
        litellm.completion(messages=USER, temperature=-1, **at)
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=LONG, **at)
    assert len(litellm.embedding(input=["a"], encoding_format="float", **at).data) == 1


SCRIPT = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "hi" }];
const ask = { model: "tiny", messages, max_tokens: 9, seed: 1 };
const whole = await client.chat.completions.create(ask);
let text = "";
for await (const chunk of await client.chat.completions.create({ ...ask, stream: true }))
  text += chunk.choices[0].delta.content ?? "";
let refused;
try { await client.chat.completions.create({ ...ask, temperature: -1 }); }
catch (error) { refused = [error.status, error.param]; }
const vectors = await client.embeddings.create({ model: "tiny", input: "hi" });
const response = await client.responses.create({ model: "tiny", input: "hi", max_output_tokens: 3 });
const left = await client.chat.completions.create({ ...ask, max_tokens: 2000, stream: true });
for await (const chunk of left) break;
console.log(JSON.stringify({
  same: text === whole.choices[0].message.content, refused, width: vectors.data[0].embedding.length,
  status: response.status, models: (await client.models.list()).data.length,
}));
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="needs node and npm")
def test_npms_openai_client(server, tmp_path) -> None:
    (tmp_path / "package.json").write_text('{"type": "module"}')
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund", "openai@6"]
    installed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    if installed.returncode:
        pytest.skip(f"npm's openai can't be had here: {installed.stderr[-200:]}")
    (tmp_path / "use.mjs").write_text(SCRIPT)
    command = ["node", "use.mjs", server.url]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, env=os.environ)
    assert done.returncode == 0, done.stderr
    told = {"same": True, "refused": [400, "temperature"], "width": 32, "status": "incomplete", "models": 1}
    assert json.loads(done.stdout) == told
    server.wait_until_idle()
