// Voting: two answers to one prompt beside each other, whose is whose unknown, until all have been judged.

import { request } from "./api.js";
import { button, clear, element, visibleNodes } from "./dom.js";
import { clearError, showError } from "./errors.js";
import { models } from "./models.js";

const KEYS = { 1: "left", 2: "right", 3: "tie", 4: "neither" };

/**
 * Let somebody vote on `comparison` in `root`. `keep()` is told of each change, `done()` when the last one is judged or
 * the result is asked for. Answers are made in the order of the prompts, ahead of the votes. Returns `{stop()}`.
 */
export function vote(root, comparison, { keep, done }) {
  const problems = element("div");
  const progress = element("p", { class: "note", role: "status" });
  const prompt = element("blockquote", { class: "compare-prompt", tabindex: 0 });
  const answers = [side("A"), side("B")];
  const choices = element("div", { class: "row compare-choices", role: "group", "aria-label": "Vote" });
  // What was judged before names were shown stays as it was judged.
  const before = () => comparison.prompts.findLastIndex((each, index) => index < at && !each.revealed);
  const back = button("Back", () => go(before()));
  const over = button("See the result now", () => finish(), { class: "quiet" });
  clear(root).append(problems, progress, prompt, element("div", { class: "compare-sides" }, ...answers.map((each) => each.element)), choices,
    element("div", { class: "row" }, back, over));
  const ending = new AbortController();
  let at = Math.max(0, comparison.prompts.findIndex((each) => !each.vote));
  const buttons = [["left", "A is better", "1"], ["right", "B is better", "2"], ["tie", "As good", "3"], ["neither", "Neither will do", "4"]]
    .map(([value, words, key]) => button([words, " ", element("kbd", {}, key)], () => judge(value), { "data-vote": value }));
  for (const each of buttons) choices.append(each);

  function keyed(event) {
    const value = KEYS[event.key];
    const typing = event.target.closest?.("input, textarea, select, dialog");
    if (!value || typing || event.ctrlKey || event.metaKey || event.altKey || root.offsetParent === null) return;
    event.preventDefault();
    judge(value);
  }
  document.addEventListener("keydown", keyed);

  function judge(value) {
    const each = comparison.prompts[at];
    if (!each?.answers || each.revealed) return;
    const named = { left: each.flipped ? "second" : "first", right: each.flipped ? "first" : "second" };
    each.vote = named[value] ?? value;
    keep();
    const next = comparison.prompts.findIndex((other, index) => index > at && !other.vote);
    if (next >= 0) go(next);
    else if (comparison.prompts.every((other) => other.vote)) finish();
    else go(comparison.prompts.findIndex((other) => !other.vote));
  }

  function go(index) {
    at = Math.max(0, index);
    show();
    prompt.focus({ preventScroll: true });
  }

  function show() {
    const each = comparison.prompts[at];
    const voted = comparison.prompts.filter((other) => other.vote).length;
    const ready = comparison.prompts.filter((other) => other.answers).length;
    const made = ready < comparison.prompts.length ? `, ${ready} answered so far` : "";
    progress.textContent = `Prompt ${at + 1} of ${comparison.prompts.length} · ${voted} judged${made}`;
    clear(prompt).append(visibleNodes(each.prompt));
    const order = each.flipped ? [1, 0] : [0, 1];
    answers.forEach((place, index) => place.show(each.answers?.[order[index]]));
    for (const each_ of buttons) {
      each_.disabled = !each.answers;
      const value = each_.dataset.vote;
      const named = { left: each.flipped ? "second" : "first", right: each.flipped ? "first" : "second" }[value] ?? value;
      each_.setAttribute("aria-pressed", String(each.vote === named));
    }
    back.disabled = before() < 0;
  }

  /** Answer one prompt by both; the sides share the seed, and nobody sees which was first. */
  async function answer(each) {
    const found = await Promise.all(comparison.sides.map((one) => ask(one.model, each)));
    each.answers = found;
    each.alike = found[0].text === found[1].text;
    // Nobody can prefer either.
    if (each.alike) each.vote = "tie";
  }

  async function ask(name, each) {
    const model = models.get(name);
    const head = comparison.system.trim() ? [{ role: "system", content: comparison.system }] : [];
    const source = model?.chat === false ? { prompt: each.prompt } : { messages: [...head, { role: "user", content: each.prompt }] };
    const body = { model: name, ...source, ...comparison.parameters, seed: each.seed };
    const whole = await request("POST", "generate", body, { signal: ending.signal });
    const [output] = whole.outputs;
    return { text: output.text, finish_reason: output.finish_reason, tokens: output.token_ids.length };
  }

  async function run() {
    clearError(problems);
    try {
      await models.refresh();
      for (const each of comparison.prompts) {
        if (each.answers) continue;
        await answer(each);
        if (ending.signal.aborted) return;
        keep();
        // What is looked at may have been judged by being alike.
        if (comparison.prompts[at].vote && comparison.prompts[at].alike && each === comparison.prompts[at]) {
          const next = comparison.prompts.findIndex((other) => !other.vote);
          if (next >= 0) at = next;
          else return finish();
        }
        show();
      }
    } catch (error) {
      if (error.name !== "AbortError") showError(problems, error, { again: run });
    }
  }

  function stop() {
    ending.abort();
    document.removeEventListener("keydown", keyed);
  }

  function finish() {
    stop();
    done();
  }

  show();
  run();
  return { stop };
}

function side(label) {
  const text = element("div", { class: "compare-answer", tabindex: 0 });
  const made = element("section", { class: "card", "aria-label": `Answer ${label}` }, element("h2", {}, `Answer ${label}`), text);
  return {
    element: made,
    show(answer) {
      clear(text);
      made.setAttribute("aria-busy", String(!answer));
      if (!answer) text.append(element("p", { class: "note" }, "is being written…"));
      else if (answer.text.trim() === "") text.append(element("p", { class: "note" }, "(nothing)"));
      else text.append(visibleNodes(answer.text));
    },
  };
}
