// How one turn is shown: who wrote it, its text (Markdown for answers, unless raw is asked for), and what can be done.

import { button, clear, copyButton, element, visible, visibleNodes } from "./dom.js";
import { blocks } from "./markdown.js";
import { busy, facts } from "./chat_run.js";

// A block that is still growing is drawn anew each time; beyond this it is shown as plain text until it is whole.
const LONGEST_LIVE = 2000;

/** Shows a growing text: blocks that are whole stay, code and long blocks are added to, any other last one is drawn anew. */
class Growing {
  #settled = 0;
  #last = null;
  #plain = null;
  #whole = null;

  constructor(place) {
    this.place = place;
  }

  show(text, over) {
    if (text === this.#whole) return;
    this.#whole = over ? text : null;
    const rest = text.slice(this.#settled);
    const found = blocks(rest);
    const last = found.pop();
    for (const block of found) this.#put(block.node(), false);
    if (found.length) this.#settled += found.at(-1).end;
    if (!last) return;
    const from = found.at(-1)?.end ?? 0;
    const plain = last.code ?? (rest.length - from > LONGEST_LIVE ? rest.slice(from).trimStart() : null);
    if (over || plain === null) this.#put(last.node());
    else if (this.#plain && plain.startsWith(this.#plain.text)) {
      this.#plain.node.append(visibleNodes(plain.slice(this.#plain.text.length)));
      this.#plain.text = plain;
    } else {
      const node = last.code === null ? element("p", { class: "raw" }, visibleNodes(plain)) : last.node();
      this.#put(node);
      this.#plain = { node: node.querySelector("code") ?? node, text: plain };
    }
  }

  /** Put a block after the settled ones, in place of what was drawn of the last one. */
  #put(node, isLast = true) {
    this.#last?.remove();
    this.place.append(node);
    this.#last = isLast ? node : null;
    this.#plain = null;
  }
}

const CLOSE = "</think>";

/**
 * What a checkpoint thinks before it answers (null: nothing), and what it says. Some templates open the block in the prompt,
 * so that an answer has its end alone.
 */
function apart(text) {
  const opened = /^\s*<think>/.exec(text)?.[0];
  const end = text.indexOf(CLOSE);
  if (end < 0) return opened ? { thought: text.slice(opened.length), said: "", thinking: true } : { thought: null, said: text };
  return { thought: text.slice(opened?.length ?? 0, end), said: text.slice(end + CLOSE.length).trimStart(), thinking: false };
}

const NAMES = { user: "You", assistant: "Answer", prompt: "Text", continuation: "Continuation" };

/**
 * One turn's element. `acts` are what can be done: {edit, retry, goOn, move, run, share, curl, python}.
 * -> {element, update()}: `update` shows what has changed of a turn that is being written.
 */
export function turnView(turn, { place, acts }) {
  const generated = turn.role === "assistant" || turn.role === "continuation";
  const body = element("div", { class: "body", dir: "auto", dataset: { testid: generated ? "answer" : "asked" } });
  const line = element("p", { class: "note facts" });
  const trouble = element("p", { class: "trouble", hidden: true });
  const actions = element("div", { class: "row actions" });
  const forgotten = element("p", { class: "note", hidden: true });
  const who = element("span", { class: "who" }, generated ? visible(turn.model ?? "Answer") : NAMES[turn.role]);
  const article = element(
    "article",
    { class: ["turn", turn.role], "aria-label": generated ? `Answer of ${visible(turn.model ?? "")}` : NAMES[turn.role], dataset: { turn: turn.id } },
    element("header", { class: "row" }, who, turn.edited ? element("span", { class: "chip" }, "edited") : null),
    forgotten,
    body,
    trouble,
    generated ? line : null,
    actions,
  );
  let raw = turn.role === "continuation" || turn.raw === true;
  let growing = null;
  let thoughts = null;
  let wasRunning = null;

  let drawn = "";

  function redraw() {
    clear(body);
    drawn = "";
    growing = thoughts = null;
    body.classList.toggle("raw", raw || !generated);
    if (generated && !raw) growing = new Growing(body);
    draw();
  }

  function draw() {
    body.querySelector(":scope > .waiting")?.remove();
    if (growing && !turn.text.startsWith(drawn)) return redraw();
    if (growing) answered();
    else if (turn.role === "continuation") continued();
    else if (body.lastChild?.nodeType === Node.TEXT_NODE && drawn && turn.text.startsWith(drawn)) {
      // Only what is new is added, whatever the length.
      body.append(visibleNodes(turn.text.slice(drawn.length)));
    } else clear(body).append(visibleNodes(turn.text));
    drawn = turn.text;
    if (!turn.text && turn.role === "assistant" && busy(turn)) clear(body).append(element("span", { class: "waiting", "aria-hidden": "true" }, "●●●"));
  }

  /** What is said, and folded above it what was thought. */
  function answered() {
    const { thought, said, thinking } = apart(turn.text);
    if (thought !== null) {
      if (!thoughts) {
        const rest = element("div");
        thoughts = element("details", { class: "thoughts" }, element("summary"), element("div", { class: "raw" }));
        clear(body).append(thoughts, rest);
        growing = new Growing(rest);
      }
      thoughts.firstChild.textContent = thinking && busy(turn) ? "Thinking…" : "What it thought";
      clear(thoughts.lastChild).append(visibleNodes(thought.trim()));
    }
    growing.show(said, !busy(turn));
  }

  /** A text that a base checkpoint goes on with is one text: what was given, and what came. */
  function continued() {
    if (!body.firstChild || !turn.text.startsWith(drawn)) {
      clear(body).append(element("span", { class: "given" }, visibleNodes(turn.prompt ?? "")), element("span", { class: "made" }));
      drawn = "";
    }
    body.lastChild.append(visibleNodes(turn.text.slice(drawn.length)));
  }

  function update() {
    const running = busy(turn);
    draw();
    article.classList.toggle("running", running);
    line.hidden = running || !turn.state;
    if (!line.hidden) line.textContent = visible(facts(turn));
    forgotten.hidden = !turn.forgotten;
    forgotten.textContent = `The context is full: the oldest ${turn.forgotten} messages were not read.`;
    trouble.hidden = !turn.trouble;
    trouble.textContent = turn.trouble ? `Broken off: ${visible(turn.trouble)}` : "";
    if (running !== wasRunning) {
      wasRunning = running;
      renew();
    }
  }

  /** What can be done, by what stands beside it and after it now. */
  function renew() {
    clear(actions).append(...(busy(turn) ? [] : buttons()));
    article.classList.toggle("answered", turn.role === "prompt" && !acts.unanswered(turn));
  }

  function buttons() {
    const { position, count } = place();
    const made = [];
    if (count > 1) {
      made.push(
        element(
          "span",
          { class: "row branch", role: "group", "aria-label": "Versions" },
          button("‹", () => acts.move(turn, -1), { class: "quiet", "aria-label": "Version before", disabled: position === 0 }),
          element("span", { class: "note" }, `${position + 1}/${count}`),
          button("›", () => acts.move(turn, 1), { class: "quiet", "aria-label": "Version after", disabled: position === count - 1 }),
        ),
      );
    }
    made.push(copyButton("Copy", () => turn.text, { class: "quiet", "aria-label": "Copy message" }));
    if (generated) {
      if (turn.role === "assistant") {
        const turned = button("Raw", () => {
          raw = !raw;
          turned.setAttribute("aria-pressed", String(raw));
          redraw();
        }, { class: "quiet", "aria-pressed": String(raw) });
        made.push(turned);
      }
      made.push(button("Retry", () => acts.retry(turn), { class: "quiet" }));
      if (["stopped", "lost", "failed"].includes(turn.state) || turn.finish_reason === "length") {
        made.push(button("Go on", () => acts.goOn(turn), { class: "quiet", title: "Continue where it was cut off" }));
      }
      made.push(button("Edit", () => edit(), { class: "quiet" }));
      const more = element("details", { class: "more" }, element("summary", { class: "quiet" }, "More"));
      more.append(
        element(
          "div",
          { class: "row" },
          copyButton("Copy link", () => acts.link(turn), { class: "quiet", title: "A link that asks the same again" }),
          copyButton("Copy as curl", () => acts.curl(turn), { class: "quiet" }),
          copyButton("Copy as Python", () => acts.python(turn), { class: "quiet" }),
        ),
      );
      made.push(more);
    } else {
      made.push(button("Edit", () => edit(), { class: "quiet" }));
      if (acts.unanswered(turn)) made.push(button("Answer this", () => acts.run(turn), { class: "primary" }));
    }
    return made;
  }

  /** Change the text where it stands; what comes of it stands beside what was there. */
  function edit() {
    const field = element("textarea", { rows: Math.min(12, turn.text.split("\n").length + 1), "aria-label": "Edited text" });
    field.value = turn.text;
    const close = () => {
      form.remove();
      body.hidden = false;
      actions.hidden = false;
      actions.querySelector("button")?.focus();
    };
    const save = () => {
      const text = field.value;
      close();
      if (text.trim() && text !== turn.text) acts.edit(turn, text);
    };
    const form = element(
      "form",
      {
        class: "column edit",
        onsubmit: (event) => {
          event.preventDefault();
          save();
        },
        onkeydown: (event) => {
          if (event.key === "Escape") {
            event.stopPropagation();
            close();
          } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save();
        },
      },
      field,
      element(
        "div",
        { class: "row" },
        element("button", { type: "submit", class: "primary" }, generated ? "Save" : "Send"),
        button("Cancel", close),
      ),
    );
    body.hidden = actions.hidden = true;
    body.after(form);
    field.focus();
  }

  redraw();
  update();
  return { element: article, update, renew, edit, turn };
}
