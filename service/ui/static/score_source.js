// A text to be looked at: typed, pasted, or read from a file, which stays on this machine until it is sent to be scored.

import { button, element, visible } from "./dom.js";
import { clearError, showError } from "./errors.js";
import { field } from "./fields.js";

// More than this is not put into a field to type in, which would be slow.
const SHOWN = 100_000;
const EXAMPLE =
  "The lighthouse stood at the end of the pier, and every evening the keeper climbed its stairs to light the lamp. One night a whale knocked at the door and asked for directions.";

function sized(bytes) {
  return bytes < 1000 ? `${bytes} bytes` : bytes < 1e6 ? `${(bytes / 1e3).toFixed(1)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

/** -> {element, text(), typed()}: the text in force, and the one in the field (which is worth keeping). */
export function source({ value = null, onchange = () => {} } = {}) {
  const area = element("textarea", { id: "score-text", rows: 6, spellcheck: "false", dataset: { parameter: "text" }, oninput: onchange });
  area.value = value ?? EXAMPLE;
  const input = element("input", { type: "file", class: "off-screen", tabindex: -1, "aria-label": "A text file to score", id: "score-file" });
  const facts = element("span", { class: "note", role: "status" }, "or drop it here; it must be plain text in UTF-8");
  const open = button("Open a file …", () => input.click());
  const leave = button("Close the file", () => put(null), { hidden: true });
  const area_field = field("Text", area);
  const drop = element("div", { class: "drop row wrap" }, open, leave, facts, input);
  const root = element("div", {}, area_field, drop);
  let file = null;

  function put(next) {
    file = next;
    area_field.hidden = file !== null;
    leave.hidden = file === null;
    facts.textContent = file ? `${visible(file.name)}, ${sized(file.size)}: too long to show as a whole` : "or drop it here; it must be plain text in UTF-8";
    (file ? leave : open).focus();
  }

  async function read(chosen) {
    if (!chosen) return;
    clearError(root);
    try {
      const text = new TextDecoder("utf-8", { fatal: true }).decode(await chosen.arrayBuffer());
      if (chosen.size > SHOWN) return put({ name: chosen.name, size: chosen.size, text });
      put(null);
      area.value = text;
      facts.textContent = `${visible(chosen.name)}, ${sized(chosen.size)}`;
      onchange();
    } catch (error) {
      const wrong = error instanceof TypeError;
      showError(root, {
        message: wrong ? `${chosen.name} is not text in UTF-8` : `${chosen.name} cannot be read: ${error.message}`,
        hint: wrong ? "save it as UTF-8 text and open it again" : null,
      });
    }
  }

  input.addEventListener("change", () => {
    read(input.files[0]);
    input.value = "";
  });
  for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
    root.addEventListener(name, (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      drop.classList.toggle("over", over);
      if (name === "drop") read(event.dataTransfer.files[0]);
    });
  }
  return { element: root, text: () => (file ? file.text : area.value), typed: () => area.value };
}
