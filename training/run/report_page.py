"""The two forms of a run's report, as templates that are filled with `report_facts` of `training.run.report`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, StrictUndefined

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
