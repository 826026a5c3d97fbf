// How one token came about: its candidates before the stages and after each, as bars, with what each stage cut.

import { button, clear, element, visible } from "./dom.js";
import { face, percent, quoted } from "./tokens.js";

const HOW = {
  sampled: "drawn by chance",
  greedy: "the likeliest that was left (temperature 0)",
  forced: "the only one that was left",
  searched: "found by the search",
};
const ROWS = 12;

function stageName(stage) {
  return stage.replaceAll("_", "-").replace(/^./, (first) => first.toUpperCase());
}

/**
 * Columns of a table: the network's own distribution, and each stage. `fixed` names stages that stand there also while
 * they are off.
 */
function columns(trace, fixed) {
  const raw = trace.contenders.map((each) => each.raw_probability);
  const found = [{ name: "Network", facts: [`${trace.candidates.toLocaleString("en")} tokens`, `${trace.entropy.toFixed(2)} nats`], shares: raw }];
  const names = fixed ? [...fixed, ...trace.stages.map((each) => each.stage).filter((each) => !fixed.includes(each))] : trace.stages.map((each) => each.stage);
  for (const name of names) {
    const stage = trace.stages.find((each) => each.stage === name);
    if (!stage) found.push({ name: stageName(name), facts: ["off"], shares: found.at(-1).shares, off: true });
    else {
      const facts = [`keeps ${stage.kept.toLocaleString("en")}`, stage.cut > 0 ? `cuts ${percent(stage.cut)}` : null, `${stage.entropy.toFixed(2)} nats`];
      found.push({ name: stageName(name), facts: facts.filter(Boolean), shares: stage.probabilities });
    }
  }
  return found;
}

function bar(share, most, before) {
  const cut = share === 0;
  const inner = element("span", { class: "bar-fill" });
  inner.style.inlineSize = `${(100 * share) / most}%`;
  const cell = element("td", { class: ["bar-cell", cut && "cut"] });
  cell.append(element("span", { class: "bar", "aria-hidden": "true" }, inner));
  cell.append(element("span", { class: "bar-words" }, cut ? (before === 0 ? "–" : "cut") : percent(share)));
  return cell;
}

/**
 * The table of a trace. `ontake(contender, index)` puts a button at each token but the chosen one; `chosen` says whether
 * the chosen token is marked; `fixed` names stages that stay while they are off.
 */
export function stageTable(trace, { ontake = null, chosen = true, fixed = null, rows = ROWS, caption } = {}) {
  const shown = columns(trace, fixed);
  const most = Math.max(...shown.flatMap((column) => column.shares), 1e-9);
  const indexes = trace.contenders.map((_, index) => index);
  const own = trace.contenders.findIndex((each) => each.token_id === trace.token_id);
  // What has little chance anywhere is left out first, but never the chosen one.
  const weight = (index) => Math.max(...shown.map((column) => column.shares[index]));
  const kept = new Set([own, ...[...indexes].sort((a, b) => weight(b) - weight(a))].slice(0, rows + 1));
  const body = indexes
    .filter((index) => kept.has(index) && index >= 0)
    .map((index) => {
      const contender = trace.contenders[index];
      const mine = chosen && index === own;
      const name = element("th", { scope: "row" }, element("span", { class: "token-name" }, face(contender)));
      const row = element("tr", { class: [mine && "chosen"] }, name);
      if (ontake) {
        const act = mine
          ? element("span", { class: "note" }, "chosen")
          : button("Take it", () => ontake(contender, index), { "aria-label": `Take ${quoted(contender)} and go on from there`, class: "small" });
        row.append(element("td", { class: "act" }, act));
      }
      shown.forEach((column, place) => row.append(bar(column.shares[index], most, shown[place - 1]?.shares[index])));
      return row;
    });
  const head = element(
    "tr",
    {},
    element("th", { scope: "col" }, "Token"),
    ontake ? element("th", { scope: "col" }, element("span", { class: "off-screen" }, "Go on from here")) : null,
    ...shown.map((column) =>
      element("th", { scope: "col", class: [column.off && "off"] }, column.name, ...column.facts.map((fact) => element("small", {}, fact))),
    ),
  );
  const table = element("table", { class: "stages" }, element("caption", { class: "off-screen" }, caption ?? "Candidates after each stage"), element("thead", {}, head), element("tbody", {}, ...body));
  return element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption ?? "Candidates after each stage" }, table);
}

/** What a trace says, in a sentence. */
export function sentence(token) {
  const { trace } = token;
  const parts = [];
  if (token.kind === "taken") {
    parts.push(`Taken by hand, at ${percent(token.probability)} under the network, where ${quoted(trace)} had been ${HOW[trace.how]}.`);
  } else {
    parts.push(`It was ${HOW[trace.how]}: rank ${trace.rank.toLocaleString("en")} of ${trace.candidates.toLocaleString("en")} under the network.`);
    const first = `Its probability was ${percent(trace.raw_probability)}`;
    parts.push(trace.stages.length ? `${first} before the stages and ${percent(trace.probability)} after them.` : `${first}, and no stage changed it.`);
    if (trace.noise !== null) parts.push(`Its Gumbel noise was ${trace.noise.toFixed(2)}, from the seed: the largest sum of log-probability and noise wins.`);
    if (trace.guessed) parts.push("It was read ahead and turned out right.");
  }
  return parts.join(" ");
}

/** Fill `root` with how the token at `index` came about. `ontake(contender, index)` goes on with another one. */
export function showTrace(root, { name, token, index, ontake }) {
  const heading = element("h3", {}, `${name}, token ${index + 1}: `, element("span", { class: "token-name" }, face(token)));
  const trace = token.kind === "taken" ? { ...token.trace, token_id: token.token_id } : token.trace;
  clear(root).append(
    heading,
    element("p", {}, visible(sentence(token))),
    stageTable(trace, { ontake, caption: `Candidates for token ${index + 1} after each stage` }),
  );
}
