/**
 * The client of imstream for browsers and Node.js: a WebSocket that reconnects by itself, and messages whose answers
 * resume. Its types are in imstream.d.ts.
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
 * @typedef {object} Frame  A frame from the server. Fields that do not apply are absent.
 * @property {string} code          SUCCESS, or the kind of failure: BUSY, AI_FAILED, EXPIRED, …
 * @property {"INIT" | "CHAT" | "HEARTBEAT" | "SYSTEM"} msgType
 * @property {string} [contents]    Text for the user, or text of the reply.
 * @property {string} [messageId]
 * @property {string} [event]       accepted, delta, restart, done, failed or cancelled; status, asked or thinking.
 * @property {number} [attempt]     The attempt that the text belongs to, from 1.
 * @property {number} [offset]      Position in the reply after this frame; opaque.
 * @property {number} [position]    Place in the queue; 1 is next.
 * @property {number} [start]       Position in the reasoning before this frame (`thinking`).
 * @property {string} [state]       State of an unfinished message (`status`): queued, started, waiting, …
 * @property {number} [etaMs]       Estimate of the time until the answer begins (`status`).
 * @property {string} [reason]      Why it waits (`status`): a word for programs.
 * @property {KnownMessage[]} [messages]  The user's newest messages: in the answer to INIT, with the want `asked`.
 * @property {number} [retryAfterMs]
 * @property {number} [heartbeatMs] Interval between heartbeats that the service requests.
 * @property {string} [finishReason]
 * @property {Record<string, number>} [usage]
 * @property {string} [node]        The node that sent the frame.
 *
 * @typedef {{messageId: string, state: string}} KnownMessage  A message that can be followed.
 *
 * @typedef {object} Options
 * @property {string} address       URL of the service: http, https, ws or wss.
 * @property {number | string} userId  An integer above 10000, or a text, as the server has it (`IMSTREAM_USER_IDS`).
 * @property {string | (() => string | Promise<string>)} [token]  The user's signed token, if the service requires
 *     one; or a function that returns a fresh one, called for each connection and before the login expires.
 * @property {string} [lang]        Language of the server's texts (a script cannot set Accept-Language).
 * @property {("status" | "asked" | "thinking")[]} [wants]  Optional events: `status`, `asked`, `thinking`.
 * @property {new (url: string) => any} [WebSocket]  The class of the socket, where there is no global one (Node.js 20).
 * @property {number} [heartbeat]   Milliseconds between heartbeats, unless the service announces an interval.
 * @property {number} [probeLimit]  Time limit for the answer to a heartbeat when the page wakes up or a message is sent.
 * @property {number} [patience]    Time limit for connecting and logging in, in milliseconds.
 * @property {number} [firstWait]   First reconnect delay in milliseconds; doubled by every failure.
 * @property {number} [longestWait] Maximum reconnect delay in milliseconds.
 *
 * @typedef {"sending" | "refused" | "queued" | "answering" | "done" | "failed" | "cancelled" | "expired"} Status
 * @typedef {"idle" | "connecting" | "online" | "waiting" | "closed"} State
 */

const DEFAULTS = { heartbeat: 25_000, probeLimit: 3_000, patience: 10_000, firstWait: 1_000, longestWait: 30_000 };
const STABLE_AFTER = 5_000; // a connection that lasted this long (ms) resets the backoff
const MAX_RESUMED = 64; // limit of one INIT
const MAX_FAILED = 64; // maximum failed messages that are remembered: an operator may retry them
const NOT_AUTHENTICATED = 4500;
const FRAME_TOO_BIG = 1009;
const INTERNAL_ERROR = 1011; // from this code on, a SYSTEM frame before the close has the reason
const DRAINING = 1012;
const NODE_FULL = 1013;
const ANSWERS = new Set(["delta", "restart", "done", "failed", "cancelled"]);
const EVENTS = new Set(["accepted", ...ANSWERS]);
const WANTED = new Set(["status", "asked", "thinking"]); // events of the names in `wants`
const WAKING = ["online", "pageshow", "visibilitychange", "focus"]; // after each, the connection may be lost unnoticed

