// The shape of one token's distribution, before and after temperature, top-k, top-p and min-p, as sliders move.

import { request } from "./api.js";
import { clear, element, freshId, visible } from "./dom.js";
import { clearError, showError } from "./errors.js";
import { debounced } from "./fields.js";
import { stageTable } from "./lab_trace.js";

const STAGES = ["temperature", "top_k", "top_p", "min_p"];
const WAIT = 90;
const SHOWN = 16;

/**
 * `place()` gives `{ids, model, words}` of the text that the token follows, or null while there is none.
 * -> {element, moved(), use(defaults)}: `moved` asks again, as for another place.
 */
export function shape(rows, place) {
  const result = element("div", {});
  const where = element("p", { class: "note", id: freshId("shape") });
  const controls = new Map();
  let ending = null;
  let latest = null;

  for (const name of STAGES) {
    const row = rows.find((each) => each.name === name);
    const id = freshId(name);
    const { low, high, step } = row.slider;
    const slider = element("input", { type: "range", id, min: low, max: high, step });
    const number = element("output", { for: id });
    const show = () => (number.textContent = Number(slider.value) === off(row) ? `${slider.value} (off)` : slider.value);
    slider.value = row.default;
    slider.addEventListener("input", () => {
      show();
      later();
    });
    show();
    controls.set(name, {
      element: element("div", { class: "field" }, element("div", { class: "row head" }, element("label", { for: id }, row.label), number), slider),
      get: () => Number(slider.value),
      set: (value) => {
        slider.value = value ?? row.default;
        show();
      },
    });
  }

  function off(row) {
    return row.name === "temperature" ? null : row.default;
  }

  async function ask() {
    ending?.abort();
    const at = place();
    if (!at || !root.open) return;
    const own = (ending = new AbortController());
    const values = Object.fromEntries([...controls].map(([name, control]) => [name, control.get()]));
    const body = { model: at.model, prompt: at.ids, max_tokens: 1, seed: 0, trace: true, logprobs: SHOWN, ...values };
    result.setAttribute("aria-busy", "true");
    try {
      const answer = await request("POST", "generate", body, { signal: own.signal });
      if (own !== ending) return;
      const trace = answer.outputs[0].trace?.[0];
      clearError(root);
      where.textContent = `The next token after ${visible(at.words)}`;
      clear(result);
      if (trace) result.append(stageTable(trace, { fixed: STAGES, chosen: false, rows: SHOWN, caption: "The next token’s candidates before and after each setting" }));
    } catch (error) {
      if (error.name !== "AbortError" && own === ending) showError(root, error);
    } finally {
      if (own === ending) result.removeAttribute("aria-busy");
    }
  }

  const later = debounced(ask, WAIT);
  const root = element(
    "details",
    { class: "group shape" },
    element("summary", {}, "What the settings do to the next token"),
    where,
    element("div", { class: "sliders" }, ...[...controls.values()].map((control) => control.element)),
    result,
  );
  root.addEventListener("toggle", () => {
    if (root.open) ask();
  });
  return {
    element: root,
    moved() {
      // The same place need not be asked about twice.
      const at = place();
      const now = at && JSON.stringify([at.model, at.ids]);
      if (now === latest && result.childNodes.length) return;
      latest = now;
      later();
    },
    use(defaults) {
      for (const [name, control] of controls) control.set(defaults?.[name]);
      latest = null;
    },
  };
}
