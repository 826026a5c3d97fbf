// What votes say: who was preferred how often, how sure that is, and the comparison as files.

import { bars } from "./chart.js";
import { button, download, element, visible, visibleNodes } from "./dom.js";

/** Wilson's interval of a share, 95 %: of `won` in `count`. */
export function wilson(won, count) {
  if (!count) return [0, 1];
  const z = 1.959964;
  const share = won / count;
  const middle = (share + (z * z) / (2 * count)) / (1 + (z * z) / count);
  const half = (z / (1 + (z * z) / count)) * Math.sqrt((share * (1 - share)) / count + (z * z) / (4 * count * count));
  return [Math.max(0, middle - half), Math.min(1, middle + half)];
}

/** How probable so uneven votes, or more so, would be if neither were better: the exact two-sided sign test. */
export function signTest(won, count) {
  const tail = Math.min(won, count - won);
  let [sum, log] = [0, -count * Math.LN2];
  for (let index = 0; index <= tail; index++) {
    sum += Math.exp(log);
    log += Math.log((count - index) / (index + 1));
  }
  return Math.min(1, 2 * sum);
}

/**
 * Counts and statistics of a comparison's votes; `share` is the first one's of the decided ones, `named` how many votes were
 * on answers that name one of the checkpoints, and so were hardly blind.
 */
export function result(comparison) {
  const votes = comparison.prompts.map((each) => each.vote);
  const count = (vote) => votes.filter((each) => each === vote).length;
  const [first, second] = [count("first"), count("second")];
  const decided = first + second;
  const [low, high] = wilson(first, decided);
  const names = comparison.sides.map((side) => side.model.toLowerCase());
  const told = (each) => each.answers?.some((answer) => names.some((name) => answer.text.toLowerCase().includes(name)));
  return {
    first, second, decided, ties: count("tie"), neither: count("neither"), open: votes.filter((vote) => !vote).length,
    named: comparison.prompts.filter((each) => each.vote && told(each)).length,
    share: decided ? first / decided : null, low, high, p: decided ? signTest(first, decided) : null,
  };
}

function votes(count) {
  return count === 1 ? "1 vote" : `${count} votes`;
}

function percent(share) {
  return `${(100 * share).toFixed(share === 0 || share === 1 ? 0 : 1)} %`;
}

/** The result in a sentence that claims no more than the votes do. */
export function verdict(comparison) {
  const found = result(comparison);
  const [one, other] = comparison.sides.map((side) => visible(side.model));
  if (!found.decided) return "No vote prefers either of the two yet.";
  if (found.first === found.second) return `Each of the two was preferred in ${found.first} of ${votes(found.decided)} that decided: nothing between them.`;
  const [won, name, share, interval] = found.first >= found.second
    ? [found.first, one, found.share, [found.low, found.high]]
    : [found.second, other, 1 - found.share, [1 - found.high, 1 - found.low]];
  const head = `${name} was preferred in ${won} of ${votes(found.decided)} that decided: ${percent(share)}, 95 % interval ${percent(interval[0])} to ${percent(interval[1])} (Wilson). `;
  const p = found.p < 0.001 ? "p < 0.001" : `p = ${found.p.toFixed(3)}`;
  if (found.p < 0.05) return `${head}Chance alone would seldom do that (exact sign test, ${p}).`;
  return `${head}That may well be chance (exact sign test, ${p}): more prompts would tell.`;
}

/** The result with every answer, whose it was, and what was voted. */
export function shown(comparison) {
  const found = result(comparison);
  const names = comparison.sides.map((side) => side.model);
  const open = found.open ? element("p", { class: "note" }, `${found.open === 1 ? "One prompt has" : `${found.open} prompts have`} no vote yet.`) : null;
  const chart = found.decided
    ? bars([
        { label: names[0], value: found.share, low: found.low, high: found.high, colour: 0, text: votes(found.first) },
        { label: names[1], value: 1 - found.share, low: 1 - found.high, high: 1 - found.low, colour: 1, text: votes(found.second) },
      ], { title: "Share of the decided votes, with 95 % intervals", high: 1, mark: 0.5 })
    : null;
  // Whose answers those are that nobody has judged yet is not told.
  const rows = comparison.prompts.filter((each) => each.vote).map((each) => {
    const [first, second] = each.answers ?? [];
    const words = { first: names[0], second: names[1], tie: each.alike ? "the same answer" : "as good", neither: "neither" }[each.vote] ?? "no vote";
    const cell = (label, content, won = false) => element("td", { class: won ? "won" : null, dataset: { label } }, content);
    return element("tr", {},
      cell("Prompt", visibleNodes(each.prompt)),
      cell(visible(names[0]), first ? visibleNodes(first.text) : "none", each.vote === "first"),
      cell(visible(names[1]), second ? visibleNodes(second.text) : "none", each.vote === "second"),
      cell("Vote", visible(words)));
  });
  const head = ["Prompt", visible(names[0]), visible(names[1]), "Vote"].map((name) => element("th", { scope: "col" }, name));
  const table = element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "All votes" },
    element("table", { class: "compare-table" }, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows)));
  return element("section", { class: "compare-result", "aria-label": "Result" },
    element("h2", {}, `${visible(names[0])} and ${visible(names[1])}`),
    element("p", { class: "compare-verdict", role: "status" }, verdict(comparison)), ...[chart].filter(Boolean),
    element("p", { class: "note" }, `${found.ties} as good, ${found.neither} where neither would do; these decide nothing.`), open,
    found.named ? element("p", { class: "note" }, `Votes on answers that name one of the two, and so were hardly blind: ${found.named}.`) : null,
    element("div", { class: "row" }, button("Export as JSON", () => download(name(comparison, "json"), asJson(comparison))), button("Export as CSV", () => download(name(comparison, "csv"), asCsv(comparison), "text/csv"))),
    table);
}

function name(comparison, ending) {
  return `comparison-${new Date(comparison.created).toISOString().slice(0, 16).replace(/[:T]/g, "-")}.${ending}`;
}

/** Everything, with the result, for other programs. */
export function asJson(comparison) {
  return `${JSON.stringify({ format: "topkapi-comparison", version: 1, ...comparison, result: result(comparison), verdict: verdict(comparison) }, null, 2)}\n`;
}

export function asCsv(comparison) {
  // A cell that begins like a formula would be one to a spreadsheet.
  const cell = (text) => `"${String(text ?? "").replace(/^[=+\-@\t\r]/, "'$&").replaceAll('"', '""')}"`;
  const rows = comparison.prompts.map((each, index) => [index + 1, each.prompt, each.answers?.[0]?.text, each.answers?.[1]?.text, each.vote ?? "", each.flipped ? "second" : "first", each.seed]);
  const head = ["number", "prompt", ...comparison.sides.map((side) => side.model), "vote", "shown_as_a", "seed"];
  return `${[head, ...rows].map((row) => row.map(cell).join(",")).join("\r\n")}\r\n`;
}
