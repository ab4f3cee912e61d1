"""The user ids of tests: numbers, or the same as text while the environment has `IMSTREAM_USER_IDS=text`.

So `ops/test --all` runs the journeys a second time: nodes and commands inherit the variable.
"""

import os
from urllib.parse import urlencode

from imstream.settings import Settings
from imstream.user_ids import UserId, UserIds

VARIABLE = Settings.variable("user_ids")
USER_IDS = UserIds(os.environ.get(VARIABLE, UserIds.NUMBER))


def user_id(number: int) -> UserId:
    """The id of a user of a test, of the kind that is tested."""
    return number if USER_IDS is UserIds.NUMBER else f"auth0|Some_One-{number}+im/a=b:c@example.com"


def query(user: UserId) -> str:
    """The query of a WebSocket URL."""
    return urlencode({"userId": user})
