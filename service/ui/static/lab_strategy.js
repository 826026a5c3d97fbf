// One strategy of the decoding lab: its settings, its answer token by token, and the tree of what could have been.

import { goingOn } from "./api.js";
import { button, clear, element, freshId, visible } from "./dom.js";
import { clearError, showError } from "./errors.js";
import { drawer } from "./parameters.js";
import { quoted, spans, traced } from "./tokens.js";

const ENDS = {
  stop: "ended by itself",
  length: "cut off at the token limit",
  deadline: "out of time",
  cancelled: "ended by the server",
  stopped: "stopped",
};
const EXPLAINED = { trace: true, logprobs: 10, stream: true, resumable: false };

/**
 * `host` has `rows` (the parameter table), `asked()` (`{ids, body}` of a run: the prompt's tokens, and what `/generate` is
 * sent), `onpick(strategy, index)`, `onremove(strategy)` and `onchange()`.
 */
export class Strategy {
  constructor(host, letter, values = {}) {
    this.host = host;
    this.letter = letter;
    this.measure = "probability";
    this.asked = null;
    this.root = null;
    this.shown = null;
    this.ending = null;
    this.selected = null;
    const heading = freshId("strategy");
    this.title = element("h3", { id: heading });
    this.summary = element("p", { class: "note" });
    const settings = element("div", {});
    this.drawer = drawer(settings, { descriptors: host.rows, without: ["seed", "max_tokens"], known: false });
    this.drawer.set(values);
    this.drawer.onchange = () => {
      this.sum();
      host.onchange();
    };
    this.tokens = spans([], { by: this.measure, onpick: (index) => this.pick(index), label: "The answer’s tokens" });
    this.facts = element("p", { class: "note", role: "status" });
    this.branches = element("div", { class: "branches" });
    this.remove = button("Remove", () => host.onremove(this), { class: "quiet small" });
    this.answer = element("div", { class: "answer" }, this.tokens.element, this.facts, this.branches);
    this.element = element(
      "section",
      { class: "strategy", "aria-labelledby": heading },
      element("div", { class: "row head" }, this.title, this.remove),
      this.summary,
      element("details", { class: "group" }, element("summary", {}, "Settings"), settings),
      this.answer,
    );
    this.name(letter);
    this.sum();
  }

  name(letter) {
    this.letter = letter;
    this.title.textContent = `Strategy ${letter}`;
    this.remove.setAttribute("aria-label", `Remove strategy ${letter}`);
  }

  get values() {
    return this.drawer.values();
  }

  sum() {
    const words = Object.entries(this.values).map(([name, value]) => `${name.replaceAll("_", " ")} ${JSON.stringify(value)}`);
    this.summary.textContent = visible(words.join(" · ") || "the checkpoint’s own settings");
  }

  /** The checkpoint's defaults, for the drawer. */
  use(defaults) {
    this.drawer.use({ defaults });
    this.sum();
  }

  by(measure) {
    this.measure = measure;
    this.tokens.by(measure);
  }

  stop() {
    this.ending?.abort();
  }

  /** Answer the prompt anew; resolves when the answer has ended. */
  run() {
    this.root = { parent: null, at: 0, tokens: [], children: [], end: null, label: "The first answer" };
    this.asked = this.host.asked();
    // Branches are written as their answer was, whatever is chosen meanwhile.
    Object.assign(this.asked.body, { ...this.values, seed: this.asked.body.seed, max_tokens: this.asked.body.max_tokens });
    this.show(this.root);
    return this.#write(this.root);
  }

  /** Go on from token `index` of what is shown with `contender` in its place. */
  branch(index, contender, rank) {
    const from = this.shown;
    const replaced = from.tokens[index];
    const taken = {
      token_id: contender.token_id,
      text: contender.text,
      bytes: contender.bytes,
      probability: contender.raw_probability,
      entropy: replaced.entropy,
      rank,
      kind: "taken",
      note: "taken by hand",
      trace: replaced.trace,
    };
    const node = {
      parent: from,
      at: index,
      tokens: [...from.tokens.slice(0, index), taken],
      children: [],
      end: null,
      label: `${index + 1}: ${quoted(taken)} for ${quoted(replaced)}`,
    };
    from.children.push(node);
    this.stop();
    this.show(node);
    this.pick(index);
    const { max_tokens: most } = this.asked.body;
    if (most === null || node.tokens.length < most) return this.#write(node);
    node.end = "length";
    this.#state();
    return Promise.resolve();
  }

  async #write(node) {
    const own = (this.ending = new AbortController());
    clearError(this.answer);
    this.answer.setAttribute("aria-busy", "true");
    this.#state("waiting");
    try {
      const there = node.tokens.map((token) => token.token_id);
      for await (const { event, data } of goingOn({ ...this.asked.body, ...EXPLAINED }, there, () => this.asked.ids, own.signal)) {
        if (event === "done") node.end = data.outputs[0].finish_reason;
        else if (event === "token") {
          data.trace.forEach((trace, at) => this.#add(node, traced(trace, data.logprobs[at])));
        }
      }
    } catch (error) {
      node.end = "stopped";
      if (error.name !== "AbortError") showError(this.answer, error);
    } finally {
      if (this.ending === own) this.ending = null;
      this.answer.removeAttribute("aria-busy");
      this.#tree();
      this.#state();
    }
  }

  #add(node, token) {
    node.tokens.push(token);
    if (node !== this.shown) return;
    this.tokens.append(token);
    this.#state("writing");
  }

  show(node) {
    this.shown = node;
    this.selected = null;
    this.tokens.replace(node.tokens);
    this.#tree();
    this.#state();
  }

  pick(index) {
    this.selected = index;
    this.tokens.select(index);
    this.host.onpick(this, index);
  }

  /** Nothing of it is looked at any more. */
  unpick() {
    this.selected = null;
    this.tokens.select(-1);
  }

  #state(doing = null) {
    const node = this.shown;
    if (!node) return;
    const known = node.tokens.filter((token) => token.probability > 0);
    const bits = known.reduce((sum, token) => sum - Math.log2(token.probability), 0) / (known.length || 1);
    const words = [`${node.tokens.length} tokens`];
    if (node.tokens.length) words.push(`${bits.toFixed(1)} bits each under the network`);
    words.push(doing ?? ENDS[node.end] ?? node.end ?? "writing");
    this.facts.textContent = words.join(" · ");
  }

  #tree() {
    clear(this.branches);
    if (!this.root?.children.length) return;
    const line = (node) => {
      const here = node === this.shown;
      const act = button(visible(node.label), () => this.show(node), { class: ["branch", here && "here"], "aria-current": here ? "true" : null });
      const below = node.children.length ? element("ul", {}, ...node.children.map(line)) : null;
      return element("li", {}, act, below);
    };
    this.branches.append(
      element("h4", {}, "Branches"),
      element("ul", { "aria-label": `Branches of strategy ${this.letter}` }, line(this.root)),
    );
  }
}
