/** The page of a node: login, connection, input. */

import { ImstreamClient } from "./imstream.js";
import { Chat } from "./page-chat.js";
import { ConversationList } from "./page-list.js";
import { Archive, local, session } from "./page-store.js";
import { isolated, language, say, secondsUntil, setLanguage, write } from "./page-texts.js";
import { $, choose, draw } from "./page-view.js";

const NOT_AUTHENTICATED = 4500;
const BAD_USER_ID = 4501;
const FROM_DISK = location.protocol === "file:";
const HERE = FROM_DISK ? "" : new URL(".", location.href).href;
const GIVEN = new URLSearchParams(FROM_DISK ? location.hash.slice(1) : ""); // from `imstream up`
const [user, token, address, connect] = $("enter").elements;
const [box, send] = $("write").elements;
const NUMBERS_ONLY = !FROM_DISK && user.dataset.userIds === "number"; // the node that serves the page writes it
const LIMITS = { frame: Number(user.dataset.maxFrame), history: Number(user.dataset.maxHistory) }; // these, too
const isTouched = matchMedia("(hover: none) and (pointer: coarse)"); // a keyboard on the screen: Enter is a new line

let client; // the ImstreamClient after login
let chat; // its Chat
let list; // its ConversationList
let nextTry = 0; // time of the next reconnect (Date.now())
let reason = ""; // the node's reason for the end of the last connection

const submit = (form) => form.dispatchEvent(new Event("submit", { cancelable: true })); // Safari 15 lacks requestSubmit

// ---- Login ----

/**
 * The user id as the protocol has it; undefined if it is not allowed. A node with ids of text takes a number for its
 * digits.
 */
function parseUserId(text) {
  if (/^[1-9]\d{4,14}$/.test(text) && Number(text) > 10000) return Number(text);
  return !NUMBERS_ONLY && /^[A-Za-z0-9._+@|:/=-]{1,128}$/.test(text) ? text : undefined;
}

