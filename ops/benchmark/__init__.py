"""The benchmark: the cost of a chat on a node, beside two services that have no queue. Run `ops/bench`."""
