// Markdown as nodes: what models write most, and nothing that could act. Every character ends up in a text node; links
// lead to http, https and mailto alone; pictures are links, for nothing is fetched from elsewhere.

import { copyButton, element, visibleNodes } from "./dom.js";
import { highlighted } from "./highlight.js";

const FENCE = /^(\s{0,3})(`{3,}|~{3,})\s*([^`\s]*)[^`]*$/;
const HEADING = /^\s{0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^\s{0,3}([-*_])(\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

// Deeper quotes and lists than anybody reads stay text, or a text could make the page nest without end.
const DEEPEST = 8;

/** The text as a fragment. Lines are `wrapped` in files: only what ends in two spaces, or a backslash, breaks there. */
export function render(text, { wrapped = false } = {}) {
  const nodes = document.createDocumentFragment();
  for (const block of blocks(text, 0, wrapped)) nodes.append(block.node());
  return nodes;
}

/**
 * The blocks of a text: `{end, code, node()}`. `end` is where the block ends in the text: what comes before the last
 * block will not change when the text grows. `code` is what there is of code that has no end yet, null of other blocks.
 */
export function blocks(text, depth = 0, wrapped = false) {
  const lines = text.split("\n");
  const found = [];
  let at = 0;
  let offset = 0;

  function take(count) {
    const taken = lines.slice(at, at + count);
    for (const line of taken) offset += line.length + 1;
    at += count;
    return taken;
  }
  function add(node, code = null) {
    found.push({ end: Math.min(offset, text.length), code, node });
  }

  while (at < lines.length) {
    const line = lines[at];
    if (!line.trim()) {
      take(1);
      continue;
    }
    const fence = line.match(FENCE);
    if (fence) {
      const closing = new RegExp(`^\\s{0,3}${fence[2][0]}{${fence[2].length},}\\s*$`);
      let end = at + 1;
      while (end < lines.length && !closing.test(lines[end])) end += 1;
      const closed = end < lines.length;
      const inside = take(closed ? end - at + 1 : lines.length - at).slice(1, closed ? -1 : undefined);
      const indent = new RegExp(`^\\s{0,${fence[1].length}}`);
      const code = inside.map((each) => each.replace(indent, "")).join("\n");
      add(() => codeBlock(code, fence[3], closed), closed ? null : code);
      continue;
    }
    const heading = line.match(HEADING);
    if (heading) {
      take(1);
      // The page has headings of its own above these.
      add(() => element(`h${Math.min(6, heading[1].length + 2)}`, {}, inline(heading[2])));
      continue;
    }
    if (RULE.test(line)) {
      take(1);
      add(() => element("hr"));
      continue;
    }
    if (/^\s{0,3}>/.test(line) && depth < DEEPEST) {
      let end = at;
      while (end < lines.length && /^\s{0,3}>/.test(lines[end])) end += 1;
      const inner = take(end - at).map((each) => each.replace(/^\s{0,3}>\s?/, "")).join("\n");
      add(() => element("blockquote", {}, ...blocks(inner, depth + 1, wrapped).map((block) => block.node())));
      continue;
    }
    if (ITEM.test(line) && depth < DEEPEST) {
      const items = take(listEnd(lines, at) - at);
      add(() => list(items, depth, wrapped));
      continue;
    }
    if (line.includes("|") && at + 1 < lines.length && DIVIDER.test(lines[at + 1]) && lines[at + 1].includes("-")) {
      let end = at + 2;
      while (end < lines.length && lines[end].includes("|") && lines[end].trim()) end += 1;
      const rows = take(end - at);
      add(() => table(rows));
      continue;
    }
    let end = at + 1;
    while (end < lines.length && !beginsBlock(lines, end)) end += 1;
    const paragraph = take(end - at);
    add(() => element("p", {}, ...lineBroken(wrapped ? joined(paragraph) : paragraph)));
  }
  return found;
}

function beginsBlock(lines, at) {
  const line = lines[at];
  const tableNext = line.includes("|") && at + 1 < lines.length && DIVIDER.test(lines[at + 1]) && lines[at + 1].includes("|");
  return !line.trim() || FENCE.test(line) || HEADING.test(line) || RULE.test(line) || /^\s{0,3}>/.test(line) || ITEM.test(line) || tableNext;
}

/** The line after the list that begins at `at`: items, what is indented below them, and empty lines between. */
function listEnd(lines, at) {
  let end = at + 1;
  while (end < lines.length) {
    if (lines[end].trim() === "") {
      const next = lines.slice(end).find((each) => each.trim());
      if (next === undefined || !(ITEM.test(next) || /^\s{2,}/.test(next))) break;
    } else if (!ITEM.test(lines[end]) && !/^\s{2,}/.test(lines[end]) && beginsBlock(lines, end)) break;
    end += 1;
  }
  return end;
}

function list(lines, depth, wrapped) {
  const first = lines[0].match(ITEM);
  const ordered = /\d/.test(first[2]);
  const made = element(ordered ? "ol" : "ul", ordered && parseInt(first[2], 10) !== 1 ? { start: parseInt(first[2], 10) } : {});
  let item = null;
  const finish = () => {
    if (!item) return;
    const inner = blocks(item.join("\n"), depth + 1, wrapped).map((block) => block.node());
    // An item of one paragraph is a line, not a paragraph.
    const plain = inner.map((node, number) => (node.nodeName === "P" && number === 0 ? [...node.childNodes] : [node])).flat();
    made.append(element("li", {}, ...plain));
  };
  for (const line of lines) {
    const found = line.match(ITEM);
    if (found && found[1].length <= first[1].length + 1) {
      finish();
      item = [found[3]];
    } else if (item) item.push(line.replace(new RegExp(`^\\s{0,${first[1].length + (ordered ? 3 : 2)}}`), ""));
  }
  finish();
  return made;
}

function cells(line) {
  return line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function table(lines) {
  const sides = cells(lines[1]).map((cell) => (/^:.*:$/.test(cell) ? "center" : /:$/.test(cell) ? "right" : null));
  const row = (line, tag) =>
    element("tr", {}, ...cells(line).map((cell, number) => element(tag, sides[number] ? { class: sides[number] } : {}, inline(cell))));
  return element(
    "div",
    { class: "scroll", tabindex: "0", role: "group", "aria-label": "Table" },
    element("table", {}, element("thead", {}, row(lines[0], "th")), element("tbody", {}, ...lines.slice(2).map((line) => row(line, "td")))),
  );
}

function codeBlock(code, language, closed) {
  return element(
    "div",
    { class: "code" },
    element("div", { class: "row code-head" }, element("span", { class: "note" }, visibleNodes(language || "text")), copyButton("Copy", () => code, { class: "quiet", "aria-label": "Copy the code" })),
    element("pre", { tabindex: "0" }, element("code", {}, closed ? highlighted(code, language) : visibleNodes(code))),
  );
}

/** The lines of a paragraph that somebody wrapped, one for each break that is meant. */
function joined(lines) {
  return lines.join("\n").split(/(?: {2,}|\\)\n/).map((line) => line.replaceAll("\n", " "));
}

function lineBroken(lines) {
  const nodes = [];
  lines.forEach((line, number) => {
    if (number) nodes.push(element("br"));
    nodes.push(inline(line.trim()));
  });
  return nodes;
}

const INLINE = [
  [/^(`+)([^`]|[^`].*?[^`])\1(?!`)/s, (found) => element("code", {}, visibleNodes(found[2].replace(/^ (.*) $/s, "$1")))],
  [/^\\([!-/:-@[-`{-~])/, (found) => document.createTextNode(found[1])],
  [/^!?\[([^\]\n]{0,1000})\]\(\s*<?([^\s<>)]{1,2000})>?(?:\s+"[^"\n]*")?\s*\)/, (found, deep) => link(found[2], inline(found[1] || found[2], deep + 1))],
  [/^<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/, (found) => link(found[1], visibleNodes(found[1]))],
  [/^https?:\/\/[^\s<>"'`)\]]{1,2000}[^\s<>"'`)\].,;:!?]/, (found) => link(found[0], visibleNodes(found[0]))],
  [/^(\*\*|__)(?=\S)(.{1,5000}?\S)\1/s, (found, deep) => element("strong", {}, inline(found[2], deep + 1))],
  [/^~~(?=\S)(.{1,5000}?\S)~~/s, (found, deep) => element("del", {}, inline(found[1], deep + 1))],
  [/^\*(?=[^\s*])(.{0,5000}?[^\s*])\*(?!\*)/s, (found, deep) => element("em", {}, inline(found[1], deep + 1))],
  [/^_(?=[^\s_])(.{0,5000}?[^\s_])_(?![A-Za-z0-9_])/s, (found, deep) => element("em", {}, inline(found[1], deep + 1))],
];
const STARTS = /[`\\![<h*_~]/g;

/** A run of text with emphasis, code and links. */
export function inline(text, deep = 0) {
  const nodes = document.createDocumentFragment();
  if (deep > DEEPEST || text.length > 20_000) {
    nodes.append(visibleNodes(text));
    return nodes;
  }
  let plain = 0;
  let at = 0;
  for (;;) {
    STARTS.lastIndex = at;
    const start = STARTS.exec(text);
    if (!start) break;
    at = start.index;
    const rest = text.slice(at);
    const inWord = at > 0 && /[A-Za-z0-9]/.test(text[at - 1]);
    const rule = (text[at] === "_" || text[at] === "h") && inWord ? undefined : INLINE.find(([pattern]) => pattern.test(rest));
    if (!rule) {
      at += 1;
      continue;
    }
    const found = rest.match(rule[0]);
    if (at > plain) nodes.append(visibleNodes(text.slice(plain, at)));
    nodes.append(rule[1](found, deep));
    at += found[0].length;
    plain = at;
  }
  if (plain < text.length) nodes.append(visibleNodes(text.slice(plain)));
  return nodes;
}

function link(target, label) {
  let address;
  try {
    address = new URL(target);
  } catch {
    return element("span", {}, label);
  }
  if (!["http:", "https:", "mailto:"].includes(address.protocol)) return element("span", {}, label);
  return element("a", { href: address.href, target: "_blank", rel: "noopener noreferrer nofollow", title: address.href }, label);
}
