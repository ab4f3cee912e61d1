"""The imports that forked processes share; see `fork_server`."""

import imstream.cli.main
import imstream.demo.server
import imstream.node  # noqa: F401
