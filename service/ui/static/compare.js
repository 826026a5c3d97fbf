// The Compare tab: two checkpoints (or adapters) answer the same prompts on the same seeds; somebody votes without knowing
// whose answer is whose; the result comes with its interval, and everything can be exported.

import { button, clear, element, freshId, visible } from "./dom.js";
import { clearError, showError } from "./errors.js";
import { result, shown } from "./compare_result.js";
import { vote } from "./compare_vote.js";
import { models, picker } from "./models.js";
import { descriptors, drawer } from "./parameters.js";
import * as store from "./store.js";

document.head.append(element("link", { rel: "stylesheet", href: new URL("compare.css", import.meta.url).href }));

const MOST = 500;
const TOKENS = 200;
// What a comparison sets itself, or what makes several answers of one.
const WITHOUT = ["seed", "n", "best_of", "trace", "logprobs"];
const OWN = "each its own";
const EXAMPLES = ["What is the capital of France?", "Write two sentences about the sea.", "What is 7 + 5?", "Give three tips for staying healthy.", "Explain why the sky is blue."];

export async function mount(root) {
  const earlier = store.collection("comparisons", { onfull: () => showError(problems, { message: "This browser keeps no more comparisons", hint: "export this one, and delete earlier ones" }) });
  const problems = element("div");
  const place = element("div");
  const list = element("ul", { class: "compare-earlier" });
  root.append(problems, place);
  let voting = null;

  function open(view) {
    voting?.stop();
    voting = null;
    clearError(problems);
    clear(place);
    view();
  }

  function toBegin() {
    return element("div", { class: "row compare-top" }, button("New comparison", () => open(begin)));
  }

  function go(comparison) {
    open(() => {
      const within = element("div");
      place.append(toBegin(), within);
      if (comparison.closed) {
        const on = result(comparison).open ? button("Go on voting", () => go({ ...comparison, closed: false })) : null;
        within.append(...[shown(comparison), on].filter(Boolean));
        return;
      }
      voting = vote(within, comparison, {
        keep: () => earlier.put(comparison),
        done: () => {
          comparison.closed = true;
          for (const each of comparison.prompts) each.revealed ||= Boolean(each.vote);
          earlier.put(comparison);
          go(comparison);
        },
      });
    });
  }

  async function showEarlier() {
    const all = (await earlier.all()).sort((one, other) => other.created - one.created);
    clear(list).append(...all.map((comparison) => {
      const found = result(comparison);
      const names = comparison.sides.map((side) => visible(side.model));
      const facts = comparison.closed ? `${found.first} : ${found.second}` : `${comparison.prompts.length - found.open} of ${comparison.prompts.length} judged`;
      return element("li", { class: "row" },
        // Who leads would unblind whoever goes on.
        button(`${names.join(" and ")}, ${new Date(comparison.created).toLocaleString("en", { dateStyle: "medium", timeStyle: "short" })}: ${facts}`, () => go(comparison), { class: "quiet" }),
        button("Delete", async () => {
          await earlier.remove(comparison.id);
          showEarlier();
        }, { class: "quiet danger", "aria-label": `Delete the comparison of ${names.join(" and ")}` }));
    }));
    list.parentElement.hidden = all.length === 0;
  }

  async function begin() {
    const sides = [element("div"), element("div")];
    let chosen = { values: () => ({}), use: () => {} };
    const onchange = () => chosen.use({ defaults: common(pickers.map((each) => each.model)) });
    const pickers = sides.map((side, index) => picker(side, { label: index ? "Second checkpoint" : "First checkpoint", remember: `compare.${index ? "second" : "first"}`, onchange }));
    const note = element("p", { class: "note" });
    const prompts = element("textarea", { id: freshId("prompts"), rows: 8, spellcheck: "false" });
    prompts.value = store.get("compare.prompts", EXAMPLES.join("\n"));
    const file = element("input", { type: "file", id: freshId("file"), accept: ".txt,.json,.jsonl,.csv,text/plain,application/json" });
    const system = element("textarea", { id: freshId("system"), rows: 2, placeholder: "none" });
    const start = button("Begin", () => begun().catch((error) => showError(formProblems, error)), { class: "primary" });
    const settings = element("div");
    const side = element("details", { class: "side compare-settings", open: !matchMedia("(max-width: 767px)").matches }, element("summary", {}, "Settings of both"), settings);
    const formProblems = element("div");
    const field = (control, label, words) => element("div", { class: "field" }, element("label", { for: control.id }, label), control, element("p", { class: "note" }, words));
    place.append(element("div", { class: "split" },
      element("section", { "aria-label": "New comparison" },
        element("h2", {}, "Which of two checkpoints answers better?"),
        element("p", {}, "Both answer every prompt on the same seed. You judge pairs of answers without knowing whose they are; their sides change at random."),
        formProblems, element("div", { class: "compare-pickers" }, ...sides), note,
        field(prompts, "Prompts", "one per line"),
        field(file, "Or from a file", "one prompt per line, or JSON: texts, or objects with prompt, instruction or question"),
        field(system, "System message", "for checkpoints that take conversations"), start,
        element("section", { class: "compare-before", "aria-label": "Earlier comparisons", hidden: true }, element("h3", {}, "Earlier comparisons"), list)),
      side));
    showEarlier();
    file.addEventListener("change", async () => {
      clearError(formProblems);
      try {
        prompts.value = read(await file.files[0].text()).join("\n");
      } catch (error) {
        showError(formProblems, error);
      }
    });
    let prepared = prepare();
    prepared.catch((error) => ((prepared = null), showError(formProblems, error)));

    /** The settings, and two checkpoints that differ, once it is known what is loaded. */
    async function prepare() {
      const [rows] = await Promise.all([descriptors(), models.known()]);
      // A checkpoint may write until its context is full; whoever judges would wait for that.
      chosen = drawer(settings, { descriptors: rows, defaults: common(pickers.map((each) => each.model)), without: WITHOUT });
      const [, second] = models.list;
      if (second && pickers[0].value === pickers[1].value) pickers[1].choose(second.name);
      if (models.list.length === 1) note.textContent = "Only one checkpoint is loaded: load another one in the Models tab.";
    }

    async function begun() {
      clearError(formProblems);
      const texts = read(prompts.value);
      if (!texts.length) return showError(formProblems, { message: "There are no prompts", hint: "write one per line" });
      if (texts.length > MOST) return showError(formProblems, { message: `These are ${texts.length} prompts`, hint: `judge at most ${MOST} at a time` });
      const names = [];
      start.disabled = true;
      start.textContent = models.isRead ? "Begin" : "Waiting for the list of checkpoints…";
      try {
        await (prepared ??= prepare());
        for (const each of pickers) names.push((await each.ready()).name);
      } finally {
        start.disabled = false;
        start.textContent = "Begin";
      }
      if (!place.contains(start)) return;
      if (names[0] === names[1]) return showError(formProblems, { message: "Both are the same checkpoint", hint: "choose two that differ" });
      store.set("compare.prompts", prompts.value);
      const seed = crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
      go({
        id: crypto.randomUUID?.() ?? String(Date.now() + Math.random()), created: Date.now(), closed: false,
        sides: names.map((model) => ({ model, family: models.get(model).family, parameters: models.get(model).parameters, dtype: models.get(model).dtype })),
        system: system.value, parameters: { max_tokens: TOKENS, ...chosen.values() },
        prompts: texts.map((prompt, index) => ({ prompt, seed: seed + index, flipped: (crypto.getRandomValues(new Uint8Array(1))[0] & 1) === 1, answers: null, vote: null })),
      });
    }
  }

  open(begin);
}

