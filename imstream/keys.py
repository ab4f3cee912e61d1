"""Every Redis key, built here and nowhere else.

Braces are Redis Cluster hash tags (https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/#hash-tags):
all keys of one node, or of one user, share a slot, so that every script touches one slot.
"""

from __future__ import annotations

from dataclasses import dataclass

GROUP = "workers"
"""The consumer group of every requests stream. A consumer is the id of the node that works on the entry."""


@dataclass(frozen=True, slots=True)
class Keys:
    """Builds key names below one prefix, so that several deployments can share a Redis.

    Attributes:
        prefix: What every key starts with, `im` unless set otherwise.
    """

    prefix: str = "im"

    def requests(self, node: str) -> str:
        """Stream: the unfinished requests of a node."""
        return f"{self.prefix}:{{node:{node}}}:requests"

    def load(self, node: str) -> str:
        """Hash, user to number of unfinished requests in the node's stream."""
        return f"{self.prefix}:{{node:{node}}}:load"

    def dead(self, node: str) -> str:
        """Stream: requests that a node gave up, newest 10,000 or so."""
        return f"{self.prefix}:{{node:{node}}}:dead"

    def inbox(self, node: str) -> str:
        """Stream that expires: what other nodes have to tell a node, newest 1,000 or so."""
        return f"{self.prefix}:{{node:{node}}}:inbox"

    def lease(self, node: str) -> str:
        """String that expires: who runs a node now."""
        return f"{self.prefix}:{{node:{node}}}:lease"

    def redis_run(self, node: str) -> str:
        """String that expires: on which run of Redis the node last held its lease."""
        return f"{self.prefix}:{{node:{node}}}:redis"

    def adopter(self, node: str) -> str:
        """String that expires: the node that looks after the stream of a node without a lease."""
        return f"{self.prefix}:{{node:{node}}}:adopter"

    def nodes(self) -> str:
        """Sorted set, node to its last sign of life (ms since 1970): all nodes ever seen and not yet retired."""
        return f"{self.prefix}:nodes"

    def route(self, user_id: int) -> str:
        """Set that expires: the nodes that hold a socket of a user."""
        return f"{self.prefix}:{{user:{user_id}}}:route"

    def reply(self, user_id: int, message_id: str) -> str:
        """Stream that expires: all that was said about one message."""
        return f"{self.prefix}:{{user:{user_id}}}:reply:{message_id}"

    def account(self, user_id: int) -> str:
        """Hash: why and until when a user is banned or locked; there is none for all others."""
        return f"{self.prefix}:{{user:{user_id}}}:account"

    def violations(self, user_id: int) -> str:
        """Number that expires: contents of a user that were refused lately."""
        return f"{self.prefix}:{{user:{user_id}}}:violations"

    def quota(self, user_id: int, day: str) -> str:
        """Sorted set that expires, message id to when it was asked (ms since 1970): what a user has asked on a day."""
        return f"{self.prefix}:{{user:{user_id}}}:quota:{day}"
