// Tokens as coloured spans: how probable each was, how uncertain the network, how far down its list. Every tab that
// shows tokens takes them from here, so that a colour means the same everywhere.

import { element, visible, visibleNodes } from "./dom.js";

const NO_VALUE = 9999;
const STYLE = new URL("tokens.css", import.meta.url).href;

document.head.append(element("link", { rel: "stylesheet", href: STYLE }));

/**
 * What tokens can be coloured by. `value(token)` is a number or null, `limits` are where each next level begins (level 0
 * is not coloured), `words(value)` says it, `ranges` are the legend's words for the levels.
 */
export const MEASURES = {
  probability: {
    label: "Probability",
    value: (token) => token.probability,
    level: (value) => [0.5, 0.2, 0.05, 0.01, 0.001].filter((limit) => value < limit).length,
    words: (value) => `probability ${percent(value)}`,
    ranges: ["over 50 %", "20–50 %", "5–20 %", "1–5 %", "0.1–1 %", "under 0.1 %"],
  },
  entropy: {
    label: "Entropy",
    value: (token) => token.entropy,
    level: (value) => [0.5, 1, 2, 3, 4.5].filter((limit) => value >= limit).length,
    words: (value) => `entropy ${value.toFixed(2)} nats`,
    ranges: ["under 0.5 nats", "0.5–1", "1–2", "2–3", "3–4.5", "over 4.5"],
  },
  rank: {
    label: "Rank",
    value: (token) => token.rank,
    level: (value) => [2, 4, 11, 101, 1001].filter((limit) => value >= limit).length,
    words: (value) => `rank ${value.toLocaleString("en")}`,
    ranges: ["1st", "2–3", "4–10", "11–100", "101–1,000", "beyond"],
  },
  surprise: {
    label: "Surprise",
    value: (token) => surprise(token.probability),
    level: (value) => [1, 3, 5, 8, 12].filter((limit) => value >= limit).length,
    words: (value) => `surprise ${value.toFixed(1)} bits`,
    ranges: ["under 1 bit", "1–3", "3–5", "5–8", "8–12", "over 12"],
  },
  difference: {
    label: "Which checkpoint expected it more",
    value: (token) => token.difference,
    // -3 to 3: the first checkpoint knew better, or the second one.
    level: (value) => Math.sign(value) * [0.5, 2, 5].filter((limit) => Math.abs(value) >= limit).length,
    words: (value) => `${Math.abs(value).toFixed(1)} bits less surprising for the ${value < 0 ? "first" : "second"}`,
    ranges: ["under 0.5 bits apart", "0.5–2", "2–5", "over 5"],
  },
};

/** Bits of a probability. */
export function surprise(probability) {
  return probability === null ? null : probability > 0 ? -Math.log2(probability) : NO_VALUE;
}

/** A probability as people read it. */
export function percent(probability) {
  if (probability === null || probability === undefined) return "–";
  const share = 100 * probability;
  if (share === 0) return "0 %";
  if (share < 0.001) return "<0.001 %";
  return `${share >= 99.95 ? share.toFixed(0) : share >= 10 ? share.toFixed(1) : share.toPrecision(2)} %`;
}

/** A token of `/generate`, from its trace and its log-probabilities. */
export function traced(trace, logprobs) {
  const { token_id, text, entropy, rank, raw_probability } = trace;
  return { token_id, text, bytes: logprobs?.bytes ?? null, probability: raw_probability, entropy, rank, trace };
}

/** A token of `/score`. */
export function scored(entry) {
  const { token_id, text, bytes, logprob, entropy, rank } = entry;
  const probability = logprob === null ? null : logprob <= -NO_VALUE ? 0 : Math.exp(logprob);
  return { token_id, text, bytes, probability, entropy, rank, top: entry.top ?? null };
}

/** The text of a token in quotes, for labels: hidden characters, spaces at the ends and new lines can be told apart. */
export function quoted(token) {
  return `“${spelled(token).replaceAll("\n", "⏎").replaceAll("\t", "⇥")}”`;
}

/** The text, or the bytes of a part of a character. */
function spelled(token) {
  if (token.text.includes("\ufffd") && token.bytes && !holdsReplacement(token.bytes)) {
    return token.bytes.map((byte) => `‹${byte.toString(16).padStart(2, "0")}›`).join("");
  }
  return visible(token.text);
}

/** Whether the bytes spell out U+FFFD itself. */
function holdsReplacement(bytes) {
  return bytes.some((byte, at) => byte === 0xef && bytes[at + 1] === 0xbf && bytes[at + 2] === 0xbd);
}

