// The Runs tab: training runs while they go on and afterwards. One or several are chosen from a list; their curves, what
// stands out, samples, settings, checkpoints and report follow what the runs write.

import { connection } from "./api.js";
import { short } from "./chart_scale.js";
import { clear, element, freshId, visible } from "./dom.js";
import { clearError, showError } from "./errors.js";
import { AXES, charts } from "./runs_charts.js";
import { Run, listed } from "./runs_data.js";
import { findings } from "./runs_findings.js";
import { checkpoints, differences, report, samples } from "./runs_parts.js";
import * as store from "./store.js";

const LIVE = 1500;
const LIST_EVERY = 3;
const MOST = 8;

document.head.append(element("link", { rel: "stylesheet", href: new URL("runs.css", import.meta.url).href }));

export async function mount(root) {
  const tab = new Tab(root);
  await tab.begin();
}

class Tab {
  #runs = new Map();
  #list = [];
  #chosen = store.get("runs.chosen", []);
  #view = { axis: "step", smoothing: 0.9, log: false, ...store.get("runs.view", {}) };

  constructor(root) {
    this.root = root;
    this.asked = 0;
    this.problems = element("div");
    this.list = element("ul", { class: "runs-list" });
    this.none = element("div", { class: "card runs-none", hidden: true });
    const side = element("details", { class: "runs-side", open: true }, element("summary", {}, "Training runs"), this.list);
    this.heading = element("div", { class: "runs-heading", id: "run-heading" });
    this.stands = element("ul", { class: "runs-findings", "aria-label": "What stands out", tabindex: 0 });
    this.controls = this.#controls();
    const drawn = element("section", { "aria-label": "Curves" });
    this.charts = charts(drawn);
    this.parts = [samples(), differences(), checkpoints(this.problems), report()];
    this.main = element("div", { class: "runs-main", hidden: true }, this.heading, this.stands, this.controls, drawn,
      ...this.parts.map((part) => part.element));
    root.append(this.problems, this.none, element("div", { class: "runs-split" }, side, this.main));
    this.side = side;
    if (matchMedia("(max-width: 767px)").matches) side.open = false;
  }

  async begin() {
    await this.#refresh();
    const again = async () => {
      if (this.root.offsetParent !== null && !document.hidden && !connection.isLost) await this.#refresh();
      setTimeout(again, LIVE);
    };
    setTimeout(again, LIVE);
    const now = () => !document.hidden && this.root.offsetParent !== null && this.#refresh();
    document.addEventListener("visibilitychange", now);
    connection.addEventListener("back", now);
  }

