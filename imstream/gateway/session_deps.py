"""The dependencies of the sessions of a node."""

from collections.abc import Callable
from dataclasses import dataclass

from imstream.frame_parser import FrameLimits
from imstream.gateway.busy_log import BusyLog
from imstream.gateway.flush_scheduler import FlushScheduler
from imstream.gateway.presence import Presence
from imstream.gateway.registry import Registry
from imstream.gateway.reply_sync import ReplySync
from imstream.guards.chain import GuardChain
from imstream.metrics import Metrics
from imstream.reply_buffer import ReplyBuffers
from imstream.settings import Settings
from imstream.store.dead_letters import DeadLetterBounds
from imstream.store.inbox import Inbox
from imstream.store.pauses import Pauses
from imstream.store.replies import ReplyStore
from imstream.store.requests import RequestStream
from imstream.tracing import Tracing
from imstream.worker.consumer import StreamConsumer
from imstream.worker.jobs import Jobs


@dataclass(frozen=True, kw_only=True)
class SessionDeps:
    """The dependencies of the sessions of a node. `not_ready`: why the node cannot serve; None when it can."""

    settings: Settings
    frame_limits: FrameLimits
    guards: GuardChain
    requests: RequestStream
    dead_letters: DeadLetterBounds
    replies: ReplyStore
    buffers: ReplyBuffers
    inbox: Inbox
    pauses: Pauses
    consumer: StreamConsumer
    jobs: Jobs
    registry: Registry
    presence: Presence
    reply_sync: ReplySync
    scheduler: FlushScheduler
    metrics: Metrics
    busy_log: BusyLog
    tracing: Tracing
    not_ready: Callable[[], str | None]
