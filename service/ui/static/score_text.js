// What scoring one text found: its figures, a curve along it, its tokens by how much they surprise, and the worst of them.

import { request } from "./api.js";
import { lines } from "./chart.js";
import { button, clear, element, visible } from "./dom.js";
import { clearError, showError } from "./errors.js";
import { facts, reveal } from "./fields.js";
import { face, legend, measures, percent, quoted, scored, spans, surprise } from "./tokens.js";

const PAGE = 1500;
const BEFORE = 3000;
const MEASURED = ["surprise", "probability", "entropy", "rank"];

export function figure(value, digits = 3) {
  return value === null || value === undefined ? "–" : value >= 1e6 ? value.toExponential(2) : Number(value.toPrecision(digits + (value >= 1000 ? 1 : 0))).toLocaleString("en");
}

/** The figures of a result. */
export function figures(result) {
  return facts([
    ["Perplexity", figure(result.perplexity, 4), "exp of the mean negative log-likelihood of a token"],
    ["Bits per byte", figure(result.bits_per_byte), "comparable between checkpoints with different tokens"],
    ["Bits per token", figure(result.nll_per_token === null ? null : result.nll_per_token / Math.LN2)],
    ["Tokens", result.tokens.toLocaleString("en")],
    ["Bytes", result.bytes.toLocaleString("en")],
  ]);
}

/**
 * A section with bits per token along a text, of each stretch by the place of its bytes, for one checkpoint or two;
 * `series` are `{name, segments}`, and `onpick(byte)` is told of a place that was chosen. Null for too short a text.
 */
export function curve(series, onpick = null) {
  if (!series.some(({ segments }) => segments.length > 2)) return null;
  const most = Math.max(...series.map(({ segments }) => segments.at(-1).end_byte)) - 1;
  const drawn = series.map(({ name, segments }, index) => ({
    name: series.length > 1 ? name : "bits per token",
    pattern: index,
    // What has no probability, as the first token, leaves a gap.
    points: segments.flatMap(({ start_byte, end_byte, nll, scored_tokens }) =>
      [start_byte, end_byte].map((byte) => [byte, scored_tokens ? nll / Math.LN2 / scored_tokens : NaN]),
    ),
  }));
  const title = `Bits per token${onpick ? "; a click leads to its place" : ""}`;
  const pick = onpick && ((byte) => onpick(Math.min(Math.max(0, byte), most)));
  const chart = lines(drawn, { title, x: { label: "byte", low: 0 }, y: { low: 0 }, height: 200, onpick: pick });
  return element("section", { "aria-label": "Curve" }, element("h3", {}, "Along the text"), chart);
}

/** What is known of one scored token. */
export function detail(token, index) {
  const known = token.probability !== null;
  const words = known
    ? [["Probability", percent(token.probability)], ["Surprise", `${surprise(token.probability).toFixed(2)} bits`], ["Rank", token.rank.toLocaleString("en")], ["Entropy", `${token.entropy.toFixed(2)} nats`]]
    : [];
  const top = token.top?.filter((other) => other.token_id !== token.token_id) ?? [];
  const others = top.length
    ? element("p", {}, "The likeliest others: ", ...top.flatMap((other, at) => [at ? ", " : null, element("span", { class: "token-name" }, face(other)), ` ${percent(Math.exp(other.logprob))}`]))
    : null;
  return element(
    "div",
    {},
    element("h3", {}, `Token ${(index + 1).toLocaleString("en")}: `, element("span", { class: "token-name" }, face(token))),
    known ? facts(words) : element("p", {}, "Nothing precedes it, so it has no probability."),
    known ? others : null,
  );
}

