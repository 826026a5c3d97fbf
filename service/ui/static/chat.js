// The chat tab: conversations with a checkpoint, kept in this browser; base checkpoints continue single texts.

import { conversationList } from "./chat_list.js";
import { answer, busy, comeBack, contextUsed, defaultsOf, facts, fresh, leave } from "./chat_run.js";
import { asCurl, asPython, linked, linkTo } from "./chat_share.js";
import { layout, PHONE } from "./chat_layout.js";
import { shortcuts, showShortcuts } from "./chat_keys.js";
import * as tree from "./chat_tree.js";
import { turnView } from "./chat_turn.js";
import { welcome } from "./chat_welcome.js";
import { button, clear, element, visible } from "./dom.js";
import { clearError, showError } from "./errors.js";
import { paced } from "./fields.js";
import { describe, models, picker } from "./models.js";
import { descriptors, drawer } from "./parameters.js";
import * as store from "./store.js";

// Milliseconds between two drawings of a growing answer.
const DRAW_EVERY = 80;
const NEAR_THE_END = 80;
const SPOKEN = { reading: "Reading", writing: "Writing", done: "The answer is there", stopped: "Stopped", lost: "Broken off", failed: "Broken off" };

export async function mount(root) {
  root.append(element("link", { rel: "stylesheet", href: new URL("chat.css", import.meta.url).href }));
  let chat = null;
  const kept = store.collection("conversations", {
    onfull: (error) => chat?.full(error),
    onchange: (id, record) => chat?.elsewhere(id, record),
  });
  // All there is to be read of this browser comes before anybody can write into what it would replace.
  const [rows, conversations] = await Promise.all([descriptors(), kept.all()]);
  chat = new Chat(root, rows, kept);
  await chat.begin(conversations);
}

class Chat {
  #conversations = new Map();
  #running = new Map();
  #unkept = new Map();
  #waiting = null;
  #views = [];
  #current = tree.newConversation();

