"""AI backends: streaming client, answer reader, failures, breaker, moderation client, and the prompt."""
