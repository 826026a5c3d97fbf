// Labelled controls, and work that is done one at a time: what the tabs Tokens, Score and Notebook share.

import { button, element, freshId } from "./dom.js";
import { clearError, showError } from "./errors.js";

/** A control with its label above and, if there is one, a note below. */
export function field(label, control, note = null) {
  control.id ||= freshId("field");
  const about = note ? element("p", { class: "note", id: `${control.id}-about` }, note) : null;
  if (about) control.setAttribute("aria-describedby", about.id);
  return element("div", { class: "field" }, element("label", { for: control.id }, label), control, about);
}

/** A number to type. */
export function numberField(label, attributes, note = null) {
  const control = element("input", { type: "number", inputmode: "numeric", ...attributes });
  const made = field(label, control, note);
  made.classList.add("short");
  return { element: made, control, value: () => (control.value.trim() === "" ? null : Number(control.value)) };
}

/** One of several things to choose from: `options` are pairs of a value and its words. */
export function choiceField(label, options, attributes = {}, note = null) {
  const control = element("select", attributes, ...options.map(([value, words]) => element("option", { value }, words)));
  return { element: field(label, control, note), control };
}

/**
 * A button that starts something and then stops it. `work(signal)` is told to stop by the signal; what it throws is shown
 * in `root`, unless it was stopped. -> {element, running, start(), stop()}
 */
export function worker(root, label, work, { stopLabel = "Stop", id = null } = {}) {
  let ending = null;
  const control = button(label, () => (ending ? made.stop() : made.start()), { class: "primary", id });
  const made = {
    element: control,
    get running() {
      return ending !== null;
    },
    async start() {
      if (ending) return;
      clearError(root);
      const own = (ending = new AbortController());
      show();
      try {
        await work(own.signal);
      } catch (error) {
        if (error.name !== "AbortError") showError(root, error, error.status ? {} : { again: () => made.start() });
      } finally {
        if (ending === own) ending = null;
        show();
      }
    },
    stop() {
      ending?.abort();
      ending = null;
      show();
    },
  };
  function show() {
    control.textContent = ending ? stopLabel : label;
    control.classList.toggle("stop", ending !== null);
  }
  return made;
}

/** Ctrl and Enter (or the command key) in `root` start, Escape stops. */
export function shortcuts(root, work) {
  root.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      work.start();
    } else if (event.key === "Escape" && work.running) {
      event.preventDefault();
      work.stop();
    }
  });
}

/** `call(…)`, once nobody has asked for it again for so many milliseconds. */
export function debounced(call, delay) {
  let timer = null;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => call(...values), delay);
  };
}

/**
 * `draw()` as something grows: `later()` draws at most every so many milliseconds and takes a fifth of the time at most, as
 * what is typed meanwhile goes first; `now()` draws at once.
 */
export function paced(draw, every) {
  let waiting = null;
  let due = 0;
  function now() {
    clearTimeout(waiting);
    waiting = null;
    const began = performance.now();
    draw();
    const ended = performance.now();
    due = ended + Math.max(every, 4 * (ended - began));
  }
  return { now, later: () => (waiting ??= setTimeout(now, Math.max(0, due - performance.now()))), stop: () => clearTimeout(waiting) };
}

/** Bring something into view without moving what is already there. */
export function reveal(node) {
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  node.scrollIntoView({ block: "nearest", behavior: still ? "auto" : "smooth" });
}

/** Names and values in a row. */
export function facts(pairs) {
  return element(
    "dl",
    { class: "facts" },
    ...pairs.filter(Boolean).map(([name, value, title]) => element("div", { title }, element("dt", {}, name), element("dd", {}, value))),
  );
}
