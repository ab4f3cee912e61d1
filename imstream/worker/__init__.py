"""The worker of a node: takes requests from its stream, has them answered, and sees each one to its end."""
