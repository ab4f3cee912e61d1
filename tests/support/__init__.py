"""Shared parts of tests: servers, processes, peers that misbehave, and ways to wait."""
