"""What can keep a request without an answer, apart from its own input being wrong."""

__all__ = ["DeadlineError", "InferenceError", "QueueFullError", "UnavailableError"]


class QueueFullError(Exception):
    """The queue holds all it may; try again after ``retry_after_s`` seconds."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"the queue is full; try again in {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


class DeadlineError(Exception):
    """The request's deadline passed while it waited; it was never run."""


class InferenceError(Exception):
    """The model fails on this request, which was run apart from all others before this is said."""


class UnavailableError(Exception):
    """The model is stopping, or its model process did not come back in time."""
