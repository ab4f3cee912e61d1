"""The imports that forked processes share; see `fork_server`.

The demo backend imports aiohttp's server by itself: a node never does, and its classes would be in the counts of the
node's objects.
"""

import imstream.cli.main
import imstream.node_process  # noqa: F401
