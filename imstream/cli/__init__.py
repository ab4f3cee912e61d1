"""The command line: `imstream up | node | chat | demo-ai | local-ai | redis | streams | user`."""
