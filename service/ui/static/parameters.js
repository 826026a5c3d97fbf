// A drawer with a control for every decoding parameter, made from the server's table. What nobody touched is not sent,
// so that only what somebody chose can be refused.

import { address } from "./api.js";
import { button, clear, element, freshId, visible } from "./dom.js";

let table = null;

/** The rows of the parameter table. */
export function descriptors() {
  table ??= fetch(address("studio/parameters.json"))
    .then((answer) => answer.json())
    .catch((error) => {
      table = null;
      throw error;
    });
  return table;
}

/** Named settings of the distribution's shape; each takes the place of whatever else was chosen about it. */
export const PRESETS = {
  "The checkpoint's own": {},
  Precise: { temperature: 0.3, top_p: 0.9, min_p: 0.1 },
  Balanced: { temperature: 0.7, top_p: 0.9, min_p: 0.05 },
  Creative: { temperature: 1.1, top_p: 1, min_p: 0.02 },
  Deterministic: { temperature: 0 },
};

const LISTS = ["strings", "words"];
// In the order in which the common ones are looked for.
const FIRST = ["temperature", "top_k", "top_p", "min_p", "max_tokens", "seed", "stop"];
const HINTS = {
  strings: "one per line",
  words: "one per line",
  integers: "token ids, with commas",
  integer_to_number: "token id: number, one per line",
  schema: '{"type": "object"}',
  layers: "low, high, or numbers",
};

function place(row) {
  return FIRST.includes(row.name) ? FIRST.indexOf(row.name) : FIRST.length;
}

/** What is written in a control as the parameter's value; what makes no sense stays text, which the server explains. */
function read(kind, text) {
  const trimmed = text.trim();
  if (kind === "integer" || kind === "number") return numeral(trimmed);
  if (LISTS.includes(kind)) return text.split("\n").filter((line) => line !== "");
  if (kind === "integers") return trimmed.split(/[\s,]+/).map(numeral);
  if (kind === "layers") return /^[a-z]/.test(trimmed) ? trimmed : trimmed.split(/[\s,]+/).map(numeral);
  if (kind === "integer_to_number") {
    const pairs = text.split("\n").filter((line) => line.trim());
    return Object.fromEntries(pairs.map((line) => line.split(":").map((part) => part.trim())).map(([id, n]) => [id, numeral(n ?? "")]));
  }
  if (kind === "schema") {
    try {
      return JSON.parse(trimmed);
    } catch {
      return text;
    }
  }
  return text;
}

function numeral(text) {
  return /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i.test(text) ? Number(text) : text;
}

/** A value as its control shows it. */
function written(kind, value) {
  if (value === null || value === undefined) return "";
  if (LISTS.includes(kind)) return (Array.isArray(value) ? value : [value]).join("\n");
  if (kind === "integers" || (kind === "layers" && Array.isArray(value))) return value.join(", ");
  if (kind === "integer_to_number") return Object.entries(value).map(([id, n]) => `${id}: ${n}`).join("\n");
  if (kind === "schema" && typeof value !== "string") return JSON.stringify(value);
  return String(value);
}

/** One parameter's control: `{element, show(value, byHand)}`; `onset(value)` is told of a change, undefined for none. */
function control(row, onset) {
  const id = freshId(`parameter-${row.name}`);
  const about = `${id}-about`;
  const shared = { id, "aria-describedby": about, dataset: { parameter: row.name }, autocomplete: "off" };
  const meaning = element("p", { class: "note", id: about }, row.meaning);
  const label = element("label", { for: id }, row.label);
  const back = button("↺", () => onset(undefined), { class: "quiet back", "aria-label": `${row.label}: back to the default`, hidden: true });
  if (row.kind === "boolean") {
    const box = element("input", { ...shared, type: "checkbox", onchange: () => onset(box.checked) });
    return {
      element: element("div", { class: "field" }, element("div", { class: "row" }, box, label, back), meaning),
      show(value, byHand) {
        box.checked = Boolean(value);
        back.hidden = !byHand;
      },
    };
  }
  const several = !["integer", "number", "layers", "integers"].includes(row.kind);
  const field = several
    ? element("textarea", { ...shared, rows: 2, placeholder: HINTS[row.kind] ?? "" })
    : element("input", { ...shared, type: "text", inputmode: row.kind === "layers" ? "text" : "decimal", placeholder: HINTS[row.kind] ?? "" });
  field.addEventListener("input", () => onset(field.value === "" ? undefined : read(row.kind, field.value)));
  // What is being typed is left alone; once it is left, it shows what is in force.
  field.addEventListener("change", () => onset(field.value === "" ? undefined : read(row.kind, field.value), true));
  const head = element("div", { class: "row head" }, label, back);
  const parts = [head, meaning];
  let slider = null;
  if (row.slider) {
    const { low, high, step } = row.slider;
    slider = element("input", { type: "range", min: low, max: high, step, "aria-label": `${row.label}, as a slider` });
    slider.addEventListener("input", () => onset(Number(slider.value), true));
    head.append(field);
    field.classList.add("number");
    parts.splice(1, 0, slider);
  } else if (several) {
    parts.splice(1, 0, field);
  } else {
    head.append(field);
    field.classList.add("number");
  }
  return {
    element: element("div", { class: "field" }, ...parts),
    show(value, byHand, typing = false, otherwise = "") {
      if (!typing) field.value = written(row.kind, value);
      if (otherwise) field.placeholder = otherwise;
      if (slider) slider.value = value ?? row.slider.low;
      back.hidden = !byHand;
    },
    limit(high) {
      if (slider) slider.max = high;
    },
  };
}

