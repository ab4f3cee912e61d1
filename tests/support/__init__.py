"""What tests share: servers, processes, peers that misbehave, and ways to wait."""
