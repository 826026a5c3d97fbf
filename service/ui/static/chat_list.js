// The list of conversations: found by their words, named, exported, brought back, taken away.

import { button, clear, download, element, freshId, visible } from "./dom.js";
import { showError } from "./errors.js";
import * as tree from "./chat_tree.js";

const SECONDS_TO_UNDO = 8;

function fileName(conversation, ending) {
  const name = (conversation.title || "conversation").replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40);
  return `${name.replace(/^-|-$/g, "") || "conversation"}.${ending}`;
}

/**
 * Put the list into `root`. `acts`: {all(), open(conversation), create(), put(conversation), remove(conversation), busy(conversation)}.
 * -> {show(current), search}
 */
export function conversationList(root, acts) {
  const search = element("input", { type: "search", id: freshId("search"), placeholder: "Search", "aria-label": "Search the conversations", oninput: () => show() });
  const list = element("ul", { class: "conversations" });
  const undo = element("p", { class: "note", role: "status" });
  const file = element("input", { type: "file", accept: ".json,application/json", class: "off-screen", tabindex: "-1", "aria-hidden": "true", onchange: bring });
  const rows = new Map();
  let current = null;

  clear(root).append(
    button("New conversation", acts.create, { class: "wide", id: "new-conversation" }),
    search,
    list,
    undo,
    element(
      "div",
      { class: "row files" },
      button("Import", () => file.click(), { title: "Conversations from a file that was exported here" }),
      button("Export all", () => download("conversations.json", tree.exported(acts.all()))),
      file,
    ),
  );

  async function bring() {
    const [given] = file.files;
    file.value = "";
    if (!given) return;
    try {
      const found = tree.imported(await given.text());
      for (const conversation of found) await acts.put(conversation);
      if (found.length) acts.open(found[0]);
    } catch (error) {
      showError(root, { message: `${given.name} cannot be imported: ${error.message}`, hint: "choose a file that was exported as JSON" });
    }
  }

  /** What has not changed stays as it is: a menu that is open, and where the keyboard stands. */
  function rowOf(conversation) {
    const seen = JSON.stringify([conversation.title, conversation === current, acts.busy(conversation)]);
    const known = rows.get(conversation.id);
    if (known?.seen !== seen || known.conversation !== conversation) rows.set(conversation.id, { seen, conversation, item: row(conversation) });
    return rows.get(conversation.id).item;
  }

  function row(conversation) {
    const name = visible(conversation.title || "New conversation");
    const title = button(name, () => acts.open(conversation), { class: "title", title: name, "aria-current": conversation === current ? "true" : null });
    const item = element("li", { class: conversation === current ? "current" : "" }, title);
    if (acts.busy(conversation)) title.append(element("span", { class: "chip" }, "writing"));
    const menu = element("details", { class: "more" }, element("summary", { "aria-label": `What to do with ${name}` }, "⋯"));
    menu.append(
      element(
        "div",
        { class: "menu" },
        button("Rename", () => rename(conversation, item)),
        button("Export as JSON", () => download(fileName(conversation, "json"), tree.exported([conversation]))),
        button("Export as Markdown", () => download(fileName(conversation, "md"), tree.asMarkdown(conversation), "text/markdown")),
        button("Delete", () => take(conversation), { class: "danger" }),
      ),
    );
    item.append(menu);
    return item;
  }

  function rename(conversation, item) {
    rows.delete(conversation.id);
    const field = element("input", { type: "text", "aria-label": "Name of the conversation", maxlength: 100, value: conversation.title });
    const done = async (keep) => {
      if (keep && field.value.trim()) {
        conversation.title = field.value.trim();
        conversation.named = true;
        await acts.put(conversation);
      }
      show();
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter") done(true);
      else if (event.key === "Escape") done(false);
    });
    field.addEventListener("blur", () => done(true));
    clear(item).append(field);
    field.focus();
    field.select();
  }

  async function take(conversation) {
    await acts.remove(conversation);
    const said = element("span", {}, `Deleted “${visible(conversation.title || "New conversation")}”. `);
    const back = button("Undo", async () => {
      clear(undo);
      await acts.put(conversation);
      acts.open(conversation);
    });
    clear(undo).append(said, back);
    setTimeout(() => back.isConnected && clear(undo), SECONDS_TO_UNDO * 1000);
  }

  function show(now = current) {
    current = now;
    const words = search.value.trim();
    const found = acts
      .all()
      .filter((each) => each === current || Object.keys(each.turns).length)
      .filter((each) => !words || tree.matches(each, words))
      .sort((one, other) => other.changed - one.changed);
    const wanted = found.map(rowOf);
    if (words && !found.length) wanted.push(element("li", { class: "note" }, "None has these words."));
    wanted.forEach((item, at) => item !== list.children[at] && list.insertBefore(item, list.children[at] ?? null));
    while (list.children.length > wanted.length) list.lastChild.remove();
  }

  return { show, search };
}
