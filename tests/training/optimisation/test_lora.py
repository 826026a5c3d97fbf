"""`topkapi finetune --method lora|qlora|dora`: what is served is what was trained, and resumed runs end the same."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.tiny import tiny_model
from tests.training.test_resume import assert_same, content, interrupted
from topkapi.model.storage.checkpoint import load_checkpoint, save_checkpoint
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.service.commands.cli import main
from topkapi.service.locations import default_checkpoints
from topkapi.service.settings import Settings
from topkapi.training.data.instructions import ExampleLoader, encode_conversations, read_conversations
from topkapi.training.optimisation.loss import evaluate

METHODS = ("lora", "qlora", "dora")
FLAGS = [
    "--batch-size",
    "4",
    "--max-steps",
    "6",
    "--evaluate-every",
    "3",
    "--sample-tokens",
    "3",
    "--threads",
    "1",
    "--learning-rate",
    "0.01",
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Files to train and to validate on."""
    folder = tmp_path_factory.mktemp("rows")
    for name, numbers in (("train", range(24)), ("validation", range(24, 32))):
        content = [{"instruction": f"Say {n}.", "input": "", "output": f"It is {n}."} for n in numbers]
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder / "train.json", folder / "validation.json"


def finetune(base: Path, rows: tuple[Path, Path], out: Path, *flags: str) -> Path:
    data = ["--data", str(rows[0]), "--validation-data", str(rows[1])]
    assert main(["finetune", "--checkpoint", str(base), *data, "--out", str(out), *FLAGS, *flags]) == 0
    return out / "best"


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("method", "precision"),
    [
        ("lora", "fp32"),
        ("qlora", "fp32"),
        ("dora", "fp32"),
        pytest.param("qlora", "bf16", marks=pytest.mark.slow),  # without hardware for it
        pytest.param("dora", "bf16", marks=pytest.mark.slow),
    ],
)
def test_the_served_checkpoint_has_the_loss_that_training_measured(
    method: str, precision: str, tiny_checkpoint: Callable[..., Path], rows: tuple[Path, Path], tmp_path: Path
) -> None:
    """With a base in 4 bits too: it is merged into those, not into the weights that they were made of."""
    base = tiny_checkpoint("base")
    best = finetune(base, rows, tmp_path / "run", "--method", method, "--precision", precision)
    settings = json.loads((best / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["use_dora"]) == (16, 32, method == "dora")
    assert not (best / "model.safetensors").exists()
    tuned = load_checkpoint(best, dtype=torch.float32)
    assert tuned.chat is not None
    examples, _ = encode_conversations(
        read_conversations(rows[1], input_heading=False), tuned.tokenizer, tuned.chat, longest=128
    )
    batches = ExampleLoader(examples, batch_size=4, seed=0).first(None)
    measured = records(tmp_path / "run")
    best_loss = min(
        record["validation_loss"] for record in measured if record.get("validation_loss") and record["step"]
    )
    assert best_loss < measured[0]["validation_loss"] - 0.1
    assert evaluate(tuned.model, batches) == pytest.approx(best_loss, rel=1e-5 if precision == "fp32" else 5e-3)
    (state,) = (tmp_path / "run" / "state").glob("step-*")
    with safe_open(state / "tensors.safetensors", framework="pt") as file:
        assert all(".adapter." in name for name in file.keys())  # noqa: SIM118


def test_new_control_tokens_train_beside_the_adapters(
    tiny_checkpoint: Callable[..., Path], rows: tuple[Path, Path], tmp_path: Path
) -> None:
    parent = load_checkpoint(tiny_checkpoint("plain", chat=False))
    bare = Tokenizer.train(["some text to train on, some text to train on"] * 3, 262)
    base = save_checkpoint(tmp_path / "bare", model=parent.model, tokenizer=bare, chat=None, generation={}, details={})
    best = finetune(base, rows, tmp_path / "run", "--method", "lora", "--lora-targets", "q_proj", "v_proj")
    settings = json.loads((best / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["q_proj", "v_proj"]
    assert settings["trainable_token_indices"] == {"embed_tokens": [262, 263]}
    before, after = (
        parent.model.embed_tokens.weight,
        load_checkpoint(best, dtype=torch.float32).model.embed_tokens.weight,
    )
    changed = (before != after).any(dim=1).nonzero().flatten()
    assert changed.tolist() == [262, 263]


def test_merged_it_is_a_checkpoint_of_its_own(
    tiny_checkpoint: Callable[..., Path],
    rows: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = tiny_checkpoint("base")
    best = finetune(base, rows, tmp_path / "run", "--method", "qlora")
    expected = load_checkpoint(best, dtype=torch.float32).model.state_dict()
    base = base.rename(base.with_name("elsewhere"))
    capsys.readouterr()
    assert main(["serve", str(best), "--port", "0"]) == 2
    assert f"hint: give its base: topkapi merge BASE {best}" in capsys.readouterr().err
    assert main(["merge", str(base), str(best), "--out", str(tmp_path / "merged")]) == 0
    found = load_checkpoint(tmp_path / "merged")
    assert all(torch.equal(found.model.state_dict()[name], tensor) for name, tensor in expected.items())
    assert found.chat is not None and found.details["recipe"]["method"] == "qlora"
    assert main(["merge", str(base), str(best), "--out", str(tmp_path / "merged")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["merge", str(best), str(base), "--out", str(tmp_path / "other")]) == 2
    assert "is not an adapter" in capsys.readouterr().err
    assert main(["merge", str(base), str(best), "--out", str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    half = load_checkpoint(tmp_path / "half").model.layers[0].mlp.up_proj.weight
    assert torch.equal(half, expected["layers.0.mlp.up_proj.weight"].bfloat16())


def test_it_is_served_as_it_lies_there(
    serve: Callable, tiny_checkpoint: Callable[..., Path], rows: tuple[Path, Path], tmp_path: Path
) -> None:
    base = tiny_checkpoint("base")
    best = finetune(base, rows, tmp_path / "run", "--method", "lora")
    model = load_checkpoint(best, dtype=torch.float32).model
    with serve(best, base) as served:
        found = served.answer("/score", token_ids=[40, 41, 42, 43], model="run-best")["results"][0]["nll"]
        other = served.answer("/score", token_ids=[40, 41, 42, 43], model="base")["results"][0]["nll"]
    ids = torch.tensor([[40, 41, 42, 43]])
    scores = model(ids, torch.arange(4).unsqueeze(0))[0, :-1].log_softmax(-1)
    assert found == pytest.approx(-scores.gather(1, ids[0, 1:, None]).sum().item(), rel=1e-4) != other
    (tmp_path / "all").mkdir()
    best.resolve().rename(tmp_path / "all" / "tuned")
    assert default_checkpoints(Settings.read(checkpoints=tmp_path / "all")) == [str(tmp_path / "all" / "tuned")]


def test_adapters_on_an_adapted_checkpoint(
    tiny_checkpoint: Callable[..., Path], rows: tuple[Path, Path], tmp_path: Path
) -> None:
    first = finetune(tiny_checkpoint("base"), rows, tmp_path / "first", "--method", "lora")
    second = finetune(first, rows, tmp_path / "second", "--method", "dora")
    losses = [records(tmp_path / name)[0]["validation_loss"] for name in ("first", "second")]
    assert losses[1] < losses[0] - 0.1
    assert Path(json.loads((second / "adapter_config.json").read_text())["base_model_name_or_path"]).name == "step-6"
    assert load_checkpoint(second).details["parent"]["name"] == "step-6"


def test_muon_recomputed_layers_and_stored_bfloat16_go_with_adapters(
    tiny_checkpoint: Callable[..., Path], rows: tuple[Path, Path], tmp_path: Path
) -> None:
    """With Muon nothing is left for AdamW."""
    flags = ["--optimizer", "muon", "--recompute", "--checkpoint-dtype", "bfloat16"]
    best = finetune(tiny_checkpoint("base"), rows, tmp_path / "run", "--method", "lora", *flags)
    losses = [record["validation_loss"] for record in records(tmp_path / "run") if "validation_loss" in record]
    assert losses[-1] < losses[0] - 0.1
    with safe_open(best / "adapter_model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora-rank", "4"], "--lora-rank is set, but --method full trains all weights"),
        (["--lora-targets", "q_proj"], "--lora-targets is set, but"),
        (["--method", "lora", "--lora-targets", "c_attn"], "the qwen3 family has no matrix 'c_attn'"),
        (["--method", "lorra"], "--method must be"),
    ],
)
def test_settings_that_cannot_apply_are_refused(
    flags: list[str],
    message: str,
    tiny_checkpoint: Callable[..., Path],
    rows: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--checkpoint", str(tiny_checkpoint("base")), "--data", str(rows[0]), "--out", str(tmp_path / "run")]
    assert main(["finetune", *given, *FLAGS, *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("method", ["lora", *(pytest.param(each, marks=pytest.mark.slow) for each in METHODS[1:])])
def test_ended_in_the_middle_it_resumes_to_the_same_bytes(
    method: str,
    tiny_checkpoint: Callable[..., Path],
    rows: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Dropout in adapters too is a function of the seed and the step; the base comes from its own checkpoint again."""
    base = tiny_checkpoint("base")
    flags = ["--method", method, "--lora-dropout", "0.2", "--evaluate-every", "2", "--save-every", "3"]
    finetune(base, rows, tmp_path / "whole", *flags)
    run = tmp_path / "resumed"
    with interrupted(monkeypatch), pytest.raises(AssertionError):
        finetune(base, rows, run, *flags)
    assert [path.name for path in (run / "state").iterdir()] == ["step-3"]
    assert main(["finetune", "--resume", str(run)]) == 0
    assert_same(run, content(tmp_path / "whole"))


# Bases of every family that sets something apart: windows, soft caps, joined matrices, norms behind.
@pytest.mark.parametrize(
    ("method", "family"),
    [
        ("full", "gemma3_text"),
        ("lora", "phi3"),
        ("lora", "gpt_neox"),
        *(pytest.param(method, family, marks=pytest.mark.slow) for method, family in (
            ("full", "gemma2"), ("lora", "gemma2"), ("lora", "gemma3_text"), ("full", "phi3"), ("full", "olmo2"),
            ("lora", "olmo2"), ("full", "smollm3"), ("lora", "smollm3"), ("full", "gpt_neox"), ("full", "granite"),
            ("lora", "granite"),
        )),
    ],
)  # fmt: skip
def test_every_family_is_tuned_and_merged(
    method: str, family: str, tiny_tokenizer: Tokenizer, rows: tuple[Path, Path], tmp_path: Path
) -> None:
    import transformers

    model = tiny_model(family, scale=1.0, vocab_size=tiny_tokenizer.vocab_size, context_length=128)
    base = save_checkpoint(
        tmp_path / "base", model=model, tokenizer=tiny_tokenizer, chat=None, generation={}, details={}
    )
    best = finetune(base, rows, tmp_path / "run", "--method", method, "--precision", "fp32", "--max-steps", "3")
    measured = [each["validation_loss"] for each in records(tmp_path / "run") if each.get("validation_loss")]
    assert measured[-1] < measured[0] - 0.05
    whole = tmp_path / "merged" if method == "lora" else best
    if method == "lora":
        assert main(["merge", str(base), str(best), "--out", str(whole)]) == 0
    tokens = torch.arange(3, 99, 4).unsqueeze(0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(tokens).logits
        found = load_checkpoint(best, dtype=torch.float32).model(tokens, torch.arange(tokens.shape[1]).unsqueeze(0))
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
