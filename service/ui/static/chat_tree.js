// A conversation: a tree of turns of which one path is shown. An edited turn and a repeated answer stand beside the one
// before, so nothing that was written is lost. What this makes is what the browser keeps and what an export holds.

export const FORMAT = "topkapi-conversation";
export const VERSION = 1;
const ROLES = ["user", "assistant", "prompt", "continuation"];
const LONGEST_TITLE = 60;

function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function newConversation(fields = {}) {
  const now = Date.now();
  return { id: newId(), title: "", created: now, changed: now, system: "", turns: {}, chosen: {}, ...fields };
}

/** The turns from the beginning to the end of the branch that is shown. */
export function path(conversation) {
  const shown = [];
  let at = "";
  for (;;) {
    const next = conversation.turns[conversation.chosen[at]];
    if (!next || shown.includes(next)) return shown;
    shown.push(next);
    at = next.id;
  }
}

/** The turns that stand where this one does, itself among them, oldest first. */
export function siblings(conversation, turn) {
  return Object.values(conversation.turns)
    .filter((other) => other.parent === turn.parent)
    .sort((one, other) => one.created - other.created || one.id.localeCompare(other.id));
}

/** Put a new turn after `parent` ("" for the beginning) and show it. Returns it. */
export function add(conversation, parent, role, text, fields = {}) {
  const newest = Math.max(0, ...Object.values(conversation.turns).map((turn) => turn.created));
  const turn = { id: newId(), parent, role, text, created: Math.max(Date.now(), newest + 1), ...fields };
  conversation.turns[turn.id] = turn;
  conversation.chosen[parent] = turn.id;
  touch(conversation);
  return turn;
}

export function choose(conversation, turn) {
  conversation.chosen[turn.parent] = turn.id;
}

/** Take a turn and what follows it away; a sibling is shown instead. */
export function remove(conversation, turn) {
  const others = siblings(conversation, turn).filter((other) => other !== turn);
  const doomed = [turn.id];
  for (const id of doomed) {
    doomed.push(...Object.values(conversation.turns).filter((other) => other.parent === id).map((other) => other.id));
    delete conversation.turns[id];
    delete conversation.chosen[id];
  }
  if (others.length) conversation.chosen[turn.parent] = others.at(-1).id;
  else delete conversation.chosen[turn.parent];
  touch(conversation);
}

export function touch(conversation) {
  conversation.changed = Date.now();
  if (!conversation.named) {
    const first = path(conversation).find((turn) => turn.role === "user" || turn.role === "prompt");
    const text = (first?.text ?? "").trim().replace(/\s+/g, " ");
    conversation.title = text.length > LONGEST_TITLE ? `${text.slice(0, LONGEST_TITLE - 1)}…` : text;
  }
}

/** The conversation of a request: its turns, the last one unanswered. */
export function fromRequest({ model, prompt, messages: told = [] }) {
  const conversation = newConversation();
  let at = "";
  for (const { role, content } of told) {
    if (role === "system") conversation.system = content;
    else if (role === "assistant") at = add(conversation, at, role, content, { model, token_ids: [], state: "done" }).id;
    else at = add(conversation, at, "user", content).id;
  }
  if (prompt !== undefined) add(conversation, "", "prompt", prompt);
  return conversation;
}

/** What the API is sent of the path up to `turn`, that one among them. */
export function messages(conversation, turn) {
  const shown = [];
  for (let at = turn; at; at = conversation.turns[at.parent]) shown.unshift(at);
  const told = shown
    .filter((each) => each.role === "user" || each.role === "assistant")
    .map((each) => ({ role: each.role, content: each.text }));
  return conversation.system.trim() ? [{ role: "system", content: conversation.system }, ...told] : told;
}

/** Whether any turn or the title has the words. */
export function matches(conversation, words) {
  const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
  const all = [conversation.title, ...Object.values(conversation.turns).map((turn) => turn.text)].join("\n").toLowerCase();
  return wanted.every((word) => all.includes(word));
}

export function exported(conversations) {
  return JSON.stringify({ format: FORMAT, version: VERSION, conversations }, null, 2);
}

