// The served checkpoints: their list, kept up to date, a picker, and what one is in a line.

import { ApiError, connection, request } from "./api.js";
import { element, freshId, visible } from "./dom.js";
import * as store from "./store.js";

const EVERY = 10_000;

/** Tells `change` when what is loaded changed. */
class Models extends EventTarget {
  list = [];
  loading = null;
  /** Whether the server has told what is loaded. */
  isRead = false;
  #asking = null;
  #seen = "";

  /** Ask the server again; the list. Several that ask at once share one question. */
  refresh() {
    this.#asking ??= request("GET", "models")
      .then((answer) => {
        this.isRead = true;
        this.list = answer.models;
        this.loading = answer.loading;
        const seen = JSON.stringify([this.loading, this.list.map(({ running, waiting, ...rest }) => rest)]);
        if (seen !== this.#seen) {
          this.#seen = seen;
          this.dispatchEvent(new Event("change"));
        }
        return this.list;
      })
      .finally(() => (this.#asking = null));
    return this.#asking;
  }

  /** The list as it is known, asked for the first time. */
  async known() {
    return this.list.length ? this.list : this.refresh();
  }

  /**
   * The one that `name()` names once the list has been read, which `signal` ends the waiting for. Throws an error in words
   * where it is not loaded.
   */
  async need(name, signal) {
    const ended = new Promise((_, fail) => signal?.addEventListener("abort", () => fail(signal.reason), { once: true }));
    await Promise.race([this.known(), ended]);
    const found = this.get(name());
    if (found) return found;
    const [status, other] = [404, "choose another checkpoint"];
    if (this.list.length) throw new ApiError(`${name()} is not loaded any more`, { status, hint: other });
    if (this.loading) throw new ApiError(`${this.loading} is being loaded`, { status, hint: "try again once it is there" });
    const hint = "load one in the tab Models, or start the server with one: topkapi serve DIRECTORY";
    throw new ApiError("No checkpoint is loaded", { status, hint });
  }

  get(name) {
    return this.list.find((model) => model.name === name || model.aliases.includes(name)) ?? null;
  }

  /** The one that answers requests that name none. */
  get first() {
    return this.list[0] ?? null;
  }
}

export const models = new Models();

function refreshed() {
  if (!document.hidden && !connection.isLost) models.refresh().catch(() => {});
}
setInterval(refreshed, EVERY);
document.addEventListener("visibilitychange", refreshed);
connection.addEventListener("back", refreshed);

/** A number of parameters in words: 8.4M. */
export function size(count) {
  for (const [limit, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]]) {
    if (count >= limit) return `${(count / limit).toPrecision(count / limit >= 100 ? 3 : 2)}${unit}`;
  }
  return String(count);
}

/** A checkpoint in a line. */
export function describe(model) {
  return [
    model.family,
    `${size(model.parameters)} parameters`,
    `context ${model.context_length.toLocaleString("en")}`,
    model.dtype,
    model.chat ? "answers conversations" : "continues texts",
  ].join(" · ");
}

/**
 * A labelled list to choose a checkpoint from, put into `root`. Its choice is kept under `remember` and comes back with
 * the page. What is unloaded while it is chosen stays in the list, marked, until another one is chosen.
 */
export function picker(root, { onchange = () => {}, label = "Checkpoint", id = freshId("checkpoint"), remember = null } = {}) {
  const select = element("select", { id });
  const fact = element("p", { class: "note", id: `${id}-about` });
  select.setAttribute("aria-describedby", fact.id);
  root.append(element("div", { class: "field" }, element("label", { for: id }, label), select, fact));
  let value = remember ? store.get(remember) : null;
  let settled = false;

  function show() {
    if (models.isRead && !models.get(value) && (!value || !settled)) value = models.first?.name ?? null;
    settled ||= models.isRead;
    const names = models.list.map((model) => model.name);
    const gone = value !== null && models.isRead && !models.get(value);
    const options = names.map((name) => element("option", { value: name }, visible(name)));
    if (!models.isRead && value !== null) options.push(element("option", { value }, visible(value)));
    if (gone) options.push(element("option", { value }, `${visible(value)} (unloaded)`));
    select.replaceChildren(...options);
    select.value = models.get(value)?.name ?? value ?? "";
    const model = models.get(value);
    if (model) fact.textContent = visible(describe(model));
    else if (models.loading) fact.textContent = `${visible(models.loading)} is being loaded`;
    else fact.textContent = !models.isRead ? "Reading the list of checkpoints…" : names.length ? "not loaded" : "No checkpoint is loaded.";
  }

  function choose(name, { silent = false } = {}) {
    value = name;
    if (remember) store.set(remember, name);
    show();
    if (!silent) onchange(models.get(value));
  }

  select.addEventListener("change", () => choose(select.value));
  // As soon as somebody looks at the list it is the current one.
  select.addEventListener("focus", refreshed);
  models.addEventListener("change", () => {
    show();
    onchange(models.get(value));
  });
  show();
  models.known().then(() => {
    show();
    onchange(models.get(value));
  }, () => show());
  return {
    element: select,
    get value() {
      return value;
    },
    get model() {
      return models.get(value);
    },
    /** The chosen one, once the list has been read: see `Models.need`. */
    ready: (signal) => models.need(() => value, signal),
    choose,
  };
}
