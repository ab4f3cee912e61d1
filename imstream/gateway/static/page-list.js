/** The list of conversations beside the chat. */

import { local } from "./page-store.js";
import { language, say, write } from "./page-texts.js";
import { $, choose, draw } from "./page-view.js";

const isNarrow = matchMedia("(max-width: 56rem)"); // then the list lies over the chat
const DAY = 86_400_000;

export class ConversationList {
  /** @type {Map<string, HTMLElement>} Entries by the id of their conversation. */
  #entries = new Map();

  /** @param chat the Chat whose conversations are listed */
  constructor(chat) {
    this.chat = chat;
    $("list").querySelector("ul").replaceChildren();
    this.show(!isNarrow.matches && local.get("list") === true);
  }

  /** Opens or closes the list. */
  show(visible) {
    const hasFocus = $("list").contains(document.activeElement);
    $("list").hidden = !visible;
    $("toggle").ariaExpanded = String(visible);
    if (hasFocus && !visible) $("toggle").focus();
    draw(this);
  }

  toggle() {
    const visible = $("list").hidden;
    this.show(visible);
    if (!isNarrow.matches) local.set("list", visible);
    else if (visible) ($("list").querySelector("button") ?? $("toggle")).focus();
  }

  /** Closes a list that lies over the chat. Returns whether it did. */
  closeOverlay() {
    const isOpen = isNarrow.matches && !$("list").hidden;
    if (isOpen) this.show(false);
    return isOpen;
  }

  /** An answer is being written in a conversation that is not shown. */
  get #runsElsewhere() {
    return this.chat.list.some((conversation) => conversation.isLive && conversation !== this.chat.current);
  }

  draw() {
    $("elsewhere-runs").hidden = !this.#runsElsewhere || !$("list").hidden;
    if ($("list").hidden) return;
    const list = $("list").querySelector("ul");
    const focused = document.activeElement;
    const wanted = this.chat.list.map((conversation) => this.#entry(conversation));
    for (const element of [...list.children]) if (!wanted.includes(element)) this.#drop(element);
    for (const [index, element] of wanted.entries()) {
      if (list.children[index] !== element) list.insertBefore(element, list.children[index] ?? null);
    }
    const { isKept } = this.chat.archive;
    $("none").hidden = wanted.length > 0 || !isKept;
    $("not-kept").hidden = isKept;
    if (focused !== document.activeElement && focused.isConnected) focused.focus();
    else if (!focused.isConnected) (list.querySelector("button") ?? $("toggle")).focus();
  }

  #drop(element) {
    element.remove();
    this.#entries.delete(element.dataset.id);
  }

  #entry(conversation) {
    const { id, title, at, isLive } = conversation;
    const element = this.#entries.get(id) ?? this.#make(conversation);
    const [open, remove] = element.querySelectorAll("button");
    const name = title || say("unknownQuestion");
    element.dataset.live = String(isLive);
    open.ariaCurrent = String(conversation === this.chat.current);
    write(open.firstElementChild, name);
    write(open.lastElementChild, isLive ? say("running") : when(at));
    remove.ariaLabel = remove.title = say("remove", { title: name });
    return element;
  }

  #make(conversation) {
    const element = $("entry").content.firstElementChild.cloneNode(true);
    const [open, remove] = element.querySelectorAll("button");
    element.dataset.id = conversation.id;
    open.onclick = () => {
      this.chat.open(conversation.id);
      if (this.closeOverlay()) $("box").focus();
    };
    remove.onclick = () => this.#remove(conversation);
    this.#entries.set(conversation.id, element);
    return element;
  }

  async #remove(conversation) {
    const question = say("removeQuestion", { title: conversation.title });
    if ((await choose(question, [say("removeYes"), say("back")])) === 0) await this.chat.remove(conversation);
  }
}

/** The day or the time of day. */
function when(time) {
  const options = Date.now() - time < DAY ? { timeStyle: "short" } : { dateStyle: "medium" };
  return new Date(time).toLocaleString(language() === "zh" ? "zh-CN" : "en", options);
}
