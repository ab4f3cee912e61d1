"""`imstream local-ai` that reads prompts token by token, as it generates: then a continued answer equals the whole one.

Tokens that are computed in batches are rounded differently, so that of two words that are nearly as likely the other
one may be chosen: after 8 of 14 cuts of one answer the rest differed, and after none with this.
"""

import xllamacpp

from imstream.cli.main import main


class TokenByToken(xllamacpp.CommonParams):  # type: ignore[misc] # an optional package without stubs
    """Parameters of a server without batches."""

    def __init__(self) -> None:
        super().__init__()
        self.n_ubatch = 1


if __name__ == "__main__":
    xllamacpp.CommonParams = TokenByToken
    main()
