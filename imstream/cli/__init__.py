"""The command line: `imstream up | node | chat | demo-ai | redis | streams | user`."""