/**
 * Put controls for `descriptors` into `root`. `defaults` are the checkpoint's own, before those of the table; `only` and
 * `without` are lists of names; `limits` are highest values of sliders. `known: false` says that the checkpoint's defaults
 * come later, by `use`: until then whatever is chosen is kept, for it may differ from them.
 * -> {values(), set(values), reset(), use({defaults, limits}), onchange}: `values()` has what was chosen alone.
 */
export function drawer(root, { descriptors: rows, defaults = {}, only = null, without = [], limits = {}, presets = true, known = true }) {
  const offered = rows.filter((row) => (only ? only.includes(row.name) : row.offered && !without.includes(row.name)));
  offered.sort((one, other) => place(one) - place(other));
  const shape = rows.find((row) => row.name === "temperature")?.group;
  const chosen = new Map();
  const controls = new Map();
  const made = { onchange: () => {} };

  function fallback(row) {
    return defaults[row.name] ?? row.default;
  }

  function isDefault(row, value) {
    return known && JSON.stringify(value) === JSON.stringify(fallback(row));
  }

  function show(name, typing = false) {
    const row = offered.find((each) => each.name === name);
    const byHand = chosen.has(name);
    const value = byHand ? chosen.get(name) : fallback(row);
    controls.get(name).show(value, byHand, typing, row.name === "seed" ? "a new one" : "");
  }

  function assign(row, value, settled = false) {
    if (value === undefined || isDefault(row, value)) chosen.delete(row.name);
    else chosen.set(row.name, value);
    show(row.name, !settled && value !== undefined);
    mark();
    made.onchange();
  }

  function mark() {
    for (const [name, pressed] of pressedPresets()) pressed.setAttribute("aria-pressed", String(matches(PRESETS[name])));
  }

  function pressedPresets() {
    return [...(presetRow?.querySelectorAll("button") ?? [])].map((each) => [each.dataset.preset, each]);
  }

  function matches(preset) {
    const own = [...chosen].filter(([name]) => rows.find((row) => row.name === name)?.group === shape);
    const wanted = Object.entries(preset).filter(([name, value]) => {
      const row = offered.find((each) => each.name === name);
      return row && value !== fallback(row);
    });
    return own.length === wanted.length && wanted.every(([name, value]) => chosen.get(name) === value);
  }

  function apply(preset) {
    for (const row of offered) {
      if (row.group !== shape) continue;
      if (preset[row.name] !== undefined && !isDefault(row, preset[row.name])) chosen.set(row.name, preset[row.name]);
      else chosen.delete(row.name);
      show(row.name);
    }
    mark();
    made.onchange();
  }

  const presetRow = presets
    ? element(
        "div",
        { class: "row presets", role: "group", "aria-label": "Presets" },
        ...Object.entries(PRESETS).map(([name, values]) =>
          button(name, () => apply(values), { "aria-pressed": "false", dataset: { preset: name } }),
        ),
      )
    : null;

  clear(root).append(...(presetRow ? [presetRow] : []));
  const groups = new Map();
  for (const row of offered) {
    const made = control(row, (value, settled) => assign(row, value, settled));
    controls.set(row.name, made);
    if (row.common || only) root.append(made.element);
    else groups.set(row.group, [...(groups.get(row.group) ?? []), made.element]);
  }
  for (const [group, members] of groups) {
    root.append(element("details", { class: "group" }, element("summary", {}, group), ...members));
  }
  root.append(button("Reset to the checkpoint's defaults", () => made.reset(), { class: "wide" }));

  Object.assign(made, {
    values: () => Object.fromEntries(chosen),
    set(values) {
      chosen.clear();
      for (const row of offered) {
        if (values[row.name] !== undefined && !isDefault(row, values[row.name])) chosen.set(row.name, values[row.name]);
        show(row.name);
      }
      mark();
    },
    reset() {
      made.set({});
      made.onchange();
    },
    use(next) {
      defaults = next.defaults ?? defaults;
      known = true;
      limits = next.limits ?? limits;
      for (const row of offered) {
        if (limits[row.name] !== undefined) controls.get(row.name).limit?.(limits[row.name]);
        if (isDefault(row, chosen.get(row.name))) chosen.delete(row.name);
        // What is being typed is left alone.
        show(row.name, chosen.has(row.name) && controls.get(row.name).element.contains(document.activeElement));
      }
      mark();
    },
    /** What is in force where nothing is chosen, in words for a label. */
    default: (name) => visible(fallback(rows.find((row) => row.name === name))),
  });
  if (known) made.use({ defaults, limits });
  else made.set({});
  return made;
}
