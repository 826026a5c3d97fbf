// Keyboard shortcuts of the chat, and the list of them.

import { element } from "./dom.js";

const LIST = [
  ["Enter", "send the message"],
  ["Shift + Enter", "a new line"],
  ["Escape", "stop the answer"],
  ["/", "go to the message"],
  ["Alt + N", "a new conversation"],
  ["Alt + F", "search the conversations"],
  ["Alt + R", "another answer to the last message"],
  ["Alt + E", "edit the last message"],
  ["Alt + ← / →", "the version before or after of the last turn that has several"],
  ["Alt + S", "show or hide the settings"],
  ["Alt + L", "show or hide the conversations"],
  ["?", "this list"],
];

export function showShortcuts() {
  if (document.getElementById("shortcuts")) return;
  const dialog = element(
    "dialog",
    { class: "studio-dialog", id: "shortcuts", "aria-labelledby": "shortcuts-title" },
    element("h2", { id: "shortcuts-title" }, "Keyboard shortcuts"),
    element("table", {}, element("tbody", {}, ...LIST.map(([keys, act]) => element("tr", {}, element("td", {}, element("kbd", {}, keys)), element("td", {}, act))))),
    element("form", { method: "dialog", class: "row end" }, element("button", { type: "submit", class: "primary" }, "Close")),
  );
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}

/** Listen while `root` is seen. `acts`: stop, focus, create, search, retry, edit, move(step), settings, list. */
export function shortcuts(root, acts) {
  const alt = {
    KeyN: acts.create,
    KeyF: acts.search,
    KeyR: acts.retry,
    KeyE: acts.edit,
    ArrowLeft: () => acts.move(-1),
    ArrowRight: () => acts.move(1),
    KeyS: acts.settings,
    KeyL: acts.list,
  };
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || root.offsetParent === null || document.querySelector("dialog[open]")) return;
    const writing = event.target.closest?.("input:not([type=range]):not([type=checkbox]), textarea, select, [contenteditable]");
    const plain = !event.ctrlKey && !event.metaKey && !event.altKey;
    let act = null;
    if (event.key === "Escape" && plain) act = acts.stop;
    else if (event.altKey && !event.ctrlKey && !event.metaKey && !event.shiftKey) {
      // In a text these move by words.
      act = writing && event.code.startsWith("Arrow") ? null : alt[event.code];
    } else if (plain && !writing && event.key === "/") act = acts.focus;
    else if (plain && !writing && event.key === "?") act = showShortcuts;
    if (!act) return;
    if (event.key !== "Escape") event.preventDefault();
    act();
  });
}
