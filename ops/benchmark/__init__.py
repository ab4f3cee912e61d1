"""The benchmark: what a chat costs on a node, beside two services that have no queue. Run `ops/bench`."""
