/**
 * The browser client of imstream: one socket that comes back by itself, and messages whose answers survive that.
 *
 *     import { ImstreamClient } from "./imstream.js";
 *
 *     const client = new ImstreamClient({ address: "http://127.0.0.1:8080", userId: 10001 });
 *     client.connect();
 *     const message = client.send("Why is the sky blue?");
 *     message.addEventListener("delta", () => show(message.text));
 *     await message.ended;
 *
 * @typedef {{role: "user" | "assistant" | "system", content: string}} Turn  One earlier message of a conversation.
 *
 * @typedef {object} Frame  What the server says. Fields that do not apply are missing.
 * @property {string} code          SUCCESS, or what kind of trouble: BUSY, AI_FAILED, EXPIRED, …
 * @property {"INIT" | "CHAT" | "HEARTBEAT" | "SYSTEM"} msgType
 * @property {string} [contents]    Text for a person, or of the reply.
 * @property {string} [messageId]
 * @property {string} [event]       accepted, delta, restart, done, failed or cancelled.
 * @property {number} [attempt]     Which attempt at an answer the text belongs to, from 1.
 * @property {number} [offset]      Where the reply stands after this frame; opaque.
 * @property {number} [position]    Place in the queue; 1 is next.
 * @property {number} [retryAfterMs]
 * @property {number} [heartbeatMs] How often the service wants to hear of us.
 * @property {string} [finishReason]
 * @property {Record<string, number>} [usage]
 * @property {string} [node]        The node that answers.
 *
 * @typedef {object} Options
 * @property {string} address       Where the service is: http, https, ws or wss.
 * @property {number} userId        An integer above 10000.
 * @property {string | (() => string | Promise<string>)} [token]  The user's signed token, when the service asks for
 *     one; or a function that gives a fresh one, for each connection and whenever the login is about to end.
 * @property {string} [lang]        Language wished for the server's texts: a script cannot set Accept-Language.
 * @property {number} [heartbeat]   Milliseconds between heartbeats, unless the service asks for others.
 * @property {number} [patience]    Milliseconds that connecting and logging in may take.
 * @property {number} [firstWait]   Milliseconds before the first try to reconnect; doubled by every failure.
 * @property {number} [longestWait] Milliseconds that a wait never exceeds.
 *
 * @typedef {"sending" | "refused" | "queued" | "answering" | "done" | "failed" | "cancelled" | "expired"} Status
 * @typedef {"idle" | "connecting" | "online" | "waiting" | "closed"} State
 */

const DEFAULTS = { heartbeat: 25_000, patience: 10_000, firstWait: 1_000, longestWait: 30_000 };
const STEADY = 5_000; // a connection that lasted this many ms was a good one: waits start small again
const MOST_RESUMED = 64; // a node takes no more in one INIT
const NOT_AUTHENTICATED = 4500;
const FRAME_TOO_BIG = 1009;
const DRAINING = 1012;
const NODE_FULL = 1013;

/**
 * One message, and what is known of its answer. Its events carry the frame that caused them as `detail`: `accepted`,
 * `delta`, `restart` (the text so far is void), and at the end exactly one of `done`, `failed`, `cancelled`,
 * `expired`. `refused` says that the service did not take the message, because it is busy for example: `resend` or
 * `cancel` it. `notice` is trouble with a message that it took: a cancel came too late, Redis is away for a moment.
 */
export class Message extends EventTarget {
  /** @type {Status} */ status = "sending";
  /** The answer so far. */ text = "";
  /** The attempt that the text belongs to; 0 before the first. */ attempt = 0;
  /** How far the text reaches, in the server's counting. */ offset = 0;
  /** @type {number | undefined} Its place in the queue when it was accepted. */ position;
  /** @type {string | undefined} The node that spoke last. */ node;
  /** @type {Frame | undefined} The last frame about it. */ frame;
  /** Whether it was ever put on the wire. */ sent = false;
  /** Whether the service has it. From then on it is resumed, never sent again. */ accepted = false;
  /** Whether it is to be cancelled. */ cancelling = false;
  /** @type {(message: Message) => void} */ #end = () => {};

