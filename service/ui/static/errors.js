// Errors where they arose: what is wrong, what to do, and gone when they are dismissed or things go well again.

import { connection } from "./api.js";
import { button, element, visible } from "./dom.js";

/** Show an error at the top of `root`, in place of the one before. Returns its element. */
export function showError(root, error, { again } = {}) {
  clearError(root);
  const facts = [error.hint, error.retryAfter ? `try again in ${error.retryAfter} s` : null].filter(Boolean);
  const shown = element(
    "div",
    { class: "studio-error", role: "alert", dataset: { field: error.field ?? "" } },
    element(
      "div",
      { class: "words" },
      element("strong", {}, visible(error.message ?? error)),
      facts.length ? element("span", {}, visible(facts.join("; "))) : null,
    ),
    again ? button("Try again", () => (clearError(root), again())) : null,
    button("✕", () => clearError(root), { class: "quiet", "aria-label": "Dismiss the error" }),
  );
  root.prepend(shown);
  // That nobody answers is said for as long as it is so.
  if (error.lost) connection.addEventListener("back", () => shown.remove(), { once: true });
  if (error.field) markField(root, error.field);
  return shown;
}

export function clearError(root) {
  root.querySelectorAll(":scope > .studio-error").forEach((shown) => shown.remove());
  document.querySelectorAll("[data-refused]").forEach((control) => {
    control.removeAttribute("aria-invalid");
    control.removeAttribute("data-refused");
  });
}

/** Mark the controls of a field that was refused (`data-parameter`), in the tab that `root` belongs to. */
function markField(root, field) {
  const tab = root.closest(".studio-tab") ?? document;
  const name = field.split(/[.[]/)[0];
  for (const control of tab.querySelectorAll("[data-parameter]")) {
    if (control.dataset.parameter !== name) continue;
    control.setAttribute("aria-invalid", "true");
    control.setAttribute("data-refused", "");
    control.closest("details:not([open])")?.setAttribute("open", "");
  }
}
