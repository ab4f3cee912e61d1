/** The conversations of a user: their messages, the history sent with a question, and messages that wait for an answer. */

import { newMessageId } from "./imstream.js";
import { ENDED, Exchange } from "./page-exchange.js";
import { session } from "./page-store.js";
import { $, draw, pin } from "./page-view.js";

const MARGIN = 2000; // bytes of a frame beside the question and its history
const TITLE = 80;

/** Conversations share the beginning of their message ids, so that every tab and device can group them. */
const conversationOf = (messageId) => messageId.split(".")[0];
const randomId = () => newMessageId().slice(0, 16);
const size = (value) => new TextEncoder().encode(JSON.stringify(value)).length;

class Conversation {
  /** @type {Exchange[]} The oldest first. */
  exchanges = [];

  constructor(id) {
    this.id = id;
    this.element = document.createElement("div");
    this.element.setAttribute("role", "log");
  }

  /** Its first question; empty without one. */
  get title() {
    const [line = ""] = (this.exchanges[0]?.message.contents ?? "").trim().split("\n");
    return line.length > TITLE ? `${line.slice(0, TITLE)}…` : line;
  }

  get at() {
    return Math.max(...this.exchanges.map(({ at }) => at));
  }

  get isLive() {
    return this.exchanges.some(({ live }) => live);
  }

  /** Inserts an exchange by its time. */
  add(exchange) {
    const index = this.exchanges.findIndex(({ at }) => at > exchange.at);
    if (index < 0) this.exchanges.push(exchange);
    else this.exchanges.splice(index, 0, exchange);
    this.element.insertBefore(exchange.article, index < 0 ? null : this.element.children[index]);
  }

  remove(exchange) {
    exchange.removed = true;
    exchange.article.remove();
    this.exchanges = this.exchanges.filter((one) => one !== exchange);
  }
}

export class Chat {
  /** @type {Map<string, Conversation>} */
  conversations = new Map();
  #restored = Promise.resolve();

  /** @param onChange called when the list of conversations, or the chosen one, has changed */
  constructor(client, archive, limits, onChange) {
    Object.assign(this, { client, archive, limits, onChange });
    this.wanted = session.get("conversation"); // shown before the page was reloaded
    this.openNew();
  }

  /** Shows a conversation; with an unknown id, a new one. */
  open(id) {
    const before = this.current;
    this.current = this.conversations.get(id) ?? new Conversation(id);
    this.conversations.set(id, this.current);
    if (before && !before.exchanges.length && before !== this.current) this.conversations.delete(before.id);
    session.set("conversation", id);
    $("exchanges").replaceChildren(this.current.element);
    draw(...this.current.exchanges);
    pin();
    this.onChange();
  }

  openNew() {
    this.open(randomId());
  }

  /** Conversations with messages, the newest first. */
  get list() {
    const filled = [...this.conversations.values()].filter(({ exchanges }) => exchanges.length);
    return filled.sort((one, other) => other.at - one.at);
  }

  find(messageId) {
    const { exchanges = [] } = this.conversations.get(conversationOf(messageId)) ?? {};
    return exchanges.find(({ message }) => message.id === messageId);
  }

  /** Sends a question, or holds it until the answer before it is there. */
  ask(question) {
    const { current } = this;
    const id = `${current.id}.${randomId()}`;
    const message = { id, contents: question, text: "", status: "held" };
    const exchange = this.#show(current, message);
    if (!this.#blocker(exchange)) this.sendAgain(exchange);
    this.changed(exchange);
    pin();
  }

  #show(conversation, message, at) {
    const exchange = new Exchange(this, conversation, message, at);
    conversation.add(exchange);
    this.conversations.set(conversation.id, conversation);
    return exchange;
  }

