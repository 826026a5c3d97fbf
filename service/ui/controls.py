"""The decoding controls of the studio, made from the parameter table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from topkapi.model.decoding.parameters import BY_NAME, PARAMETERS, Parameter
from topkapi.service.generation import defaults_of
from topkapi.service.models import LoadedModel

COMMON = ("temperature", "top_k", "top_p", "min_p")
"""What most people reach for first; other controls lie in a folded section."""
LINES = ("stop", "stop_regex", "bad_words", "choice")
"""Lists of texts, written one per line."""


class Controls:
    """One component per control, and their values as decoding parameters."""

    def __init__(self, model: LoadedModel) -> None:
        """Render the controls inside the surrounding layout, set to the checkpoint's own defaults."""
        self._model = model
        sliders = [parameter for parameter in PARAMETERS if parameter.slider is not None]
        self._components: dict[str, gr.components.Component] = {}
        for parameter in (parameter for parameter in sliders if parameter.name in COMMON):
            self._components[parameter.name] = self._slider(parameter)
        self._components["max_tokens"] = gr.Slider(
            1, model.context_length - 1, self.value(model, "max_tokens"), step=1, label=_label("max_tokens"),
            info="Most tokens of an answer; the context may end it sooner.",
        )  # fmt: skip
        self._components["seed"] = gr.Textbox(
            "", label=_label("seed"), placeholder="a new one for every answer", max_lines=1,
            info="Same text, same settings, same seed: same answer. The seed of an answer stands below it.",
        )  # fmt: skip
        self._components["stop"] = self._text(BY_NAME["stop"])
        with gr.Accordion("More", open=False):
            for parameter in (parameter for parameter in sliders if parameter.name not in COMMON):
                self._components[parameter.name] = self._slider(parameter)
        with gr.Accordion("Texts and structure", open=False):
            for parameter in PARAMETERS:
                if parameter.kind in ("text", "prompt") or parameter.name in LINES[1:]:
                    self._components[parameter.name] = self._text(parameter)
                elif parameter.kind == "boolean" and parameter.name != "trace":
                    self._components[parameter.name] = gr.Checkbox(
                        self.value(model, parameter.name), label=_label(parameter.name), info=parameter.meaning
                    )
        self._reset = gr.Button("Reset to the checkpoint's defaults", size="sm", variant="secondary")

    @property
    def components(self) -> list[gr.components.Component]:
        """The components, in the order in which `parameters` takes their values."""
        return list(self._components.values())

    @property
    def reset(self) -> gr.Button:
        """Sets every control to what `defaults` gives."""
        return self._reset

    def parameters(self, model: LoadedModel, values: Sequence[Any]) -> dict[str, Any]:
        """The components' values as decoding parameters.

        What was left at the checkpoint's default is left out, so that only what the visitor chose can be refused. The
        seed stays text where it is no number: the parameter table says what is wrong with it.
        """
        given = dict(zip(self._components, values, strict=True))
        given = {name: value for name, value in given.items() if value != self.value(model, name)}
        if "seed" in given:
            seed = str(given["seed"]).strip()
            given["seed"] = int(seed) if seed.isascii() and seed.isdecimal() and len(seed) < 20 else seed
        for name in LINES:
            if name in given:
                given[name] = [line for line in str(given[name]).split("\n") if line]
        return given | {"max_tokens": int(values[list(self._components).index("max_tokens")])}

    def defaults(self, model: LoadedModel) -> list[Any]:
        """Updates that set every control to the defaults of `model`."""
        updates: list[Any] = []
        for name in self._components:
            value = self.value(model, name)
            if name == "max_tokens":
                updates.append(gr.update(value=value, maximum=model.context_length - 1))
            else:
                updates.append(gr.update(value=value))
        return updates

    @staticmethod
    def value(model: LoadedModel, name: str) -> Any:
        """What a control shows before anybody touches it: the checkpoint's default, else the table's."""
        if name in ("seed", *LINES) or BY_NAME[name].kind in ("text", "prompt"):
            return ""
        own = defaults_of(model).get(name)
        if name == "max_tokens":
            return min(own or 256, model.context_length - 1)
        return BY_NAME[name].default if own is None else own

    def _text(self, parameter: Parameter) -> gr.Textbox:
        hint = "one per line" if parameter.name in LINES else None
        return gr.Textbox("", label=_label(parameter.name), placeholder=hint, lines=1, info=parameter.meaning)

    def _slider(self, parameter: Parameter) -> gr.Slider:
        assert parameter.slider is not None
        minimum, maximum, step = parameter.slider
        value = self.value(self._model, parameter.name)
        return gr.Slider(minimum, maximum, value, step=step, label=_label(parameter.name), info=parameter.meaning)


def _label(name: str) -> str:
    return BY_NAME[name].label or name.replace("_", " ").capitalize()
