"""The result of a rewrite."""

import msgspec


class RewriteResult(msgspec.Struct, frozen=True, kw_only=True):
    """What one rewrite did to one graph, in place.

    ``rewritten`` counts the places that it changed; ``declined`` has one sentence for each distinct
    reason why it left a place, or the whole graph, as it was.
    """

    name: str
    rewritten: int
    declined: tuple[str, ...] = ()
