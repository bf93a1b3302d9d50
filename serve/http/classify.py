"""The request and the predictions of ``/classify``."""

from collections.abc import Mapping, Sequence

import msgspec

from trainkit.serve.encoding import Tokens
from trainkit.serve.http.exceptions import HTTPError
from trainkit.serve.http.messages import Classified, ClassifyRequest
from trainkit.serve.http.model import Model
from trainkit.serve.postprocess import label_thresholds, ranking
from trainkit.serve.types import FloatArray

_DECODER = msgspec.json.Decoder(ClassifyRequest)


def decode(body: bytes) -> ClassifyRequest:
    """Read a body; ``HTTPError`` if it is invalid."""
    try:
        return _DECODER.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        message = f'the body must be JSON such as {{"texts": ["How far is Mars?"]}}: {error}.'
        raise HTTPError(400, message) from None
    except RecursionError:
        raise HTTPError(400, "the body's JSON is nested too deep.") from None


def thresholds_of(request: ClassifyRequest, model: Model) -> dict[str, float] | None:
    """Return the threshold of each label, or None if the request has none."""
    if request.thresholds is None:
        return None
    if model.manifest.problem_type != "multi_label_classification":
        raise HTTPError(
            422, f"thresholds are for multi-label models; {model.name} is not one. Leave them out."
        )
    return label_thresholds(request.thresholds, model.manifest.labels)


def predictions(
    model: Model,
    rows: Sequence[Tokens],
    logits: FloatArray,
    top_k: int | None,
    thresholds: Mapping[str, float] | None,
) -> list[Classified]:
    """Return the predictions of (N, C) logits in the form of ``/classify``."""
    found = []
    ranks = ranking(logits).tolist()
    predicted = model.classifier.predictions(rows, logits)
    for rank, (label, score, scores, truncated) in zip(ranks, predicted, strict=True):
        prediction = Classified(label, score, scores, truncated)
        ranked = [model.manifest.labels[column] for column in rank]
        if top_k is not None:
            prediction.scores = {name: scores[name] for name in ranked[:top_k]}
        if thresholds is not None:
            prediction.labels = [name for name in ranked if scores[name] > thresholds[name]]
        found.append(prediction)
    return found