/** The address of a node as a URL; undefined for other text. */
function parseAddress(text) {
  try {
    return new URL(text.includes("://") ? text : `http://${text}`).href.replace(/\/*$/, "/");
  } catch {
    return undefined;
  }
}

async function logIn(userId, base) {
  const owner = `${userId} ${base}`;
  const isKnown = session.get("owner") === owner; // this tab was logged in before: its conversations may be shown
  for (const store of [local, session]) {
    store.set("user", String(userId));
    store.set("address", base);
  }
  nextTry = 0;
  const { options } = client ?? {};
  if (!(options?.userId === userId && options.address === base)) {
    leave();
    begin(userId, base, owner);
  } // otherwise it continues with a token, after it was requested
  client.options.token = token.value.trim() || undefined; // kept in memory only
  write($("who"), String(userId));
  write($("where"), new URL(base).host);
  showLogin(false);
  box.focus();
  const ours = client;
  if (isKnown) await chat.restore(); // the login then resumes unfinished messages
  if (ours === client) client.connect();
}

function begin(userId, base, owner) {
  client = new ImstreamClient({ address: base, userId, lang: language(), wants: ["status", "asked", "thinking"] });
  chat = new Chat(client, new Archive(owner, (ids) => chat.forget(ids)), LIMITS, showChat);
  list = new ConversationList(chat);
  showChat();
  const [ours, here] = [client, chat];
  client.addEventListener("state", ({ detail }) => ours === client && connectionChanged(detail, owner));
  client.addEventListener("asked", ({ detail }) => here.adopt(detail));
}

function leave() {
  chat?.close();
  client?.close();
  client = chat = list = undefined;
}

async function logOut(problem = "") {
  if (!problem && chat.list.length) {
    const { isKept } = chat.archive;
    const actions = isKept ? [say("keep"), say("removeAll")] : [say("loseAll")];
    const chosen = await choose(say(isKept ? "leaveQuestion" : "loseQuestion"), [...actions, say("back")]);
    if (!actions[chosen]) return;
    if (chosen === 1) await chat.removeAll();
  }
  for (const key of ["user", "owner", "conversation"]) session.set(key, null);
  leave();
  token.value = "";
  showLogin(true, problem);
  user.focus();
}

/** The node requests a token. The conversation stays on the page. */
function askForToken(problem) {
  $("secret").hidden = false;
  token.value = "";
  showLogin(true, problem);
  token.focus();
}

/** Shows the problem of the input in the language of the page, which may change while it is shown. */
function refuseInput(name) {
  showLogin(true, say(name));
  $("problem").dataset.name = name;
}

function showLogin(visible, problem = "") {
  $("problem").dataset.name = "";
  $("login").hidden = !visible;
  for (const id of ["chat", "menu", "toggle"]) $(id).hidden = visible;
  $("menu").open = false;
  $("no-answer").hidden = true;
  $("problem").hidden = !problem;
  write($("problem"), problem);
  if (visible) $("new").hidden = true;
  else showChat();
}

// ---- Connection ----

function connectionChanged(detail, owner) {
  if (client.state === "online") reason = "";
  if (detail?.frame) reason = detail.frame.contents ?? "";
  if (client.state === "waiting") nextTry = Date.now() + detail.wait;
  if (client.state === "closed" && detail.code === NOT_AUTHENTICATED) return askForToken(reason || say("ended"));
  if (client.state === "closed" && detail.code === BAD_USER_ID) return logOut(reason || say("ended"));
  if (client.state === "online") {
    if (session.get("owner") !== owner) chat.restore(); // the service has accepted this user
    session.set("owner", owner);
    chat.followKnown();
  }
  showConnection();
  chat.connectionChanged(client.state === "waiting");
}

function showConnection() {
  const { state, node } = client;
  $("menu").dataset.state = state;
  write($("state"), say(state));
  write($("node"), node ?? "–");
  write($("via"), state === "online" && node !== undefined ? say("via", { node }) : "");
  const [trouble, button] = $("trouble").children;
  const seconds = secondsUntil(nextTry);
  if (state === "waiting") {
    write(trouble, reason ? `${isolated(reason)} · ${say("retryIn", { seconds })}` : say("lost", { seconds }));
  }
  if (state === "connecting") write(trouble, say("trying"));
  if (state === "closed") write(trouble, reason || say("ended"));
  const isQuiet = state === "online" || (state === "connecting" && !nextTry);
  if (isQuiet && document.activeElement === button) box.focus();
  $("trouble").hidden = isQuiet;
  button.disabled = state === "connecting";
}

// ---- Chat ----

function showChat() {
  if (!chat) return;
  const isEmpty = !chat.current.exchanges.length;
  $("welcome").hidden = !isEmpty;
  if (isEmpty && document.activeElement === $("new")) box.focus();
  $("new").hidden = isEmpty;
  if (list) draw(list);
}

function ask(question) {
  chat.ask(question);
  box.focus();
}

/** Shows that a text is too long for one message, and by how much. */
function measure() {
  const question = box.value.trim();
  const excess = chat?.excess(question) ?? 0;
  $("too-long").hidden = !excess;
  write($("too-long"), excess ? say("tooLong", { count: excess.toLocaleString("en") }) : "");
  box.setAttribute("aria-invalid", String(excess > 0));
  send.disabled = !question || excess > 0;
}

function tick() {
  if (!client) return;
  showConnection();
  chat.tick();
}

// ---- User actions ----

function speak(chosen) {
  setLanguage(chosen);
  box.placeholder = say("write");
  $("language").textContent = chosen === "zh" ? "English" : "中文";
  $("language").lang = chosen === "zh" ? "en" : "zh-CN";
  const { name } = $("problem").dataset;
  if (name) write($("problem"), say(name));
  if (!client) return;
  showConnection();
  measure();
  chat.relabel();
  draw(list);
}

$("enter").onsubmit = (event) => {
  event.preventDefault();
  const id = parseUserId(user.value.trim());
  const base = parseAddress(address.value.trim() || HERE || address.placeholder);
  if (id === undefined) return refuseInput(NUMBERS_ONLY ? "badNumber" : "badUser");
  if (base === undefined) return refuseInput("badAddress");
  logIn(id, base);
};

$("write").onsubmit = (event) => {
  event.preventDefault();
  const question = box.value.trim();
  if (!question || chat.excess(question)) return;
  box.value = "";
  measure();
  ask(question);
};
box.oninput = measure;
box.onkeydown = (event) => {
  // During IME composition, Enter selects a word. Safari reports this only by the key code.
  const composing = event.isComposing || event.keyCode === 229;
  if (event.key !== "Enter" || event.shiftKey || composing || isTouched.matches) return;
  event.preventDefault();
  submit($("write"));
};
for (const idea of document.querySelectorAll("#ideas button")) idea.onclick = () => ask(idea.textContent);

$("new").onclick = () => {
  chat.openNew();
  list.closeOverlay();
  box.focus();
};
$("toggle").onclick = () => list.toggle();
$("drop").onclick = () => {
  closeMenu();
  client.drop();
};
$("leave").onclick = () => logOut();
$("reconnect").onclick = () => client.connect();
$("language").onclick = () => {
  speak(language() === "zh" ? "en" : "zh");
  local.set("lang", language());
  if (client) client.options.lang = language(); // used for the next connection
};

/** Closes the menu. Returns whether it was open. */
function closeMenu() {
  const { open } = $("menu");
  if ($("menu").contains(document.activeElement)) $("menu").firstElementChild.focus();
  $("menu").open = false;
  return open;
}

document.addEventListener("click", ({ target }) => {
  if (!$("menu").contains(target)) $("menu").open = false;
  if (target === $("stage") || $("stage").contains(target)) list?.closeOverlay();
});
document.addEventListener("keydown", ({ key, isComposing }) => {
  if (key !== "Escape" || isComposing || $("dialog").open || !chat) return;
  if (!closeMenu() && !list.closeOverlay()) chat.stop();
});
// Other tabs may have asked questions while this one was not connected.
document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && client?.state === "online" && chat.restore());

user.inputMode = NUMBERS_ONLY ? "numeric" : "";
for (const element of document.querySelectorAll("[data-ids]")) {
  element.hidden = element.dataset.ids !== (NUMBERS_ONLY ? "number" : "text");
}
box.enterKeyHint = isTouched.matches ? "enter" : "send";
speak(local.get("lang") ?? (navigator.language.startsWith("zh") ? "zh" : "en"));
user.value ||= session.get("user") ?? local.get("user") ?? "10001";
address.value ||= session.get("address") ?? HERE; // from disk it is filled in, see boot.js
token.value = GIVEN.get("token") ?? "";
setInterval(tick, 500);
if (session.get("user")) submit($("enter")); // the page was reloaded
else if (document.activeElement === document.body) user.focus();