/** The nodes that show a token's text: new lines and tabs as marks, which also act where they stand in a text. */
export function face(token, { acting = false } = {}) {
  const shown = document.createDocumentFragment();
  const text = spelled(token) === visible(token.text) ? token.text : spelled(token);
  for (const piece of text.split(/(\n|\t)/)) {
    if (piece === "\n") shown.append(element("span", { class: "token-mark", "aria-hidden": "true" }, "⏎"), acting ? "\n" : "");
    else if (piece === "\t") shown.append(element("span", { class: "token-mark", "aria-hidden": "true" }, "⇥"), acting ? "\t" : "");
    else if (piece) shown.append(visibleNodes(piece));
  }
  if (!shown.childNodes.length) shown.append(element("span", { class: "token-mark" }, "∅"));
  return shown;
}

/** What the colours of a measure mean. */
export function legend(by) {
  const measure = MEASURES[by];
  const list = element("ul", { class: "token-legend", "aria-label": `Colours: ${measure.label.toLowerCase()}` });
  if (by === "difference") {
    for (const level of [-3, -2, -1, 0, 1, 2, 3]) {
      const words = level === 0 ? "alike" : Math.abs(level) === 3 ? (level < 0 ? "first, by over 5 bits" : "second, by over 5 bits") : measure.ranges[Math.abs(level)];
      list.append(element("li", {}, element("span", { class: "token-swatch", dataset: { side: level } }, "a"), words));
    }
    return list;
  }
  measure.ranges.forEach((words, level) =>
    list.append(element("li", {}, element("span", { class: "token-swatch", dataset: { level } }, "a"), words)),
  );
  return list;
}

/**
 * Tokens in a row, coloured by a measure.
 *
 * `onpick(index)` is told of a click, or of Enter or the space bar on a token; the arrow keys, Home and End go from
 * token to token, which are one stop of the Tab key together. `label` names the group.
 * -> {element, append(token), replace(tokens), by(measure), select(index), focus(index), tokens}
 */
export function spans(tokens, { by = "probability", onpick = null, label = "Tokens" } = {}) {
  const root = element("div", { class: "tokens", role: "group", "aria-label": label });
  const made = { element: root, tokens: [] };
  let measure = by;
  let selected = -1;
  let reached = 0;

  function paint(node, token, index) {
    const { value, level, words } = MEASURES[measure];
    const found = token.probability === undefined && measure !== "difference" ? null : (value(token) ?? null);
    delete node.dataset.level;
    delete node.dataset.side;
    if (found !== null) node.dataset[measure === "difference" ? "side" : "level"] = level(found);
    const facts = found === null ? (token.note ?? "the first one: nothing precedes it") : words(found);
    const title = `${quoted(token)}, ${facts}${token.note && found !== null ? `, ${token.note}` : ""}`;
    node.title = title;
    if (onpick) node.setAttribute("aria-label", `Token ${index + 1}: ${title}`);
  }

  function add(token) {
    const index = made.tokens.length;
    made.tokens.push(token);
    const node = element("span", { class: ["token", token.kind] }, face(token, { acting: true }));
    node.dataset.index = index;
    if (onpick) {
      node.setAttribute("role", "button");
      node.tabIndex = index === reached ? 0 : -1;
    }
    paint(node, token, index);
    root.append(node);
  }

  function reach(index) {
    const next = Math.max(0, Math.min(made.tokens.length - 1, index));
    if (root.children[reached]) root.children[reached].tabIndex = -1;
    reached = next;
    const node = root.children[reached];
    if (node) node.tabIndex = 0;
    return node;
  }

  function indexOf(event) {
    const node = event.target.closest?.(".token");
    return node && root.contains(node) ? Number(node.dataset.index) : null;
  }

  if (onpick) {
    root.addEventListener("click", (event) => {
      const index = indexOf(event);
      if (index === null) return;
      reach(index);
      onpick(index);
    });
    root.addEventListener("keydown", (event) => {
      const index = indexOf(event);
      if (index === null || event.ctrlKey || event.metaKey || event.altKey) return;
      const to = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: made.tokens.length - 1 }[event.key];
      if (event.key === "Enter" || event.key === " ") onpick(index);
      else if (to !== undefined) reach(to)?.focus();
      else return;
      event.preventDefault();
    });
  }

  Object.assign(made, {
    append: add,
    replace(next) {
      made.tokens = [];
      selected = -1;
      reached = 0;
      root.replaceChildren();
      next.forEach(add);
    },
    by(next) {
      measure = next;
      made.tokens.forEach((token, index) => paint(root.children[index], token, index));
    },
    select(index) {
      root.children[selected]?.removeAttribute("aria-pressed");
      selected = index;
      root.children[selected]?.setAttribute("aria-pressed", "true");
      if (root.children[selected]) reach(selected);
    },
    focus(index) {
      const node = reach(index);
      node?.scrollIntoView({ block: "nearest" });
      node?.focus({ preventScroll: true });
    },
  });
  made.replace(tokens);
  return made;
}

/** A labelled choice of measures; `onchange(name)`. */
export function measures(names, { label = "Colour by", onchange, value = names[0] }) {
  const select = element("select", { onchange: () => onchange(select.value) },
    ...names.map((name) => element("option", { value: name }, MEASURES[name].label)));
  select.value = value;
  return element("label", { class: "inline" }, `${label} `, select);
}
