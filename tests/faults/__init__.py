"""What imstream survives, each fault caused for real: by signals, proxies, full memory, hostile sockets."""