/**
 * One message and its answer. Its events carry their frame as `detail`: `accepted`,
 * `delta`, `restart` (discard the text so far), and finally exactly one of `done`, `failed`, `cancelled`,
 * `expired`. After `failed`, `restart` may follow when an operator retries the message: then it ends once more, with a
 * new promise `ended`. `refused`: the service did not accept the message, for example because it is busy; `resend` or
 * `cancel` it. `notice`: a problem with an accepted message (a late cancel, Redis is briefly unavailable).
 *
 * Only if they are wanted (`Options.wants`): `status` when `state` or `position` has changed, `asked` with the question
 * of a message of another socket, `thinking` when `thinking` has grown.
 */
export class Message extends EventTarget {
  /** @type {Status} */ status = "sending";
  /** The answer so far. */ text = "";
  /** The attempt that the text belongs to; 0 before the first. */ attempt = 0;
  /** Offset of the end of the text, counted by the server. */ offset = 0;
  /** The model's reasoning so far, which does not belong to the answer. */ thinking = "";
  /** @type {string | undefined} The state of the unfinished message, as the service calls it. */ state;
  /** @type {number | undefined} Its last known place in the queue. */ position;
  /** @type {string | undefined} The node that sent the last frame. */ node;
  /** @type {Frame | undefined} The last frame about it. */ frame;
  /** @type {string | undefined} The trace that it belongs to (W3C Trace Context). */ traceparent;
  /** Whether it was sent. */ sent = false;
  /** Whether the service accepted it; then it is resumed, never resent. */ accepted = false;
  /** Whether cancellation is requested. */ cancelling = false;
  /** @type {(message: Message) => void} */ #end = () => {};

  /** @param {string} id @param {string} contents @param {Turn[]} history */
  constructor(id, contents, history) {
    super();
    this.id = id;
    this.contents = contents;
    this.history = history;
    /** @type {Promise<Message>} Resolves when the message has ended. */
    this.ended = this.#unfinished();
  }

  /** @returns {Promise<Message>} */
  #unfinished() {
    return new Promise((resolve) => (this.#end = resolve));
  }

  get isEnded() {
    return ["done", "failed", "cancelled", "expired"].includes(this.status);
  }

  /** Applies a frame. Outdated and repeated frames, and unknown events, change nothing. @param {Frame} frame */
  take(frame) {
    const { event, attempt = this.attempt, offset = this.offset } = frame;
    if (attempt < this.attempt || !this.#isKnown(frame)) return;
    this.frame = frame;
    this.node = frame.node ?? this.node;
    if (frame.code === "EXPIRED") return this.become("expired");
    if (frame.msgType === "SYSTEM") return this.#takeRefusal(frame);
    if (event && WANTED.has(event)) return this.#takeWanted(frame, event);

    this.accepted = true;
    if (this.status === "failed") this.ended = this.#unfinished();
    if (attempt > this.attempt || event === "restart") {
      if (this.attempt || event === "restart") this.thinking = ""; // else it belongs to this attempt
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
      // Of a message that was sent again while its answer began, some of the text is known. Offsets count code points.
      const [text, added] = [frame.contents ?? "", offset - this.offset];
      this.offset = offset;
      this.text += text.length > added ? [...text].slice(-added).join("") : text;
      this.become("answering", event);
    } else if (event === "done" || event === "failed" || event === "cancelled") {
      this.become(event);
    }
  }

  /** Whether this version of the client supports a frame. @param {Frame} frame */
  #isKnown({ msgType, code, event }) {
    if (msgType !== "CHAT") return msgType === "SYSTEM";
    return event ? EVENTS.has(event) || WANTED.has(event) : code === "EXPIRED";
  }

  /** @param {Frame} frame @param {string} event */
  #takeWanted(frame, event) {
    if (event === "asked") this.contents ||= frame.contents ?? "";
    else if (event === "thinking") this.thinking = (frame.start ? this.thinking : "") + (frame.contents ?? "");
    else [this.state, this.position] = [frame.state, frame.position];
    this.become(this.status, event);
  }

