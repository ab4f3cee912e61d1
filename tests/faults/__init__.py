"""Faults that imstream survives, each caused for real: by signals, proxies, full memory, hostile sockets."""
