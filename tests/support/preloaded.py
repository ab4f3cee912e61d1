"""What a forked process has imported already; see `fork_server`."""

import imstream.cli.main
import imstream.demo.server
import imstream.node  # noqa: F401
