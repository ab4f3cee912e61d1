"""The imports that forked processes share; see `fork_server`."""

import imstream.cli.main
import imstream.demo.backend
import imstream.node  # noqa: F401
