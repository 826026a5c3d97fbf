// The Models tab: what is loaded (family, parameters, precision, memory, licence, card), loading and unloading where the
// server lets requests do so, and which one answers requests that name none.

import { request, requestText } from "./api.js";
import { button, clear, element, freshId, visible } from "./dom.js";
import { clearError, showError } from "./errors.js";
import { models, size } from "./models.js";

document.head.append(element("link", { rel: "stylesheet", href: new URL("checkpoints.css", import.meta.url).href }));

const LIVE = 2000;

export async function mount(root) {
  const problems = element("div");
  const list = element("div", { class: "checkpoints", "aria-live": "off" });
  const loading = element("p", { class: "note", role: "status" });
  const cards = new Map();
  root.append(problems, element("div", { class: "split" },
    element("section", { "aria-label": "Loaded checkpoints" }, element("h2", {}, "Loaded checkpoints"), loading, list),
    element("section", { class: "side", "aria-label": "Load a checkpoint" }, form())));

  function show() {
    const names = models.list.map((model) => model.name);
    loading.textContent = models.loading ? `${visible(models.loading)} is being loaded…` : names.length ? "" : "No checkpoint is loaded.";
    for (const name of cards.keys()) if (!names.includes(name)) cards.delete(name);
    for (const model of models.list) {
      if (!cards.has(model.name)) cards.set(model.name, card());
      cards.get(model.name).update(model);
    }
    const wanted = names.map((name) => cards.get(name).element);
    if (wanted.some((node, index) => list.children[index] !== node) || list.children.length !== wanted.length) {
      clear(list).append(...wanted);
    }
  }

  models.addEventListener("change", show);
  try {
    await models.refresh();
  } catch (error) {
    showError(problems, error, { again: () => models.refresh().then(show) });
  }
  show();
  // How many requests run is no change of what is loaded.
  setInterval(() => {
    if (root.offsetParent !== null && !document.hidden) models.refresh().then(show, () => {});
  }, LIVE);
}

/** One loaded checkpoint. */
function card() {
  const heading = element("h3", { class: "row" });
  const problems = element("div");
  const facts = element("dl");
  const warnings = element("ul", { class: "checkpoint-warnings" });
  const buttons = element("div", { class: "row" });
  const text = element("details", { class: "group" }, element("summary", {}, "Card"));
  const made = element("article", { class: "card checkpoint" }, heading, problems, facts, warnings, buttons, text);
  let seen = null;

  text.addEventListener("toggle", async () => {
    if (!text.open || text.children.length > 1) return;
    const place = element("div", { class: "checkpoint-card", tabindex: 0, role: "region", "aria-label": "Card" }, "Reading…");
    text.append(place);
    try {
      const [{ render }, words] = await Promise.all([import("./markdown.js"), requestText("GET", `${address(made.dataset.name)}/card`)]);
      // Its pictures lie beside it on the server's disk.
      clear(place).append(render(words.replace(/^!\[[^\]]*\]\([^)]*\)$/gm, ""), { wrapped: true }));
    } catch (error) {
      place.remove();
      text.open = false;
      showError(problems, error);
    }
  });

  function act(label, work, attributes = {}) {
    const pressed = button(label, async () => {
      clearError(problems);
      pressed.disabled = true;
      try {
        await work();
        await models.refresh();
      } catch (error) {
        showError(problems, error);
      } finally {
        pressed.disabled = false;
      }
    }, attributes);
    return pressed;
  }

  function choices(model) {
    const unload = button("Unload", () => {
      const sure = act("Unload it", () => request("DELETE", address(model.name)), { class: "danger" });
      const words = model.running ? `${model.running} running requests will end as cancelled. ` : "";
      clear(buttons).append(element("span", {}, `Unload ${visible(model.name)}? ${words}`), sure, button("Keep it", () => choices(model)));
      sure.focus();
    });
    const first = model.default ? null : act("Make it the default", () => request("PATCH", address(model.name), { default: true }));
    clear(buttons).append(...[first, unload].filter(Boolean));
  }

  function update(model) {
    made.dataset.name = model.name;
    text.hidden = !model.card;
    const chips = [model.default ? "default" : null, model.chat ? "chat" : "base", model.draft ? "with a draft" : null].filter(Boolean);
    clear(heading).append(element("span", { class: "checkpoint-name" }, visible(model.name)), ...chips.map((chip) => element("span", { class: "chip" }, chip)));
    clear(facts).append(...described(model).flatMap(([name, value, note]) => [
      element("dt", {}, name), element("dd", {}, visible(value), note ? element("span", { class: "note" }, visible(note)) : null)]));
    clear(warnings).append(...model.warnings.map((warning) => element("li", {}, visible(warning))));
    const now = JSON.stringify([model.default, model.name]);
    if (now !== seen) choices(model);
    seen = now;
  }

  return { element: made, update };
}

