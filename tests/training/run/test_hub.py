"""The best checkpoint is pushed to a hub, here a small one that speaks its HTTP."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from tests.hub import TOKEN, Hub, running_hub
from topkapi.model.storage.checkpoint import load_checkpoint
from topkapi.service.commands.cli import main


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that takes every file as a small one, within the commit."""
    with running_hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def pretrain(tmp_path: Path, english: str) -> Iterator[Callable[..., tuple[int, Path]]]:
    source, out = tmp_path / "source.txt", tmp_path / "run"
    source.write_text(english[:20_000], encoding="utf-8")
    flags = "--hidden-size 32 --intermediate-size 64 --num-layers 1 --num-heads 2 --num-kv-heads 1 --head-dim 16"
    flags += " --context-length 32 --vocab-size 300 --threads 1 --batch-size 4 --sample-every never --max-steps 4"
    data = ["--data", str(source), "--out", str(out), "--cache", str(tmp_path / "cache"), *flags.split()]
    before = torch.get_num_threads()
    yield lambda *more: (main(["pretrain", *data, *more]), out)
    torch.set_num_threads(before)


def said(out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Everything that was printed and written, which the token is no part of."""
    printed = "".join(capsys.readouterr())
    written = [path.read_text("utf-8", errors="replace") for path in out.rglob("*") if path.is_file()]
    assert TOKEN not in "".join([printed, *written])
    return printed


def test_the_best_checkpoint_is_pushed_whole(
    hub: Hub, pretrain: Callable[..., tuple[int, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = pretrain("--push", "model")
    printed = said(out, capsys)
    assert code == 0, printed
    assert "without a card" not in printed
    assert f"pushed to: {hub.url}/somebody/model" in printed
    (made,) = hub.made
    # Earlier releases of the library say it in the other way.
    assert made["name"] == "model" and (made.get("visibility") == "private" or made.get("private") is True)
    assert hub.tokens == {f"Bearer {TOKEN}"}
    pushed = tmp_path / "pushed"
    pushed.mkdir()
    for name, content in hub.files.items():
        (pushed / name).write_bytes(content)
    readme = hub.files.pop("README.md").decode()
    assert {path.name: path.read_bytes() for path in (out / "best").iterdir()} == hub.files
    (result,) = [each for each in ModelCard(readme).data.eval_results if each.metric_type == "perplexity"]
    loss = load_checkpoint(out / "best").details["validation_loss"]
    assert result.metric_value == pytest.approx(math.exp(loss), abs=1e-3)
    assert load_checkpoint(pushed).details["step"] == load_checkpoint(out / "best").details["step"]


@pytest.mark.parametrize("refusal", [403, 404])
def test_a_hub_that_refuses_costs_nothing_of_the_run(
    refusal: int, hub: Hub, pretrain: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refusal = refusal
    code, out = pretrain("--push", "somebody/model")
    printed = said(out, capsys)
    assert code == 2
    assert "error: the checkpoint was not pushed to somebody/model: " in printed and "Traceback" not in printed
    assert f"the run is complete; try again with: hf upload somebody/model {out / 'best'}" in printed
    assert load_checkpoint(out / "best").details["step"] == 4 and (out / "report.md").is_file()


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("a/b/c", TOKEN, "'a/b/c' cannot be the name of a repository"),
        ("somebody/model", None, "pushing needs a token of the Hugging Face hub"),
    ],
)
def test_a_push_that_can_only_fail_is_refused_before_the_run(
    name: str,
    token: str | None,
    message: str,
    hub: Hub,
    pretrain: Callable[..., tuple[int, Path]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if token is None:
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    code, out = pretrain("--push", name)
    assert code == 2 and not out.exists() and not hub.made
    assert f"error: {message}" in said(out, capsys)


def test_checkpoints_are_pushed_as_the_run_goes_each_as_a_revision(
    hub: Hub, pretrain: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    """With a card that fills as it goes; what is pruned here meanwhile stays there."""
    code, out = pretrain("--push", "model", "--push-every", "2", "--evaluate-every", "1", "--save-every", "4")
    printed = said(out, capsys)
    assert code == 0, printed
    assert set(hub.tags) == {"step-2", "step-4"}
    assert f"pushed step 2 to: {hub.url}/somebody/model/tree/step-2" in printed
    for step in (2, 4):
        files = hub.pushes[int(hub.tags[f"step-{step}"]) - 1]
        assert json.loads(files["topkapi.json"])["step"] == step
        course = files["README.md"].decode().partition("## The run so far")[2]
        assert [line.split(" |")[0] for line in course.splitlines()[4:]] == [f"| {at}" for at in range(step + 1)]
    # The best one is pushed at the end, with the card that this run wrote.
    assert "## The run so far" in hub.files["README.md"].decode()
    assert not (out / ".pushing").exists()


def test_a_push_on_the_way_that_fails_costs_nothing_and_a_card_that_is_there_stays(
    hub: Hub, pretrain: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refusal = 403
    code, out = pretrain("--push", "somebody/model", "--push-every", "2")
    assert code == 2 and (out / "report.md").is_file()
    assert "the checkpoint of step 2 was not pushed to somebody/model" in said(out, capsys)
    hub.refusal, hub.files["README.md"] = None, b"mine"
    code, out = pretrain("--push", "somebody/model", "--push-every", "2", "--overwrite")
    assert code == 0 and hub.files["README.md"] == b"mine" and set(hub.tags) == {"step-2", "step-4"}
    assert pretrain("--push-every", "2", "--overwrite")[0] == 2
    assert "--push-every does nothing without --push" in capsys.readouterr().err
