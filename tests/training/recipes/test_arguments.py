"""Settings that do not go together are refused before anything is begun."""

from pathlib import Path

import pytest

from topkapi.model.errors import SettingsError
from topkapi.service.commands.cli import main
from topkapi.training.recipes.arguments import build_recipe
from topkapi.training.recipes.recipe import DpoRecipe, FinetuneRecipe, PretrainRecipe


@pytest.mark.parametrize(
    ("kind", "fields", "field"),
    [
        (PretrainRecipe, {"optimizer": "schedule-free"}, "schedule"),
        (PretrainRecipe, {"optimizer": "schedule-free", "schedule": "constant", "beta1": 0.0}, "beta1"),
        (PretrainRecipe, {"best_metric": "validation_margin"}, "best_metric"),
        (FinetuneRecipe, {"best_metric": "copied_from_training", "sample_every": "never"}, "best_metric"),
        (FinetuneRecipe, {"train_examples": 10}, "train_examples"),
        (FinetuneRecipe, {"test_examples": 3}, "test_examples"),
        (PretrainRecipe, {"muon_learning_rate": 0.1}, "muon_learning_rate"),
        (PretrainRecipe, {"decay_fraction": 0.5}, "decay_fraction"),
        (PretrainRecipe, {"schedule": "constant", "final_learning_rate": 0.5}, "final_learning_rate"),
        (PretrainRecipe, {"batch_size": 4, "micro_batch_size": 9}, "micro_batch_size"),
        (PretrainRecipe, {"z_loss": float("inf")}, "z_loss"),
        (PretrainRecipe, {"track_project": "mine"}, "track_project"),
        (FinetuneRecipe, {"track_name": "mine"}, "track_name"),
        (FinetuneRecipe, {"push_every": 5}, "push_every"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(kind, fields, field) -> None:
    with pytest.raises(SettingsError) as refused:
        build_recipe(kind, fields, "flags", fields)
    assert refused.value.field == field and refused.value.hint


def test_a_recipe_file_may_hold_what_does_nothing_today() -> None:
    build_recipe(PretrainRecipe, {"muon_learning_rate": 0.1, "decay_fraction": 0.5}, "a.yaml", ["schedule"])
    build_recipe(DpoRecipe, {"best_metric": "validation_margin"}, "a.yaml")


def test_a_refused_setting_leaves_the_run_that_was_to_be_replaced(tmp_path: Path, english: str, capsys) -> None:
    (tmp_path / "text.txt").write_text(english[:20_000], encoding="utf-8")
    flags = ["pretrain", "--data", str(tmp_path / "text.txt"), "--cache", str(tmp_path), "--out", str(tmp_path / "run")]
    shape = "--model tiny --num-layers 1 --context-length 32 --batch-size 2 --threads 1 --max-steps 2"
    flags += shape.split(" ")
    # Without validation data nothing is called so.
    assert main([*flags, "--validation-fraction", "0", "--evaluate-every", "1"]) == 0
    told = capsys.readouterr().out
    assert "best training" in told and "train " in told and "  validation " not in told
    report = (tmp_path / "run" / "report.md").read_text("utf-8")
    assert "Best training" in report and "validation loss" not in report.lower().replace("validation_loss", "")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert main([*flags, "--overwrite", "--best-metric", "validation_margin"]) == 2
    assert main([*flags, "--overwrite", "--family", "gpt2", "--num-kv-heads", "1"]) == 2
    assert "as many key-value heads as heads" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
