"""The WebSocket gateway: sockets, the sessions on them, and the registry of who is connected."""
