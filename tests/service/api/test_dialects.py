"""The seam between dialects: whose errors, which body on a shared path, and what a lenient server leaves out."""

from typing import Annotated, Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from fastapi.responses import JSONResponse, Response
from starlette.testclient import TestClient

from topkapi.model.decoding.aliases import BY_ALIAS, translated
from topkapi.model.decoding.parameters import BY_NAME, PARAMETERS, resolve
from topkapi.model.errors import EngineError, InvalidRequest, Overloaded
from topkapi.service.api.http.body import JSONRoute, Strict
from topkapi.service.api.http.dialect import Dialect
from topkapi.service.api.http.errors import NATIVE, InapplicableField, field_name, location_of
from topkapi.service.api.http.middleware import BodyLimit
from topkapi.service.api.http.registration import register, set_up

OTHER = Dialect(
    "other", lambda error: (418, {"oops": error.message}), prefixes=("/other/",), fields={"/shared": ("words",)}
)


class One(Strict):
    text: str


class Nested(Strict):
    depth: int = 0


class Two(Strict):
    words: list[str]
    nested: list[Nested] | None = None
    shape: Annotated[str | None, "can't act"] = None


def application(*, lenient: bool) -> TestClient:
    app = FastAPI()
    set_up(app, ignore_unknown_fields=lenient)
    first, second = APIRouter(route_class=JSONRoute), APIRouter(route_class=JSONRoute)

    @first.post("/shared", summary="One")
    async def one(body: One) -> Response:
        return JSONResponse({"one": body.text})

    @second.post("/shared", summary="Two", responses={429: {"description": "busy"}})
    async def two(body: Two) -> Response:
        if body.shape is not None:
            raise InapplicableField("shape can't act", field="shape")
        return JSONResponse({"two": body.words})

    @second.post("/fails/{how}")
    async def fails(how: str) -> Response:
        raise {"busy": Overloaded("full", retry_after=7), "engine": EngineError("broke")}.get(
            how
        ) or ZeroDivisionError()

    register(app, NATIVE, first)
    register(app, OTHER, second)
    app.add_middleware(BodyLimit, limit=1000)
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def strict() -> TestClient:
    return application(lenient=False)


@pytest.fixture(scope="module")
def lenient() -> TestClient:
    return application(lenient=True)


def is_others(response: httpx.Response, words: str) -> bool:
    return response.status_code == 418 and words in response.json()["oops"]


def test_a_field_says_whose_body_it_is_on_a_shared_path(strict) -> None:
    assert strict.post("/shared", json={"text": "a"}).json() == {"one": "a"}
    assert strict.post("/shared", json={"words": ["a"]}).json() == {"two": ["a"]}
    assert strict.post("/shared", json={}).json()["error"]["field"] == "text"
    assert is_others(strict.post("/shared", json={"words": 5}), "words: must be a list")
    assert is_others(strict.post("/shared", json={"words": [], "text": "a"}), "unknown field text")


def test_whatever_goes_wrong_is_told_in_the_dialect_of_the_path(strict) -> None:
    assert is_others(strict.post("/other/nothing", json={}), "no route POST /other/nothing")
    assert is_others(strict.get("/fails/engine"), "does not answer GET")
    assert is_others(strict.post("/fails/engine"), "broke")
    assert is_others(strict.post("/fails/defect"), "unexpected")
    assert is_others(strict.post("/fails/x", content=b"a" * 2000), "1,000 bytes")
    busy = strict.post("/fails/busy")
    assert is_others(busy, "full") and busy.headers["retry-after"] == "7"
    assert strict.get("/nothing").json()["error"]["type"] == "not_found"
    assert strict.get("/shared").json()["error"]["hint"] == "use POST"
    assert strict.post("/shared", content=b"a" * 2000).json()["error"]["type"] == "body_too_large"


def test_a_lenient_server_leaves_out_and_says_what(lenient) -> None:
    body: dict[str, Any] = {"words": ["a"], "shape": "b", "mood": 1, "ñ o": 2, "nested": [{"depth": 1}, {"x": 2}]}
    response = lenient.post("/shared", json=body)
    assert response.json() == {"two": ["a"]}
    ignored = response.headers["x-ignored-parameters"].split(", ")
    assert sorted(ignored) == ["%C3%B1%20o", "mood", "nested[1].x", "shape"]
    assert "x-ignored-parameters" not in lenient.post("/shared", json={"text": "a"}).headers
    assert is_others(lenient.post("/shared", json={"words": 5, "mood": 1}), "must be a list")


def test_a_strict_server_refuses_the_same_by_name(strict) -> None:
    assert is_others(strict.post("/shared", json={"words": ["a"], "mood": 1}), "unknown field mood")
    assert is_others(strict.post("/shared", json={"words": ["a"], "shape": "b"}), "shape can't act")


def test_a_place_in_a_body_can_be_written_and_read() -> None:
    for location in (["a"], ["a", 0, "b"], ["messages", 12, "content", 3, "text"]):
        assert location_of(field_name(location)) == location


def test_the_description_of_a_shared_path_covers_every_dialect(strict) -> None:
    document = strict.get("/openapi.json").json()
    assert set(document["paths"]) == {"/shared", "/fails/{how}"}
    operation = document["paths"]["/shared"]["post"]
    bodies = operation["requestBody"]["content"]["application/json"]["schema"]["anyOf"]
    assert [each["$ref"].rsplit("/")[-1] for each in bodies] == ["One", "Two"]
    assert {"200", "429"} <= set(operation["responses"])


def test_an_alias_belongs_to_one_parameter_and_is_none_itself() -> None:
    aliases = [alias for parameter in PARAMETERS for alias in parameter.aliases]
    assert len(aliases) == len(set(aliases)) and not set(aliases) & BY_NAME.keys()
    for alias, name in BY_ALIAS.items():
        with translated({alias: 1, "temperature": None}) as parameters:
            assert parameters == {name: 1}


def test_an_error_speaks_the_name_that_was_given() -> None:
    with pytest.raises(InvalidRequest) as refused, translated({"max_completion_tokens": -1}) as parameters:
        resolve(parameters)
    assert refused.value.field == "max_completion_tokens"
    assert refused.value.message.startswith("max_completion_tokens must be at least 0")
    with (
        pytest.raises(InvalidRequest, match="two names of one parameter"),
        translated({"max_tokens": 1, "n_predict": 1}),
    ):
        pass


LONG = "hello " * 300
CONVERSATION = [{"role": "user", "content": LONG}]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "path,body",
    [
        ("/generate", {"prompt": LONG}),
        ("/generate", {"inputs": LONG}),
        ("/generate", {"text": LONG}),
        ("/v1/completions", {"prompt": LONG}),
        ("/v1/chat/completions", {"messages": CONVERSATION}),
        ("/chat/completions", {"messages": CONVERSATION}),
        ("/v1/responses", {"input": LONG}),
        ("/v1/messages", {"messages": CONVERSATION, "max_tokens": 5, "model": "chat"}),
        ("/completion", {"prompt": LONG}),
    ],
)
def test_no_stream_begins_for_what_is_refused(served, path: str, body: dict[str, Any], stream: bool) -> None:
    """A status and JSON, not an event in a stream that seemed to succeed (ggml-org/llama.cpp#14566)."""
    response = served.post(path, **body, stream=stream)
    assert response.status_code in (400, 422), response.text
    assert response.headers["content-type"] == "application/json" and "128" in response.text
