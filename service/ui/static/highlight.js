// Modest colouring of code: comments, texts, numbers and the words that most languages share.

import { element, visibleNodes } from "./dom.js";

const WORDS = new Set(
  `abstract and as assert async await begin bool boolean break byte case catch char class const continue def default del
  delete do double echo elif else elsif end enum esac except export extends extern false False fi final finally float fn
  for foreach from func function global goto if impl implements import in include inline instanceof int interface is
  lambda let local long loop match mod module mut namespace new nil None not null or out package pass private protected
  pub public raise readonly record ref require return self short signed sizeof static string struct super switch
  synchronized template then this throw throws to trait true True try type typedef typeof union unless unsigned until use
  using val var virtual void volatile when where while with yield`.split(/\s+/),
);
const SQL = new Set(
  `select from where insert into values update set delete create table drop alter join left right inner outer on group by
  order having limit as and or not null is in like distinct union all primary key foreign references default`.split(/\s+/),
);

const SLASHES = String.raw`\/\/[^\n]*|\/\*[\s\S]*?(?:\*\/|$)`;
const HASHES = String.raw`#[^\n]*`;
const DASHES = String.raw`--[^\n]*`;
const MARKUP = String.raw`<!--[\s\S]*?(?:-->|$)`;
const TEXTS = String.raw`"""[\s\S]*?(?:"""|$)|'''[\s\S]*?(?:'''|$)|"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'?|` + "`(?:\\\\.|[^`\\\\])*`?";
const NUMBERS = String.raw`\b(?:0[xX][0-9a-fA-F_]+|\d[\d_]*\.?\d*(?:[eE][+-]?\d+)?)\b`;

const HASHED = ["py", "python", "sh", "bash", "shell", "zsh", "ruby", "rb", "yaml", "yml", "toml", "perl", "r", "make", "dockerfile", "julia", "elixir"];
const DASHED = ["sql", "lua", "haskell", "hs", "ada"];
const MARKED = ["html", "xml", "svg", "markdown", "md"];
const PLAIN = ["", "text", "txt", "plain", "console", "output"];

// Beyond this the colours would take longer than they are worth.
const LONGEST = 100_000;

/** The code as nodes, coloured by what its language is called. */
export function highlighted(code, language = "") {
  const name = language.toLowerCase();
  const nodes = document.createDocumentFragment();
  if (PLAIN.includes(name) || code.length > LONGEST) {
    nodes.append(visibleNodes(code));
    return nodes;
  }
  const comments = HASHED.includes(name) ? HASHES : DASHED.includes(name) ? DASHES : MARKED.includes(name) ? MARKUP : SLASHES;
  const words = name === "sql" ? SQL : WORDS;
  const pattern = new RegExp(`(?<comment>${comments})|(?<string>${TEXTS})|(?<number>${NUMBERS})|(?<word>[A-Za-z_]\\w*)`, "g");
  let plain = 0;
  for (const found of code.matchAll(pattern)) {
    const { comment, string, number, word } = found.groups;
    const known = word !== undefined && words.has(name === "sql" ? word.toLowerCase() : word);
    const kind = comment ? "comment" : string ? "string" : number ? "number" : known ? "keyword" : null;
    if (!kind) continue;
    if (found.index > plain) nodes.append(visibleNodes(code.slice(plain, found.index)));
    nodes.append(element("span", { class: `code-${kind}` }, visibleNodes(found[0])));
    plain = found.index + found[0].length;
  }
  if (plain < code.length) nodes.append(visibleNodes(code.slice(plain)));
  return nodes;
}
