// Making elements, and showing text that nobody vouches for. Nothing here or elsewhere in the studio writes markup:
// what comes from users and models is put in as text.

// Controls, marks that turn the direction of text, and characters that take no room: all could show a text as another.
const HIDDEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028\u2029\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\u{e0000}-\u{e007f}]/gu;

const SVG = "http://www.w3.org/2000/svg";

function furnish(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on") && typeof value === "function") made.addEventListener(name.slice(2), value);
    else if (name === "class") made.setAttribute("class", Array.isArray(value) ? value.filter(Boolean).join(" ") : value);
    else if (name === "dataset") Object.assign(made.dataset, value);
    else if (name === "value" || name === "checked" || name === "disabled" || name === "hidden") made[name] = value;
    else made.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat()) {
    if (child !== undefined && child !== null && child !== false) made.append(child);
  }
  return made;
}

/** An element. Attributes: class (a text or a list), dataset, `on<event>` functions, and any other; children are nodes or texts. */
export function element(tag, attributes = {}, ...children) {
  return furnish(document.createElement(tag), attributes, children);
}

/** An element of a drawing. */
export function drawing(tag, attributes = {}, ...children) {
  return furnish(document.createElementNS(SVG, tag), attributes, children);
}

export function clear(node) {
  node.replaceChildren();
  return node;
}

function spelled(character) {
  const code = character.codePointAt(0);
  return code > 0xffff ? `\\u{${code.toString(16)}}` : `\\u${code.toString(16).padStart(4, "0")}`;
}

/** The text with what is hidden in it spelled out, as \u202e: for places that take plain text (labels, titles, options). */
export function visible(text) {
  return String(text).replace(HIDDEN, spelled);
}

/** The text as nodes, with what is hidden in it as marked chips. */
export function visibleNodes(text) {
  const nodes = document.createDocumentFragment();
  const whole = String(text);
  let from = 0;
  for (const found of whole.matchAll(HIDDEN)) {
    if (found.index > from) nodes.append(whole.slice(from, found.index));
    nodes.append(element("span", { class: "mark", title: "a character that is not seen" }, spelled(found[0])));
    from = found.index + found[0].length;
  }
  if (from < whole.length) nodes.append(whole.slice(from));
  return nodes;
}

let numbered = 0;

/** An id that no other element has, to tie a label to its control. */
export function freshId(prefix = "studio") {
  numbered += 1;
  return `${prefix}-${numbered}`;
}

/** A button. */
export function button(label, onclick, attributes = {}) {
  return element("button", { type: "button", ...attributes, onclick }, label);
}

/** Copy a text, also where the page is not secure and has no clipboard; whether that worked. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const field = element("textarea", { class: "off-screen", "aria-hidden": "true" });
    field.value = text;
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    return done;
  }
}

/** A button that copies what `text()` gives and says so for a moment. */
export function copyButton(label, text, attributes = {}) {
  const made = button(
    label,
    async () => {
      const done = await copy(await text());
      made.textContent = done ? "Copied" : "Not copied";
      setTimeout(() => (made.textContent = label), 1200);
    },
    attributes,
  );
  return made;
}

/** Have the browser save a text as a file. */
export function download(name, text, type = "application/json") {
  const address = URL.createObjectURL(new Blob([text], { type: `${type};charset=utf-8` }));
  const link = element("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
