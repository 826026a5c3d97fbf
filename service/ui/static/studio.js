// The frame: the bar of tabs, each filled by its script when it is first chosen; the address chooses one (#chat); and a
// word when the server is gone. Gradio brings the page around them.

import { connection } from "./api.js";
import { button, element } from "./dom.js";
import { showError } from "./errors.js";
import * as store from "./store.js";

const filled = new WeakSet();

async function fill(place) {
  if (filled.has(place)) return;
  filled.add(place);
  measure();
  place.setAttribute("aria-busy", "true");
  try {
    const script = await import(`./${place.dataset.script}.js`);
    await script.mount(place);
  } catch (error) {
    console.error(error);
    showError(place, { message: `This tab cannot be shown: ${error.message}`, hint: "load the page again" });
  } finally {
    place.removeAttribute("aria-busy");
  }
}

function tabs() {
  return [...document.querySelectorAll("#tabs [role=tab]")];
}

function panel(tab) {
  return document.getElementById(tab.getAttribute("aria-controls"));
}

let chosen = null;

function choose(tab) {
  chosen = tab;
  for (const each of tabs()) {
    each.setAttribute("aria-selected", String(each === tab));
    each.tabIndex = each === tab ? 0 : -1;
  }
  tab.scrollIntoView({ block: "nearest", inline: "nearest" });
  see();
}

/** Show the chosen panel and fill its places: Gradio puts each into the page, and back into it, in its own time. */
function see() {
  for (const each of tabs()) {
    const shown = panel(each);
    if (!shown) continue;
    if (shown.getAttribute("role") !== "tabpanel") {
      shown.setAttribute("role", "tabpanel");
      shown.setAttribute("aria-labelledby", each.id);
    }
    if (shown.classList.contains("shown") !== (each === chosen)) shown.classList.toggle("shown", each === chosen);
  }
  panel(chosen)?.querySelectorAll(".studio-tab[data-script]").forEach(fill);
}

/** Where tabs begin, for those that fill the rest of the window (`--studio-top`). */
function measure() {
  const place = panel(chosen)?.querySelector(".studio-tab");
  const top = place ? place.getBoundingClientRect().top + scrollY : 0;
  if (top) document.documentElement.style.setProperty("--studio-top", `${Math.ceil(top)}px`);
}

/** The tab that the address names; what follows a slash or a question mark is the tab's own. */
function addressed() {
  const name = location.hash.slice(1).split(/[/?]/)[0].toLowerCase();
  return tabs().find((tab) => tab.id === `tab-${name}-button`) ?? tabs()[0];
}

function begin(bar) {
  document.body.classList.toggle("one-tab", tabs().length === 1);
  bar.addEventListener("click", (event) => {
    const tab = event.target.closest("[role=tab]");
    if (!tab) return;
    choose(tab);
    history.replaceState(null, "", `#${tab.id.slice("tab-".length, -"-button".length)}`);
  });
  bar.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const all = tabs();
    const at = all.indexOf(document.activeElement);
    const next = step ? all.at((at + step) % all.length) : { Home: all[0], End: all.at(-1) }[event.key];
    if (!next || at < 0) return;
    event.preventDefault();
    next.focus();
    next.click();
  });
  addEventListener("hashchange", () => choose(addressed()));
  addEventListener("resize", measure);
  look();
  choose(addressed());
  new MutationObserver(see).observe(document.querySelector("gradio-app") ?? document.body, { childList: true, subtree: true });
}

/** The button that changes between light and dark; until it is used the system's wish counts. */
function look() {
  const turned = button("", () => {
    document.body.classList.toggle("dark");
    store.set("dark", document.body.classList.contains("dark"));
    show();
  }, { id: "look", class: "quiet" });
  function show() {
    const dark = document.body.classList.contains("dark");
    turned.textContent = dark ? "☀" : "☾";
    turned.title = dark ? "Light colours" : "Dark colours";
    turned.setAttribute("aria-label", turned.title);
  }
  const kept = store.get("dark");
  if (kept !== null) document.body.classList.toggle("dark", kept);
  document.querySelector("#header nav").append(turned);
  show();
}

const lost = element("div", { id: "connection", role: "status" });
connection.addEventListener("lost", () => {
  lost.className = "lost";
  lost.textContent = "The server does not answer. It is asked again every second; nothing here is lost.";
});
connection.addEventListener("back", () => {
  lost.className = "back";
  lost.textContent = "The server is back.";
  setTimeout(() => {
    if (!connection.isLost) lost.textContent = lost.className = "";
  }, 4000);
});

/** Gradio makes the page in its own time: the bar of tabs is there once it has come to it. */
function whenMade(act) {
  const made = () => tabs().length > 0 && document.querySelector("#tabs");
  document.body.prepend(lost);
  if (made()) return act(made());
  new MutationObserver((_, observer) => {
    if (!made()) return;
    observer.disconnect();
    act(made());
  }).observe(document.body, { childList: true, subtree: true });
}

whenMade(begin);
