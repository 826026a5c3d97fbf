"""What a finished run leaves to look at: `report.md`, and the same as one HTML file that needs nothing else.

Both are templates, filled with `report_facts`.
"""

from __future__ import annotations

import base64
import json
import os
import platform
import shlex
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from topkapi.training.run.console import Console, duration, visible
from topkapi.training.run.directory import RunDirectory
from topkapi.training.run.plots import draw_losses, draw_machine, draw_schedule, save, steps_down
from topkapi.training.run.state import TrainerState

# Samples are shown from so many moments of the run, the first and the last among them.
_MOMENTS = 6
_PACKAGES = ("torch", "numpy", "tokenizers", "safetensors")


def finish(run: RunDirectory, state: TrainerState, console: Console) -> None:
    """Write `plots/*.png`, `report.md` and `report.html` and tell how the run went."""
    records = run.records("metrics.jsonl")
    figures = {
        "losses": ("loss.png", draw_losses(records, state)),
        "learning rate": ("learning-rate.png", draw_schedule(records)),
        "machine": ("machine.png", draw_machine(run.records("system.jsonl"), run.records("timings.jsonl"))),
    }
    plots = {name: run.path / "plots" / file for name, (file, _) in figures.items()}
    for name, (_, figure) in figures.items():
        save(figure, plots[name])
    for down in steps_down(records):
        console.message(down.sentence())
    facts = report_facts(run, state)
    run.write(
        "report.md", render(MARKDOWN, facts | {"plots": {name: f"plots/{at.name}" for name, at in plots.items()}})
    )
    embedded = {
        name: "data:image/png;base64," + base64.b64encode(at.read_bytes()).decode() for name, at in plots.items()
    }
    run.write("report.html", render(PAGE, facts | {"plots": embedded}))
    console.message(f"{facts['ending']}: {state.verdict()}")
    console.message(f"report: {run.path / 'report.md'}")
    console.message(f"serve it with: {facts['serve']}")


def report_facts(run: RunDirectory, state: TrainerState) -> dict[str, Any]:
    """Everything that the report says, in words and rows of text."""
    records = run.records("metrics.jsonl")
    made = _made(run.path)
    place = shlex.quote(str(run.path))
    verdict = state.verdict()
    evaluations = [record for record in records if "train_loss" in record]
    names = dict.fromkeys(name for record in evaluations for name in record)
    measured = [name for name in names if name not in ("step", "epoch", "tokens")]
    data = made.get("data") or {}
    return {
        "name": run.path.resolve().name,
        "ending": state.finished or "all steps done",
        "verdict": verdict[:1].upper() + verdict[1:],
        "steps": f"{state.step:,}",
        "tokens": f"{state.tokens:,}",
        "speed": _speed(run.records("timings.jsonl")),
        "warnings": _warnings(records, state),
        "measured": [name.replace("_", " ") for name in measured],
        "evaluations": [
            [f"{record['step']:,}", *(_number(record.get(name)) for name in measured)] for record in evaluations
        ],
        "samples": _samples(run.records("samples.jsonl")),
        "data": [[name, str(digest)] for name, digest in (data.get("sources") or {}).items()],
        "counts": [[name.replace("_", " "), f"{value:,}"] for name, value in data.items() if isinstance(value, int)],
        "parent": made.get("parent"),
        "parameters": f"{made['parameters']:,}" if "parameters" in made else "",
        "environment": _environment(),
        "settings": [[name, json.dumps(value)] for name, value in run.config().items() if value not in (None, [])],
        "repeat": f"{made.get('made_by', 'topkapi pretrain')} {place}/config.yaml --out {place}-again",
        "directory": os.getcwd(),
        "serve": f"topkapi serve {shlex.quote(str(run.path / 'best'))}",
    }


def _made(path: Path) -> dict[str, Any]:
    """How the run's checkpoints were made, as one of them says."""
    for name in ("best", "last"):
        details = path / name / "topkapi.json"
        if details.is_file():
            made: dict[str, Any] = json.loads(details.read_text("utf-8"))
            return made
    return {}


def _number(value: float | None) -> str:
    """A cell of the table of evaluations: blank where one did not measure it."""
    return "" if value is None else f"{value:.3f}"


def _speed(timings: list[dict[str, Any]]) -> str:
    if not timings:
        return ""
    last = timings[-1]
    line = f"{duration(last['seconds'])} since it was last started, {last['tokens_per_s']:,.0f} tokens/s"
    share = last.get("model_flops_utilisation")
    return line if share is None else f"{line}, {share:.0%} of the machine's peak"


def _warnings(records: list[dict[str, Any]], state: TrainerState) -> list[str]:
    found = []
    for record in records:
        if "event" not in record:
            continue
        row = record["rows"][0]
        after = f"; the run returned to step {record['returned_to']}" if "returned_to" in record else ""
        loss = "no number" if record["loss"] is None else f"{record['loss']:.3f}"
        found.append(f"Step {record['step']}: the loss was {loss}{after}. {row['origin']}: “{visible(row['text'])}”")
    if state.risen is not None:
        found.append(
            f"Diverging: at step {state.risen} the smoothed loss stood far above the "
            f"{state.first_train_loss:.3f} of before the first step."
        )
    if state.overfitting:
        found.append(f"Overfitting: {state.verdict()}.")
    found += [f"{down.sentence()[:1].upper()}{down.sentence()[1:]}." for down in steps_down(records)]
    if state.memorising:
        found.append(f"Memorising: the last samples repeat up to {state.copied} tokens of the training text.")
    return found


