"""Chaos: everything is killed, frozen and restarted at random, and every message is accounted for. Run `ops/chaos`."""
