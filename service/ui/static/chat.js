// The chat tab: conversations with a checkpoint, kept in this browser; base checkpoints continue single texts.

import { connection } from "./api.js";
import { conversationList } from "./chat_list.js";
import { answer, busy, contextUsed, facts, fresh } from "./chat_run.js";
import { asCurl, asPython, linked, linkTo } from "./chat_share.js";
import { shortcuts, showShortcuts } from "./chat_keys.js";
import * as tree from "./chat_tree.js";
import { turnView } from "./chat_turn.js";
import { welcome } from "./chat_welcome.js";
import { button, clear, element } from "./dom.js";
import { clearError, showError } from "./errors.js";
import { describe, models, picker } from "./models.js";
import { descriptors, drawer } from "./parameters.js";
import * as store from "./store.js";

// How often a growing answer is drawn, and how long its drawing may take of that time.
const DRAW_EVERY = 80;
const NEAR_THE_END = 80;
const PHONE = matchMedia("(max-width: 767px)");
const WIDE = 1200;
// Without a limit a small network goes on until its context is full.
const MOST_TOKENS = 512;

export async function mount(root) {
  root.append(element("link", { rel: "stylesheet", href: new URL("chat.css", import.meta.url).href }));
  const chat = new Chat(root, await descriptors());
  await chat.begin();
}

class Chat {
  #conversations = new Map();
  #running = new Map();
  #views = [];
  #current = tree.newConversation();

