/** Texts of the page that change, in English and Chinese. Fixed ones stand in index.html, those of a node come with frames. */

const TEXTS = {
  badUser: [
    "A user id is 1 to 128 letters A-Z, digits, or any of . _ + @ | : / = -",
    "用户标识由 1 到 128 个英文字母、数字或 . _ + @ | : / = - 组成。",
  ],
  badNumber: ["A user id is a number above 10000.", "用户标识必须是大于 10000 的数字。"],
  badAddress: ["This address is not valid.", "该地址无效。"],

  via: ["node {node}", "节点 {node}"],
  idle: ["Not connected", "未连接"],
  connecting: ["Connecting", "连接中"],
  online: ["Connected", "已连接"],
  waiting: ["Reconnecting", "重新连接中"],
  closed: ["Not connected", "未连接"],
  lost: ["Connection lost. Next try in {seconds} s", "连接已断开，{seconds} 秒后重试"],
  trying: ["Connecting…", "连接中…"],
  ended: ["The connection was closed.", "连接已关闭。"],

  write: ["Write a message", "输入消息"],
  tooLong: ["Too long for one message: remove {count} characters", "消息太长，需要删去约 {count} 个字符"],

  you: ["You", "你"],
  assistant: ["Assistant", "助手"],
  thinkingText: ["Reasoning of the model", "模型的思考过程"],
  unknownQuestion: ["This question is not available", "问题已不再保留"],

  held: ["Will be sent after the answer above", "将在上面的回答完成后发送"],
  heldBack: ["Not sent, because the message above has no answer", "尚未发送，因为上一条消息没有得到回答"],
  sending: ["Sending", "发送中"],
  offline: ["Waiting for the connection", "等待连接"],
  resuming: ["Connection lost, the answer will continue where it stopped", "连接已断开，恢复后将从断开处继续"],
  queued: ["Place {position} in the queue", "排队中，第 {position} 位"],
  next: ["Next in the queue", "排队中，下一个就是你"],
  inQueue: ["In the queue", "排队中"],
  seconds: ["about {count} s", "约 {count} 秒"],
  minutes: ["about {count} min", "约 {count} 分钟"],
  started: ["The AI has the question", "AI 已收到问题"],
  thinking: ["Thinking · {seconds} s", "思考中 · {seconds} 秒"],
  thought: ["thought for {seconds} s", "思考了 {seconds} 秒"],
  paused: ["The service is paused; the answer follows later", "服务暂停中，稍后回答"],
  away: ["The AI service is away", "AI 服务暂时不可用"],
  busy: ["The AI service is busy", "AI 服务繁忙"],
  awayUntil: ["{what}, trying again in {seconds} s", "{what}，{seconds} 秒后重试"],
  awayNow: ["{what}, trying again", "{what}，正在重试"],
  answering: ["Answering", "回答中"],
  again: ["Interrupted, writing it again (attempt {attempt})", "回答中断，正在重新生成（第 {attempt} 次）"],
  afterAll: ["It had failed; now it is answered after all", "之前失败的消息正在重新得到回答"],
  stopping: ["Stopping", "正在停止"],
  done: ["Answered", "已回答"],
  doneBy: ["Answered by node {node}", "由节点 {node} 回答"],
  tokens: ["{tokens} tokens", "{tokens} 个 token"],
  resumed: ["resumed", "断线后已恢复"],
  late: ["after it had failed at first", "先前失败，之后得到回答"],
  length: ["cut at the length limit", "已达长度上限，在此截断"],
  content_filter: ["cut by the content filter", "被内容审核截断"],
  cancelled: ["Stopped", "已停止"],
  failed: ["This message could not be answered.", "这条消息没有得到回答。"],
  expired: ["The answer has expired.", "这条回答已不再保留。"],
  refused: [
    "The service did not take this message. It may be too long.",
    "服务没有接受这条消息，可能太长了。",
  ],
  retryIn: ["Trying again in {seconds} s", "{seconds} 秒后重试"],

  stop: ["Stop", "停止"],
  giveUp: ["Give up", "放弃"],
  takeBack: ["Take back", "撤回"],
  sendAnyway: ["Send anyway", "仍然发送"],
  tryAgain: ["Try again", "重试"],
  tryNow: ["Try now", "立即重试"],
  regenerate: ["Answer again", "重新回答"],
  copy: ["Copy", "复制"],
  copied: ["Copied", "已复制"],
  code: ["Code", "代码"],
  table: ["Table", "表格"],
  taskDone: ["Done", "已完成"],
  taskOpen: ["Not done", "未完成"],

  running: ["not answered yet", "尚未答完"],
  remove: ["Delete “{title}”", "删除“{title}”"],
  removeQuestion: ["Delete the conversation “{title}”? This cannot be undone.", "删除对话“{title}”？此操作无法撤销。"],
  removeYes: ["Delete", "删除"],
  leaveQuestion: [
    "Your conversations are kept in this browser, for your next login. Keep them?",
    "你的对话保存在此浏览器中，供下次登录使用。要保留吗？",
  ],
  loseQuestion: [
    "This browser does not keep your conversations: they are lost when you log out.",
    "此浏览器无法保存你的对话，退出登录后将丢失。",
  ],
  loseAll: ["Log out", "退出登录"],
  keep: ["Keep them", "保留"],
  removeAll: ["Delete them", "删除"],
  back: ["Cancel", "取消"],
};

const RIGHT_TO_LEFT = /[\u0590-\u08ff\u200f\ufb1d-\ufdff\ufe70-\ufeff\u{10800}-\u{10fff}\u{1e800}-\u{1efff}]/u;

let lang = "en";

export const language = () => lang;

/** Chooses the language of all texts. */
export function setLanguage(chosen) {
  lang = chosen;
  globalThis.speak(chosen); // the fixed ones: see boot.js
}

/** A text of the page with its placeholders filled in. */
export function say(name, values = {}) {
  return TEXTS[name][lang === "zh" ? 1 : 0].replace(/\{(\w+)\}/g, (_, key) => isolated(values[key]));
}

/** Sets a text only if it differs: screen readers announce changes. */
export function write(element, text) {
  text = directed(text);
  if (element.textContent !== text) element.textContent = text;
}

/** Removes control characters that embed or override the text direction. */
export function directed(text) {
  return text.replace(/[\u202a-\u202e\u2066\u2067]/g, "");
}

/** Isolates a foreign value inside a sentence, so that right-to-left text does not reorder it. */
export function isolated(value) {
  const text = directed(String(value));
  return RIGHT_TO_LEFT.test(text) ? `\u2068${text.replace(/[\u2068\u2069]/g, "")}\u2069` : text;
}

export function secondsUntil(time) {
  return Math.max(0, Math.ceil((time - Date.now()) / 1000));
}

export function secondsSince(time) {
  return Math.max(0, Math.round((Date.now() - time) / 1000));
}

/** A duration in words: seconds, or minutes. */
export function roughly(seconds) {
  return seconds < 100 ? say("seconds", { count: seconds }) : say("minutes", { count: Math.round(seconds / 60) });
}