/** Pages of tokens: all of them, cut up, or stretches of the text that are scored again when they are looked at. */
function pagesOf(result, bytes, model) {
  if (result.per_token) {
    const all = result.per_token.map(scored);
    const starts = [];
    let at = 0;
    for (const token of all) {
      starts.push(at);
      at += token.bytes.length;
    }
    const pages = Array.from({ length: Math.ceil(all.length / PAGE) || 1 }, (_, page) => ({
      start: page * PAGE,
      start_byte: starts[page * PAGE] ?? 0,
      load: async () => all.slice(page * PAGE, (page + 1) * PAGE),
    }));
    return { pages, again: false };
  }
  const decoder = new TextDecoder();
  const whole = (at) => {
    // Where a token ends within a character, the character belongs to the stretch before.
    while (at < bytes.length && (bytes[at] & 0xc0) === 0x80) at += 1;
    return at;
  };
  const pages = result.segments.map((segment) => ({
    start: segment.start,
    start_byte: segment.start_byte,
    load: async (signal) => {
      const [from, to] = [whole(segment.start_byte), whole(segment.end_byte)];
      const prompt = decoder.decode(bytes.slice(whole(Math.max(0, from - BEFORE)), from));
      const text = decoder.decode(bytes.slice(from, to));
      const body = prompt ? { pairs: [{ prompt, completion: text }] } : { text };
      const answer = await request("POST", "score", { ...body, model, top: 5 }, { signal });
      return answer.results[0].per_token.map(scored);
    },
  }));
  return { pages, again: true };
}

export function showText(root, answer, { bytes, model }) {
  const [result] = answer.results;
  const { pages, again } = pagesOf(result, bytes, model);
  let measure = "surprise";
  let shown = 0;
  let ending = null;

  const about = element("div", { "aria-live": "polite" });
  const colours = element("div", { class: "row wrap colours" });
  const chooseMeasure = measures(MEASURED, { onchange: colour });
  const tokens = spans([], { by: measure, onpick: pick, label: "The text’s tokens" });
  const where = element("span", { class: "note" });
  const back = button("← Earlier", () => turn(shown - 1), { class: "small" });
  const on = button("Later →", () => turn(shown + 1), { class: "small" });
  const heat = element("div", { class: "heat" }, tokens.element);
  const place = element(
    "section",
    { "aria-label": "The text by its tokens" },
    element("h3", {}, "Where it surprises"),
    colours,
    pages.length > 1 ? element("div", { class: "row wrap" }, back, where, on) : null,
    heat,
    about,
  );

  function colour(next) {
    measure = next;
    tokens.by(measure);
    colours.replaceChildren(chooseMeasure, legend(measure));
  }

  function pick(index) {
    tokens.select(index);
    clear(about).append(detail(tokens.tokens[index], pages[shown].start + index));
  }

  /** Show a page; whether it is there. */
  async function turn(next) {
    ending?.abort();
    const own = (ending = new AbortController());
    shown = Math.max(0, Math.min(pages.length - 1, next));
    clear(about);
    clearError(place);
    back.disabled = shown === 0;
    on.disabled = shown === pages.length - 1;
    where.textContent = `Part ${shown + 1} of ${pages.length}${again ? ", scored again after the text before it" : ""}`;
    heat.setAttribute("aria-busy", "true");
    try {
      const page = await pages[shown].load(own.signal);
      if (own !== ending) return false;
      tokens.replace(page);
      heat.scrollTop = 0;
      return true;
    } catch (error) {
      if (error.name !== "AbortError") showError(place, error);
      return false;
    } finally {
      if (own === ending) heat.removeAttribute("aria-busy");
    }
  }

  /** Go to the token that holds a byte of the text. */
  async function goTo(byte, { focus = false } = {}) {
    const next = pages.findLastIndex((page) => page.start_byte <= byte);
    if ((next !== shown || !tokens.tokens.length) && !(await turn(next))) return;
    let at = pages[shown].start_byte;
    const index = tokens.tokens.findIndex((token) => (at += token.bytes.length) > byte);
    if (index < 0) return;
    pick(index);
    reveal(heat);
    const node = tokens.element.children[index];
    heat.scrollTop += node.getBoundingClientRect().top - heat.getBoundingClientRect().top - heat.clientHeight / 2;
    if (focus) node.focus({ preventScroll: true });
  }

  const worst = element(
    "ol",
    { class: "surprising" },
    ...result.surprising.map((entry) => {
      const token = scored(entry);
      const words = `${quoted(token)} · ${surprise(token.probability).toFixed(1)} bits · rank ${token.rank.toLocaleString("en")}`;
      return element("li", {}, button(visible(words), () => goTo(entry.start_byte, { focus: true })));
    }),
  );
  clear(root).append(
    element("section", { "aria-label": "Figures" }, figures(result)),
    ...[
      curve([{ name: model, segments: result.segments }], (byte) => goTo(byte)),
      place,
      result.surprising.length ? element("section", { "aria-label": "Most surprising tokens" }, element("h3", {}, "The most surprising tokens"), worst) : null,
    ].filter(Boolean),
  );
  colour(measure);
  return turn(0);
}