def _samples(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each prompt, what the model wrote at some moments of the run."""
    steps = sorted({record["step"] for record in records})
    last = len(steps) - 1
    chosen = {steps[round(number * last / (_MOMENTS - 1))] for number in range(_MOMENTS)} if steps else set()
    prompts: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["step"] in chosen:
            shown = {name: visible(text) if isinstance(text, str) else text for name, text in record.items()}
            prompts.setdefault(shown["prompt"], []).append(shown)
    return [{"prompt": prompt, "answers": answers} for prompt, answers in prompts.items()]


def _environment() -> list[list[str]]:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return [
        ["device", device],
        ["threads", str(torch.get_num_threads())],
        ["system", platform.platform()],
        ["Python", platform.python_version()],
        *([name, version(name)] for name in _PACKAGES),
    ]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.machine())}, {os.cpu_count()} processors"


MARKDOWN = """\
# {{ name }}

{{ steps }} steps, {{ tokens }} tokens{% if parameters %}, {{ parameters }} parameters{% endif %}: {{ ending }}. \
{{ verdict }}.{% if speed %} {{ speed }}.{% endif %}

{% for warning in warnings %}
- {{ warning }}
{% endfor %}

{% for title, plot in plots.items() %}
![{{ title }}]({{ plot }})
{% endfor %}

## Evaluation

| step |{% for name in measured %} {{ name }} |{% endfor %}

|---:|{% for name in measured %}---:|{% endfor %}

{% for row in evaluations %}
| {{ row | join(" | ") }} |
{% endfor %}

## Samples

{% for sample in samples %}
{% for answer in sample.answers %}
Step {{ answer.step }}:

> {{ (sample.prompt ~ " **|** " ~ answer.text).replace("\\n", "\\n> ") }}

{% endfor %}
{% endfor %}
## Data

{% for name, digest in data %}
- `{{ name }}` sha256 `{{ digest }}`
{% endfor %}
{% if parent %}
- started from {{ parent.name }}, weights sha256 `{{ parent.sha256 }}`
{% endif %}
{% for name, value in counts %}
- {{ name }}: {{ value }}
{% endfor %}

## Environment

{% for name, value in environment %}
- {{ name }}: {{ value }}
{% endfor %}

## Repeat it

In `{{ directory }}`:

```
{{ repeat }}
```

## Serve it

```
{{ serve }}
```
"""

PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }}</title>
<style>
  :root { color-scheme: light dark; }
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
  h1 { margin-bottom: .2rem; }
  h2 { margin-top: 2.5rem; border-bottom: 1px solid #8884; padding-bottom: .2rem; }
  img { max-width: 100%; background: white; border-radius: 6px; }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
  th, td { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; }
  table.numbers th, table.numbers td { text-align: right; }
  tbody tr:nth-child(odd) { background: #8881; }
  td, code { overflow-wrap: anywhere; }
  pre { background: #8882; padding: .7rem 1rem; border-radius: 6px; white-space: pre-wrap; }
  .verdict { font-size: 1.1rem; }
  .warning { border-left: 4px solid #d33; padding: .2rem .8rem; margin: .5rem 0; background: #d332; }
  blockquote { margin: .3rem 0 1rem; padding-left: .8rem; border-left: 3px solid #8886; white-space: pre-wrap; }
  .prompt { opacity: .65; }
  .step { font-weight: 600; }
</style>
<h1>{{ name }}</h1>
<p class="verdict">{{ verdict }}.</p>
<p>{{ steps }} steps, {{ tokens }} tokens{% if parameters %}, {{ parameters }} parameters{% endif %}: {{ ending }}.
{%- if speed %} {{ speed }}.{% endif %}</p>
{% for warning in warnings %}
<p class="warning">{{ warning }}</p>
{% endfor %}
<h2>Curves</h2>
{% for title, plot in plots.items() %}
<p><img src="{{ plot }}" alt="{{ title }}"></p>
{% endfor %}
<h2>Evaluation</h2>
<table class="numbers">
<thead><tr><th>step</th>{% for name in measured %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in evaluations %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
<h2>Samples</h2>
{% for sample in samples %}
{% for answer in sample.answers %}
<div><span class="step">Step {{ answer.step }}</span>
{%- if answer.copied_from_training %}, longest copy {{ answer.copied_from_training }} tokens{% endif %}</div>
<blockquote><span class="prompt">{{ sample.prompt }}</span> {{ answer.text }}</blockquote>
{% endfor %}
{% endfor %}
<h2>Data</h2>
<table>
{% for name, digest in data %}
<tr><td>{{ name }}</td><td>sha256 <code>{{ digest }}</code></td></tr>
{% endfor %}
{% if parent %}
<tr><td>started from {{ parent.name }}</td><td>weights sha256 <code>{{ parent.sha256 }}</code></td></tr>
{% endif %}
{% for name, value in counts %}
<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}
</table>
<h2>Environment</h2>
<table>
{% for name, value in environment %}
<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}
</table>
<h2>Settings</h2>
<details><summary>the whole recipe</summary>
<table>
{% for name, value in settings %}
<tr><td>{{ name }}</td><td><code>{{ value }}</code></td></tr>
{% endfor %}
</table>
</details>
<h2>Repeat it</h2>
<p>In <code>{{ directory }}</code>:</p>
<pre>{{ repeat }}</pre>
<h2>Serve it</h2>
<pre>{{ serve }}</pre>
</html>
"""


def render(template: str, facts: Mapping[str, Any]) -> str:
    """`template` filled with `facts`; in the page, text that looks like HTML stays text."""
    settings: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    environment = Environment(autoescape=template is PAGE, undefined=StrictUndefined, **settings)
    return environment.from_string(template).render(facts)