  constructor(root, rows) {
    this.kept = store.collection("conversations", { onfull: (error) => this.#full(error) });
    this.text = element("textarea", { rows: 1, "aria-label": "Message", placeholder: "Write here; Enter sends", id: "message-text" });
    this.send = element("button", { type: "submit", class: "primary send-button" }, "Send");
    this.stop = button("Stop", () => this.#stop(), { class: "danger stop-button", hidden: true });
    this.status = element("p", { id: "status", class: "note", role: "status" });
    this.form = element("form", { id: "message", onsubmit: (event) => (event.preventDefault(), this.#submit()) }, this.text, this.send, this.stop);
    this.composer = element("div", { class: "composer" }, this.form, this.status);
    this.conversation = element("div", { id: "conversation", role: "log", "aria-live": "off", "aria-label": "Conversation", tabindex: "0" });
    const bar = element("div", { class: "row bar" });
    this.listSide = element("aside", { class: "chat-list", id: "conversations", "aria-label": "Conversations" });
    this.system = element("textarea", { id: "system", rows: 2, placeholder: "none" });
    const parameters = element("div");
    this.systemField = element("div", { class: "field" }, element("label", { for: "system" }, "System message"), this.system);
    this.settingsSide = element("aside", { class: "side", id: "settings", "aria-label": "Settings" }, this.systemField, parameters);
    this.layout = element(
      "div",
      { id: "chat", class: "chat" },
      this.listSide,
      element("section", { class: "talk", "aria-label": "Chat" }, bar, this.conversation, this.composer),
      this.settingsSide,
    );
    root.append(this.layout);

    this.listButton = this.#toggle("list", "☰", "Conversations", this.listSide);
    this.settingsButton = this.#toggle("settings", "⚙", "Settings", this.settingsSide);
    bar.append(this.listButton);
    this.drawer = drawer(parameters, { descriptors: rows });
    this.drawer.set(store.get("chat.parameters", {}));
    this.drawer.onchange = () => store.set("chat.parameters", this.drawer.values());
    this.picker = picker(bar, { id: "checkpoint", remember: "chat.checkpoint", onchange: (model) => this.#choose(model) });
    bar.append(
      element("span", { class: "grow" }),
      button("New", () => this.create(), { class: "quiet", title: "A new conversation (Alt + N)" }),
      button("?", showShortcuts, { class: "quiet", "aria-label": "Keyboard shortcuts" }),
      this.settingsButton,
    );

    this.list = conversationList(this.listSide, {
      all: () => [...this.#conversations.values()],
      open: (conversation) => this.open(conversation),
      create: () => this.create(),
      put: (conversation) => this.#keep(conversation),
      remove: (conversation) => this.#remove(conversation),
      busy: (conversation) => this.#running.has(conversation.id),
    });
    this.#listen(root);
  }

  #listen(root) {
    this.text.addEventListener("input", () => this.#fit());
    this.text.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#submit();
    });
    this.system.addEventListener("input", () => {
      this.#current.system = this.system.value;
      this.#keep(this.#current);
    });
    const last = (roles) => this.#views.findLast((view) => roles.includes(view.turn.role));
    shortcuts(root, {
      stop: () => this.#stop(),
      focus: () => this.text.focus(),
      create: () => this.create(),
      search: () => (this.#open("list", true), this.list.search.focus()),
      retry: () => last(["assistant", "continuation"]) && this.#retry(last(["assistant", "continuation"]).turn),
      edit: () => last(["user", "prompt"])?.edit(),
      move: (step) => {
        const several = this.#views.findLast((view) => tree.siblings(this.#current, view.turn).length > 1);
        if (several) this.#move(several.turn, step);
      },
      settings: () => this.settingsButton.click(),
      list: () => this.listButton.click(),
    });
    addEventListener("pagehide", () => {
      for (const { conversation, abort } of this.#running.values()) {
        abort.abort();
        this.#keep(conversation);
      }
    });
    addEventListener("hashchange", () => this.#fromLink());
    connection.addEventListener("back", () => this.#state());
  }

  /** A button that shows or hides a side, as it was left; on a phone both begin hidden. */
  #toggle(name, sign, label, side) {
    const made = button(sign, () => this.#open(name, side.hidden), { class: "quiet", "aria-controls": side.id, "aria-label": label, title: label });
    side.hidden = PHONE.matches || !store.get(`chat.${name}`, name === "settings" || innerWidth >= WIDE);
    made.setAttribute("aria-expanded", String(!side.hidden));
    return made;
  }

  #open(name, open) {
    const [side, made] = { list: [this.listSide, this.listButton], settings: [this.settingsSide, this.settingsButton] }[name];
    side.hidden = !open;
    made.setAttribute("aria-expanded", String(open));
    if (!PHONE.matches) store.set(`chat.${name}`, open);
  }

  async begin() {
    for (const conversation of await this.kept.all()) {
      this.#conversations.set(conversation.id, conversation);
      // What was being written when the page went away is all there is of it.
      for (const turn of Object.values(conversation.turns).filter(busy)) {
        turn.state = "lost";
        turn.trouble = "the page was closed while it was written";
      }
    }
    this.open(this.#conversations.get(store.get("chat.open")) ?? this.#current, { focus: true });
    await this.#fromLink();
  }

  /** A request in the address is shown, not sent: whoever follows a link decides. */
  async #fromLink() {
    let asked;
    try {
      asked = await linked();
    } catch (error) {
      showError(this.composer, { message: `The link can't be read: ${error.message}`, hint: "copy it again" });
      return;
    }
    if (!asked) return;
    history.replaceState(null, "", "#chat");
    const conversation = tree.fromRequest(asked);
    if (models.get(asked.model)) this.picker.choose(asked.model);
    else showError(this.composer, { message: `The link is about ${asked.model}, which is not loaded`, hint: "another checkpoint answers otherwise" });
    this.drawer.set(asked.parameters);
    await this.#keep(conversation);
    this.open(conversation);
  }

  #choose(model) {
    if (!model) return;
    this.systemField.hidden = !model.chat;
    this.drawer.use({ defaults: defaultsOf(model) });
    this.text.placeholder = model.chat ? "Write here; Enter sends" : "Begin a text; Enter has it continued";
    if (!this.#views.length) this.#show();
    else this.status.textContent = `${model.name} · ${describe(model)}`;
  }

  create() {
    this.open(tree.newConversation(), { focus: true });
  }

  open(conversation, { focus = false } = {}) {
    this.#current = conversation;
    store.set("chat.open", conversation.id);
    this.system.value = conversation.system;
    clearError(this.composer);
    this.#show();
    this.conversation.scrollTop = this.conversation.scrollHeight;
    if (focus || !PHONE.matches) this.text.focus();
    if (PHONE.matches) this.#open("list", false);
  }

  /** Draw the branch that is shown, and everything that depends on it. */
  #show() {
    const turns = tree.path(this.#current);
    this.#views = turns.map((turn) =>
      turnView(turn, {
        place: () => {
          const all = tree.siblings(this.#current, turn);
          return { position: all.indexOf(turn), count: all.length };
        },
        acts: {
          edit: (turn, text) => this.#edit(turn, text),
          retry: (turn) => this.#retry(turn),
          goOn: (turn) => this.#run(turn, { goOn: true }),
          move: (turn, step) => this.#move(turn, step),
          run: (turn) => this.#answerTo(turn),
          unanswered: (turn) => this.#current.chosen[turn.id] === undefined,
          link: (turn) => linkTo(turn),
          curl: (turn) => asCurl(turn),
          python: (turn) => asPython(turn),
        },
      }),
    );
    clear(this.conversation).append(...this.#views.map((view) => view.element));
    const model = this.picker?.model;
    if (!turns.length && model) {
      const first = element("div", { class: "welcome" });
      const notebook = document.getElementById("tab-notebook-button");
      this.conversation.append(first);
      welcome(first, model, { ask: (text) => this.#ask(text), notebook: notebook && (() => notebook.click()) });
      this.status.textContent = `${model.name} · ${describe(model)}`;
    } else this.#say(this.#running.get(this.#current.id)?.turn ?? turns.findLast((turn) => turn.token_ids));
    this.#state();
    this.list?.show(this.#current);
  }

  /** How the answer comes along; once it is there, how much of the context is used. */
  #say(turn) {
    const model = turn && models.get(turn.model);
    if (!model) this.status.textContent = "";
    else this.status.textContent = busy(turn) ? facts(turn) : `${model.name} · ${contextUsed(turn, model)}`;
  }

  /** Which buttons there are, by whether the shown conversation is being answered. */
  #state() {
    const running = this.#running.has(this.#current.id);
    this.send.hidden = running;
    this.stop.hidden = !running;
  }

  #fit() {
    this.text.style.height = "auto";
    this.text.style.height = `${Math.min(this.text.scrollHeight + 2, innerHeight * 0.4)}px`;
  }

  #submit() {
    const text = this.text.value;
    if (!text.trim() || this.#running.has(this.#current.id)) return;
    this.text.value = "";
    this.#fit();
    this.#ask(text);
  }

  #ask(text) {
    const model = this.picker.model;
    if (!model) {
      this.text.value = text;
      showError(this.composer, { message: `${this.picker.value ?? "No checkpoint"} is not loaded`, hint: "choose another checkpoint" });
      return;
    }
    const last = tree.path(this.#current).at(-1);
    const asked = tree.add(this.#current, last?.id ?? "", model.chat ? "user" : "prompt", text);
    this.#answerTo(asked, { text });
  }

  #answerTo(asked, options = {}) {
    const model = this.picker.model;
    if (!model || this.#running.has(this.#current.id)) return;
    // Where nothing is chosen there is still a limit.
    const parameters = { max_tokens: defaultsOf(model).max_tokens, ...this.drawer.values() };
    const alone = asked.role === "prompt";
    const fields = { ...fresh(model, parameters), ...(alone ? { prompt: asked.text } : {}) };
    const turn = tree.add(this.#current, asked.id, alone ? "continuation" : "assistant", "", fields);
    this.#show();
    this.conversation.scrollTop = this.conversation.scrollHeight;
    return this.#run(turn, { ...options, asked, isNew: true });
  }

  /** Have an answer written. Where nothing came of it, it is taken back, and what was asked goes to where it was written. */
  async #run(turn, { goOn = false, asked = null, isNew = false, text = null } = {}) {
    const conversation = this.#current;
    const model = models.get(turn.model);
    if (this.#running.has(conversation.id)) return;
    if (!model) {
      showError(this.composer, { message: `${turn.model} is not loaded any more`, hint: "choose another checkpoint and press Retry" });
      return;
    }
    const abort = new AbortController();
    this.#running.set(conversation.id, { conversation, turn, abort });
    clearError(this.composer);
    this.#state();
    this.list.show();
    let drawn = 0;
    let took = 0;
    let waiting = null;
    const draw = () => {
      waiting = null;
      const began = performance.now();
      const shown = this.#current === conversation;
      const atEnd = this.conversation.scrollHeight - this.conversation.scrollTop - this.conversation.clientHeight < NEAR_THE_END;
      this.#views.find((view) => view.turn === turn)?.update();
      if (shown) this.#say(turn);
      if (shown && atEnd) this.conversation.scrollTop = this.conversation.scrollHeight;
      drawn = performance.now();
      took = drawn - began;
    };
    const shown = () => {
      if (!busy(turn) || turn.text === "") return clearTimeout(waiting), draw();
      // Drawing has a fifth of the time at most: what is typed meanwhile goes first.
      waiting ??= setTimeout(draw, Math.max(0, drawn + Math.max(DRAW_EVERY, 4 * took) - performance.now()));
    };
    try {
      await answer(conversation, turn, model, { signal: abort.signal, shown, keep: () => this.#keep(conversation), goOn });
    } catch (error) {
      if (isNew) {
        tree.remove(conversation, turn);
        if (text !== null) tree.remove(conversation, asked);
      }
      if (this.#current === conversation) {
        if (text !== null && !this.text.value) this.text.value = text;
        this.#fit();
        this.#running.delete(conversation.id);
        this.#show();
        this.status.textContent = "";
        showError(this.composer, error);
        if (text !== null) this.text.focus();
      }
    } finally {
      clearTimeout(waiting);
      this.#running.delete(conversation.id);
      tree.touch(conversation);
      await this.#keep(conversation);
      if (this.#current === conversation) {
        this.#views.find((view) => view.turn === turn)?.update();
        this.#state();
      }
      this.list.show();
    }
  }

  #stop() {
    this.#running.get(this.#current.id)?.abort.abort();
  }

  #retry(turn) {
    const asked = this.#current.turns[turn.parent];
    if (asked && !this.#running.has(this.#current.id)) this.#answerTo(asked);
  }

  #edit(turn, text) {
    if (this.#running.has(this.#current.id)) return;
    const asks = turn.role === "user" || turn.role === "prompt";
    const { parent, role, ...rest } = turn;
    const fields = asks ? {} : { model: rest.model, parameters: rest.parameters, messages: rest.messages, token_ids: [], state: "done", edited: true };
    const made = tree.add(this.#current, parent, role, text, fields);
    if (asks) this.#answerTo(made);
    else {
      this.#show();
      this.#keep(this.#current);
    }
  }

  #move(turn, step) {
    const all = tree.siblings(this.#current, turn);
    const next = all[all.indexOf(turn) + step];
    if (!next) return;
    tree.choose(this.#current, next);
    this.#keep(this.#current);
    const at = this.conversation.scrollTop;
    this.#show();
    this.conversation.scrollTop = at;
  }

  #keep(conversation) {
    if (!Object.keys(conversation.turns).length && !conversation.system) return Promise.resolve();
    this.#conversations.set(conversation.id, conversation);
    return this.kept.put(conversation);
  }

  async #remove(conversation) {
    this.#running.get(conversation.id)?.abort.abort();
    this.#conversations.delete(conversation.id);
    await this.kept.remove(conversation.id);
    if (conversation === this.#current) this.create();
    else this.list.show();
  }

  #full(error) {
    const hint = "export what you want to keep, and delete older conversations";
    showError(this.composer, { message: `The browser keeps no more: ${error?.message ?? "its storage is full"}`, hint });
  }
}

/** A checkpoint's defaults; its own limit on an answer's length or MOST_TOKENS, as far as its context has room. */
function defaultsOf(model) {
  const own = (model.chat ? model.chat_defaults : model.defaults) ?? {};
  return { ...own, max_tokens: Math.min(own.max_tokens ?? MOST_TOKENS, model.context_length - 1) };
}
