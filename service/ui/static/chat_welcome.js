// The first screen: what this checkpoint is, what it can be asked, and how to serve another one.

import { button, clear, copyButton, element, visible } from "./dom.js";
import { requestText } from "./api.js";
import { models, size } from "./models.js";
import { render } from "./markdown.js";

// A network of this many parameters has little to say, whatever it was trained on.
const TINY = 100e6;
const SMALL = 2e9;

const FOR_TINY = ["Who are you?", "What is the capital of France?", "Write a short story about a lighthouse."];
const FOR_OTHERS = [
  "Explain in two sentences why the sky is blue.",
  "Write a Python function that finds the primes up to n, and say how it works.",
  "Plan a weekend in Istanbul, as a table of hours and places.",
];
const TO_CONTINUE = ["Once upon a time", "The city of", "It was late in the evening when"];

/** The card of a checkpoint, null where it has none or the server tells none. */
async function cardOf(model) {
  if (!model.card) return null;
  return requestText("GET", `models/${encodeURIComponent(model.name)}/card`).catch(() => null);
}

/** Prompts that the card shows an answer to (`> **Who are you?** I am …`): these work. */
export function samples(card) {
  const found = [...(card ?? "").matchAll(/^>\s*\*\*(.{3,120}?)\*\*/gm)].map((each) => each[1].trim());
  return [...new Set(found)].slice(0, 4);
}

function abilities(model) {
  if (!model.chat) {
    return "It is a base checkpoint: it has read texts and goes on with what you write. It knows neither questions nor turns.";
  }
  if (model.parameters < TINY) {
    return "It is tiny: it keeps to the form of a conversation and answers what is close to its training. Do not believe what it says.";
  }
  if (model.parameters < SMALL) return "It is small: it holds a conversation and writes simple texts, and is often wrong about facts.";
  return "It answers conversations. It can be wrong: check what matters.";
}

/** Fill `root` for `model`; `ask(text)` is called with an example that was chosen, `notebook()` leads to the Notebook tab. */
export async function welcome(root, model, { ask, notebook }) {
  const examples = element("div", { class: "examples" });
  const offer = (prompts) =>
    clear(examples).append(...prompts.map((prompt) => button(visible(prompt), () => ask(prompt), { class: "example" })));
  const facts = [
    `${size(model.parameters)} parameters`,
    `family ${model.family}`,
    `reads and writes ${model.context_length.toLocaleString("en")} tokens at most`,
    `held in ${model.dtype}`,
    model.license ? `licence ${model.license}` : null,
  ].filter(Boolean);
  const card = element("details", { class: "card-text", hidden: true }, element("summary", {}, "Its card: how it was made, and its limits"));
  clear(root).append(
    element("h2", {}, model.chat ? "Ask " : "Begin a text for ", element("span", { class: "name" }, visible(model.name))),
    element("p", { class: "note" }, facts.join(" · ")),
    element("p", {}, abilities(model)),
  );
  if (!model.chat && notebook) {
    root.append(
      element("p", { class: "row" }, "The Notebook is made for it: one text that is continued in place.", button("Open the Notebook", notebook, { class: "primary" })),
    );
  }
  offer(model.examples.length ? model.examples : model.chat ? (model.parameters < TINY ? FOR_TINY : FOR_OTHERS) : TO_CONTINUE);
  const invitation = element("p", { class: "note" }, model.examples.length ? "What it answers well:" : "To begin with:");
  root.append(invitation, examples, card, another(model));
  const text = await cardOf(model);
  if (text === null || models.get(model.name) !== model) return;
  const shown = samples(text);
  if (shown.length && !model.examples.length) {
    offer(shown);
    invitation.textContent = "Its card shows what it says to these:";
  }
  card.append(element("div", { class: "body" }, render(text, { wrapped: true })));
  card.hidden = false;
}

function another(model) {
  const command = "topkapi serve Qwen/Qwen2.5-0.5B-Instruct";
  return element(
    "details",
    { class: "another", open: model.parameters < TINY },
    element("summary", {}, "Serve a larger one"),
    element("p", {}, "Start the server with a model of the Hugging Face hub (owner/name) or a directory of your own; it is downloaded once:"),
    element("div", { class: "row command" }, element("code", {}, command), copyButton("Copy", () => command, { class: "quiet", "aria-label": "Copy the command" })),
  );
}
