/** Types of imstream.js. A test compares them with the code. */

/** One earlier message of a conversation. */
export interface Turn {
  role: "user" | "assistant" | "system";
  content: string;
}

/** A message that can be followed. */
export interface KnownMessage {
  messageId: string;
  state: string;
}

/** A frame from the server. Fields that do not apply are absent. A newer server may send other codes and events. */
export interface Frame {
  /** SUCCESS, or the kind of failure: BUSY, AI_FAILED, EXPIRED, … */
  code: string;
  msgType: "INIT" | "CHAT" | "HEARTBEAT" | "SYSTEM";
  /** Text for the user, text of the reply, or the question (`asked`). */
  contents?: string;
  messageId?: string;
  event?: string;
  /** The attempt that the text belongs to, from 1. */
  attempt?: number;
  /** Position in the reply after this frame; opaque. */
  offset?: number;
  /** Position in the reasoning before this frame (`thinking`); with 0 it starts again. */
  start?: number;
  /** Place in the queue; 1 is next. */
  position?: number;
  /** State of an unfinished message (`status`): queued, started, waiting, … */
  state?: string;
  /** Estimate of the time until the answer begins (`status`). */
  etaMs?: number;
  /** Why it waits (`status`): a word for programs. */
  reason?: string;
  messages?: KnownMessage[];
  retryAfterMs?: number;
  heartbeatMs?: number;
  finishReason?: string;
  usage?: Record<string, number>;
  node?: string;
}

export interface Options {
  /** URL of the service: http, https, ws or wss. */
  address: string;
  /** An integer above 10000, or a text, as the server has it (`IMSTREAM_USER_IDS`). */
  userId: number | string;
  /** The user's signed token, or a function that returns a fresh one, called for each login. */
  token?: string | (() => string | Promise<string>);
  /** Language of the server's texts. */
  lang?: string;
  /** Optional events. */
  wants?: ("status" | "asked" | "thinking")[];
  /** The class of the socket, where there is no global one (Node.js 20): that of the package ws, for example. */
  WebSocket?: new (url: string) => object;
  /** Milliseconds between heartbeats, unless the service announces an interval; 25,000 by default. */
  heartbeat?: number;
  /** Time limit for the answer to a heartbeat when the page wakes up or a message is sent; 3,000 ms by default. */
  probeLimit?: number;
  /** Time limit for connecting and logging in; 10,000 ms by default. */
  patience?: number;
  /** First reconnect delay, doubled by every failure; 1,000 ms by default. */
  firstWait?: number;
  /** Maximum reconnect delay; 30,000 ms by default. */
  longestWait?: number;
}

export type Status = "sending" | "refused" | "queued" | "answering" | "done" | "failed" | "cancelled" | "expired";
export type State = "idle" | "connecting" | "online" | "waiting" | "closed";

/** The events of a message, each with its frame. `refused` has none if the message is too big. */
export interface MessageEvents {
  accepted: CustomEvent<Frame>;
  delta: CustomEvent<Frame>;
  /** Discard the text so far. Also after `failed`, when an operator retries the message. */
  restart: CustomEvent<Frame>;
  done: CustomEvent<Frame>;
  failed: CustomEvent<Frame>;
  /** Without a frame if the message was never sent. */
  cancelled: CustomEvent<Frame | undefined>;
  /** The reply has expired. */
  expired: CustomEvent<Frame>;
  /** The service did not accept the message: `resend` or `cancel` it. */
  refused: CustomEvent<Frame | undefined>;
  /** A problem with an accepted message: a late cancel, Redis is briefly unavailable. */
  notice: CustomEvent<Frame>;
  /** With the want `status`: `state` or `position` has changed. */
  status: CustomEvent<Frame>;
  /** With the want `asked`: the question of a message of another socket. */
  asked: CustomEvent<Frame>;
  /** With the want `thinking`: `thinking` has grown. */
  thinking: CustomEvent<Frame>;
}

/** Why the state has changed: a close, with its reason and the frame in which the service said why. */
export interface StateChange {
  code: number;
  reason?: string;
  frame?: Frame;
  /** Milliseconds until the next attempt. */
  wait?: number;
}

export interface ClientEvents {
  state: CustomEvent<StateChange | undefined>;
  /** A frame about no message. */
  notice: CustomEvent<Frame>;
  /** With the want `asked`: a message of another socket. */
  asked: CustomEvent<Message>;
}

/** One message and its answer. */
export class Message extends EventTarget {
  constructor(id: string, contents: string, history: Turn[]);
  id: string;
  contents: string;
  history: Turn[];
  status: Status;
  /** The answer so far. */
  text: string;
  /** The model's reasoning so far, which does not belong to the answer. */
  thinking: string;
  /** The state of the unfinished message, as the service calls it. */
  state: string | undefined;
  /** Its last known place in the queue. */
  position: number | undefined;
  /** The attempt that the text belongs to; 0 before the first. */
  attempt: number;
  /** Offset of the end of the text, counted by the server. */
  offset: number;
  /** The node that sent the last frame. */
  node: string | undefined;
  /** The last frame about it. */
  frame: Frame | undefined;
  /** The trace that it belongs to (W3C Trace Context). */
  traceparent: string | undefined;
  sent: boolean;
  accepted: boolean;
  cancelling: boolean;
  /** Resolves when the message has ended. A failed message that is answered after all gets a new promise. */
  ended: Promise<Message>;
  get isEnded(): boolean;
  take(frame: Frame): void;
  become(status: Status, event?: string): void;
  addEventListener<K extends keyof MessageEvents>(
    type: K,
    listener: (this: Message, event: MessageEvents[K]) => void,
    options?: boolean | AddEventListenerOptions,
  ): void;
  addEventListener(
    type: string,
    listener: EventListenerOrEventListenerObject | null,
    options?: boolean | AddEventListenerOptions,
  ): void;
}

/** One user's connection to a service, which reconnects by itself. */
export class ImstreamClient extends EventTarget {
  constructor(options: Options);
  options: Options;
  state: State;
  /** The connected node. */
  node: string | undefined;
  /** With the want `asked`: the user's newest messages at the last login. */
  known: KnownMessage[];
  /** Connects and logs in, and reconnects until `close` or a close code that forbids it. */
  connect(): void;
  /** Disconnects. Unfinished messages resume with the next `connect`. */
  close(): void;
  /** Drops the connection as if the network had failed; reconnect and resume follow. */
  drop(): void;
  /** Sends a message, now or as soon as there is a connection. */
  send(contents: string, history?: Turn[], id?: string, options?: { traceparent?: string }): Message;
  /** Sends a refused message again, under the same id. */
  resend(message: Message): Message;
  /** Takes up a message that was accepted earlier, or on another device. */
  follow(id: string, contents?: string): Message;
  /** Cancels one message and keeps its text. */
  cancel(messageId: string): void;
  addEventListener<K extends keyof ClientEvents>(
    type: K,
    listener: (this: ImstreamClient, event: ClientEvents[K]) => void,
    options?: boolean | AddEventListenerOptions,
  ): void;
  addEventListener(
    type: string,
    listener: EventListenerOrEventListenerObject | null,
    options?: boolean | AddEventListenerOptions,
  ): void;
}

/** Reconnect delay in milliseconds. */
export function reconnectWait(code: number, failures: number, firstWait: number, longestWait: number): number;

/** Returns a new message id. */
export function newMessageId(): string;
