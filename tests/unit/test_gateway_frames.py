"""Text frames that are built without websockets: its parser must read them back."""

import pytest
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.uri import parse_uri

from imstream.gateway.websocket_protocol import text_frame


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65_535, 65_536, 100_000])
@pytest.mark.parametrize("character", ["a", "你"])
def test_a_frame_of_any_length_is_read_back(size: int, character: str) -> None:
    text = (character * size)[: size // len(character.encode())] + "a" * (size % len(character.encode()))
    assert len(text.encode()) == size
    client = ClientProtocol(parse_uri("ws://127.0.0.1/"), state=State.OPEN, max_size=None)
    client.receive_data(text_frame(text) + text_frame("next"))
    assert client.events_received() == [Frame(Opcode.TEXT, text.encode()), Frame(Opcode.TEXT, b"next")]
