// One text under two checkpoints, token by token: where their tokens are not the same, by the stretches that both have.

import { button, clear, element, visible } from "./dom.js";
import { reveal } from "./fields.js";
import { curve, figure, figures } from "./score_text.js";
import { face, legend, percent, quoted, scored, spans, surprise } from "./tokens.js";

const PAGE = 1500;
const LISTED = 12;

/** The bits of some tokens together; null if one has no probability. */
function bitsOf(tokens) {
  let sum = 0;
  for (const token of tokens) {
    if (token.probability === null) return null;
    sum += surprise(token.probability);
  }
  return sum;
}

/** The shortest stretches at whose ends both have the end of a token: `{text, bytes, sides, bits, difference}`. */
export function aligned(first, second) {
  const groups = [];
  const sides = [first, second];
  const next = [0, 0];
  while (next[0] < first.length || next[1] < second.length) {
    const own = [[], []];
    const size = [0, 0];
    do {
      const left = [0, 1].filter((side) => next[side] < sides[side].length);
      if (!left.length) break;
      const side = left.length === 1 ? left[0] : size[0] <= size[1] ? 0 : 1;
      const token = sides[side][next[side]++];
      own[side].push(token);
      size[side] += token.bytes.length;
    } while (size[0] !== size[1] || !size[0]);
    const longer = own[0].length ? own[0] : own[1];
    const bytes = longer.flatMap((token) => token.bytes);
    const bits = own.map(bitsOf);
    const difference = bits[0] === null || bits[1] === null ? null : bits[0] - bits[1];
    groups.push({ text: new TextDecoder().decode(new Uint8Array(bytes)), bytes, sides: own, bits, difference });
  }
  return groups;
}

function sideOf(name, tokens) {
  const list = tokens.map((token) => [element("span", { class: "token-name" }, face(token)), ` ${percent(token.probability)}${token.rank ? `, rank ${token.rank.toLocaleString("en")}` : ""} `]);
  return element("tr", {}, element("th", { scope: "row" }, visible(name)), element("td", {}, ...list.flat()));
}

function verdict(results, names) {
  const [one, other] = results.map((result) => result.bits_per_byte);
  if (one === null || other === null) return null;
  if (Math.abs(one - other) < 1e-6) return element("p", {}, "Both need the same number of bits.");
  const better = one < other ? 0 : 1;
  return element("p", {}, element("strong", {}, visible(names[better])), ` expects the text more: it needs ${figure(Math.abs(one - other))} bits per byte less, ${percent(Math.abs(one - other) / Math.max(one, other))} of what the other one takes.`);
}

export function showPair(root, answers, names) {
  const results = answers.map((answer) => answer.results[0]);
  const labels = names.map((name, at) => `${at ? "Second" : "First"}: ${visible(name)}`);
  clear(root).append(
    ...results.map((result, at) => element("section", { "aria-label": labels[at] }, element("h3", {}, labels[at]), figures(result))),
    element("section", { "aria-label": "Verdict" }, verdict(results, names)),
  );
  const along = curve(results.map((result, at) => ({ name: labels[at], segments: result.segments })));
  if (!results.every((result) => result.per_token)) {
    if (along) root.append(along);
    return;
  }

  const groups = aligned(...results.map((result) => result.per_token.map(scored)));
  const about = element("div", { "aria-live": "polite" });
  const tokens = spans([], { by: "difference", onpick: pick, label: "The text’s tokens by which checkpoint expected them more" });
  const heat = element("div", { class: "heat" }, tokens.element);
  const where = element("span", { class: "note" });
  const back = button("← Earlier", () => turn(shown - 1), { class: "small" });
  const on = button("Later →", () => turn(shown + 1), { class: "small" });
  const count = Math.ceil(groups.length / PAGE) || 1;
  let shown = 0;

  function turn(next) {
    shown = next;
    back.disabled = shown === 0;
    on.disabled = shown === count - 1;
    where.textContent = `Part ${shown + 1} of ${count}`;
    tokens.replace(groups.slice(shown * PAGE, (shown + 1) * PAGE));
    clear(about);
  }

  function pick(index) {
    const group = tokens.tokens[index];
    tokens.select(index);
    const words = group.difference === null ? "One of them has no probability for it." : `${group.bits[0].toFixed(2)} bits under the first, ${group.bits[1].toFixed(2)} under the second.`;
    clear(about).append(
      element("h3", {}, element("span", { class: "token-name" }, face(group))),
      element("p", {}, words),
      element("table", {}, element("tbody", {}, ...group.sides.map((side, at) => sideOf(names[at], side)))),
    );
  }

  function goTo(index) {
    if (Math.floor(index / PAGE) !== shown) turn(Math.floor(index / PAGE));
    pick(index % PAGE);
    reveal(heat);
    tokens.focus(index % PAGE);
  }

  const order = groups.map((_, index) => index).filter((index) => groups[index].difference !== null);
  const listed = (title, sign) => {
    const own = order.filter((index) => groups[index].difference * sign > 0.5).sort((a, b) => sign * (groups[b].difference - groups[a].difference));
    const items = own.slice(0, LISTED).map((index) => element("li", {}, button(visible(`${quoted(groups[index])} · ${Math.abs(groups[index].difference).toFixed(1)} bits`), () => goTo(index))));
    return items.length ? element("section", { "aria-label": title }, element("h3", {}, title), element("ol", { class: "surprising" }, ...items)) : null;
  };
  root.append(
    element(
      "section",
      { "aria-label": "The text by its tokens" },
      element("h3", {}, "Token by token"),
      element("div", { class: "colours" }, legend("difference")),
      count > 1 ? element("div", { class: "row wrap" }, back, where, on) : null,
      heat,
      about,
    ),
    ...[listed("What the first expected more", -1), listed("What the second expected more", 1), along].filter(Boolean),
  );
  turn(0);
}
