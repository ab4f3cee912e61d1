"""The clipboard, and the texts of the terminal chat that only it uses."""

import base64
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

from imstream.client.reply import Reply, Status
from imstream.codes import State
from imstream.texts import Lang, Sentence, localize

HELP = Sentence(
    "/new    开始新的对话\n/retry  重新回答上一条消息\n/copy   复制上一条回答\n/quit   退出,同 Ctrl-D\n"
    "Ctrl-C  取消回答,或清空输入\nAlt-Enter,或行尾的 \\  换行",
    "/new    begins a new conversation\n/retry  answers the last message again\n/copy   copies the last answer\n"
    "/quit   leaves, as Ctrl-D does\nCtrl-C  stops an answer, or clears the message\n"
    "Alt-Enter, or \\ before Enter, begins a new line",
)
NEW = Sentence("新的对话,之前的消息不再发送", "A new conversation, without the earlier messages")
NOTHING_YET = Sentence("还没有消息", "There is no message yet")
UNKNOWN = Sentence("没有命令 {name},见 /help", "There is no command {name}: see /help")
COPIED = Sentence("已复制 {count} 个字符", "Copied {count} characters")
SENT_TO_TERMINAL = Sentence(
    "已把 {count} 个字符交给终端的剪贴板(OSC 52)", "Sent {count} characters to the terminal's clipboard (OSC 52)"
)
NO_CLIPBOARD = Sentence("这里没有剪贴板", "There is no clipboard here")
LEFT = Sentence("不再等待这条回答", "No longer waiting for this answer")
ANSWERED_LATE = Sentence("之前失败的消息有了回答: {question}", "A message that had failed is answered: {question}")
FAILED_AGAIN = Sentence(
    "之前失败的消息再次失败: {question}: {why}", "A message that had failed has failed again: {question}: {why}"
)

OFFLINE = Sentence("正在重新连接……", "Connecting again…")
NO_SERVER = Sentence(
    "无法连接({why})。imstream 在运行吗?可用 imstream up 启动",
    "No connection ({why}). Is imstream running? Start it with imstream up",
)

_SENDING = Sentence("正在发送……", "Sending…")
_QUEUED = Sentence("排队中", "Waiting in the queue")
_PAUSED = Sentence("服务暂停中,稍后回答", "The service is paused; the answer follows later")
_PLACE = Sentence("排在第 {position} 位", "Place {position} in the queue")
_ETA = Sentence(",约 {seconds} 秒", ", about {seconds} s")
_STARTED = Sentence("等待回答…… {seconds} 秒", "Waiting for the answer… {seconds} s")
_THINKING = Sentence("思考中…… {seconds} 秒", "Thinking… {seconds} s")
_AWAY = Sentence("AI 服务暂时不可用({reason}),正在重试", "The AI service is away ({reason}), trying again")
_IN = Sentence(",{seconds} 秒后", " in {seconds} s")


class StatusLine:
    """The state of a message before its text, in one line."""

    def __init__(self, reply: Reply, lang: Lang) -> None:
        self._reply, self._lang = reply, lang
        self._status: Status | None = None
        self._since = time.monotonic()

    def text(self) -> str:
        """The line now; empty while text arrives."""
        if self._reply.status is not self._status:
            self._status, self._since = self._reply.status, time.monotonic()
        seconds = f"{time.monotonic() - self._since:.0f}"
        match self._status:
            case Status(state=State.WAITING, reason=reason, retry_after=retry_after):
                return self._say(_PAUSED if reason == "paused" else _AWAY, reason=reason) + self._left(_IN, retry_after)
            case Status(state=State.THINKING):
                return self._say(_THINKING, seconds=seconds)
            case _ if self._reply.so_far:
                return ""
            case None if self._reply.position is not None:  # of an older server
                return self._say(_PLACE, position=self._reply.position)
            case Status(state=State.QUEUED, position=position, eta=eta, reason=reason):
                queued = _PAUSED if reason == "paused" else _QUEUED if position is None else _PLACE
                return self._say(queued, position=position) + self._left(_ETA, eta)
        return self._say(_STARTED if self._reply.is_accepted else _SENDING, seconds=seconds)

    def _say(self, sentence: Sentence, **values: object) -> str:
        return localize(sentence, self._lang, **values)

    def _left(self, sentence: Sentence, span: timedelta | None) -> str:
        """The rest of a time span that began with the status."""
        left = 0.0 if span is None else span.total_seconds() - (time.monotonic() - self._since)
        return self._say(sentence, seconds=f"{left:.0f}") if left > 0 else ""


_CLIPBOARDS = (
    ("WAYLAND_DISPLAY", ("wl-copy",)),
    ("DISPLAY", ("xclip", "-selection", "clipboard")),
    ("TMUX", ("tmux", "load-buffer", "-w", "-")),  # tmux ignores OSC 52 by default
)
_COPY_TIMEOUT = 5  # seconds


def copy(text: str, send: Callable[[str], bool]) -> Sentence:
    """Copy a text with a program, or else by `send`ing a sequence to the terminal; returns the sentence to show."""
    programs = [command for variable, command in _CLIPBOARDS if os.environ.get(variable)]
    if sys.platform == "darwin":
        programs.insert(0, ("pbcopy",))
    for name, *options in programs:
        if (found := shutil.which(name)) is not None:
            with suppress(OSError, subprocess.SubprocessError):
                subprocess.run(  # noqa: S603 - programs of the list
                    [found, *options],
                    input=text.encode(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    check=True,
                    timeout=_COPY_TIMEOUT,
                )
                return COPIED
    return SENT_TO_TERMINAL if send(f"\x1b]52;c;{base64.b64encode(text.encode()).decode()}\x07") else NO_CLIPBOARD
