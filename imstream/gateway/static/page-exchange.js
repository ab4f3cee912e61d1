/** One question and its answer on the page. */

import { MarkdownView } from "./markdown.js";
import { directed, isolated, roughly, say, secondsSince, secondsUntil, write } from "./page-texts.js";
import { $, draw } from "./page-view.js";

export const ENDED = new Set(["done", "failed", "cancelled", "expired"]);
const IDLE = new Set([...ENDED, "refused", "held"]); // nothing more arrives without an action of the user or the page
const EVENTS = ["accepted", "delta", "restart", "notice", "refused", ...ENDED, "status", "asked", "thinking"];
const UNSAVED = new Set(["delta", "status", "thinking"]);
const TEMPORARY = new Set(["BUSY", "RATE_LIMITED", "UNAVAILABLE"]); // sent again even without retryAfterMs
const MAX_PAUSE = 120_000; // maximum wait (ms) before a refused message is resent; longer waits, such as a daily quota, are left to the user
const MAX_RETRIES = 5; // automatic retries of a refused message; then the user decides

export class Exchange {
  retryAt = 0; // time of the automatic resend of a refused message
  retries = 0;
  resumed = false;
  removed = false; // it was deleted: never stored again

  /**
   * @param chat the Chat that it belongs to
   * @param message a Message of the client, or a stored record: of a message that has ended or was not sent yet
   */
  constructor(chat, conversation, message, at = Date.now()) {
    Object.assign(this, { chat, conversation, at });
    this.article = $("exchange").content.firstElementChild.cloneNode(true);
    const part = (name) => this.article.querySelector(`.${name}`);
    const names = ["you", "question", "assistant", "thinking", "answer", "status", "stop", "again", "copy"];
    this.parts = Object.fromEntries(names.map((name) => [name, part(name)]));
    this.view = new MarkdownView(this.parts.answer, { label: say, copy });
    this.parts.stop.onclick = () => this.cancel();
    this.parts.again.onclick = () => this.tryAgain();
    this.parts.copy.onclick = () => this.copyAnswer();
    this.attach(message);
  }

  /** Binds this exchange to a message. `known`: its text as far as it was shown before. */
  attach(message, known = "") {
    this.message = message;
    this.shown = known; // stays, greyed, until the answer is longer: while it is written again
    this.hasFailed = message.status === "failed";
    this.late = message.late ?? false; // answered, or being answered, after it had failed
    this.thinkingSince = this.startsAt = this.awayUntil = 0;
    this.reason = undefined; // of the wait
    this.thoughtFor = message.thoughtFor ?? 0; // seconds
    for (const event of EVENTS) {
      message.addEventListener?.(event, () => message === this.message && this.changed(event));
    }
    draw(this);
  }

  /** Follows a message that has failed: if an operator has it answered after all, this is shown. */
  watch(message) {
    let hasFailed = false;
    const take = (event) => {
      if (this.message === message || this.removed) return;
      if (event === "failed") return (hasFailed = true);
      if (event === "delta" && !hasFailed) return; // text of the attempt that has failed
      this.attach(message, this.message.text);
      this.late = true;
      this.changed(event);
    };
    for (const event of ["restart", "delta", "done", "failed"]) message.addEventListener(event, () => take(event));
  }

  /** Whether more may arrive without user action. */
  get live() {
    return !IDLE.has(this.message.status);
  }

  /** The part of it that is kept in the browser. */
  get record() {
    const { id, contents, text, status, node, accepted, frame } = this.message;
    return {
      ...{ id, contents, status, node, accepted, at: this.at, conversation: this.conversation.id },
      text: this.isBehind ? this.shown : text,
      frame: ENDED.has(status) ? frame : undefined,
      late: this.late,
      thoughtFor: this.thoughtFor,
    };
  }

  changed(event) {
    const { frame, status, state } = this.message;
    if (event === "failed") this.hasFailed = true;
    else if (this.hasFailed && ["restart", "delta", "done"].includes(event)) this.late = true;
    if (event === "status") {
      this.startsAt = frame.etaMs === undefined ? 0 : Date.now() + frame.etaMs;
      this.awayUntil = frame.retryAfterMs === undefined ? 0 : Date.now() + frame.retryAfterMs;
      this.reason = frame.reason;
    }
    if (event === "restart") this.thinkingSince = this.thoughtFor = 0;
    if (event === "status" && state === "thinking") this.thinkingSince ||= Date.now();
    else if (this.thinkingSince && event !== "thinking") {
      this.thoughtFor = secondsSince(this.thinkingSince);
      this.thinkingSince = 0;
    }
    this.planRetry(status, frame);
    if (!UNSAVED.has(event)) this.chat.changed(this);
    draw(this);
  }

  planRetry(status, frame) {
    this.retryAt = 0;
    if (status !== "refused") return;
    const { code, retryAfterMs: wait = TEMPORARY.has(code) ? 3000 : Infinity } = frame ?? {};
    if (wait <= MAX_PAUSE && this.retries++ < MAX_RETRIES) this.retryAt = Date.now() + wait * (1 + Math.random() / 2);
  }

  cancel() {
    if (this.message.status === "held") return this.chat.takeBack(this);
    this.chat.client.cancel(this.message.id);
    draw(this);
  }

  tryAgain() {
    if (this.message.status === "refused") {
      this.retryAt = 0;
      this.chat.client.resend(this.message);
    } else this.chat.sendAgain(this);
    this.chat.changed(this);
    draw(this);
  }

  async copyAnswer() {
    await copy(this.message.text);
    write(this.parts.copy.lastElementChild, say("copied"));
    setTimeout(() => draw(this), 1500);
  }

