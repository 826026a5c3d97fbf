"""Recipes: flags over YAML over defaults, every field a flag with help, every mistake named with its remedy."""

import argparse
from pathlib import Path

import pytest
import yaml

from topkapi.model.text.tokenizer import Tokenizer
from topkapi.service.commands.cli import main
from topkapi.training import cli
from topkapi.training.pretrain import model_config
from topkapi.training.recipes.arguments import RECIPES, build_recipe, read_arguments, read_yaml
from topkapi.training.recipes.recipe import (
    DpoRecipe,
    FinetuneRecipe,
    KtoRecipe,
    PretrainRecipe,
    TrainingRecipe,
    free_fields,
)

COMMANDS: dict[str, type[TrainingRecipe]] = {
    "pretrain": PretrainRecipe, "finetune": FinetuneRecipe, "dpo": DpoRecipe, "kto": KtoRecipe,
}  # fmt: skip


def parse(*arguments: str) -> tuple[TrainingRecipe, Path, bool]:
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    for add in cli.COMMANDS.values():
        add(subparsers)
    return read_arguments(parser.parse_args(arguments))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_field_is_a_flag_with_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for name, field in COMMANDS[command].model_fields.items():
        assert f"--{name.replace('_', '-')}" in printed
        assert field.description and " ".join(field.description.split()) in printed.replace("- ", "-")


def test_flags_go_over_the_recipe_and_the_recipe_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("learning_rate: 5e-4\nclip: 0.5\nqkv_bias: true\ndata: [a.txt]\nbatch_size: 3\n")
    recipe, out, resume = parse("pretrain", str(path), "--batch-size", "7", "--no-qkv-bias", "--clip", "none")
    assert isinstance(recipe, PretrainRecipe)
    assert (recipe.learning_rate, recipe.batch_size, recipe.qkv_bias, recipe.clip) == (5e-4, 7, False, None)
    assert recipe.data == ["a.txt"] and recipe.weight_decay == 0.1
    assert (out, resume) == (Path("runs/mine"), False)


def test_a_run_is_named_after_its_data_and_resumed_by_its_directory(tmp_path: Path) -> None:
    recipe, out, _ = parse("pretrain", "--data", "some/book.txt", "more.txt")
    assert (recipe.data, out) == (["some/book.txt", "more.txt"], Path("runs/book"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json") | {"seed": 77}))
    resumed, out, resume = parse("pretrain", "--resume", str(tmp_path))
    assert (resumed.seed, resumed.data, out, resume) == (77, recipe.data, tmp_path, True)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_included_recipes_are_valid_and_survive_a_round_trip(path: Path) -> None:
    fields = read_yaml(path)
    tuned = path.stem.startswith(("topkapi-chat", "instruction-", "smollm2-"))
    kind = FinetuneRecipe if tuned else PretrainRecipe
    recipe = build_recipe(kind, fields, path.name)
    assert kind.model_validate(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))) == recipe


