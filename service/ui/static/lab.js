// The tab Tokens, a decoding lab: one prompt, up to four strategies beside each other on the same seed, why each token
// was chosen, and what would have come of another one.

import { request } from "./api.js";
import { button, clear, element } from "./dom.js";
import { clearError, showError } from "./errors.js";
import { choiceField, field, numberField, reveal, shortcuts, worker } from "./fields.js";
import { shape } from "./lab_shape.js";
import { Strategy } from "./lab_strategy.js";
import { showTrace } from "./lab_trace.js";
import { models, picker } from "./models.js";
import { descriptors, PRESETS } from "./parameters.js";
import * as store from "./store.js";
import { legend, measures, spans } from "./tokens.js";

const MOST = 4;
const KEPT = "tokens";
const MEASURED = ["probability", "entropy", "rank"];
const FIRST = [{}, PRESETS.Deterministic];
const NEXT = [{}, PRESETS.Deterministic, PRESETS.Precise, PRESETS.Creative];

export async function mount(root) {
  const rows = await descriptors();
  const kept = store.get(KEPT, {});
  const strategies = [];
  let measure = MEASURED.includes(kept.measure) ? kept.measure : "probability";
  let asked = null;
  let known = null;

  const prompt = element("textarea", { rows: 3, id: "lab-prompt", dataset: { parameter: "prompt" }, spellcheck: "false" });
  prompt.value = kept.prompt ?? "Once upon a time there was a small";
  const about = element("p", { class: "note", role: "status" });
  const pieces = spans([], { label: "The prompt’s tokens" });
  const promptTokens = element("details", { class: "group", hidden: true }, element("summary", {}, "The prompt’s tokens"), pieces.element);
  const reading = choiceField("Read as", [["text", "a text to continue"], ["message", "a message to answer"]], { id: "lab-reading" });
  const seed = numberField("Seed", { min: 0, value: kept.seed ?? 1, id: "lab-seed", dataset: { parameter: "seed" } });
  const most = numberField("Tokens", { min: 1, value: kept.most ?? 40, id: "lab-most", dataset: { parameter: "max_tokens" } });
  const head = element("div", {});
  const chosen = element("div", { class: "top" });
  const grid = element("div", { class: "strategies" });
  const why = element("section", { class: "why", "aria-label": "Why this token", "aria-live": "polite" });
  const work = worker(head, "Run", run, { id: "lab-run" });
  const add = button("Add a strategy", () => put(NEXT[strategies.length] ?? {}));

  const host = {
    rows,
    asked: () => ({ ...asked, body: { ...asked.body, seed: seed.value(), max_tokens: most.value() } }),
    onchange: keep,
    onremove(strategy) {
      strategy.stop();
      strategies.splice(strategies.indexOf(strategy), 1);
      strategy.element.remove();
      strategies.forEach((each, index) => each.name("ABCD"[index]));
      if (strategy.selected !== null) clear(why);
      offer();
      keep();
      add.focus();
    },
    onpick(strategy, index) {
      for (const other of strategies) if (other !== strategy) other.unpick();
      const token = strategy.shown.tokens[index];
      showTrace(why, {
        name: `Strategy ${strategy.letter}`,
        token,
        index,
        ontake: (contender, place) => strategy.branch(index, contender, place < 5 ? place + 1 : null),
      });
      reveal(why);
      distribution.moved();
    },
  };

  const distribution = shape(rows, () => {
    const strategy = strategies.find((each) => each.selected !== null);
    // An answer belongs to the prompt that it was given to, whatever stands there now.
    const source = strategy?.asked ?? asked;
    if (!source) return null;
    const before = strategy ? strategy.shown.tokens.slice(0, strategy.selected) : [];
    const text = `${source.text}${before.map((token) => token.text).join("")}`;
    return { ids: [...source.ids, ...before.map((token) => token.token_id)], model: source.model, words: `“${text.length > 60 ? "…" : ""}${text.slice(-60)}”` };
  });
  distribution.element.addEventListener("toggle", () => {
    if (distribution.element.open && !asked) read().then(() => distribution.moved(), (error) => showError(head, error));
  });

  const chooser = picker(chosen, { label: "Checkpoint", remember: "tokens-checkpoint", onchange: changed });
  chosen.append(reading.element, seed.element, most.element);

  function changed(model) {
    // Of the list's changes most are about others.
    const now = model && JSON.stringify([model.name, model.created, model.defaults, model.chat_defaults]);
    if (!model || now === known) return;
    known = now;
    reading.element.hidden = !model.chat;
    reading.control.value = model.chat ? (kept.reading ?? "message") : "text";
    reset();
  }

  function defaults() {
    const model = chooser.model;
    return (reading.control.value === "message" ? model?.chat_defaults : model?.defaults) ?? {};
  }

  /** What was asked is not what stands there any more. */
  function reset() {
    asked = null;
    if (!chooser.model) return;
    for (const strategy of strategies) strategy.use(defaults());
    distribution.use(defaults());
  }

  function put(values) {
    if (strategies.length >= MOST) return;
    const strategy = new Strategy(host, "ABCD"[strategies.length], values);
    strategy.by(measure);
    if (chooser.model) strategy.use(defaults());
    strategies.push(strategy);
    grid.append(strategy.element);
    offer();
    keep();
  }

  function offer() {
    add.hidden = strategies.length >= MOST;
    for (const strategy of strategies) strategy.remove.hidden = strategies.length === 1;
  }

  function keep() {
    const values = strategies.map((strategy) => strategy.values);
    Object.assign(kept, { prompt: prompt.value, seed: seed.value(), most: most.value(), measure, strategies: values });
    store.set(KEPT, kept);
  }

  /** The prompt's token ids: branches and distributions go on from them. */
  async function read(signal) {
    if (!models.isRead) about.textContent = "Waiting for the list of checkpoints…";
    const { name: model } = await chooser.ready(signal).finally(() => (about.textContent = ""));
    const message = reading.control.value === "message";
    const body = message ? { messages: [{ role: "user", content: prompt.value }] } : { prompt: prompt.value };
    const told = await request("POST", "tokenize", { model, ...(message ? body : { text: prompt.value }) }, { signal });
    asked = { model, body: { model, ...body }, ids: told.token_ids, text: prompt.value };
    pieces.replace(told.pieces.map((piece) => ({ ...piece, note: `id ${piece.token_id}` })));
    promptTokens.hidden = false;
    about.textContent = `The prompt has ${told.count.toLocaleString("en")} tokens${message ? " as the checkpoint’s template puts it" : ""}.`;
  }

  async function run(signal) {
    keep();
    clear(why);
    await read(signal);
    signal.addEventListener("abort", () => strategies.forEach((strategy) => strategy.stop()));
    const running = strategies.map((strategy) => strategy.run());
    distribution.moved();
    await Promise.all(running);
  }

  prompt.addEventListener("input", () => {
    asked = null;
    keep();
  });
  reading.control.addEventListener("change", () => {
    kept.reading = reading.control.value;
    keep();
    reset();
  });
  for (const each of [seed, most]) each.control.addEventListener("input", keep);

  const colours = element("div", { class: "row wrap colours" });
  function colour(next) {
    measure = next;
    for (const strategy of strategies) strategy.by(measure);
    colours.replaceChildren(chooseMeasure, legend(measure));
    keep();
  }
  const chooseMeasure = measures(MEASURED, { value: measure, onchange: colour });

  const form = element(
    "div",
    { class: "panel" },
    chosen,
    field("Prompt", prompt),
    element("div", { class: "row wrap" }, work.element, add, about),
    promptTokens,
  );
  head.append(form);
  shortcuts(form, work);
  clear(root).append(
    element("p", { class: "lead" }, "One prompt, several ways to choose each next token, on the same seed. Click a token to see why it was chosen, and take another one instead."),
    head,
    colours,
    grid,
    why,
    distribution.element,
  );
  for (const values of kept.strategies?.length ? kept.strategies.slice(0, MOST) : FIRST) put(values);
  colour(measure);
  clearError(head);
}