/**
 * The defaults that both have, for the drawer. Where they differ it says so: whatever number is chosen is then sent, be it
 * the default of one of them.
 */
function common(both) {
  const [one, other] = both.map((model) => (model?.chat ? model.chat_defaults : model?.defaults) ?? {});
  const names = new Set([...Object.keys(one), ...Object.keys(other)]);
  const same = (name) => JSON.stringify(one[name]) === JSON.stringify(other[name]);
  const found = Object.fromEntries([...names].map((name) => [name, same(name) ? one[name] : OWN]));
  return { ...found, max_tokens: TOKENS };
}

/** The prompts in a text: one per line, or as JSON has them. Throws an error in words. */
export function read(text) {
  const trimmed = text.trim();
  const lines = trimmed.split(/\r?\n/).filter((line) => line.trim());
  if (!/^[[{]/.test(trimmed)) return lines;
  let rows;
  try {
    rows = JSON.parse(trimmed);
  } catch {
    try {
      rows = lines.map((line) => JSON.parse(line));
    } catch {
      // A list in brackets may be what somebody wants to ask about.
      return lines;
    }
  }
  return [rows].flat().map((row, index) => {
    const prompt = typeof row === "string" ? row : row?.prompt ?? row?.instruction ?? row?.question;
    if (typeof prompt === "string" && prompt.trim()) return prompt;
    throw new Error(`Row ${index + 1} has no text as prompt, instruction or question`);
  });
}