/** The conversations of an exported text, as new ones. Throws an error that says what is wrong with it. */
export function imported(text) {
  let document;
  try {
    document = JSON.parse(text);
  } catch {
    throw new Error("the file is not JSON");
  }
  const list = document?.format === FORMAT ? document.conversations : null;
  if (!Array.isArray(list)) throw new Error("the file holds no conversations that were exported here");
  if (document.version > VERSION) throw new Error("the file was written by a newer studio");
  return list.map((each, number) => {
    const turns = Object.fromEntries(Object.values(each?.turns ?? {}).map((turn) => [turn?.id, turn]));
    if (!isObject(each) || !Object.values(turns).every((turn) => isWhole(turn) && reaches(turns, turn))) {
      throw new Error(`conversation ${number + 1} of the file has a turn that makes no sense`);
    }
    const chosen = Object.entries(each.chosen ?? {}).filter(([at, id]) => Object.hasOwn(turns, id) && turns[id].parent === at);
    return newConversation({
      title: String(each.title ?? ""),
      named: Boolean(each.named),
      system: String(each.system ?? ""),
      created: Number(each.created) || Date.now(),
      changed: Number(each.changed) || Date.now(),
      turns: Object.fromEntries(Object.entries(turns).map(([id, turn]) => [id, known(turn)])),
      chosen: Object.fromEntries(chosen),
    });
  });
}

function isWhole(turn) {
  return typeof turn?.id === "string" && turn.id !== "" && typeof turn.text === "string" && ROLES.includes(turn.role);
}

/** Whether a turn leads back to the beginning. */
function reaches(turns, turn) {
  const seen = new Set();
  for (let at = turn; at.parent !== ""; at = turns[at.parent]) {
    if (seen.has(at) || typeof at.parent !== "string" || !Object.hasOwn(turns, at.parent)) return false;
    seen.add(at);
  }
  return true;
}

const isCount = (value) => Number.isInteger(value) && value >= 0;
const isText = (value) => typeof value === "string";
const isNumber = (value) => Number.isFinite(value);
const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
const isList = (each) => (value) => Array.isArray(value) && value.every(each);
/** What a turn may have beside its text and its place, and of what form. */
const FIELDS = {
  model: isText, prompt: isText, trouble: isText, finish_reason: isText,
  messages: isList((message) => isText(message?.role) && isText(message.content)),
  parameters: isObject, in_force: isObject, timings: (value) => isObject(value) && (value.tokens_per_s === null || isNumber(value.tokens_per_s)),
  token_ids: isList(isCount), joints: isList(isCount),
  prompt_tokens: isCount, forgotten: isCount, released: isCount, first_token_s: isNumber, speed: isNumber,
  edited: (value) => value === true, raw: (value) => value === true,
};
const STATES = ["done", "stopped", "lost", "failed"];
const OPEN = ["queued", "reading", "writing"];

/** A turn of a file, with what is known of turns alone. */
function known({ id, parent, role, text, created, ...given }) {
  const turn = { id, parent, role, text, created: Number(created) || 0 };
  for (const [name, fits] of Object.entries(FIELDS)) if (fits(given[name])) turn[name] = given[name];
  if (role === "user" || role === "prompt") return turn;
  turn.state = STATES.includes(given.state) ? given.state : OPEN.includes(given.state) ? "lost" : "done";
  return { ...turn, model: turn.model ?? "", token_ids: turn.token_ids ?? [], parameters: turn.parameters ?? {} };
}

/** The path that is shown, as Markdown. */
export function asMarkdown(conversation) {
  const parts = [`# ${conversation.title || "Conversation"}`];
  if (conversation.system.trim()) parts.push(`## System\n\n${conversation.system}`);
  for (const turn of path(conversation)) {
    const who = { user: "You", prompt: "Text", assistant: turn.model, continuation: `${turn.model}, going on` }[turn.role];
    parts.push(`## ${who ?? "Answer"}\n\n${turn.text}`);
  }
  return `${parts.join("\n\n")}\n`;
}
