"""What the sessions of a node have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imstream.gateway.following import Following
    from imstream.gateway.presence import Presence
    from imstream.gateway.registry import Registry
    from imstream.gateway.rounds import Rounds
    from imstream.guards.chain import Guards
    from imstream.reply import ReplyBoard
    from imstream.settings import Settings
    from imstream.store.replies import ReplyStore
    from imstream.store.requests import RequestStream
    from imstream.wire import FrameLimits
    from imstream.worker.jobs import Jobs
    from imstream.worker.worker import Worker


@dataclass(frozen=True)
class Services:
    """What sessions use of their node."""

    settings: Settings
    guards: Guards
    requests: RequestStream
    replies: ReplyStore
    board: ReplyBoard
    worker: Worker
    jobs: Jobs
    registry: Registry
    presence: Presence
    following: Following
    rounds: Rounds
    frame_limits: FrameLimits
