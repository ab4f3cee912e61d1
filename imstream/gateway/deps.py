"""What the sessions of a node have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imstream.gateway.flush_scheduler import FlushScheduler
    from imstream.gateway.presence import Presence
    from imstream.gateway.registry import Registry
    from imstream.gateway.reply_sync import ReplySync
    from imstream.guards.chain import GuardChain
    from imstream.reply_buffer import ReplyBuffers
    from imstream.settings import Settings
    from imstream.store.replies import ReplyStore
    from imstream.store.requests import RequestStream
    from imstream.wire import FrameLimits
    from imstream.worker.consumer import StreamConsumer
    from imstream.worker.jobs import Jobs


@dataclass(frozen=True)
class SessionDeps:
    """What sessions use of their node."""

    settings: Settings
    guards: GuardChain
    requests: RequestStream
    replies: ReplyStore
    buffers: ReplyBuffers
    consumer: StreamConsumer
    jobs: Jobs
    registry: Registry
    presence: Presence
    following: ReplySync
    rounds: FlushScheduler
    frame_limits: FrameLimits