  /** @param {string} id @param {string} contents @param {Turn[]} history */
  constructor(id, contents, history) {
    super();
    this.id = id;
    this.contents = contents;
    this.history = history;
    /** @type {Promise<Message>} Settles when nothing more will come. */
    this.ended = new Promise((resolve) => (this.#end = resolve));
  }

  get isEnded() {
    return ["done", "failed", "cancelled", "expired"].includes(this.status);
  }

  /** Takes in what the server says about it. What is outdated or known changes nothing. @param {Frame} frame */
  take(frame) {
    const { event, attempt = this.attempt, offset = this.offset } = frame;
    if (attempt < this.attempt) return;
    this.frame = frame;
    this.node = frame.node ?? this.node;
    if (frame.code === "EXPIRED") return this.become("expired");
    if (frame.msgType === "SYSTEM") return this.#takeRefusal(frame);

    this.accepted = true;
    if (attempt > this.attempt || event === "restart") {
      this.attempt = attempt;
      this.text = "";
      this.offset = 0;
    }
    if (event === "accepted") {
      this.position = frame.position;
      this.become(this.attempt ? "answering" : "queued", event);
    } else if (event === "restart") {
      this.become("answering", event);
    } else if (event === "delta" && offset > this.offset) {
      this.offset = offset;
      this.text += frame.contents ?? "";
      this.become("answering", event);
    } else if (event === "done" || event === "failed" || event === "cancelled") {
      this.become(event);
    }
  }

  /** @param {Frame} frame */
  #takeRefusal(frame) {
    if (this.cancelling && (frame.code === "UNKNOWN" || !this.accepted)) return this.become("cancelled");
    if (!this.accepted) return this.become("refused");
    this.cancelling &&= frame.code === "UNAVAILABLE"; // then it is tried again
    this.become(this.status, "notice");
  }

  /** Changes the status, and tells who listens. @param {Status} status @param {string} [event] */
  become(status, event = status) {
    this.status = status;
    this.dispatchEvent(new CustomEvent(event, { detail: this.frame }));
    if (this.isEnded) this.#end(this);
  }
}

/**
 * One user's connection to a service. Its events: `state`, when `client.state` has changed (`detail` has the close
 * `code`, and the `wait` before the next try), and `notice` with a frame about no message, such as why it is closed.
 */
export class ImstreamClient extends EventTarget {
  /** @type {State} `waiting` is the time before the next try; after `closed` there is none. */ state = "idle";
  /** @type {string | undefined} The node that we talk to. */ node;
  /** @type {Map<string, Message>} Messages without an end, in the order sent. */ #messages = new Map();
  /** @type {WebSocket | undefined} */ #socket;
  /** @type {ReturnType<typeof setTimeout> | undefined} What comes next: a try, the end of our patience. */ #timer;
  /** @type {ReturnType<typeof setInterval> | undefined} */ #pulse;
  /** Whether nothing was heard since the last heartbeat. */ #silent = false;
  /** @type {string | undefined} The token that was shown last. */ #shown;
  /** @type {string | undefined} The token that has let us in. */ #believed;
  /** @type {string | undefined} One that the service has refused since it last let us in. */ #refused;
  #failures = 0;
  #onlineSince = Infinity;

  /** @param {Options} options */
  constructor(options) {
    super();
    this.options = { ...DEFAULTS, ...options };
  }

