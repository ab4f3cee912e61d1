"""What a forked process has imported already; see `fork_server`."""

import imstream.ai.demo.server
import imstream.cli.main
import imstream.node  # noqa: F401
