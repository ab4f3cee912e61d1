"""Texts for people, in Chinese and English, and the choice between the two."""

import re
from dataclasses import dataclass
from enum import Enum
from typing import Literal

Lang = Literal["zh", "en"]
DEFAULT_LANG: Lang = "zh"

_SUBTAGS = re.compile(r"[-_.@].*", re.DOTALL)
"""Subtags after the language: `-TW` in `zh-TW`, `_CN.UTF-8` in the locale `zh_CN.UTF-8`."""


@dataclass(frozen=True)
class Sentence:
    """A text for people in both languages. `localize` fills in the braces."""

    zh: str
    en: str


class Text(Sentence, Enum):
    """The sentences that several modules use. A module keeps its own ones as `Sentence` constants."""

    WELCOME = ("用户标识: {user_id} 登录成功", "User id {user_id}: logged in")
    HEARTBEAT = ("心跳测试,很高兴收到你的心跳包", "Heartbeat received, glad to hear from you")
    BAD_USER_ID = ("用户身份标识有误!", "The user id is not valid!")
    BUSY = ("当前排队人数较多,请稍后再重试!", "Many people are waiting right now, please try again later!")
    USER_BUSY = (
        "您有太多消息还在处理中,请等待回复后再发送!",
        "Too many of your messages are still being answered, please wait for a reply!",
    )
    ACCEPTED = ("消息已收到,当前排在第 {position} 位", "Message received, place {position} in the queue")
    ANSWERED_BEFORE = ("这条消息已有回答,以下是记录", "This message was answered before; the recorded answer follows")
    RESTART = ("回答中断,正在重新生成", "The answer was interrupted and is being generated again")
    FAILED = (
        "抱歉,这条消息暂时无法得到回答,请稍后再试!",
        "Sorry, this message could not be answered. Please try again later!",
    )
    AI_AWAY = (
        "抱歉,AI 服务暂时不可用,请稍后再试!",
        "Sorry, the AI service is not available right now. Please try again later!",
    )
    REFUSED = (
        "抱歉,AI 服务拒绝了这条消息,请修改后再发送!",
        "Sorry, the AI service refused this message. Please change it and send it again!",
    )
    CANCELLED = ("已取消", "Cancelled")
    TOO_LATE = ("这条消息的回答已经结束,无法取消", "The answer to this message had already ended")
    UNKNOWN_MESSAGE = ("没有找到这条消息", "There is no such message")
    EXPIRED = ("这条消息的回答已过期,请重新发送", "The reply to this message has expired, please send it again")
    TEXT_ONLY = ("只接受文本消息 (JSON)", "Only text messages (JSON) are taken")
    NOT_LOGGED_IN = ("请先登录 (INIT)", "Please log in first (INIT)")
    OTHER_USER = ("不能以其他用户的身份操作", "This socket belongs to another user")
    BAD_FRAME = ("消息格式有误: {problem}", "The message is not valid: {problem}")
    UNAVAILABLE = ("服务暂时不可用,请稍后再重试!", "The service is not available right now, please try again later!")
    PAUSED = ("服务正在维护,请稍后再发送!", "The service is being maintained, please send it again later!")
    DRAINING = ("服务节点即将重启,请重新连接", "This node is about to restart, please reconnect")
    TOO_SLOW = ("连接读取过慢,已断开", "This connection reads too slowly and was closed")
    NO_HEARTBEAT = ("长时间没有收到心跳,连接已断开", "No heartbeat for a long time, the connection was closed")
    NODE_FULL = ("当前连接人数过多,请稍后再连接", "This node has too many connections, please come back later")
    TOO_MANY_SOCKETS = ("您的连接过多,本连接已断开", "You have too many connections, so this one was closed")
    TOO_FAST = ("发送过于频繁,请稍候", "You are sending too fast, please wait")
    REPLACED = ("您已在其他地方登录,本连接已断开", "You have logged in elsewhere, so this connection was closed")
    LOGIN_ENDING = (
        "登录将在 {seconds} 秒后过期,请用新的令牌再次登录 (INIT)",
        "Your login ends in {seconds} s, please log in again with a new token (INIT)",
    )
    LOGIN_EXPIRED = ("登录已过期,请重新登录", "Your login has expired, please log in again")
    NO_INIT = ("没有及时登录,连接已断开", "No login (INIT) in time, the connection was closed")
    INTERNAL = ("系统内部错误,请稍后再重试!", "Something went wrong on our side, please try again later!")

    # The terminal client's own notes.
    CHAT_WELCOME = (
        "已连接 {url}。输入消息后按回车发送;/help 显示帮助,Ctrl-D 退出。",
        "Connected to {url}. Type a message and press Enter; /help shows more.",
    )
    CHAT_LOST = ("连接中断({why}),{seconds} 秒后重新连接", "No connection ({why}); connecting again in {seconds} s")
    CHAT_BACK = ("已重新连接 {url}", "Connected again to {url}")
    CHAT_RESUMED = ("已重新连接 {url},回答继续", "Connected again to {url}; the answer continues")
    CHAT_RETRY = ("{why} {seconds} 秒后自动重发(Ctrl-C 放弃)", "{why} Sent again in {seconds} s (Ctrl-C gives up)")
    CHAT_CUT = ("回答已达长度上限,在此截断", "The answer was cut at the length limit")
    CHAT_FILTERED = ("回答被内容审核截断", "The answer was cut by the content filter")
    CHAT_CANCELLING = ("正在取消……再按一次 Ctrl-C 不再等待", "Stopping the answer… press Ctrl-C again to stop waiting")


def localize(text: Sentence, lang: Lang, **values: object) -> str:
    """The sentence in this language, with its braces filled in."""
    return (text.en if lang == "en" else text.zh).format(**values)


def choose_lang(accept_language: str | None, default: Lang) -> Lang:
    """Choose the language by an `Accept-Language` (RFC 9110, section 12.5.4), or by the name of a locale.

    The preferred one of Chinese and English if either is named, English for other languages, else `default`.
    """
    best: tuple[float, Lang] = (0.0, default)
    for part in (accept_language or "").split(","):
        tag, _, parameter = part.strip().partition(";")
        name, _, value = parameter.partition("=")
        try:
            weight = float(value) if name.strip() == "q" else 1.0
        except ValueError:
            weight = 0.0
        match _SUBTAGS.sub("", tag.strip().lower()):
            case "zh" | "en" as lang if weight > best[0]:
                best = (weight, lang)
            case other if weight > 0 and best[0] == 0 and other.isascii() and other.isalpha():
                best = (0.0, "en")
    return best[1]
