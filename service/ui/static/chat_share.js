// Taking an answer's request elsewhere: a link that asks the same again, and the request as curl and as Python.

import { address } from "./api.js";
import { bodyOf } from "./chat_run.js";

const HASH = "#chat/";
const LONGEST = 200_000;

async function through(bytes, transform) {
  const stream = new Blob([bytes]).stream().pipeThrough(transform);
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** The address of this page with a request in it: model, turns, parameters and seed, compressed; nothing is stored. */
export async function linkTo(turn) {
  const packed = await through(new TextEncoder().encode(JSON.stringify(bodyOf(turn))), new CompressionStream("deflate-raw"));
  let text = "";
  for (const byte of packed) text += String.fromCharCode(byte);
  const safe = btoa(text).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
  return new URL(HASH + safe, location.href).href;
}

/** The request in this page's address, null where there is none. Throws where it can't be read. */
export async function linked() {
  if (!location.hash.startsWith(HASH)) return null;
  const safe = location.hash.slice(HASH.length);
  if (!safe || safe.length > LONGEST) return null;
  const bytes = Uint8Array.from(atob(safe.replaceAll("-", "+").replaceAll("_", "/")), (character) => character.charCodeAt(0));
  const body = JSON.parse(new TextDecoder().decode(await through(bytes, new DecompressionStream("deflate-raw"))));
  const { model, prompt, messages, ...parameters } = body;
  const whole =
    typeof prompt === "string" ||
    (Array.isArray(messages) && messages.length && messages.every((each) => typeof each?.role === "string" && typeof each.content === "string"));
  if (typeof model !== "string" || !whole) throw new Error("the link holds no request");
  return { model, prompt, messages, parameters };
}

export function asCurl(turn) {
  const body = JSON.stringify({ ...bodyOf(turn), stream: true }, null, 2).replaceAll("'", "'\\''");
  return `curl -sN ${address("generate")} -H "Content-Type: application/json" -d '${body}'\n`;
}

/** A value as Python writes it. */
function literal(value, indent = "") {
  const deeper = `${indent}    `;
  if (value === null || value === undefined) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value === "string") return JSON.stringify(value).replace(/[\u007f-\uffff]/g, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`).replace(/(\\u[dD][89abAB][0-9a-f]{2}\\u[dD][c-fC-F][0-9a-f]{2})/g, (pair) => {
    const point = JSON.parse(`"${pair}"`).codePointAt(0);
    return `\\U${point.toString(16).padStart(8, "0")}`;
  });
  if (Array.isArray(value)) return value.length ? `[\n${value.map((each) => `${deeper}${literal(each, deeper)},\n`).join("")}${indent}]` : "[]";
  if (typeof value === "object") {
    const entries = Object.entries(value).map(([name, each]) => `${deeper}${JSON.stringify(name)}: ${literal(each, deeper)},\n`);
    return `{\n${entries.join("")}${indent}}`;
  }
  return String(value);
}

export function asPython(turn) {
  return `import httpx

body = ${literal(bodyOf(turn))}
answer = httpx.post(${JSON.stringify(String(address("generate")))}, json=body, timeout=600)
answer.raise_for_status()
print(answer.json()["outputs"][0]["text"])
`;
}
