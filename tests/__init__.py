"""The tests: `unit` without a network, `redis` on real servers, `faults` with killed processes, `journeys` as users."""
