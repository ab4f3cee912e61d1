"""The canned answer of the demo backend, delta by delta. Pure, so that tests know the text."""

import re
from functools import lru_cache
from itertools import chain, cycle, islice

from imstream.demo.marker import parse_marker

_MAX_QUOTE = 200

# Line breaks, a word with the blanks before it, two characters of a script without blanks, or any other character:
# about the size of a model's tokens.
_PIECE = re.compile(r"\n+|[ \t]*[!-~]+|[^\x00-~]{1,2}|.", re.DOTALL)
_CHINESE = re.compile("[\u3400-\u9fff\uf900-\ufaff]")

_EN = """\
This is the demo backend of imstream. It is not a model: it speaks the protocol of one, and says the same to everybody.

You asked:

> {quote}

No thought went into this answer, but your message made the whole journey: over the WebSocket to the node, \
into its Redis Stream, from there to a worker, over HTTP to this backend, and back to you word by word.

Things to try:

- Cancel this answer while it is running.
- Drop the connection in the middle: the page reconnects and goes on where it stopped.
- Write [[demo fail=2]] into a message: the first two calls fail, the third one answers.
- Write [[demo length=500 pace=10ms]] for a long and fast answer.

For real answers set IMSTREAM_AI_URL, IMSTREAM_AI_MODEL and IMSTREAM_AI_KEY to any OpenAI-compatible service."""

_ZH = """\
这里是 imstream 的演示后端。它不是大模型,只是讲同样的协议,对谁都说同样的话。

您的问题是:

> {quote}

这个回答没有经过思考,但您的消息走完了全程:经 WebSocket 到达节点,写入它的 Redis Stream,由 worker 取出,\
通过 HTTP 送到这个后端,再逐字回到您面前。

您可以试一试:

- 在回答的过程中取消它。
- 中途断开连接:页面会自动重连,并从断开的地方继续。
- 在消息里写上 [[demo fail=2]]:前两次调用失败,第三次成功。
- 写上 [[demo length=500 pace=10ms]],得到一个又长又快的回答。

想要真正的回答,请把 IMSTREAM_AI_URL、IMSTREAM_AI_MODEL 和 IMSTREAM_AI_KEY 设为任何一个兼容 OpenAI 的服务。"""

_MORE_EN = "\n\nThis answer was asked to be longer, so it goes on: the words are filler, the stream is real."
_MORE_ZH = "\n\n这个回答需要更长一些,所以继续:文字只是填充,流式传输却是真的。"


def pieces(text: str) -> list[str]:
    """Split a text into pieces of about the size of a model's tokens."""
    return _PIECE.findall(text)


@lru_cache(maxsize=256)  # benchmarks repeat questions
def canned_answer(question: str, length: int = 0) -> tuple[str, ...]:
    """The deltas of the answer to a question; deterministic.

    Args:
        question: The user's last message. Its marker is not quoted, and its `length` is used.
        length: Number of deltas if the marker has none; 0 for the natural length.
    """
    plain, marker = parse_marker(question)
    length = length if marker.length is None else marker.length
    chinese = _CHINESE.search(plain) is not None
    quote = " ".join(plain.split())
    if len(quote) > _MAX_QUOTE:
        quote = quote[:_MAX_QUOTE] + "…"
    natural = pieces((_ZH if chinese else _EN).format(quote=quote))
    filler = cycle(pieces(_MORE_ZH if chinese else _MORE_EN))
    return tuple(islice(chain(natural, filler), length or len(natural)))
