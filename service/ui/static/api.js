// The one way to the server: its public HTTP API, errors in its own words, streams, the key, and whether it is there.

import { element } from "./dom.js";

// Scripts lie in a folder beside the API's paths, whatever path a proxy serves both under.
const BASE = new URL("../", import.meta.url);
const KEY = "topkapi:key";
const AGAIN_AFTER = 1000;

export function address(path) {
  return new URL(path.replace(/^\//, ""), BASE);
}

/** What the API refused, or that nothing answered (`status` 0). */
export class ApiError extends Error {
  constructor(message, { status = 0, type = null, hint = null, field = null, retryAfter = null } = {}) {
    super(message);
    this.name = "ApiError";
    Object.assign(this, { status, type, hint, field, retryAfter });
  }

  /** Whether the server could not be reached, or went away in the middle. */
  get lost() {
    return this.status === 0;
  }
}

/** Tells `lost` when the server stops answering and `back` when it answers again; asks /health only in between. */
class Connection extends EventTarget {
  isLost = false;

  lose() {
    if (this.isLost) return;
    this.isLost = true;
    this.dispatchEvent(new Event("lost"));
    this.#ask();
  }

  find() {
    if (!this.isLost) return;
    this.isLost = false;
    this.dispatchEvent(new Event("back"));
  }

  async #ask() {
    while (this.isLost) {
      await new Promise((done) => setTimeout(done, AGAIN_AFTER));
      try {
        const answer = await fetch(address("health"), { cache: "no-store", signal: AbortSignal.timeout(5000) });
        const { models, loading } = await answer.json();
        // A server that has been started again answers before its checkpoints are there.
        if (answer.ok && (models.length > 0 || loading === null)) this.find();
      } catch {
        // Not yet.
      }
    }
  }
}

export const connection = new Connection();

function lostError() {
  return new ApiError("The server does not answer", {
    hint: "it is asked again every second; what you wrote stays where it is",
  });
}

function remembered() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return null;
  }
}

/** Forget the key of this browser tab. */
export function signOut() {
  sessionStorage.removeItem(KEY);
}

let asking = null;

/** The one dialog that asks for a key; whether one was given. */
function signIn(why) {
  asking ??= new Promise((settle) => {
    const field = element("input", { type: "password", id: "api-key", autocomplete: "off", required: true });
    const dialog = element(
      "dialog",
      { class: "studio-dialog", "aria-labelledby": "sign-in" },
      element(
        "form",
        { method: "dialog" },
        element("h2", { id: "sign-in" }, "This server asks for a key"),
        element("p", {}, why),
        element("label", { for: "api-key" }, "API key"),
        field,
        element("p", { class: "note" }, "It is kept until this browser tab is closed, and sent to this server alone."),
        element(
          "div",
          { class: "row end" },
          // No submit button: Enter would press the first of these.
          element("button", { type: "button", onclick: () => dialog.close("") }, "Cancel"),
          element("button", { type: "submit", value: "in", class: "primary" }, "Sign in"),
        ),
      ),
    );
    dialog.addEventListener("close", () => {
      const given = dialog.returnValue === "in" && field.value.trim();
      if (given) sessionStorage.setItem(KEY, field.value.trim());
      dialog.remove();
      asking = null;
      settle(Boolean(given));
    });
    document.body.append(dialog);
    dialog.showModal();
  });
  return asking;
}

async function told(answer) {
  const text = await answer.text().catch(() => "");
  const retryAfter = Number(answer.headers.get("retry-after")) || null;
  let about = null;
  try {
    about = JSON.parse(text).error;
  } catch {
    // A proxy's page, say.
  }
  return new ApiError(about?.message ?? `The server answered ${answer.status} ${answer.statusText}`.trim(), {
    status: answer.status,
    type: about?.type ?? null,
    hint: about?.hint ?? null,
    field: about?.field ?? null,
    retryAfter,
  });
}