function described(model) {
  return [
    ["Family", model.family],
    ["Parameters", `${size(model.parameters)} (${model.parameters.toLocaleString("en")})`],
    ["Precision", `${model.dtype}, cache in ${model.kv_cache_dtype}`, model.dtype_why],
    ["Memory", `about ${bytes(model.memory.weights)} of weights`, `and up to ${bytes(model.memory.cache)} of keys and values, as requests need them`],
    ["Licence", model.license ?? "not stated"],
    ["Context", `${model.context_length.toLocaleString("en")} tokens, vocabulary of ${model.vocab_size.toLocaleString("en")}`],
    ["Computed by", model.kernels],
    ["Made", model.created ? new Date(model.created * 1000).toLocaleString("en", { dateStyle: "medium", timeStyle: "short" }) : "unknown"],
    ...(model.aliases.length ? [["Also called", model.aliases.join(", ")]] : []),
    ["Requests", `${model.running} running, ${model.waiting} waiting`],
  ];
}

/** A number of bytes in words. */
export function bytes(count) {
  for (const [limit, unit] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (count >= limit) return `${(count / limit).toLocaleString("en", { maximumFractionDigits: count >= 10 * limit ? 0 : 1 })} ${unit}`;
  }
  return `${count} bytes`;
}

function address(name) {
  return `models/${encodeURIComponent(name)}`;
}

/** Load one by its path in the model directory, or by its name on the hub. */
function form() {
  const problems = element("div");
  const field = (name, label, note, attributes = {}) => {
    const control = element("input", { type: "text", id: freshId(name), autocomplete: "off", spellcheck: "false", "data-parameter": name, ...attributes });
    return { control, element: element("div", { class: "field" }, element("label", { for: control.id }, label), control, element("p", { class: "note" }, note)) };
  };
  const path = field("path", "Path or hub name", "a path within the server's model directory, or owner/name on the Hugging Face hub, where the server allows it", { required: true });
  const name = field("name", "Name", "what requests call it; the directory's name if empty");
  const tick = (words) => {
    const control = element("input", { type: "checkbox", id: freshId("tick") });
    return { control, element: element("div", { class: "row checkpoint-tick" }, control, element("label", { for: control.id }, words)) };
  };
  const first = tick("Let it answer requests that name none");
  const replace = tick("Let it take the place of one with its name");
  const pressed = element("button", { type: "submit", class: "primary wide" }, "Load");
  const status = element("p", { class: "note", role: "status" });
  const made = element("form", { class: "card" }, element("h2", {}, "Load a checkpoint"), problems, path.element, name.element, first.element, replace.element, pressed, status);
  made.addEventListener("submit", async (event) => {
    event.preventDefault();
    clearError(problems);
    const body = { path: path.control.value.trim(), default: first.control.checked, replace: replace.control.checked };
    if (name.control.value.trim()) body.name = name.control.value.trim();
    pressed.disabled = true;
    pressed.textContent = "Loading…";
    status.textContent = "A model of the hub is downloaded first, which takes as long as it is large.";
    try {
      const loaded = await request("POST", "models", body);
      status.textContent = `${visible(loaded.name)} is loaded.`;
      path.control.value = name.control.value = "";
      await models.refresh();
    } catch (error) {
      status.textContent = "";
      showError(problems, error);
    } finally {
      pressed.disabled = false;
      pressed.textContent = "Load";
    }
  });
  return made;
}
