"""Why a request gets no answer, apart from an ``InputError`` about its texts."""


class HTTPError(Exception):
    """The request is answered with ``status`` and one sentence."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class ClientGoneError(Exception):
    """The client closed the connection before it had its answer."""


class QueueFullError(Exception):
    """The queue is full; try again after ``retry_after_s`` seconds."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"the queue is full; try again in {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


class DeadlineError(Exception):
    """The request's deadline passed while it was queued; it was not run."""


class InferenceError(Exception):
    """The model fails on this request, also when it runs without others."""


class UnavailableError(Exception):
    """The model is stopping, or its process did not come back in time."""
