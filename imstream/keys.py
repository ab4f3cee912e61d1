"""All Redis keys.

Braces are Redis Cluster hash tags (https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/#hash-tags):
all keys of one node, or of one user, share a slot, so that every script uses one slot.
"""

from dataclasses import dataclass

from imstream.user_ids import UserId

GROUP = "workers"  # consumer group of every requests stream; a consumer is named after the node that works on the entry


@dataclass(frozen=True, slots=True)
class Keys:
    """Builds keys with a common prefix, so that several deployments can share a Redis."""

    prefix: str = "im"

    def requests(self, node: str) -> str:
        """Stream: unfinished requests of a node."""
        return f"{self.prefix}:{{node:{node}}}:requests"

    def load(self, node: str) -> str:
        """Hash, user → number of unfinished requests in the node's stream."""
        return f"{self.prefix}:{{node:{node}}}:load"

    def dead(self, node: str) -> str:
        """Stream, expires: dead letters of a node, at most 10,000."""
        return f"{self.prefix}:{{node:{node}}}:dead"

    def node_of_dead(self, key: str) -> str | None:
        """The node whose dead letters have this key; None for another key."""
        before, after = self.dead("\0").split("\0")
        node = key.removeprefix(before).removesuffix(after)
        return node if key == self.dead(node) else None

    def inbox(self, node: str) -> str:
        """Stream, expires: notices from other nodes, about 1,000."""
        return f"{self.prefix}:{{node:{node}}}:inbox"

    def lease(self, node: str) -> str:
        """String, expires: the process that runs a node."""
        return f"{self.prefix}:{{node:{node}}}:lease"

    def status(self, node: str) -> str:
        """Hash, expires, written with the lease: release, sessions and work of a node, why it is not ready."""
        return f"{self.prefix}:{{node:{node}}}:status"

    def probe(self, node: str) -> str:
        """Exists only while `imstream doctor` tries a node's commands."""
        return f"{self.prefix}:{{node:{node}}}:probe"

    def redis_run(self, node: str) -> str:
        """String, expires: the run of Redis on which the node last held its lease."""
        return f"{self.prefix}:{{node:{node}}}:redis"

    def adopter(self, node: str) -> str:
        """String, expires: the node that has adopted the stream of a dead node."""
        return f"{self.prefix}:{{node:{node}}}:adopter"

    def backends(self, node: str) -> str:
        """Hash, expires, name → JSON: the states of the backends, as this node sees them."""
        return f"{self.prefix}:{{node:{node}}}:backends"

    def nodes(self) -> str:
        """Sorted set, node → last heartbeat (ms since 1970): the nodes that were not retired."""
        return f"{self.prefix}:nodes"

    def paused(self) -> str:
        """Hash, node or `*` → JSON: which nodes an operator has paused, and why."""
        return f"{self.prefix}:paused"

    def route(self, user_id: UserId) -> str:
        """Set, expires: nodes that hold a socket of a user."""
        return f"{self.prefix}:{{user:{user_id}}}:route"

    def reply(self, user_id: UserId, message_id: str) -> str:
        """Stream, expires: the record of one message."""
        return f"{self.prefix}:{{user:{user_id}}}:reply:{message_id}"

    def messages(self, user_id: UserId) -> str:
        """Sorted set, expires, message id → when it was asked (ms since 1970): the newest 64 messages of a user."""
        return f"{self.prefix}:{{user:{user_id}}}:messages"

    def account(self, user_id: UserId) -> str:
        """Hash: the ban or lock of a user. Other users have none."""
        return f"{self.prefix}:{{user:{user_id}}}:account"

    def violations(self, user_id: UserId) -> str:
        """Counter, expires: violations of a user within the window."""
        return f"{self.prefix}:{{user:{user_id}}}:violations"

    def quota(self, user_id: UserId, day: str) -> str:
        """Sorted set, expires, message id → when it was asked (ms since 1970): the counted messages of a day."""
        return f"{self.prefix}:{{user:{user_id}}}:quota:{day}"
