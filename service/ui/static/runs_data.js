// A training run as the API tells of it (GET /runs/{name}…): read once, then only what is new.

import { request } from "./api.js";
import { scale } from "./chart_scale.js";

const MOST_BYTES = 8e6;
const KINDS = ["metrics", "timings", "system", "samples"];

/** The list of runs, the latest first. */
export async function listed(options) {
  return (await request("GET", "runs", null, options)).runs;
}

export class Run {
  details = null;
  #next = {};
  #asking = null;

  constructor(name) {
    this.name = name;
    for (const kind of KINDS) this.#forget(kind);
  }

  get address() {
    return `runs/${encodeURIComponent(this.name)}`;
  }

  get running() {
    return this.details?.state === "running";
  }

  /** Ask for what is new; whether there was any. */
  refresh() {
    this.#asking ??= this.#refresh().finally(() => (this.#asking = null));
    return this.#asking;
  }

  async #refresh() {
    const before = JSON.stringify(this.details);
    this.details = await request("GET", this.address);
    // A run of a million steps has more of them than a screen has places.
    const every = Math.max(1, Math.ceil(this.details.sizes.metrics / MOST_BYTES));
    if (this.every === undefined || every > 2 * this.every) {
      this.every = every;
      this.#forget("metrics");
    }
    const found = await Promise.all(KINDS.map((kind) => this.#read(kind)));
    return found.includes(true) || JSON.stringify(this.details) !== before;
  }

  async #read(kind) {
    if (!this.details.sizes[kind] && this.#next[kind] === "0") return false;
    let changed = false;
    for (;;) {
      const thin = kind === "metrics" && this.every > 1 ? `&every=${this.every}` : "";
      const page = await request("GET", `${this.address}/${kind}?after=${this.#next[kind]}${thin}`);
      if (page.restarted) this.#forget(kind);
      this.#next[kind] = page.next;
      for (const record of page.records) this.#take(kind, record);
      changed ||= page.restarted || page.records.length > 0;
      if (!page.more) return changed;
    }
  }

  #forget(kind) {
    this.#next[kind] = "0";
    if (kind !== "metrics") this[kind] = [];
    else Object.assign(this, { updates: [], evaluations: [], events: [], copies: [] });
  }

  #take(kind, record) {
    if (kind === "system") {
      if (Number.isFinite(record.time)) this.system.push(record);
    } else if (!Number.isFinite(record.step)) {
      return;
    } else if (kind !== "metrics") this[kind].push(record);
    else if ("event" in record) this.events.push(record);
    else if ("learning_rate" in record) this.updates.push(record);
    else if ("train_loss" in record) this.evaluations.push(record);
    else if ("copied_from_training" in record) this.copies.push(record);
  }

  get epochSteps() {
    return this.details?.steps_per_epoch ?? null;
  }

  get lastStep() {
    return Math.max(this.updates.at(-1)?.step ?? 0, this.evaluations.at(-1)?.step ?? 0);
  }

  /** Points `[x, value]` of some records by their steps, x as `axis` has it: step, epoch, tokens or hours. */
  points(records, value, axis) {
    const at = this.#axis(axis);
    const found = [];
    for (const record of records) {
      const x = at(record.step, record);
      const y = value(record);
      if (Number.isFinite(x) && Number.isFinite(y)) found.push([x, y]);
    }
    return found;
  }

  /** Where on an axis a step lies. */
  at(step, axis) {
    return this.#axis(axis)(step);
  }

  #axis(axis) {
    if (axis === "epoch") return (step) => (this.epochSteps ? step / this.epochSteps : NaN);
    if (axis === "tokens") return between(this.updates.map(({ step, tokens }) => [step, tokens]));
    if (axis === "hours") return between(this.#times());
    return (step) => step;
  }

  /** Steps with the hours that training had taken by then, those before it was resumed included. */
  #times() {
    const found = [[0, 0]];
    let [earlier, last] = [0, 0];
    for (const { step, seconds } of this.timings) {
      if (!Number.isFinite(seconds)) continue;
      if (seconds < last) earlier += last;
      last = seconds;
      found.push([step, (earlier + seconds) / 3600]);
    }
    return found.length > 1 ? found : [];
  }
}

/** What lies between known pairs, which are in order, and beyond them as the nearest two say. */
function between(pairs) {
  if (!pairs.length) return () => NaN;
  if (pairs.length === 1) return (x) => (x === pairs[0][0] ? pairs[0][1] : x === 0 ? 0 : NaN);
  let at = 0;
  return (x) => {
    if (x < pairs[at][0]) at = 0;
    while (at < pairs.length - 2 && pairs[at + 1][0] <= x) at++;
    const [[fromX, fromY], [toX, toY]] = [pairs[at], pairs[at + 1]];
    return toX === fromX ? toY : scale([fromX, toX], [fromY, toY]).place(x);
  };
}