  /** Sends the question of an exchange: a held one for the first time, others as a new message. */
  sendAgain(exchange) {
    const { id, contents, status } = exchange.message;
    const isFirst = status === "held";
    if (!isFirst) this.archive.remove([id]);
    const newId = isFirst ? id : `${exchange.conversation.id}.${randomId()}`;
    exchange.attach(this.client.send(contents, this.#history(exchange), newId));
  }

  /** The exchange that keeps a held question from being sent: the one before it, without an end. */
  #blocker(exchange) {
    const { exchanges } = exchange.conversation;
    const before = exchanges[exchanges.indexOf(exchange) - 1];
    return before && !["done", "cancelled"].includes(before.message.status) ? before : undefined;
  }

  /** Whether a held question stays until the user decides: the message before it has no answer. */
  isHeldBack(exchange) {
    const { message, retryAt } = this.#blocker(exchange) ?? {};
    return ["failed", "expired"].includes(message?.status) || (message?.status === "refused" && !retryAt);
  }

  isLast(exchange) {
    return exchange.conversation.exchanges.at(-1) === exchange;
  }

  /** Removes a held question, and gives its text back to write on. */
  takeBack(exchange) {
    this.#remove([exchange.message.id]);
    this.archive.remove([exchange.message.id]);
    $("box").value ||= exchange.message.contents;
    $("box").dispatchEvent(new Event("input"));
    $("box").focus();
  }

  /** Stops the answers of the shown conversation that are being written. Returns whether there was one. */
  stop() {
    const running = this.current.exchanges.filter(({ live }) => live);
    for (const exchange of running) exchange.cancel();
    return running.length > 0;
  }

  /** Stores an exchange; sends the question that has waited for it. */
  changed(exchange) {
    if (exchange.removed) return;
    this.archive.put(exchange.record);
    this.#sendNext(exchange.conversation);
    draw(...exchange.conversation.exchanges);
    this.onChange();
  }

  #sendNext({ exchanges }) {
    const next = exchanges.find(({ message }) => message.status === "held");
    if (!next || this.#blocker(next)) return;
    this.sendAgain(next);
    this.archive.put(next.record);
  }

  /** The characters by which a question is too long for one frame, about; 0 if it fits. */
  excess(question) {
    return Math.max(0, Math.ceil((-this.#room(question) * question.length) / size(question)));
  }

  /** The bytes that a frame with a question has left. */
  #room(question) {
    return this.limits.frame - MARGIN - size(question);
  }

  /** History for a question: as many of the turns before it as a message may have and a frame has room for, oldest first. */
  #history({ conversation: { exchanges }, message }) {
    const history = [];
    let room = this.#room(message.contents);
    const index = exchanges.findIndex((one) => one.message === message);
    for (const { message: { contents, text, status } } of exchanges.slice(0, index).reverse()) {
      if (!text || !contents || !ENDED.has(status)) continue;
      const turns = [
        { role: "user", content: contents },
        { role: "assistant", content: text },
      ];
      room -= size(turns);
      if (room < 0 || history.length + turns.length > this.limits.history) break;
      history.unshift(...turns);
    }
    return history;
  }

  /** Adds the stored messages that are not known yet, and takes up the unfinished ones. */
  restore() {
    this.#restored = this.#restored.then(() => this.#restore());
    return this.#restored;
  }

  async #restore() {
    for (const record of await this.archive.prune(await this.archive.all())) {
      if (this.find(record.id)) continue;
      const { id, status, contents, text, accepted, at } = record;
      const conversation = this.conversations.get(record.conversation) ?? new Conversation(record.conversation);
      const exchange = this.#show(conversation, record, at);
      if (ENDED.has(status) || status === "held") continue;
      const history = this.#history(exchange);
      exchange.attach(accepted ? this.client.follow(id, contents) : this.client.send(contents, history, id), text);
    }
    for (const conversation of this.conversations.values()) this.#sendNext(conversation);
    if (this.wanted === null && !$("box").value) this.wanted = this.list.find(({ isLive }) => isLive)?.id; // a new tab
    if (this.conversations.has(this.wanted) && !this.current.exchanges.length) this.open(this.wanted);
    this.wanted = undefined;
    this.onChange();
  }

  /** Logged in: follows messages of other tabs and devices, and failed ones, that the service has. */
  async followKnown() {
    const known = [...this.client.known];
    await this.#restored;
    for (const { messageId, state } of known) {
      const found = this.find(messageId);
      if (!found && !ENDED.has(state)) this.adopt(this.client.follow(messageId));
      const isOld = found && !(found.message instanceof EventTarget);
      if (found?.message.status === "failed" && (isOld || state !== "failed")) found.watch(this.client.follow(messageId));
    }
  }

  /** Shows a message that was sent elsewhere. */
  adopt(message) {
    const found = this.find(message.id);
    if (found) {
      const late = found.message.status === "failed";
      found.attach(message, found.message.text);
      found.late = late;
      return this.changed(found);
    }
    const id = conversationOf(message.id);
    const exchange = this.#show(this.conversations.get(id) ?? new Conversation(id), message);
    if (!this.current.exchanges.length && !$("box").value) this.open(id);
    this.changed(exchange);
  }

  /** Deletes a conversation everywhere in this browser, and stops its answers. */
  remove({ id, exchanges }) {
    for (const { message, live } of exchanges) if (live) this.client.cancel(message.id);
    const ids = exchanges.map(({ message }) => message.id);
    this.#remove(ids);
    if (this.current.id === id) this.openNew();
    return this.archive.remove(ids);
  }

  /** Deletes all conversations of the user in this browser, also messages that are so far only in another tab. */
  async removeAll() {
    await Promise.all(this.list.map((conversation) => this.remove(conversation)));
    const left = await this.archive.all();
    if (left.length) await this.archive.remove(left.map(({ id }) => id));
  }

  /** Forgets messages that were deleted, here or in another tab. */
  #remove(ids) {
    for (const exchange of ids.map((id) => this.find(id))) {
      if (!exchange) continue;
      const { conversation } = exchange;
      conversation.remove(exchange);
      if (!conversation.exchanges.length && conversation !== this.current) this.conversations.delete(conversation.id);
      draw(...conversation.exchanges);
    }
    this.onChange();
  }

  /** Another tab has deleted messages. */
  forget(ids) {
    this.#remove(ids);
  }

  /** The connection has changed. `isLost`: answers will be resumed. */
  connectionChanged(isLost) {
    for (const { exchanges } of this.conversations.values()) {
      for (const exchange of exchanges) if (isLost && exchange.live && exchange.message.accepted) exchange.resumed = true;
    }
    draw(...this.current.exchanges);
  }

  /** The language has changed. */
  relabel() {
    for (const { exchanges } of this.conversations.values()) for (const exchange of exchanges) exchange.relabel();
  }

  tick() {
    for (const { exchanges } of this.conversations.values()) for (const exchange of exchanges) exchange.tick();
  }

  close() {
    this.archive.close();
    $("exchanges").replaceChildren();
  }
}
