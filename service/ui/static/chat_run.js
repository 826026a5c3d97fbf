// One answer: what is asked of the API, what is told while it comes, and how it ends.

import { ApiError, goingOn, request } from "./api.js";
import * as tree from "./chat_tree.js";
import * as store from "./store.js";

const KEEP_EVERY = 1000;
// Without a limit a small network goes on until its context is full.
const MOST_TOKENS = 512;

/** A seed that every answer gets, so that it can be had again even where it was stopped half-way. */
export function newSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0];
}

/** The parameters of an answer: what was chosen, and a seed where drawing needs one that was not chosen. */
export function withSeed(parameters) {
  return parameters.seed === undefined ? { ...parameters, seed: newSeed() } : parameters;
}

/** The body that `POST /generate` is sent, without what only a page needs. */
export function bodyOf(turn) {
  const source = turn.role === "continuation" ? { prompt: turn.prompt } : { messages: turn.messages };
  return { model: turn.model, ...source, ...turn.parameters };
}

/** The body of an answer that is to have so many tokens more, where what it has is all that it might have. */
function bodyFor(turn) {
  const body = bodyOf(turn);
  const most = body.max_tokens;
  const cut = turn.token_ids.length > 0 && turn.token_ids.length >= most;
  return cut ? { ...body, max_tokens: turn.token_ids.length + most } : body;
}

/** The tokens of what an answer was asked for by. */
async function promptOf(turn, signal) {
  const source = turn.role === "continuation" ? { text: turn.prompt } : { messages: turn.messages };
  return (await request("POST", "tokenize", { model: turn.model, ...source }, { signal })).token_ids;
}

/**
 * The newest part of a conversation that leaves room for an answer, and how many older messages that lost. A system
 * message stays; the rest loses whole exchanges, oldest first. What does not fit at all is left to the API to refuse.
 */
async function fitted(model, messages, most, signal) {
  const head = messages[0]?.role === "system" ? 1 : 0;
  const room = model.context_length - Math.min(most ?? Infinity, Math.floor(model.context_length / 4));
  // Where a conversation may begin: with any question, in the end with the last message alone.
  const starts = messages.map((_, at) => at).filter((at) => at === head || (at > head && messages[at].role === "user"));
  if (starts.at(-1) !== messages.length - 1) starts.push(messages.length - 1);

  async function counted(start) {
    const kept = [...messages.slice(0, head), ...messages.slice(start)];
    try {
      return { kept, lost: start - head, count: (await request("POST", "tokenize", { model: model.name, messages: kept }, { signal })).count };
    } catch (error) {
      // Too long to be counted is too long.
      if (!(error instanceof ApiError) || error.lost || start === starts.at(-1)) throw error;
      return { kept, lost: start - head, count: Infinity };
    }
  }

  // The fewer messages, the fewer tokens: halved until it is found where they fit.
  let best = await counted(starts[0]);
  let [low, high] = [0, starts.length - 1];
  if (best.count <= room) return best;
  best = null;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    const found = await counted(starts[middle]);
    if (found.count <= room) [high, best] = [middle, found];
    else low = middle;
  }
  return best ?? counted(starts[high]);
}

/**
 * Fill `turn` (an answer in `conversation`) from the API, or go on with what there is of it (`goOn`). `turn.state` is queued, reading or writing while it comes, then
 * done, stopped, lost or failed. `shown()` is told of each change, `keep()` when it is worth keeping.
 * Throws `ApiError` where nothing of an answer came.
 */
export async function answer(conversation, turn, model, { signal, shown, keep, goOn = false }) {
  const began = performance.now();
  const { text, released = 0 } = turn;
  // What an end let out, half a character or half a stop text, comes again with what follows it.
  const before = { text: text.slice(0, text.length - released), tokens: turn.token_ids.length };
  turn.text = before.text;
  turn.released = 0;
  let first = null;
  let kept = began;
  turn.state = "queued";
  if (before.tokens) turn.joints = [...(turn.joints ?? []), before.tokens];
  delete turn.trouble;
  delete turn.finish_reason;
  delete turn.timings;
  shown();
  try {
    if (turn.role === "assistant" && !goOn) {
      const all = tree.messages(conversation, conversation.turns[turn.parent]);
      const fit = await fitted(model, all, turn.parameters.max_tokens, signal);
      turn.messages = fit.kept;
      turn.forgotten = fit.lost;
      turn.prompt_tokens = fit.count;
    }
    const body = { ...bodyFor(turn), stream: true, progress: true, resumable: false };
    for await (const { event, data } of goingOn(body, turn.token_ids.slice(), () => promptOf(turn, signal), signal)) {
      if (event === "progress") {
        turn.prompt_tokens = data.total - before.tokens;
        turn.read = data.read;
        turn.others = data.others;
        turn.state = data.state === "queued" && data.others > 0 ? "queued" : "reading";
      } else if (event === "token") {
        const now = performance.now();
        first ??= now;
        turn.first_token_s = (first - began) / 1000;
        turn.state = "writing";
        turn.text += data.text;
        turn.token_ids.push(...data.token_ids);
        if (!data.token_ids.length) turn.released = data.text.length;
        turn.speed = now > first + 200 ? ((turn.token_ids.length - before.tokens - 1) * 1000) / (now - first) : null;
        if (now - kept > KEEP_EVERY) {
          kept = now;
          keep();
        }
      } else if (event === "done") finish(turn, data, before.text);
      shown();
    }
  } catch (error) {
    // What the page has noted already, as it goes away, stays.
    if (error.name === "AbortError" && turn.state === "lost") return;
    turn.state = error.name === "AbortError" ? "stopped" : error.lost ? "lost" : "failed";
    if (turn.token_ids.length === before.tokens) Object.assign(turn, { text, released });
    if (turn.state !== "stopped") {
      turn.trouble = error.lost ? error.message : [error.message, error.hint].filter(Boolean).join("; ");
      if (turn.token_ids.length === before.tokens) throw error;
    }
  } finally {
    shown();
    keep();
  }
}

