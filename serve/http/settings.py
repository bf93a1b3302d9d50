"""What ``trainkit serve`` may be told: limits of a request, of the queue, and of the processes."""

import msgspec

__all__ = ["Limits", "Settings"]


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one request may ask for; more is refused before it is read, tokenised or run."""

    body_bytes: int = 8 << 20  # as sent, and again once decompressed
    texts: int = 1024
    characters: int = 1 << 20  # of all texts together
    tokens: int = 1 << 17  # of all texts together, special tokens included, after truncation


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the models are run; see ``trainkit serve --help``."""

    limits: Limits = Limits()
    batch_tokens: int = 2048  # of a batch at most; a longer text goes alone
    batch_rows: int = 64
    max_wait_ms: float = 0.0  # an idle worker waits so long for a batch to fill; 0: never
    queue_tokens: int = 1 << 18  # that may wait; beyond it a request gets 429
    timeout_s: float = 30.0  # of a request at most, and of one that names no deadline of its own
    threads: int = 0  # intra-op threads of the inference process; 0: see default_threads
    most_threads: int = 0  # where nobody says how many; 0: as many as it sees cores
    providers: tuple[str, ...] = ()  # empty: the bundle's `serving`, else the CPU
    hang_s: float = 30.0  # a batch that takes longer is given up with its process
    start_s: float = 120.0  # a model that takes longer to load is refused