def test_the_verdict_is_the_books_network() -> None:
    recipe = build_recipe(PretrainRecipe, read_yaml(RECIPES / "the-verdict.yaml"), "the-verdict.yaml")
    config = model_config(recipe, Tokenizer.gpt2())
    assert config.parameter_count() == 162_419_712
    assert (config.family, config.context_length, config.qkv_bias, config.dropout) == ("gpt2", 256, False, 0.1)


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["no-such-recipe"], "there is no recipe no-such-recipe", "the-verdict"),
        (["the-verdict"], "no training text", "Project Gutenberg"),
        (["the-verdict", "--data", "gone.txt"], "no such file, folder or glob: gone.txt", "Project Gutenberg"),
        (["--learning-rate", "-1"], "--learning-rate must be a number above 0, not '-1'", "peak learning rate"),
        (
            ["--batch-size", "many"],
            "--batch-size must be a whole number of at least 1, not 'many'",
            "sequences per update",
        ),
        (["--precision", "fp8"], "--precision must be 'auto', 'fp32'", "arithmetic of the matrix products"),
        (["bad.yaml"], "bad.yaml: unknown field 'lr'", "learning_rate"),
        (["misspelt.yaml"], "misspelt.yaml: unknown field 'learning_rat'", "did you mean 'learning_rate'?"),
        (["wrong.yaml"], "wrong.yaml: 'batch_size' must be a whole number of at least 1, not 0", "sequences per"),
        (["instruction-1100"], "is a recipe for finetune, not for pretrain", "topkapi finetune instruction-1100"),
        (["list.yaml"], "must be a list of 'field: value' lines", "for example: learning_rate: 0.001"),
        (["broken.yaml"], "the recipe broken.yaml cannot be read", ""),
        (["--resume", "gone"], "no training run in gone", ""),
        (["--data", "bad.yaml"], "bad.yaml is not a kind of file that can be read", "a recipe (.yaml) comes before"),
        (["--data", "text.txt", "--device", "tpu"], "device 'tpu' is not supported", "cpu, cuda or auto"),
        (["--data", "text.txt", "--tokenizer", "gone"], "there is no tokenizer at gone", "tokenizer.json, or gpt2"),
        (
            ["--data", "text.txt", "--hidden-size", "30", "--family", "gpt2"],
            "--hidden-size 30 is not a multiple",
            "nearest that are: 28 and 32",
        ),
        (
            ["--data", "text.txt", "--num-kv-heads", "3"],
            "--num-heads (4) must be a multiple of --num-kv-heads (3)",
            "1, 2 or 4",
        ),
        (["--data", "text.tx"], "no such file, folder or glob: text.tx", "did you mean text.txt?"),
        (["text.txt"], "text.txt is not a recipe, which is a .yaml file", "--data text.txt"),
        (["the-verdikt"], "there is no recipe the-verdikt", "did you mean the-verdict?"),
        (["finetune"], "there is no recipe finetune", "that is a kind of run: --run finetune"),
        (["--data", "text.txt", "--hidden-size", "36"], "--head-dim must be even for rotary positions, not 9", ""),
        (
            ["--data", "answers.jsonl"],
            "no text in the field 'text'",
            "(topkapi finetune trains on questions and answers)",
        ),
        (["--data", "nowhere/text.txt"], "no such file", "there is no folder nowhere"),
        (["--data", "text.txt=abc", "bad.yaml=1"], "the weight of text.txt must be a number, not 'abc'", "text.txt=3"),
        (["--data", "text.txt", "--chat-template", "gone"], "there is no chat template gone", "alpaca"),
        (
            ["--data", "text.txt", "--context-length", "9999"],
            "too little training text in text.txt",
            "--context-length",
        ),
        (["--data", "text.txt", "--vocab-size", "5000"], "yields a vocabulary of only", "at most"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(
    arguments: list[str],
    message: str,
    hint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    english: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text("lr: 1")
    Path("misspelt.yaml").write_text("learning_rat: 1")
    Path("wrong.yaml").write_text("batch_size: 0")
    Path("answers.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    Path("list.yaml").write_text("- 1")
    Path("broken.yaml").write_text("a: [1")
    Path("text.txt").write_text(english[:4000], encoding="utf-8")
    assert main(["pretrain", *arguments, *([] if "--resume" in arguments else ["--out", "run"])]) == 2
    error = capsys.readouterr().err
    assert message in error and hint in error and error.startswith("error: ") and len(error.splitlines()) <= 2


def test_only_what_does_not_change_learning_is_free() -> None:
    assert free_fields(PretrainRecipe) == {
        "out", "overwrite", "save_every", "save_minutes", "asynchronous_saves", "keep", "keep_best", "checkpoint_dtype",
        "cache", "data_hint", "track", "track_name", "track_project", "parallel", "push", "push_every", "generation",
    }  # fmt: skip


def test_tokenizer_train_writes_what_pretrain_reads(tmp_path: Path, english: str) -> None:
    (tmp_path / "text.txt").write_text(english[:60_000], encoding="utf-8")
    out = tmp_path / "tokenizer"
    assert main(["tokenizer", "train", str(tmp_path / "text.txt"), "--vocab-size", "400", "--out", str(out)]) == 0
    tokenizer = Tokenizer.from_directory(out)
    assert tokenizer.vocab_size == 400
    assert {"<|endoftext|>", "<|im_start|>", "<|im_end|>"} < set(tokenizer.control_tokens)
    assert tokenizer.decode(tokenizer.encode(english[-500:])) == english[-500:]


def test_decoding_defaults_are_stored_with_the_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("generation: {temperature: 0.3, top_k: 20}")
    recipe, _, _ = parse("pretrain", str(path), "--data", "a.txt")
    stored = recipe.generation_config({"temperature": 0.8, "top_p": 0.95}, [7])
    assert stored == {"temperature": 0.3, "top_p": 0.95, "top_k": 20, "eos_token_id": [7]}
    for entry, message in {
        "temperature=-1": "temperature must be at least 0, not -1",
        "heat=1": "'heat=1' is not a decoding default and its value, as in temperature=0.3",
        "temperature": "'temperature' is not a decoding default",
        "top_p=[": "'top_p=[' is not a decoding default",
        "top_k=many": "top_k",
    }.items():
        assert main(["pretrain", "--data", "a.txt", "--generation", entry]) == 2
        assert message in capsys.readouterr().err