  /** Connects and logs in, and keeps doing so until `close` or a close code that forbids it. */
  connect() {
    if (this.state === "connecting" || this.state === "online") return;
    this.#letGo();
    if (this.state === "closed") this.#refused = undefined; // somebody has asked for another try
    const socket = (this.#socket = new WebSocket(socketUrl(this.options)));
    socket.onopen = () => this.#logIn();
    socket.onmessage = ({ data }) => this.#hear(JSON.parse(data));
    socket.onclose = ({ code }) => this.#lose(code);
    this.#timer = setTimeout(() => this.drop(), this.options.patience);
    this.#become("connecting");
  }

  /** Leaves. Messages without an end stay so, until `connect` takes them up again. */
  close() {
    this.#letGo();
    this.#become("closed", { code: 1000 });
  }

  /** Gives the connection up, as when the network fails. The usual reconnect and resume follow. */
  drop() {
    if (this.#socket) this.#lose(1006);
  }

  /**
   * Sends a message, now or as soon as there is a connection, and returns the handle that its answer comes to.
   * @param {string} contents
   * @param {Turn[]} history  Earlier messages, oldest first.
   * @param {string} id       1 to 64 of A-Z a-z 0-9 . _ : -, unique for this user.
   */
  send(contents, history = [], id = newMessageId()) {
    return this.resend(new Message(id, contents, history));
  }

  /** Sends a refused message again, under the same id. @param {Message} message */
  resend(message) {
    message.status = "sending";
    this.#messages.set(message.id, message);
    if (this.state === "online") this.#chat(message);
    return message;
  }

  /**
   * Takes up a message that was accepted earlier, before the page was reloaded for example: its recorded answer
   * comes from the start. To be called before `connect`. @param {string} id @param {string} contents
   */
  follow(id, contents = "") {
    const message = new Message(id, contents, []);
    message.accepted = true;
    message.status = "queued";
    this.#messages.set(id, message);
    return message;
  }

  /** Stops one message. The text so far stays. @param {string} messageId */
  cancel(messageId) {
    const message = this.#messages.get(messageId);
    if (!message) return;
    message.cancelling = true;
    if (message.status === "refused" || !(message.sent || message.accepted)) message.become("cancelled");
    else if (this.state === "online") this.#say({ msgType: "CANCEL", messageId });
    if (message.isEnded) this.#messages.delete(messageId);
  }

  /** Shows who we are, and takes up what goes on; or only the former, to go on longer. */
  async #logIn(resuming = true) {
    const socket = this.#socket;
    const { token } = this.options;
    try {
      this.#shown = typeof token === "function" ? await token() : token;
    } catch {
      if (socket === this.#socket && this.state === "connecting") this.drop(); // no token now, perhaps later
      return;
    }
    if (socket !== this.#socket) return; // lost meanwhile
    if (this.#refused !== undefined && this.#shown === this.#refused) return this.#lose(NOT_AUTHENTICATED);
    const resume = [...this.#messages.values()]
      .filter(({ accepted }) => accepted && resuming)
      .slice(-MOST_RESUMED)
      .map(({ id, attempt, offset }) => ({ messageId: id, attempt, offset }));
    this.#say({ msgType: "INIT", token: this.#shown, resume });
  }

  /** We are in. What was not acknowledged is said again: the server knows duplicates by their id. */
  #enter(heartbeat = this.options.heartbeat) {
    clearTimeout(this.#timer);
    this.#refused = undefined;
    this.#believed = this.#shown;
    this.#onlineSince = Date.now();
    this.#pulse = setInterval(() => this.#beat(), heartbeat);
    for (const message of this.#messages.values()) if (message.status === "sending") this.#chat(message);
    this.#repeatCancels();
    this.#become("online");
  }

  #repeatCancels() {
    for (const { id, cancelling } of this.#messages.values()) {
      if (cancelling) this.#say({ msgType: "CANCEL", messageId: id });
    }
  }

  /** The server could not look up a message of ours: it is asked again. What it follows already keeps its place. */
  #askAgain(wait = this.options.firstWait) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => (this.#logIn(), this.#repeatCancels()), wait);
  }

  /** @param {Frame} frame */
  #hear(frame) {
    this.#silent = false;
    this.node = frame.node ?? this.node;
    const message = this.#subject(frame);
    if (message) {
      if (frame.code === "EXPIRED" && !message.accepted) return this.#chat(message); // it never arrived
      message.take(frame);
      if (message.accepted && frame.code === "UNAVAILABLE") this.#askAgain(frame.retryAfterMs);
      if (message.isEnded) this.#messages.delete(message.id);
    } else if (frame.msgType === "INIT" && this.state === "connecting") {
      this.#enter(frame.heartbeatMs);
    } else if (frame.msgType === "INIT") {
      this.#believed = this.#shown;
    } else if (frame.msgType === "SYSTEM") {
      this.dispatchEvent(new CustomEvent("notice", { detail: frame }));
      if (frame.code === "UNAUTHORIZED" && this.state === "online" && this.#canRenew) this.#logIn(false);
      if (frame.code === "UNAVAILABLE" && this.state === "connecting") this.drop(); // nobody can be let in now
    }
  }

  /** The message that a frame is about. @param {Frame} frame */
  #subject({ messageId, code }) {
    if (messageId) return this.#messages.get(messageId);
    // A frame that could not be read is refused without its id. Answers come in the order of what was sent.
    if (code === "BAD_REQUEST") return [...this.#messages.values()].find(({ status }) => status === "sending");
  }

  /** Whether the next token is a new one. */
  get #canRenew() {
    return typeof this.options.token === "function";
  }

  #beat() {
    if (this.#silent) return this.drop(); // not even the last heartbeat was answered
    this.#silent = true;
    this.#say({ msgType: "HEARTBEAT" });
  }

  /** @param {Message} message */
  #chat(message) {
    message.sent = true;
    this.#say({ msgType: "CHAT", messageId: message.id, contents: message.contents, history: message.history });
  }

  /** @param {object} frame */
  #say(frame) {
    this.#socket?.send(JSON.stringify({ userId: this.options.userId, ...frame }));
  }

  /** The connection is gone. Its code says whether to come back now, later or never. @param {number} code */
  #lose(code) {
    if (Date.now() - this.#onlineSince > STEADY) this.#failures = 0;
    this.#letGo();
    if (code === FRAME_TOO_BIG) this.#refuseLongest();
    const renew = code === NOT_AUTHENTICATED && this.#canRenew && this.#refused === undefined;
    // When a login ends, a newer token may have been said too late to be looked at.
    const refused = this.state === "online" ? this.#believed : this.#shown;
    this.#refused = code === NOT_AUTHENTICATED ? refused : this.#refused;
    if (code >= 4500 && code <= 4999 && !renew) return this.#become("closed", { code });
    const { firstWait, longestWait } = this.options;
    const wait = reconnectWait(code, this.#failures++, firstWait, longestWait);
    this.#timer = setTimeout(this.#comeBack, wait);
    globalThis.addEventListener?.("online", this.#comeBack);
    this.#become("waiting", { code, wait });
  }

  #comeBack = () => this.connect();

  /** The longest message in the air is the one that was too big. Sent again, it would end the next connection too. */
  #refuseLongest() {
    const size = (/** @type {Message} */ { contents, history }) => JSON.stringify([contents, history]).length;
    const inTheAir = [...this.#messages.values()].filter(({ status }) => status === "sending");
    inTheAir.sort((one, other) => size(other) - size(one))[0]?.become("refused");
  }

  #letGo() {
    clearTimeout(this.#timer);
    clearInterval(this.#pulse);
    globalThis.removeEventListener?.("online", this.#comeBack);
    const socket = this.#socket;
    this.#socket = undefined;
    this.#silent = false;
    this.#onlineSince = Infinity;
    if (!socket) return;
    socket.onopen = socket.onmessage = socket.onclose = null;
    socket.close();
  }

  /** @param {State} state @param {{code: number, wait?: number}} [detail] */
  #become(state, detail) {
    this.state = state;
    this.dispatchEvent(new CustomEvent("state", { detail }));
  }
}

/**
 * Milliseconds to wait before reconnecting: doubled by each failure, and scattered, because everybody else lost the
 * same node. @param {number} code @param {number} failures @param {number} firstWait @param {number} longestWait
 */
export function reconnectWait(code, failures, firstWait, longestWait) {
  if (code === DRAINING && failures === 0) return Math.random() * Math.min(500, firstWait);
  const least = code === NODE_FULL ? 5 * firstWait : firstWait;
  return Math.min(longestWait, least * 2 ** failures) * (0.5 + Math.random() / 2);
}

/** A new id. Not `crypto.randomUUID`: that exists on secure origins only, and a plain http address is none. */
export function newMessageId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** @param {Options} options */
function socketUrl({ address, userId, lang }) {
  const url = new URL("ws", address.replace(/\/*([?#].*)?$/, "/"));
  url.protocol = url.protocol.replace("http", "ws");
  url.searchParams.set("userId", String(userId));
  if (lang) url.searchParams.set("lang", lang);
  return url.href;
}