  constructor(root, rows, kept) {
    this.kept = kept;
    Object.assign(this, layout(root, { submit: () => this.#submit(), stop: () => this.#stop() }));
    this.bar.append(this.sides.list.toggle);
    this.drawer = drawer(this.parameters, { descriptors: rows, known: false });
    this.drawer.set(store.get("chat.parameters", {}));
    this.drawer.onchange = () => store.set("chat.parameters", this.drawer.values());
    this.picker = picker(this.bar, { id: "checkpoint", remember: "chat.checkpoint", onchange: (model) => this.#choose(model) });
    this.bar.append(
      element("span", { class: "grow" }),
      button("New", () => this.create(), { class: "quiet", title: "A new conversation (Alt + N)" }),
      button("?", showShortcuts, { class: "quiet", "aria-label": "Keyboard shortcuts" }),
      this.sides.settings.toggle,
    );

    this.found = conversationList(this.list, {
      all: () => [...this.#conversations.values()],
      open: (conversation) => this.open(conversation),
      create: () => this.create(),
      put: (conversation) => (delete conversation.gone, this.#keep(conversation)),
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
      search: () => (this.sides.list.open(true), this.found.search.focus()),
      retry: () => last(["assistant", "continuation"]) && this.#retry(last(["assistant", "continuation"]).turn),
      edit: () => last(["user", "prompt"])?.edit(),
      move: (step) => {
        const several = this.#views.findLast((view) => tree.siblings(this.#current, view.turn).length > 1);
        if (several) this.#move(several.turn, step);
      },
      settings: () => this.sides.settings.toggle.click(),
      list: () => this.sides.list.toggle.click(),
    });
    addEventListener("pagehide", () => {
      leave([...this.#running.values(), ...this.#unkept.values()]);
      for (const { abort } of this.#running.values()) abort.abort();
    });
    addEventListener("hashchange", () => this.#fromLink());
  }

  async begin(conversations) {
    for (const conversation of conversations) this.#conversations.set(conversation.id, conversation);
    for (const conversation of comeBack(this.#conversations)) this.#keep(conversation);
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
    await this.#keep(conversation);
    this.open(conversation);
    await models.known().catch(() => {});
    if (models.get(asked.model)) this.picker.choose(asked.model);
    else showError(this.composer, { message: `The link is about ${asked.model}, which is not loaded`, hint: "another checkpoint answers otherwise" });
    this.drawer.set(asked.parameters);
  }

  #choose(model) {
    if (!model) return;
    this.systemField.hidden = !model.chat;
    this.drawer.use({ defaults: defaultsOf(model) });
    this.text.placeholder = model.chat ? "Write here; Enter sends" : "Begin a text; Enter has it continued";
    if (!this.#views.length) this.#show();
    else this.status.textContent = visible(`${model.name} · ${describe(model)}`);
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
    this.turns.scrollTop = this.turns.scrollHeight;
    // Whoever goes through the bar of tabs by keyboard stays there.
    if ((focus || !PHONE.matches) && !document.activeElement?.matches("[role=tab]")) this.text.focus();
    if (PHONE.matches) this.sides.list.open(false);
  }

  /** Draw the branch that is shown, and everything that depends on it. */
  #show() {
    const turns = tree.path(this.#current);
    // What two branches share is left as it is: a long conversation is not drawn anew for each message.
    const other = turns.findIndex((turn, number) => this.#views[number]?.turn !== turn);
    const shared = this.#views.slice(0, other < 0 ? turns.length : other);
    shared.at(-1)?.renew();
    this.#views = [...shared, ...turns.slice(shared.length).map((turn) => this.#view(turn))];
    if (!shared.length) clear(this.turns);
    while (this.turns.children.length > shared.length) this.turns.lastChild.remove();
    this.turns.append(...this.#views.slice(shared.length).map((view) => view.element));
    const model = this.picker?.model;
    if (!turns.length && model) {
      const first = element("div", { class: "welcome" });
      const notebook = document.getElementById("tab-notebook-button");
      this.turns.append(first);
      welcome(first, model, { ask: (text) => this.#ask(text), notebook: notebook && (() => notebook.click()) });
      this.status.textContent = visible(`${model.name} · ${describe(model)}`);
    } else this.#say(this.#running.get(this.#current.id)?.turn ?? turns.findLast((turn) => turn.token_ids));
    this.#state();
    this.found?.show(this.#current);
  }

  #view(turn) {
    return turnView(turn, {
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
    });
  }

  /** How the answer comes along; once it is there, how much of the context is used. */
  #say(turn) {
    const model = turn && models.get(turn.model);
    const spoken = turn ? SPOKEN[turn.state] : "";
    if (spoken !== undefined && this.spoken.textContent !== spoken) this.spoken.textContent = spoken;
    if (!model) this.status.textContent = "";
    else this.status.textContent = visible(busy(turn) ? facts(turn) : `${model.name} · ${contextUsed(turn, model)}`);
  }

  /** Which buttons there are, by whether the shown conversation is being answered. */
  #state() {
    const running = this.#running.has(this.#current.id) || this.#waiting !== null;
    this.send.hidden = running;
    this.stop.hidden = !running;
  }

  /** Browsers that fit a field to its text themselves don't need the page to be laid out for each key. */
  #fit() {
    if (CSS.supports("field-sizing", "content")) return;
    this.text.style.height = "auto";
    this.text.style.height = `${Math.min(this.text.scrollHeight + 2, innerHeight * 0.4)}px`;
  }

  /**
   * The checkpoint that is chosen, or that `name` names, once it is known what is loaded; null, and why is said, where
   * there is none, and where another conversation is shown by then.
   */
  async #checkpoint(name = null) {
    const known = models.get(name ?? this.picker.value);
    if (known) return known;
    if (this.#waiting) return null;
    const conversation = this.#current;
    this.#waiting = new AbortController();
    clearError(this.composer);
    if (!models.isRead) this.status.textContent = "Waiting for the list of checkpoints…";
    this.#state();
    try {
      const found = await models.need(() => name ?? this.picker.value, this.#waiting.signal);
      return this.#current === conversation ? found : null;
    } catch (error) {
      if (error.name !== "AbortError") showError(this.composer, error);
      return null;
    } finally {
      this.#waiting = null;
      this.status.textContent = "";
      this.#state();
    }
  }

  /** What is written stays where it is until it is known who answers it. */
  async #submit() {
    if (!this.text.value.trim() || this.#running.has(this.#current.id) || !(await this.#checkpoint())) return;
    const text = this.text.value;
    if (!text.trim()) return;
    this.text.value = "";
    this.#fit();
    this.#ask(text);
  }

  async #ask(text) {
    const model = await this.#checkpoint();
    if (!model) return;
    const last = tree.path(this.#current).at(-1);
    const asked = tree.add(this.#current, last?.id ?? "", model.chat ? "user" : "prompt", text);
    this.#answerTo(asked, { text });
  }

  async #answerTo(asked, options = {}) {
    const model = await this.#checkpoint();
    if (!model || this.#running.has(this.#current.id)) return;
    // Where nothing is chosen there is still a limit.
    const parameters = { max_tokens: defaultsOf(model).max_tokens, ...this.drawer.values() };
    const alone = asked.role === "prompt";
    const fields = { ...fresh(model, parameters), ...(alone ? { prompt: asked.text } : {}) };
    const turn = tree.add(this.#current, asked.id, alone ? "continuation" : "assistant", "", fields);
    this.#show();
    this.turns.scrollTop = this.turns.scrollHeight;
    return this.#run(turn, { ...options, asked, isNew: true });
  }

  /** Have an answer written. Where nothing came of it, it is taken back, and what was asked goes to where it was written. */
  async #run(turn, { goOn = false, asked = null, isNew = false, text = null } = {}) {
    const model = await this.#checkpoint(turn.model);
    const conversation = this.#current;
    if (!model || this.#running.has(conversation.id)) return;
    const abort = new AbortController();
    this.#running.set(conversation.id, { conversation, turn, abort });
    clearError(this.composer);
    this.#state();
    this.#keep(conversation);
    this.found.show();
    const draw = paced(() => {
      const shown = this.#current === conversation;
      const atEnd = this.turns.scrollHeight - this.turns.scrollTop - this.turns.clientHeight < NEAR_THE_END;
      this.#views.find((view) => view.turn === turn)?.update();
      if (shown) this.#say(turn);
      if (shown && atEnd) this.turns.scrollTop = this.turns.scrollHeight;
    }, DRAW_EVERY);
    const shown = () => (!busy(turn) || turn.text === "" ? draw.now() : draw.later());
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
      draw.stop();
      this.#running.delete(conversation.id);
      tree.touch(conversation);
      this.#unkept.set(turn.id, { conversation, turn });
      await this.#keep(conversation);
      this.#unkept.delete(turn.id);
      if (this.#current === conversation) {
        this.#views.find((view) => view.turn === turn)?.update();
        this.#state();
      }
      this.found.show();
    }
  }

  #stop() {
    this.#waiting?.abort();
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
    const at = this.turns.scrollTop;
    this.#show();
    this.turns.scrollTop = at;
  }

  #keep(conversation) {
    if (conversation.gone) return Promise.resolve();
    if (!Object.keys(conversation.turns).length && !conversation.system) {
      return this.#conversations.delete(conversation.id) ? this.kept.remove(conversation.id) : Promise.resolve();
    }
    this.#conversations.set(conversation.id, conversation);
    return this.kept.put(conversation);
  }

  /** Another tab of this browser has changed a conversation: it is the same one here, unless it is being answered here. */
  elsewhere(id, record) {
    if (this.#running.has(id) || (this.#current.id === id && this.turns.querySelector(".edit"))) return;
    if (record) this.#conversations.set(id, record);
    else this.#conversations.delete(id);
    if (record && this.#current.id === id) this.#current = record;
    if (this.#current.id === id) this.#show();
    else this.found.show();
  }

  async #remove(conversation) {
    conversation.gone = true;
    this.#running.get(conversation.id)?.abort.abort();
    this.#conversations.delete(conversation.id);
    await this.kept.remove(conversation.id);
    if (conversation === this.#current) this.create();
    else this.found.show();
  }

  full(error) {
    const hint = "export what you want to keep, and delete older conversations";
    showError(this.composer, { message: `The browser keeps no more: ${error?.message ?? "its storage is full"}`, hint });
  }
}