  #controls() {
    const axis = element("select", { id: freshId("axis") },
      ...Object.entries(AXES).map(([value, { title }]) => element("option", { value }, title)));
    axis.value = this.#view.axis;
    const shown = element("output", {}, String(this.#view.smoothing));
    const smoothing = element("input", { type: "range", min: 0, max: 0.99, step: 0.01, id: freshId("smoothing"), value: this.#view.smoothing });
    const log = element("input", { type: "checkbox", id: freshId("log"), checked: this.#view.log });
    const changed = () => {
      this.#view = { axis: axis.value, smoothing: Number(smoothing.value), log: log.checked };
      shown.textContent = smoothing.value;
      store.set("runs.view", this.#view);
      this.#show();
    };
    for (const control of [axis, log]) control.addEventListener("change", changed);
    smoothing.addEventListener("input", changed);
    return element("div", { class: "row runs-controls" },
      element("label", { for: axis.id }, "Across"), axis,
      element("label", { for: smoothing.id }, "Smoothing"), smoothing, shown,
      log, element("label", { for: log.id }, "Logarithmic"));
  }

  async #refresh() {
    if (this.refreshing) return;
    this.refreshing = true;
    try {
      // What is looked at is asked for more often than what else there is.
      if (this.asked++ % LIST_EVERY === 0 || !this.shownOnce) {
        this.#list = this.#ordered(await listed());
        this.#settle();
      }
      const running = this.#selected().filter((run) => run.details === null || this.#stale(run));
      const changed = (await Promise.all(running.map((run) => run.refresh()))).includes(true);
      this.#listRuns();
      if (changed || !this.shownOnce) this.#show();
      clearError(this.problems);
    } catch (error) {
      // What was deleted since the list was made is gone from the next one.
      if (error.type !== "unknown_run") showError(this.problems, error, { again: () => this.#refresh() });
    } finally {
      this.refreshing = false;
    }
  }

  /** The list in the order in which it was shown before, what is new first: of runs that go on now one, now another is the latest. */
  #ordered(list) {
    const before = this.#list.map((run) => run.name);
    const place = (run) => before.indexOf(run.name);
    return [...list.filter((run) => place(run) < 0), ...list.filter((run) => place(run) >= 0).sort((one, other) => place(one) - place(other))];
  }

  /** Whether the list says that a run wrote something since it was last asked. */
  #stale(run) {
    const told = this.#list.find((each) => each.name === run.name);
    return run.running || (told && (told.updated !== run.details.updated || told.state !== run.details.state));
  }

  /** Choose what is there: of the runs chosen before, else the one that goes on, else the latest. */
  #settle() {
    const known = new Set(this.#list.map((run) => run.name));
    this.#chosen = this.#chosen.filter((name) => known.has(name)).slice(0, MOST);
    const first = this.#list.find((run) => run.state === "running") ?? this.#list[0];
    if (!this.#chosen.length && first) this.#chosen = [first.name];
    for (const name of this.#runs.keys()) if (!known.has(name)) this.#runs.delete(name);
    for (const name of this.#chosen) if (!this.#runs.has(name)) this.#runs.set(name, new Run(name));
  }

  #selected() {
    return this.#chosen.map((name) => this.#runs.get(name)).filter(Boolean);
  }

  #choose(names) {
    this.#chosen = names;
    store.set("runs.chosen", names);
    this.#settle();
    this.shownOnce = false;
    this.#listRuns();
    this.#refresh();
  }

  #listRuns() {
    this.none.hidden = this.#list.length > 0;
    this.side.hidden = this.#list.length === 0;
    if (!this.#list.length && !this.none.children.length) {
      this.none.append(
        element("h2", {}, "No training runs yet"),
        element("p", {}, "Runs in the server's directory of runs appear here while they train: runs/ where it was started, or the one that --runs-directory names."),
        element("pre", {}, "topkapi pretrain --data my.txt --model tiny --out runs/mine"),
      );
    }
    const seen = JSON.stringify([this.#list, this.#chosen]);
    if (seen === this.seen) return;
    this.seen = seen;
    const focused = this.list.contains(document.activeElement) ? document.activeElement.dataset.run : null;
    clear(this.list).append(...this.#list.map((run, index) => this.#row(run, index)));
    if (focused !== null) [...this.list.querySelectorAll("input")].find((box) => box.dataset.run === focused)?.focus();
  }

  #row(run, index) {
    const chosen = this.#chosen.includes(run.name);
    const id = `run-${index}`;
    const box = element("input", { type: "checkbox", id, dataset: { run: run.name }, checked: chosen, disabled: !chosen && this.#chosen.length >= MOST });
    box.addEventListener("change", () =>
      this.#choose(box.checked ? [...this.#chosen, run.name] : this.#chosen.filter((name) => name !== run.name)));
    const total = run.total_steps ? ` of ${run.total_steps.toLocaleString("en")}` : "";
    const loss = run.best_validation_loss ?? run.validation_loss ?? run.train_loss;
    const facts = [`step ${run.step.toLocaleString("en")}${total}`, loss === null ? null : `best ${loss.toFixed(3)}`].filter(Boolean);
    const several = this.#chosen.length > 1 && chosen;
    const colour = several ? element("span", { class: `runs-colour chart-bar-${this.#chosen.indexOf(run.name) % 8}` }) : null;
    return element("li", { class: chosen ? "chosen" : null }, box,
      element("label", { for: id }, element("span", { class: "runs-name" }, colour, visible(run.name)), state(run), element("span", { class: "note" }, facts.join(" · "))));
  }

  #show() {
    const runs = this.#selected().filter((run) => run.details !== null);
    this.main.hidden = runs.length === 0;
    if (!runs.length) return;
    this.shownOnce = true;
    const found = runs.flatMap((run) => findings(run).map((each) => ({ ...each, run: run.name })));
    this.#head(runs);
    clear(this.stands).append(...found.slice(0, 12).map((each) => this.#finding(each, runs.length > 1)));
    this.charts.update(runs, found, this.#view);
    for (const part of this.parts) part.update(runs);
  }

  #head(runs) {
    clear(this.heading);
    if (runs.length > 1) {
      this.heading.append(element("h2", {}, `${runs.length} runs over one another`));
      return;
    }
    const { details } = runs[0];
    const part = details.total_steps ? Math.min(1, details.step / details.total_steps) : null;
    this.heading.append(element("h2", {}, visible(details.name)), state(details));
    if (part !== null && details.state !== "finished") {
      this.heading.append(element("progress", { value: part, max: 1, "aria-label": "How far the run is" }));
    }
    const speed = details.tokens_per_s ? `${short(Math.round(details.tokens_per_s))} tokens/s` : null;
    const facts = [
      `step ${details.step.toLocaleString("en")}${details.total_steps ? ` of ${details.total_steps.toLocaleString("en")}` : ""}`,
      details.steps_per_epoch ? `epoch ${(details.step / details.steps_per_epoch).toFixed(2)}` : null,
      `${short(details.tokens)} tokens`, speed, details.state === "running" ? remaining(details) : null,
    ];
    this.heading.append(element("span", { class: "note" }, facts.filter(Boolean).join(" · ")));
  }

  #finding(each, several) {
    const title = `${several ? `${visible(each.run)}: ` : ""}${each.title}`;
    const after = each.size === undefined || several ? `, step ${each.step.toLocaleString("en")}` : ` (step ${each.step.toLocaleString("en")})`;
    return element("li", { class: each.kind }, element("strong", {}, title + after), element("span", {}, visible(each.words)));
  }
}

/** How long it will still take, by the tokens of a step and the speed so far. */
function remaining({ step, total_steps: total, tokens, tokens_per_s: speed }) {
  if (!total || !speed || !step || total <= step) return null;
  const seconds = ((total - step) * (tokens / step)) / speed;
  if (seconds < 90) return `about ${Math.ceil(seconds)} s left`;
  return seconds < 5400 ? `about ${Math.round(seconds / 60)} min left` : `about ${(seconds / 3600).toFixed(1)} h left`;
}

function state(run) {
  return element("span", { class: `chip state ${run.state}` }, run.state);
}
