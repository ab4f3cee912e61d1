"""The WebSocket gateway: sockets, sessions, their registry, and the page."""