  /** Counts down; resends a refused message that is due. */
  tick() {
    if (this.retryAt && Date.now() >= this.retryAt && this.chat.client.state === "online") this.tryAgain();
    if (this.isCounting) draw(this);
  }

  get isCounting() {
    return Boolean(this.retryAt || (this.live && (this.thinkingSince || this.startsAt || this.awayUntil)));
  }

  /** Whether the text that was shown is longer than that of the message: it is written again. */
  get isBehind() {
    const { status, text } = this.message;
    return (this.live || status === "expired") && text.length < this.shown.length;
  }

  /** The language has changed. */
  relabel() {
    this.view.relabel();
    draw(this);
  }

  /** The status of this message as a short text. */
  describe() {
    const { status, frame, accepted, cancelling } = this.message;
    const connection = this.chat.client.state;
    if (this.live && connection === "closed") return say("ended");
    if (this.live && connection !== "online") return say(accepted ? "resuming" : "offline");
    if (this.live && cancelling) return say("stopping");
    if (this.retryAt) return `${isolated(frame.contents ?? "")} ${say("retryIn", { seconds: secondsUntil(this.retryAt) })}`;
    if (status === "queued" || status === "answering") return this.describeProgress();
    if (status === "done") return this.describeAnswer();
    if (status === "held") return say(this.chat.isHeldBack(this) ? "heldBack" : "held");
    if (["refused", "failed", "expired"].includes(status)) return frame?.contents ?? say(status);
    return say(status);
  }

  describeProgress() {
    const { status, state, text, attempt } = this.message;
    if (this.reason === "paused" && state !== "started") return say("paused");
    if (state === "waiting") return this.describeWaiting();
    if (state === "thinking") return say("thinking", { seconds: this.thinkingSince ? secondsSince(this.thinkingSince) : 0 });
    if (this.late) return say("afterAll");
    if (status === "answering" && attempt > 1) return say("again", { attempt });
    if (state === "started") return say(text ? "answering" : "started");
    if (status === "queued") return this.describePlace();
    return say(status);
  }

  describeWaiting() {
    const what = say(this.reason === "http_429" ? "busy" : "away");
    const seconds = secondsUntil(this.awayUntil);
    return seconds ? say("awayUntil", { what, seconds }) : say("awayNow", { what });
  }

  describePlace() {
    const { position } = this.message;
    const place = position === undefined ? say("inQueue") : position > 1 ? say("queued", { position }) : say("next");
    return this.startsAt ? `${place} · ${roughly(Math.max(1, secondsUntil(this.startsAt)))}` : place;
  }

  describeAnswer() {
    const { node, frame } = this.message;
    const facts = [node === undefined ? say("done") : say("doneBy", { node })];
    const tokens = frame?.usage?.completion_tokens;
    if (["length", "content_filter"].includes(frame?.finishReason)) facts.push(say(frame.finishReason));
    if (this.late) facts.push(say("late"));
    if (this.thoughtFor) facts.push(say("thought", { seconds: this.thoughtFor }));
    if (tokens) facts.push(say("tokens", { tokens }));
    if (this.resumed) facts.push(say("resumed"));
    return facts.join(" · ");
  }

  get mood() {
    const { status, state, frame } = this.message;
    if (status === "failed" || status === "expired" || (status === "refused" && !this.retryAt)) return "bad";
    const isCut = status === "done" && ["length", "content_filter"].includes(frame?.finishReason);
    const waits = this.retryAt || (this.live && (this.chat.client.state !== "online" || state === "waiting"));
    return waits || isCut || (status === "held" && this.chat.isHeldBack(this)) ? "wait" : "";
  }

  draw() {
    const { status, text, contents, thinking } = this.message;
    const { you, question, assistant, answer, status: line } = this.parts;
    const { isBehind } = this;
    if (!isBehind) this.shown = text;
    Object.assign(this.article.dataset, { status, live: this.live, mood: this.mood });
    write(you, say("you"));
    write(assistant, say("assistant"));
    write(question, contents || say("unknownQuestion"));
    answer.ariaBusy = String(this.live); // announced as a whole, not word by word
    answer.classList.toggle("old", isBehind);
    this.view.update(directed(this.shown), { done: !this.live });
    this.drawThinking(thinking);
    line.ariaLive = this.isCounting ? "off" : "polite"; // a countdown is not announced
    write(line, this.describe());
    this.drawButtons(status, text);
  }

  drawThinking(thinking) {
    const { thinking: details } = this.parts;
    details.hidden = !thinking;
    if (!thinking) return;
    write(details.firstElementChild, say("thinkingText"));
    write(details.lastElementChild, thinking);
  }

  drawButtons(status, text) {
    const { stop, again, copy: copying } = this.parts;
    const isHeld = status === "held";
    const focused = [stop, again, copying].find((button) => button === document.activeElement);
    stop.hidden = this.message.cancelling || !(this.live || status === "refused" || isHeld);
    again.hidden = this.live || (isHeld && !this.chat.isHeldBack(this)) || (status === "done" && !this.chat.isLast(this));
    copying.hidden = this.live || !text;
    write(stop.lastElementChild, say(isHeld ? "takeBack" : status === "refused" ? "giveUp" : "stop"));
    const name = isHeld ? "sendAnyway" : status === "done" ? "regenerate" : this.retryAt ? "tryNow" : "tryAgain";
    write(again.lastElementChild, say(name));
    write(copying.lastElementChild, say("copy"));
    if (focused?.hidden) ([again, copying, stop].find((button) => !button.hidden) ?? this.article).focus();
  }
}

async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.body.appendChild(document.createElement("textarea")); // the clipboard API needs a secure origin
  area.value = text;
  area.select();
  document.execCommand("copy");
  area.remove();
}