  /** @param {Frame} frame */
  #takeRefusal(frame) {
    if (this.cancelling && (frame.code === "UNKNOWN" || !this.accepted)) return this.become("cancelled");
    if (!this.accepted) return this.become("refused");
    this.cancelling &&= frame.code === "UNAVAILABLE"; // then the cancel is sent again
    this.become(this.status, "notice");
  }

  /** Changes the status and dispatches the event. @param {Status} status @param {string} [event] */
  become(status, event = status) {
    this.status = status;
    this.dispatchEvent(new CustomEvent(event, { detail: this.frame }));
    if (this.isEnded) this.#end(this);
  }
}

/**
 * One user's connection to a service. Its events: `state` when `client.state` has changed (`detail`: the close
 * `code` and its `reason`, the `frame` in which the service said why, if it did, and the `wait` before the next
 * attempt), `notice` with a frame about no message, and if that is wanted `asked` with a `Message` of another socket.
 */
export class ImstreamClient extends EventTarget {
  /** @type {State} `waiting`: until the next attempt; `closed`: no further attempt. */ state = "idle";
  /** @type {string | undefined} The connected node. */ node;
  /** @type {KnownMessage[]} With the want `asked`: the user's newest messages at the last login, see `follow`. */
  known = [];
  /** @type {Map<string, Message>} Messages without an end, in the order sent. */ #messages = new Map();
  /** @type {Map<string, Message>} Failed messages, the oldest first. */ #failed = new Map();
  /** @type {WebSocket | undefined} */ #socket;
  /** @type {ReturnType<typeof setTimeout> | undefined} The next attempt, or the time limit of this one. */ #timer;
  /** @type {ReturnType<typeof setInterval> | undefined} */ #heartbeatTimer;
  /** @type {ReturnType<typeof setTimeout> | undefined} Time limit of a heartbeat that must be answered. */ #probeTimer;
  /** Whether a message is followed that the last INIT did not resume. */ #isFollowing = false;
  /** Whether no frame arrived since the last heartbeat. */ #awaitingHeartbeat = false;
  /** @type {string | undefined} The token sent last. */ #sentToken;
  /** @type {string | undefined} The token of the current login. */ #acceptedToken;
  /** @type {string | undefined} A token rejected since the last login. */ #rejectedToken;
  /** @type {Frame | undefined} The last frame of this connection. */ #lastFrame;
  #failures = 0;
  /** When the state changed last, in ms. */ #since = 0;

  /** @param {Options} options */
  constructor(options) {
    super();
    this.options = { ...DEFAULTS, ...options };
  }