/** `fetch` with the key, the one question for it, and errors as `ApiError`. */
async function ask(method, path, body, { signal, headers = {}, keepalive = false } = {}) {
  for (;;) {
    const key = remembered();
    const sent = { ...headers };
    if (body !== undefined && body !== null) sent["Content-Type"] = "application/json";
    if (key) sent.Authorization = `Bearer ${key}`;
    let answer;
    try {
      const content = body === undefined || body === null ? undefined : JSON.stringify(body);
      answer = await fetch(address(path), { method, headers: sent, body: content, signal, keepalive, cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError" || error.name === "TimeoutError") throw error;
      connection.lose();
      throw lostError();
    }
    connection.find();
    if (answer.ok) return answer;
    const error = await told(answer);
    if (answer.status !== 401 || !(await signIn(error.message))) throw error;
  }
}

/** The JSON that a route answers (null for 204). Throws `ApiError`, and `AbortError` where `signal` says so. */
export async function request(method, path, body, options = {}) {
  const answer = await ask(method, path, body, options);
  return answer.status === 204 ? null : answer.json();
}

/** The text that a route answers. */
export async function requestText(method, path, body, options = {}) {
  return (await ask(method, path, body, options)).text();
}

/**
 * The events of a stream as `{event, data, id}`, data parsed, in order. An `error` event, and a stream that ends
 * without `done`, are thrown as `ApiError`. Leaving the loop, or aborting `signal`, ends the request.
 */
export async function* stream(path, body, { signal, method = "POST" } = {}) {
  const ending = new AbortController();
  const end = () => ending.abort(signal.reason);
  if (signal?.aborted) end();
  signal?.addEventListener("abort", end);
  const answer = await ask(method, path, body, { signal: ending.signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const found = parsed(block);
        if (found === null) continue;
        if (found.event === "error") {
          const about = found.data.error ?? {};
          throw new ApiError(about.message ?? "The answer broke off", { status: 500, ...about });
        }
        yield found;
        if (found.event === "done") return;
      }
    }
    throw Object.assign(lostError(), { message: "The connection was lost before the answer's end" });
  } catch (error) {
    if (error instanceof ApiError) {
      if (error.lost) connection.lose();
      throw error;
    }
    if (error.name === "AbortError") throw error;
    connection.lose();
    throw Object.assign(lostError(), { message: "The connection was lost before the answer's end" });
  } finally {
    signal?.removeEventListener("abort", end);
    ending.abort();
  }
}

/**
 * The events of the rest of an answer to `body` (of `/generate`) that has the tokens `answered`: those that would have come
 * in one go. Searches and mirostat, which remember more than tokens, begin anew behind them: after the tokens that
 * `prompt()` gives, and those.
 */
export async function* goingOn(body, answered, prompt, signal) {
  try {
    yield* stream("generate", answered.length ? { ...body, answer_prefix: answered } : body, { signal });
  } catch (error) {
    if (!answered.length || !["num_beams", "penalty_alpha", "mirostat"].includes(error.field)) throw error;
    const { messages, ...others } = body;
    const less = (count, by) => (Number.isInteger(count) ? count + by : count);
    // The seed's noise is counted from the first token: with the same one it would come a second time.
    const left = { max_tokens: less(body.max_tokens, -answered.length), seed: less(body.seed, answered.length) };
    yield* stream("generate", { ...others, ...left, prompt: [...(await prompt()), ...answered] }, { signal });
  }
}

function parsed(block) {
  const found = { event: "message", data: "", id: null };
  for (const line of block.split("\n")) {
    const colon = line.indexOf(":");
    if (colon <= 0) continue;
    const value = line.slice(colon + 1).replace(/^ /, "");
    if (line.startsWith("data")) found.data += value;
    else if (line.startsWith("event")) found.event = value;
    else if (line.startsWith("id")) found.id = value;
  }
  return found.data === "" ? null : { ...found, data: JSON.parse(found.data) };
}
