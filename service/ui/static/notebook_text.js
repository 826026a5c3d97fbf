// The text of a notebook: which stretches of it were generated, what an edit does to them, and its undo history.

const MOST_STEPS = 200;

/**
 * Stretches are `{from, to, run, level}`: positions in the text, which continuation they belong to, and how improbable
 * the token was (0 to 5).
 */
export class NotebookText {
  text = "";
  stretches = [];
  runs = 0;
  #past = [];
  #future = [];
  #typing = false;

  /** From what was kept. */
  restore({ text = "", stretches = [], runs = 0 } = {}) {
    Object.assign(this, { text, stretches, runs });
    this.#past = [];
    this.#future = [];
    this.#typing = false;
  }

  /** What is worth keeping. */
  state() {
    return { text: this.text, stretches: this.stretches, runs: this.runs };
  }

  get canUndo() {
    return this.#past.length > 0;
  }

  get canRedo() {
    return this.#future.length > 0;
  }

  /** Begin a step that can be undone. Letters typed one after the other are one step. */
  mark({ typing = false } = {}) {
    if (typing && this.#typing) return;
    this.#past.push(this.state());
    if (this.#past.length > MOST_STEPS) this.#past.shift();
    this.#future = [];
    this.#typing = typing;
  }

  /** The step that was begun came to nothing. */
  unmark() {
    this.#past.pop();
  }

  undo() {
    if (!this.canUndo) return false;
    this.#future.push(this.state());
    Object.assign(this, this.#past.pop());
    this.#typing = false;
    return true;
  }

  redo() {
    if (!this.canRedo) return false;
    this.#past.push(this.state());
    Object.assign(this, this.#future.pop());
    this.#typing = false;
    return true;
  }

  /** Somebody changed the text by hand: what is new was not generated. */
  edit(next) {
    const before = this.text;
    if (next === before) return;
    let from = 0;
    const shorter = Math.min(before.length, next.length);
    while (from < shorter && before[from] === next[from]) from += 1;
    let end = 0;
    while (end < shorter - from && before.at(-1 - end) === next.at(-1 - end)) end += 1;
    // A word's end, a new line or a deletion begins another step.
    const inserted = next.slice(from, next.length - end);
    const typed = inserted.length === 1 && before.length - end === from && !/\s/.test(inserted);
    if (!typed) this.#typing = false;
    this.mark({ typing: typed });
    this.#replace(from, before.length - end, inserted);
  }

  /** Put generated text in at `at`; where it ends. */
  insert(at, text, level) {
    this.#replace(at, at, text);
    this.stretches.push({ from: at, to: at + text.length, run: this.runs, level });
    this.stretches.sort((a, b) => a.from - b.from);
    return at + text.length;
  }

  #replace(from, to, text) {
    const shift = text.length - (to - from);
    const kept = [];
    for (const each of this.stretches) {
      if (each.from < from) kept.push({ ...each, to: Math.min(each.to, from) });
      if (each.to > to) kept.push({ ...each, from: Math.max(each.from, to) + shift, to: each.to + shift });
    }
    this.text = this.text.slice(0, from) + text + this.text.slice(to);
    this.stretches = kept.filter((each) => each.to > each.from);
  }

  /** The text in pieces, `{text, run, level}`; `run` is null for what was written by hand. Alike neighbours are one. */
  pieces(key) {
    const found = [];
    let at = 0;
    const add = (text, run, level) => {
      const last = found.at(-1);
      if (!text) return;
      if (last && last.run !== null && run !== null && last[key] === { run, level }[key]) last.text += text;
      else found.push({ text, run, level });
    };
    for (const { from, to, run, level } of this.stretches) {
      add(this.text.slice(at, from), null, null);
      add(this.text.slice(from, to), run, level);
      at = to;
    }
    add(this.text.slice(at), null, null);
    return found;
  }
}