  /** Connects and logs in, and reconnects until `close` or a close code that forbids it. */
  connect() {
    if (this.state === "connecting" || this.state === "online") return;
    this.#dropSocket();
    // The caller requests another attempt.
    if (this.state === "closed") [this.#rejectedToken, this.#failures] = [undefined, 0];
    const { WebSocket = globalThis.WebSocket } = this.options;
    if (!WebSocket) throw new TypeError("There is no WebSocket here: pass a class as the option of this name.");
    /** @type {globalThis.WebSocket} */ const socket = new WebSocket(socketUrl(this.options));
    this.#socket = socket;
    socket.onopen = () => this.#login();
    socket.onmessage = ({ data }) => this.#onFrame(parsed(data));
    socket.onclose = ({ code, reason }) => this.#onClose(code, reason);
    socket.onerror = () => {}; // a close follows; ws throws errors without a handler
    this.#timer = setTimeout(() => this.drop(), this.options.patience);
    this.#setState("connecting");
  }

  /** Disconnects. Unfinished messages resume with the next `connect`. */
  close() {
    this.#dropSocket();
    this.#setState("closed", { code: 1000 });
  }

  /** Drops the connection as if the network had failed; reconnect and resume follow. */
  drop() {
    if (this.#socket) this.#onClose(1006);
  }

  /**
   * Sends a message, now or as soon as there is a connection, and returns the handle that its answer comes to.
   * @param {string} contents
   * @param {Turn[]} history  Earlier messages, oldest first.
   * @param {string} id       1 to 64 of A-Z a-z 0-9 . _ : -, unique for this user.
   * @param {{ traceparent?: string }} [options]  The trace that it belongs to (W3C Trace Context).
   */
  send(contents, history = [], id = newMessageId(), { traceparent } = {}) {
    return this.resend(Object.assign(new Message(id, contents, history), { traceparent }));
  }

  /** Sends a refused message again, under the same id. @param {Message} message */
  resend(message) {
    message.status = "sending";
    this.#failed.delete(message.id);
    this.#messages.set(message.id, message);
    if (this.state === "online") this.#chat(message);
    return message;
  }

  /**
   * Takes up a message that was accepted earlier, before the page was reloaded or on another device: its recorded
   * answer comes from the start. @param {string} id @param {string} contents
   */
  follow(id, contents = "") {
    const message = new Message(id, contents, []);
    message.accepted = true;
    message.status = "queued";
    this.#failed.delete(id);
    this.#messages.set(id, message);
    this.#isFollowing = true;
    if (this.state === "online") this.#retryLater(0);
    return message;
  }

  /** Cancels one message and keeps its text. @param {string} messageId */
  cancel(messageId) {
    const message = this.#messages.get(messageId);
    if (!message) return;
    message.cancelling = true;
    if (message.status === "refused" || !(message.sent || message.accepted)) message.become("cancelled");
    else if (this.state === "online") this.#probe(), this.#send({ msgType: "CANCEL", messageId });
    this.#sort(message);
  }

  /** Sends INIT. With `resuming`, resumes accepted messages; without, only renews the login. */
  async #login(resuming = true) {
    const socket = this.#socket;
    const { token } = this.options;
    try {
      this.#sentToken = typeof token === "function" ? await token() : token;
    } catch {
      if (socket === this.#socket && this.state === "connecting") this.drop(); // no token now: try again later
      return;
    }
    if (socket !== this.#socket) return; // the connection was lost meanwhile
    if (this.#rejectedToken !== undefined && this.#sentToken === this.#rejectedToken) return this.#onClose(NOT_AUTHENTICATED);
    this.#isFollowing &&= !resuming;
    const resume = [...this.#messages.values()]
      .filter(({ accepted }) => accepted && resuming)
      .slice(-MAX_RESUMED)
      .map(({ id, attempt, offset }) => ({ messageId: id, attempt, offset }));
    this.#send({ msgType: "INIT", token: this.#sentToken, resume, wants: this.options.wants });
  }

  /** Logged in: resends unacknowledged messages; the server detects duplicates by their id. @param {Frame} frame */
  #onLoggedIn({ heartbeatMs: heartbeat = this.options.heartbeat, messages = [] }) {
    clearTimeout(this.#timer);
    this.#rejectedToken = undefined;
    this.#acceptedToken = this.#sentToken;
    this.known = messages;
    this.#heartbeatTimer = setInterval(() => this.#heartbeat(), heartbeat);
    for (const message of this.#messages.values()) if (message.status === "sending") this.#chat(message);
    this.#repeatCancels();
    if (this.#isFollowing) this.#retryLater(0); // since INIT was sent
    this.#setState("online");
  }

  #repeatCancels() {
    for (const { id, cancelling } of this.#messages.values()) {
      if (cancelling) this.#send({ msgType: "CANCEL", messageId: id });
    }
  }

  /** The server could not look up a message: resumes again after `wait` ms. Followed messages keep their offset. */
  #retryLater(wait = this.options.firstWait) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => (this.#login(), this.#repeatCancels()), wait);
  }

  /** @param {Frame | undefined} frame */
  #onFrame(frame) {
    if (!frame) return;
    this.#awaitingHeartbeat = false;
    if (this.#probeTimer) this.#limitProbe(frame.msgType !== "HEARTBEAT");
    this.#lastFrame = frame;
    this.node = frame.node ?? this.node;
    if (frame.event === "asked") this.#onAsked(frame);
    const message = this.#messageOf(frame);
    if (message) {
      if (frame.code === "EXPIRED" && !message.accepted) return this.#chat(message); // the message never arrived
      message.take(frame);
      if (message.accepted && frame.code === "UNAVAILABLE") this.#retryLater(frame.retryAfterMs);
      this.#sort(message);
    } else if (frame.msgType === "INIT" && this.state === "connecting") {
      this.#onLoggedIn(frame);
    } else if (frame.msgType === "INIT") {
      this.#acceptedToken = this.#sentToken;
    } else if (frame.msgType === "SYSTEM") {
      this.dispatchEvent(new CustomEvent("notice", { detail: frame }));
      if (frame.code === "UNAUTHORIZED" && this.state === "online" && this.#canRenew) this.#login(false);
      if (frame.code === "UNAVAILABLE" && this.state === "connecting") this.drop(); // no login is possible now
    }
  }

  /** Forgets a message that has ended, but not yet one that has failed. @param {Message} message */
  #sort(message) {
    if (!message.isEnded) return;
    this.#messages.delete(message.id);
    if (message.status === "failed") this.#failed.set(message.id, message);
    if (this.#failed.size > MAX_FAILED) this.#failed.delete(/** @type {string} */ (this.#failed.keys().next().value));
  }

  /** A message of another socket: its frames follow. @param {Frame} frame */
  #onAsked({ messageId: id = "", contents = "" }) {
    if (this.#messages.has(id) || this.#failed.has(id)) return;
    const message = new Message(id, contents, []);
    message.accepted = true;
    message.status = "queued";
    this.#messages.set(id, message);
    this.dispatchEvent(new CustomEvent("asked", { detail: message }));
  }

  /** The message that a frame is about. @param {Frame} frame */
  #messageOf({ messageId, code, event, attempt = 0 }) {
    const failed = this.#failed.get(messageId ?? "");
    if (failed && ANSWERS.has(event ?? "") && attempt > failed.attempt) {
      this.#failed.delete(failed.id);
      this.#messages.set(failed.id, failed);
    }
    if (messageId) return this.#messages.get(messageId);
    // An unreadable frame is refused without its id. Replies come in the order of the frames sent.
    if (code === "BAD_REQUEST") return [...this.#messages.values()].find(({ status }) => status === "sending");
  }

  /** Whether a fresh token can be had. */
  get #canRenew() {
    return typeof this.options.token === "function";
  }

  #heartbeat() {
    if (this.#awaitingHeartbeat) return this.drop(); // the last heartbeat was not answered
    this.#awaitingHeartbeat = true;
    this.#send({ msgType: "HEARTBEAT" });
  }

  /**
   * Sends a heartbeat that must be answered soon: a dead connection looks like a living one. The server handles frames
   * in their order, so not while it is still busy with a message.
   * @param {Message} [sending]
   */
  #probe(sending) {
    const isBusy = [...this.#messages.values()].some((one) => one !== sending && one.sent && one.status === "sending");
    if (this.state !== "online" || this.#probeTimer || isBusy) return;
    this.#send({ msgType: "HEARTBEAT" });
    this.#limitProbe(true);
  }

  /** Begins the time limit of a heartbeat's answer, from the last frame on, or ends it. @param {boolean} isMissing */
  #limitProbe(isMissing) {
    clearTimeout(this.#probeTimer);
    this.#probeTimer = isMissing ? setTimeout(() => this.drop(), this.options.probeLimit) : undefined;
  }

  /** @param {Event} event */
  #wake = ({ type }) => {
    if (globalThis.document?.visibilityState === "hidden") return;
    // An attempt that began before may wait for a network that is gone; timers stand still while a computer sleeps.
    const isOld = type === "online" || Date.now() - this.#since > this.options.patience;
    if (this.state === "connecting" && isOld) this.drop();
    if (this.state === "waiting") this.connect();
    else this.#probe();
  };

  /** @param {Message} message */
  #chat(message) {
    this.#probe(message);
    message.sent = true;
    const { id: messageId, contents, history, traceparent } = message;
    this.#send({ msgType: "CHAT", messageId, contents, history, traceparent });
  }

  /** @param {object} frame */
  #send(frame) {
    this.#socket?.send(JSON.stringify({ userId: this.options.userId, ...frame }, wellFormed));
  }

  /**
   * Handles the end of a connection. The close code decides whether to reconnect now, later or never.
   * @param {number} code @param {string} [reason]
   */
  #onClose(code, reason) {
    const frame = code >= INTERNAL_ERROR && this.#lastFrame?.msgType === "SYSTEM" ? this.#lastFrame : undefined;
    if (this.state === "online" && Date.now() - this.#since > STABLE_AFTER) this.#failures = 0;
    this.#dropSocket();
    if (code === FRAME_TOO_BIG) this.#refuseLongest();
    const late = frame?.code === "INIT_TIMEOUT"; // no fault of the token
    const renew = code === NOT_AUTHENTICATED && this.#canRenew && this.#rejectedToken === undefined;
    // When a login expires, a newer token may have been sent too late to be checked.
    const refused = this.state === "online" ? this.#acceptedToken : this.#sentToken;
    this.#rejectedToken = code === NOT_AUTHENTICATED && !late ? refused : this.#rejectedToken;
    if (code >= 4500 && code <= 4999 && !renew && !late) return this.#setState("closed", { code, reason, frame });
    const { firstWait, longestWait } = this.options;
    const wait = reconnectWait(code, this.#failures++, firstWait, longestWait);
    this.#timer = setTimeout(() => this.connect(), wait);
    this.#setState("waiting", { code, reason, frame, wait });
  }

  /** Refuses the longest unacknowledged message: it was too big, and would close the next connection, too. */
  #refuseLongest() {
    const size = (/** @type {Message} */ { contents, history }) => JSON.stringify([contents, history]).length;
    const unacknowledged = [...this.#messages.values()].filter(({ status }) => status === "sending");
    unacknowledged.sort((one, other) => size(other) - size(one))[0]?.become("refused");
  }

  #dropSocket() {
    clearTimeout(this.#timer);
    clearInterval(this.#heartbeatTimer);
    this.#limitProbe(false);
    const socket = this.#socket;
    this.#socket = this.#lastFrame = undefined;
    this.#awaitingHeartbeat = false;
    if (!socket) return;
    socket.onopen = socket.onmessage = socket.onclose = null;
    socket.close();
  }

  /** @param {State} state @param {{code: number, reason?: string, frame?: Frame, wait?: number}} [detail] */
  #setState(state, detail) {
    this.state = state;
    this.#since = Date.now();
    const change = state === "closed" ? "removeEventListener" : "addEventListener";
    for (const event of WAKING) globalThis[change]?.(event, this.#wake);
    this.dispatchEvent(new CustomEvent("state", { detail }));
  }
}

/**
 * Reconnect delay in milliseconds: doubled by each failure, with jitter, because other clients lost the same node,
 * too. @param {number} code @param {number} failures @param {number} firstWait @param {number} longestWait
 */
export function reconnectWait(code, failures, firstWait, longestWait) {
  if (code === DRAINING && failures === 0) return Math.random() * Math.min(500, firstWait);
  const base = code === NODE_FULL ? 5 * firstWait : firstWait;
  return Math.min(longestWait, base * 2 ** failures) * (0.5 + Math.random() / 2);
}

/** Returns a new id. `crypto.randomUUID` exists on secure origins only, so not with plain http. */
export function newMessageId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Replaces halves of surrogate pairs, which cannot be sent, in the strings of JSON. @param {string} _ @param {unknown} value */
function wellFormed(_, value) {
  return typeof value === "string" ? value.replace(/\p{Surrogate}/gu, "\ufffd") : value;
}

/** Parses a frame; returns undefined for other data. @param {unknown} data @returns {Frame | undefined} */
function parsed(data) {
  try {
    const frame = JSON.parse(String(data));
    return frame?.msgType && frame;
  } catch {
    return undefined; // a newer server, or a program between
  }
}

/** @param {Options} options */
function socketUrl({ address, userId, lang }) {
  const url = new URL("ws", address.replace(/\/*([?#].*)?$/, "/"));
  url.protocol = url.protocol.replace("http", "ws");
  url.searchParams.set("userId", String(userId));
  if (lang) url.searchParams.set("lang", lang);
  return url.href;
}
