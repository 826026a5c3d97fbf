// The tab Notebook: one text that a checkpoint continues in place, with what it wrote coloured.

import { request, stream } from "./api.js";
import { button, clear, copyButton, download, element, visible, visibleNodes } from "./dom.js";
import { clearError, showError } from "./errors.js";
import { debounced, shortcuts, worker } from "./fields.js";
import { models, picker } from "./models.js";
import { NotebookText } from "./notebook_text.js";
import { descriptors, drawer } from "./parameters.js";
import * as store from "./store.js";
import { MEASURES } from "./tokens.js";

const TOKENS = 60;
const PALEST = 3;
const RECORD = "notebook";
const EXAMPLES = ["Once upon a time, there was", "The city lies on the river and", "It was late in the evening when"];
const ENDS = { stop: "the text ended by itself", length: "cut off at the token limit", deadline: "out of time", cancelled: "ended by the server" };

function counted(tokens) {
  return tokens === 1 ? "1 token" : `${tokens.toLocaleString("en")} tokens`;
}

export async function mount(root) {
  const kept = store.collection("notebooks");
  // What is kept comes before anybody can write into what it would replace.
  const [rows, records] = await Promise.all([descriptors(), kept.all()]);
  const book = new NotebookText();
  let by = store.get("notebook-colours", "run");

  const area = element("textarea", { id: "notebook-text", "aria-label": "The notebook’s text", placeholder: "Write the beginning of a text …", spellcheck: "false", dataset: { parameter: "prompt" } });
  const under = element("div", { class: "page-under", "aria-hidden": "true" });
  const page = element("div", { class: "page" }, under, area);
  const place = element("div", {});
  const status = element("p", { class: "note", role: "status", id: "notebook-status" });
  const marks = element("p", { class: "hidden-marks", role: "note" });
  const head = element("div", { class: "top" });
  const settings = element("div", {});
  const side = element("details", { class: "side", open: matchMedia("(min-width: 768px)").matches }, element("summary", {}, "Settings"), settings);
  const here = element("input", { type: "checkbox", id: "notebook-here" });
  const colours = element(
    "select",
    { id: "notebook-colours", onchange: () => { by = colours.value; store.set("notebook-colours", by); draw(); } },
    element("option", { value: "run" }, "what was generated"),
    element("option", { value: "level" }, "each token by its probability"),
  );
  colours.value = by;
  const legend = element("ul", { class: "token-legend", "aria-label": "Colours" });
  const examples = element("div", { class: "row wrap" }, ...EXAMPLES.map((words) => button(words, () => { change(() => book.edit(words)); work.start(); }, { class: "small" })));

  const chooser = picker(head, { label: "Checkpoint", id: "notebook-checkpoint", remember: "notebook-checkpoint", onchange: use });
  const parameters = drawer(settings, { descriptors: rows, defaults: { max_tokens: TOKENS }, known: false });
  const work = worker(place, "Continue", go, { id: "notebook-continue" });
  const undo = button("Undo", () => step("undo"));
  const redo = button("Redo", () => step("redo"));
  const other = button("Another", another, { title: "Take the last continuation back and write another one" });

  function use(model) {
    if (!model) return;
    parameters.use({ defaults: { ...model.defaults, max_tokens: Math.min(TOKENS, model.context_length - 1) }, limits: { max_tokens: model.context_length - 1 } });
  }

  const keep = debounced(() => kept.put({ id: RECORD, ...book.state() }), 300);

  /** Do something to the text and show it. */
  function change(what, caret = null) {
    what();
    show();
    if (caret !== null) area.setSelectionRange(caret, caret);
    keep();
  }

  function step(name) {
    if (work.running) return;
    const before = book.text;
    change(() => book[name]());
    status.textContent = "";
    area.focus();
    // To the end of what changed.
    const after = book.text;
    let end = 0;
    while (end < Math.min(before.length, after.length) && before.at(-1 - end) === after.at(-1 - end)) end += 1;
    area.setSelectionRange(after.length - end, after.length - end);
  }

  function show() {
    if (area.value !== book.text) area.value = book.text;
    undo.disabled = !book.canUndo || work.running;
    redo.disabled = !book.canRedo || work.running;
    other.disabled = !last || work.running || book.text !== last.after;
    examples.hidden = book.text !== "" || work.running;
    hiddenMarks();
    draw();
  }

  function draw() {
    const nodes = book.pieces(by).map(({ text, run, level }) => {
      if (run === null) return text;
      if (by === "run") return element("mark", { class: run % 2 ? null : "other" }, text);
      return element("mark", { class: "level", dataset: { level: Math.min(PALEST, level) } }, text);
    });
    // A line at the end that is empty has a height, too.
    under.replaceChildren(...nodes, "\u200b");
    const swatch = (attributes, words) => element("li", {}, element("span", { class: "page-swatch", ...attributes }, "\u00a0"), words);
    legend.replaceChildren(
      ...(by === "run"
        ? [swatch({}, "a continuation"), swatch({ class: "page-swatch other" }, "the next one")]
        : MEASURES.probability.ranges.slice(0, PALEST + 1).map((words, level) => swatch({ class: "level", dataset: { level } }, level === PALEST ? "under 5 %" : words))),
    );
  }

  /** Characters that can't be seen in a text that can be typed in are named below it. */
  function hiddenMarks() {
    const shown = visible(book.text);
    if (shown === book.text) return clear(marks);
    const found = [...book.text.matchAll(/[^\n\t\x20-\x7e\xa1-\xac\xae-\u05ff]+/gu)].filter(([run]) => visible(run) !== run);
    const near = found.slice(0, 4).flatMap(({ 0: run, index }, at) => [at ? " · " : null, visibleNodes(`…${book.text.slice(Math.max(0, index - 8), index + run.length + 8)}…`)]);
    clear(marks).append("The text holds characters that are not seen: ", ...near.filter(Boolean));
  }

  /** What is sent as the prompt: the text, or of a text beyond the context the last tokens. */
  async function promptOf(text, model, tokens, signal) {
    const room = model.context_length - Math.min(tokens ?? TOKENS, Math.floor(model.context_length / 2));
    if (!text || text.length <= room) return { prompt: text, note: null };
    const { token_ids, count } = await request("POST", "tokenize", { model: model.name, text }, { signal });
    if (count <= room) return { prompt: text, note: null };
    return { prompt: token_ids.slice(-room), note: `read the last ${room.toLocaleString("en")} of ${count.toLocaleString("en")} tokens` };
  }

  let last = null;

  async function go(signal) {
    clearError(place);
    if (!models.isRead) status.textContent = "Waiting for the list of checkpoints…";
    const model = await chooser.ready(signal).finally(() => (status.textContent = ""));
    const values = { max_tokens: TOKENS, ...parameters.values() };
    let at = here.checked ? area.selectionStart : book.text.length;
    const caret = area.selectionStart;
    const before = book.text;
    book.mark();
    book.runs += 1;
    const first = at;
    area.readOnly = true;
    page.setAttribute("aria-busy", "true");
    status.textContent = "Reading the text";
    let due = false;
    let ended = false;
    let count = 0;
    const follow = () => {
      due = false;
      if (ended) return;
      const end = page.getBoundingClientRect().bottom;
      show();
      if (end <= innerHeight + 60 && !here.checked) page.scrollIntoView({ block: "nearest" });
      status.textContent = `Writing · ${counted(count)}`;
    };
    let told = "stopped";
    try {
      const { prompt, note } = await promptOf(book.text.slice(0, at), model, values.max_tokens, signal);
      const body = { model: model.name, prompt, ...values, logprobs: 0, stream: true, resumable: false };
      for await (const { event, data } of stream("generate", body, { signal })) {
        if (event === "token") {
          count += data.token_ids.length;
          const raw = data.logprobs.at(-1)?.raw_logprob ?? 0;
          if (data.text) at = book.insert(at, data.text, MEASURES.probability.level(Math.exp(raw)));
          if (!due) {
            due = true;
            requestAnimationFrame(follow);
          }
        } else if (event === "done") {
          const { finish_reason } = data.outputs[0];
          const speed = data.timings.tokens_per_s;
          told = [`seed ${data.parameters.seed}`, speed && count > 4 ? `${speed.toFixed(0)} tokens/s` : null, ENDS[finish_reason] ?? finish_reason, note].filter(Boolean).join(" · ");
        }
      }
    } catch (error) {
      if (error.name !== "AbortError") {
        told = count ? "broken off" : "";
        throw error;
      }
    } finally {
      ended = true;
      area.readOnly = false;
      page.removeAttribute("aria-busy");
      if (book.text === before) book.unmark();
      last = { before, after: book.text, first };
      // The button that stops is one that continues once this has returned.
      queueMicrotask(() => setTimeout(() => {
        show();
        keep();
        status.textContent = [count || told ? counted(count) : null, told || null].filter(Boolean).join(" · ");
        const to = here.checked || at === first ? (at === first ? caret : at) : book.text.length;
        area.setSelectionRange(to, to);
        if (document.activeElement === document.body) area.focus({ preventScroll: true });
      }));
    }
  }

  function another() {
    if (!last || book.text !== last.after) return;
    if (last.before !== last.after) change(() => book.undo(), last.first);
    work.start();
  }

  area.addEventListener("input", () => change(() => book.edit(area.value)));
  area.addEventListener("keydown", (event) => {
    const key = event.key.toLowerCase();
    if (!(event.ctrlKey || event.metaKey) || event.altKey || !["z", "y"].includes(key)) return;
    event.preventDefault();
    step(key === "y" || event.shiftKey ? "redo" : "undo");
  });
  area.addEventListener("beforeinput", (event) => {
    if (event.inputType !== "historyUndo" && event.inputType !== "historyRedo") return;
    event.preventDefault();
    step(event.inputType === "historyUndo" ? "undo" : "redo");
  });

  const main = element(
    "div",
    {},
    place,
    element("div", { class: "row wrap bar-of-page" }, work.element, other, undo, redo, element("span", { class: "row" }, here, element("label", { for: here.id }, "at the cursor"))),
    status,
    examples,
    page,
    marks,
    element(
      "div",
      { class: "row wrap colours" },
      element("label", { class: "inline", for: colours.id }, "Colour ", colours),
      legend,
      copyButton("Copy", () => book.text, { class: "small" }),
      button("Save as a file", () => download("notebook.txt", book.text, "text/plain"), { class: "small" }),
      button("Clear", () => change(() => book.edit("")), { class: "small" }),
    ),
  );
  shortcuts(main, work);
  clear(root).append(
    element("p", { class: "lead" }, "One text, which the checkpoint goes on with. Write, have it continued (Ctrl and Enter), change what you like, go on."),
    head,
    element("div", { class: "split" }, main, side),
  );
  const stored = records.find((record) => record.id === RECORD);
  if (stored) book.restore(stored);
  show();
}
