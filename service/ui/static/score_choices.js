// Some continuations of one prompt, ranked by how much the checkpoint expects them.

import { clear, element, visible } from "./dom.js";
import { choiceField, field } from "./fields.js";
import { figure } from "./score_text.js";
import { face, legend, percent, scored, spans } from "./tokens.js";

const EXAMPLE = { prompt: "The capital of France is", choices: "Paris\nLyon\na city on the moon" };
const NORMALIZE = [["byte", "per byte: long choices are at no disadvantage"], ["token", "per token"], ["none", "as it is: the whole choice’s probability"]];
const COSTS = { byte: "nll_per_byte", token: "nll_per_token", none: "nll" };

/** Parts of a whole, from log-likelihoods. */
function shares(results) {
  const best = Math.min(...results.map((result) => result.nll));
  const weights = results.map((result) => Math.exp(best - result.nll));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  return weights.map((weight) => weight / total);
}

/** -> {element, values(), body(), show(root, answer)} */
export function choicesForm({ values = {}, onchange = () => {} }) {
  const prompt = element("textarea", { id: "score-prompt", rows: 2, spellcheck: "false", dataset: { parameter: "prompt" }, oninput: onchange });
  const choices = element("textarea", { id: "score-choices", rows: 4, spellcheck: "false", dataset: { parameter: "choices" }, oninput: onchange });
  const space = element("input", { type: "checkbox", id: "score-space", checked: values.space ?? true, onchange });
  const normalize = choiceField("Compare", NORMALIZE, { id: "score-normalize", onchange, dataset: { parameter: "normalize" } });
  prompt.value = values.prompt ?? EXAMPLE.prompt;
  choices.value = values.choices ?? EXAMPLE.choices;
  normalize.control.value = values.normalize ?? "byte";

  function lines() {
    return choices.value.split("\n").filter((line) => line !== "").map((line) => (space.checked ? ` ${line}` : line));
  }

  function show(root, answer) {
    const asked = lines();
    const own = shares(answer.results);
    const key = COSTS[normalize.control.value];
    const rows = answer.ranking.map((index, place) => {
      const result = answer.results[index];
      const tokens = spans(result.per_token.map(scored), { by: "surprise" });
      const inner = element("span", { class: "bar-fill" });
      inner.style.inlineSize = `${100 * own[index]}%`;
      return element(
        "tr",
        { class: [place === 0 && "chosen"] },
        element("td", {}, String(place + 1)),
        element("th", { scope: "row" }, tokens.element, element("span", { class: "off-screen" }, visible(asked[index] ?? ""))),
        element("td", { class: "bar-cell" }, element("span", { class: "bar", "aria-hidden": "true" }, inner), element("span", { class: "bar-words" }, percent(own[index]))),
        element("td", {}, figure(result[key] / Math.LN2)),
        element("td", {}, figure(result.perplexity)),
        element("td", {}, result.greedy_match ? "yes" : "no"),
      );
    });
    const heads = ["", "Choice", "Share among these", `Bits ${{ byte: "per byte", token: "per token", none: "in all" }[normalize.control.value]}`, "Perplexity", "Written at temperature 0"];
    clear(root).append(
      element(
        "section",
        { "aria-label": "Ranking" },
        element("h3", {}, "The likeliest first"),
        element("div", { class: "colours" }, legend("surprise")),
        element(
          "div",
          { class: "scroll", tabindex: 0, role: "region", "aria-label": "Choices" },
          element("table", { class: "stages choices" }, element("thead", {}, element("tr", {}, ...heads.map((head) => (head ? element("th", { scope: "col" }, head) : element("td", {}))))), element("tbody", {}, ...rows)),
        ),
        element("p", { class: "note" }, "The share is that of the whole choices’ probabilities; they are ranked by what Compare says."),
      ),
    );
  }

  return {
    element: element(
      "div",
      {},
      field("Prompt", prompt),
      field("Choices, one per line", choices),
      element("div", { class: "row wrap field" }, space, element("label", { for: space.id }, "A space before each choice")),
      normalize.element,
    ),
    values: () => ({ prompt: prompt.value, choices: choices.value, space: space.checked, normalize: normalize.control.value }),
    body: () => ({ prompt: prompt.value, choices: lines(), normalize: normalize.control.value }),
    show,
  };
}
