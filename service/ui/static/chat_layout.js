// The chat's elements: the list of conversations, the talk with its bar and the message, the settings.

import { button, element } from "./dom.js";
import * as store from "./store.js";

export const PHONE = matchMedia("(max-width: 767px)");
const WIDE = 1200;

/** Put the chat's parts into `root`; they are what is returned. `acts`: {submit(), stop()}. */
export function layout(root, acts) {
  const text = element("textarea", { rows: 1, "aria-label": "Message", placeholder: "Write here; Enter sends", id: "message-text" });
  const send = element("button", { type: "submit", class: "primary send-button" }, "Send");
  const stop = button("Stop", acts.stop, { class: "danger stop-button", hidden: true });
  const form = element("form", { id: "message", onsubmit: (event) => (event.preventDefault(), acts.submit()) }, text, send, stop);
  const status = element("p", { id: "status", class: "note" });
  // What is read out: each state once, not each token.
  const spoken = element("p", { class: "off-screen", role: "status" });
  const composer = element("div", { class: "composer" }, form, status, spoken);
  const turns = element("div", { id: "conversation", role: "log", "aria-live": "off", "aria-label": "Turns", tabindex: "0" });
  const bar = element("div", { class: "row bar" });
  const system = element("textarea", { id: "system", rows: 2, placeholder: "none" });
  const systemField = element("div", { class: "field" }, element("label", { for: "system" }, "System message"), system);
  const parameters = element("div");
  const list = element("aside", { class: "chat-list", id: "conversations", "aria-label": "Conversations" });
  const settings = element("aside", { class: "side", id: "settings", "aria-label": "Settings" }, systemField, parameters);
  const talk = element("section", { class: "talk", "aria-label": "Chat" }, bar, turns, composer);
  root.append(element("div", { id: "chat", class: "chat" }, list, talk, settings));
  const sides = { list: side("list", "☰", "Conversations", list), settings: side("settings", "⚙", "Settings", settings) };
  return { text, send, stop, status, spoken, composer, turns, bar, system, systemField, parameters, list, settings, sides };
}

/** A side that a button shows or hides, as it was left; on a phone both begin hidden. */
function side(name, sign, label, place) {
  const toggle = button(sign, () => open(place.hidden), { class: "quiet", "aria-controls": place.id, "aria-label": label, title: label });
  function open(wanted) {
    place.hidden = !wanted;
    toggle.setAttribute("aria-expanded", String(wanted));
    if (PHONE.matches && wanted) place.scrollIntoView({ block: "start" });
    if (!PHONE.matches) store.set(`chat.${name}`, wanted);
  }
  place.hidden = PHONE.matches || !store.get(`chat.${name}`, name === "settings" || innerWidth >= WIDE);
  toggle.setAttribute("aria-expanded", String(!place.hidden));
  return { toggle, open };
}
