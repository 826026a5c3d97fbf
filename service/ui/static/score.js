// The tab Score: how probable a text is, where it surprises, which of two checkpoints expected it more, and which of some
// continuations of a prompt is the likeliest.

import { stream } from "./api.js";
import { clear, element, visible } from "./dom.js";
import { shortcuts, worker } from "./fields.js";
import { models, picker } from "./models.js";
import { choicesForm } from "./score_choices.js";
import { showPair } from "./score_pair.js";
import { source } from "./score_source.js";
import { showText } from "./score_text.js";
import * as store from "./store.js";

const MODES = { text: "One text", pair: "Two checkpoints", choices: "Choices" };
const SEGMENTS = 200;
const SURPRISING = 30;
// Up to so many bytes every token is told with others that were likelier, or at least every token.
const WITH_OTHERS = 40_000;
const EVERY_TOKEN = 400_000;

export function mount(root) {
  const kept = store.get("score", {});
  let mode = MODES[kept.mode] ? kept.mode : "text";

  const radios = Object.entries(MODES).map(([name, words]) =>
    element("label", { class: "inline" }, element("input", { type: "radio", name: "score-mode", value: name, checked: name === mode, onchange: () => turn(name) }), words),
  );
  const chosen = element("div", { class: "top" });
  const form = element("div", { class: "panel" });
  const inputs = element("div", {});
  const progress = element("div", { role: "status", class: "note" });
  const results = element("div", { class: "results", "aria-live": "polite" });
  const first = picker(chosen, { label: "Checkpoint", id: "score-checkpoint", remember: "score-checkpoint" });
  const second = picker(chosen, { label: "Second checkpoint", id: "score-second", remember: "score-second" });
  const text = source({ value: kept.text, onchange: keep });
  const choices = choicesForm({ values: kept.choices ?? {}, onchange: keep });
  const work = worker(form, "Score", run, { id: "score-run" });

  function keep() {
    Object.assign(kept, { mode, text: text.typed(), choices: choices.values() });
    store.set("score", kept);
  }

  function turn(next) {
    mode = next;
    work.stop();
    clear(results);
    second.element.closest(".field").hidden = mode !== "pair";
    inputs.replaceChildren(mode === "choices" ? choices.element : text.element);
    keep();
  }

  /** The answer of a streamed `/score`, told of on the way. */
  async function score(body, signal, told) {
    for await (const { event, data } of stream("score", body, { signal })) {
      if (event === "progress") told(data.scored, data.total);
      else if (event === "done") return data;
    }
    return null;
  }

  /** A bar for one checkpoint's progress. */
  function bar(name) {
    const shown = visible(name);
    const words = element("p", {}, `${shown}: waiting`);
    const line = element("progress", { max: 1, "aria-label": `Progress of ${shown}` });
    progress.append(words, line);
    return (scored, total) => {
      words.textContent = `${shown}: ${scored.toLocaleString("en")} of ${total.toLocaleString("en")} tokens`;
      line.max = total;
      line.value = scored;
    };
  }

  async function run(signal) {
    keep();
    clear(results);
    clear(progress);
    if (!models.isRead) progress.append("Waiting for the list of checkpoints…");
    try {
      const chosen = [await first.ready(signal), mode === "pair" ? await second.ready(signal) : null];
      clear(progress);
      const names = chosen.filter(Boolean).map((model) => model.name);
      if (mode === "choices") await ranked(names, signal);
      else await scoredText(names, signal);
    } finally {
      clear(progress);
    }
  }

  async function scoredText(names, signal) {
    const whole = text.text();
    const bytes = new TextEncoder().encode(whole);
    const per_token = bytes.length <= EVERY_TOKEN;
    const top = bytes.length <= WITH_OTHERS && mode === "text" ? 5 : 0;
    const body = { text: whole, per_token, top, segments: SEGMENTS, surprising: SURPRISING, stream: true, resumable: false };
    if (mode === "text") {
      const [model] = names;
      const answer = await score({ ...body, model }, signal, bar(model));
      showText(results, answer, { bytes, model });
      return;
    }
    const answers = await Promise.all(names.map((model) => score({ ...body, model }, signal, bar(model))));
    showPair(results, answers, names);
  }

  async function ranked([model], signal) {
    const body = choices.body();
    const answer = await score({ ...body, model, stream: true, resumable: false }, signal, bar(model));
    choices.show(results, answer);
  }

  form.append(
    element("div", { class: "row wrap", role: "radiogroup", "aria-label": "What to score" }, ...radios),
    chosen,
    inputs,
    element("div", { class: "row wrap" }, work.element),
    progress,
  );
  shortcuts(form, work);
  clear(root).append(
    element("p", { class: "lead" }, "How much a checkpoint expects a text: the less it does, the more bits it would take to tell it."),
    form,
    results,
  );
  turn(mode);
}
