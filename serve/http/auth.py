"""Where the bearer token comes from, and what it must look like."""

import os
import re

from trainkit.serve.errors import InputError

VARIABLE = "TRAINKIT_TOKEN"


def from_environment() -> str | None:
    """Take the token out of the environment, so that no child inherits it; None without one."""
    token = os.environ.pop(VARIABLE, None)
    return None if token is None else checked(token, f"the variable {VARIABLE}")


def checked(token: str, where: str) -> str:
    """Return ``token``; ``InputError`` if it does not fit into a header or is short."""
    if not re.fullmatch(r"[!-~]{8,}", token):
        raise InputError(
            f"{where} holds no token: one line of 8 or more letters, digits and signs, no spaces."
        )
    return token