function finish(turn, whole, begun) {
  const output = whole.outputs[0];
  turn.text = begun + output.text;
  turn.state = { cancelled: "lost", error: "failed" }[output.finish_reason] ?? "done";
  turn.finish_reason = output.finish_reason;
  turn.timings = whole.timings;
  turn.usage = whole.usage;
  turn.first_token_s = whole.timings.first_token_s ?? turn.first_token_s;
  turn.in_force = whole.parameters;
  if (turn.state === "lost") turn.trouble = "The server ended it before its time";
}

export const REASONS = {
  stop: "ended by itself",
  length: "cut off at the token limit",
  deadline: "out of time",
  cancelled: "cut off by the server",
};

/** How much of the context an answer and what came before it take. */
export function contextUsed(turn, model) {
  const used = (turn.prompt_tokens ?? 0) + turn.token_ids.length;
  return `context ${used.toLocaleString("en")} of ${model.context_length.toLocaleString("en")} tokens`;
}

/** What there is to say of an answer while it comes and afterwards, as a line. */
export function facts(turn) {
  if (turn.state === "queued") return turn.others ? `Queued behind ${turn.others} ${turn.others === 1 ? "other" : "others"}…` : "Sent…";
  if (turn.state === "reading") {
    const part = turn.read ? `${turn.read.toLocaleString("en")} of ` : "";
    return `Reading ${part}${turn.prompt_tokens.toLocaleString("en")} tokens…`;
  }
  const count = turn.token_ids.length;
  const said = [`${count} ${count === 1 ? "token" : "tokens"}`];
  const perSecond = turn.timings?.tokens_per_s ?? turn.speed;
  if (perSecond) said.push(`${perSecond.toFixed(perSecond < 10 ? 1 : 0)} tokens/s`);
  if (turn.first_token_s !== undefined) said.push(`first after ${turn.first_token_s.toFixed(2)} s`);
  if (turn.state === "writing") return `Writing… ${said.join(" · ")}`;
  if (turn.parameters?.seed !== undefined) said.push(`seed ${turn.parameters.seed}`);
  if (turn.joints) said.push(`gone on with after ${turn.joints.join(", ")}`);
  const end = { stopped: "stopped", lost: "broken off", failed: "broken off" }[turn.state] ?? (Object.hasOwn(REASONS, turn.finish_reason) ? REASONS[turn.finish_reason] : null);
  return [...said, end].filter(Boolean).join(" · ");
}

/** What was being written when the page went away is all there is of it. */
function lost(turn) {
  return Object.assign(turn, { state: "lost", trouble: "the page was closed while it was written" });
}

/** Note what is being written, or has just been: `{conversation, turn}` each. A page that goes away has no time for a database. */
export function leave(entries) {
  const left = entries.map(({ conversation, turn }) => ({ id: conversation.id, turn: busy(turn) ? lost(turn) : turn }));
  if (left.length) store.set("chat.left", left);
}

/** Put that into the conversations, a map by their ids; those that it changed. */
export function comeBack(conversations) {
  for (const conversation of conversations.values()) Object.values(conversation.turns).filter(busy).forEach(lost);
  const changed = new Set();
  for (const { id, turn } of store.get("chat.left", [])) {
    const conversation = conversations.get(id);
    if (!conversation?.turns[turn.id]) continue;
    conversation.turns[turn.id] = turn;
    changed.add(conversation);
  }
  store.remove("chat.left");
  return changed;
}

/** A new answer's fields. */
export function fresh(model, parameters) {
  return { model: model.name, parameters: withSeed(parameters), token_ids: [], state: "queued" };
}

/** Whether something of it is still to come. */
export function busy(turn) {
  return ["queued", "reading", "writing"].includes(turn.state);
}

/** A checkpoint's defaults; its own limit on an answer's length or MOST_TOKENS, as far as its context has room. */
export function defaultsOf(model) {
  const own = (model.chat ? model.chat_defaults : model.defaults) ?? {};
  return { ...own, max_tokens: Math.min(own.max_tokens ?? MOST_TOKENS, model.context_length - 1) };
}
