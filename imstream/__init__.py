"""imstream: chat between people and AI models over WebSocket and Redis Streams."""

__version__ = "0.1.0"
