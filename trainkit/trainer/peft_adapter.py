"""A trained prefix as a PEFT adapter, for use without trainkit.

Writes the folder of a prefix with the backbone's own head, for ``PeftModel.from_pretrained(base,
folder)``; before it gets its name it is loaded that way and must give the same logits. PEFT has no
place for a head over the mean of the states.
"""

import importlib.util
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from trainkit.models.adapter import load_adapter
from trainkit.models.backbone_classifier import BackboneClassifier
from trainkit.models.base import TextClassifier
from trainkit.models.closeness import SAME_LOGITS, relative_difference
from trainkit.models.loading import quiet
from trainkit.serve.encoding import TextEncoder
from trainkit.serve.errors import CheckFailedError, TrainkitError
from trainkit.serve.files import write_atomically

ADAPTER = "peft"


def write_adapter(
    folder: Path, model: TextClassifier, encoder: TextEncoder, texts: Sequence[str]
) -> str | None:
    """Write ``folder``/peft and return None, or return why there can be none.

    ``texts`` are compared. Only a prefix on a backbone is asked for; of other models, None.
    """
    if not isinstance(model, BackboneClassifier) or not model.prefixes:
        return None
    if model.head is not None:
        return (
            "no PEFT adapter was written: the head of this run averages the states, and PEFT has "
            "only the backbone's own head; train with --head own to get one."
        )
    if importlib.util.find_spec("peft") is None:
        return (
            "no PEFT adapter was written: PEFT is not installed; run: pip install "
            "'trainkit-onnx[peft]', and train again."
        )
    assert model.config.backbone is not None  # a BackboneClassifier has one
    with tempfile.TemporaryDirectory(dir=folder) as place:
        made = Path(place) / ADAPTER
        try:
            _save(made, model)
            compare(made, model, encoder, texts)
        except TrainkitError as error:
            return f"no PEFT adapter was written: {error}"
        shutil.rmtree(folder / ADAPTER, ignore_errors=True)
        made.rename(folder / ADAPTER)
    return None


def _save(folder: Path, model: BackboneClassifier) -> None:
    """Let PEFT save an adapter with these keys, values and head: the names are PEFT's business."""
    from peft import PrefixTuningConfig, get_peft_model

    source: Any = model.model
    heads, length, size = model.prefixes[0].key.shape
    trained = model.own_head()
    config = PrefixTuningConfig(
        task_type="SEQ_CLS",
        num_virtual_tokens=length,
        token_dim=heads * size,
        num_attention_heads=heads,
        num_layers=len(model.prefixes),
        modules_to_save=list(trained),
    )
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers for an old name
        plain: Any = AutoModelForSequenceClassification.from_config(source.config)
        if "pooler" not in trained and getattr(plain.base_model, "pooler", None) is not None:
            plain.base_model.pooler = None
        adapted: Any = get_peft_model(plain, config)
        adapted.prompt_encoder["default"].embedding.weight.data.copy_(flat(model))
        for name, module in trained.items():
            inside = plain.base_model if name == "pooler" else plain
            wrapper = inside.get_submodule(name)
            wrapper.modules_to_save["default"].load_state_dict(module.state_dict())
        adapted.peft_config["default"].base_model_name_or_path = model.config.backbone.name  # type: ignore[union-attr]
        adapted.save_pretrained(str(folder), save_embedding_layers=False)
    named = source.config.__class__.from_dict(source.config.to_dict())
    named.id2label = dict(enumerate(model.config.labels))
    named.label2id = {label: index for index, label in enumerate(model.config.labels)}
    write_atomically(folder / "config.json", named.to_json_string().encode())
    (folder / "README.md").unlink(missing_ok=True)  # an empty form


def flat(model: BackboneClassifier) -> Tensor:
    """Lay out the prefix as PEFT does: (P, L * 2 * A * D), keys before values in each layer."""
    layers = [torch.stack([prefix.key, prefix.value]) for prefix in model.prefixes]
    stacked = torch.stack(layers)  # (L, 2, A, P, D)
    return stacked.permute(3, 0, 1, 2, 4).flatten(1).detach().cpu()


def compare(
    folder: Path, model: TextClassifier, encoder: TextEncoder, texts: Sequence[str]
) -> None:
    """Load ``folder`` with PEFT on the backbone, and compare logits under padding of each kind.

    Raises ``InputError`` if PEFT cannot load or run it; raises ``CheckFailedError`` if the logits
    differ.
    """
    assert model.config.backbone is not None
    reference = load_adapter(folder, model.config.backbone.name).reference
    device = next(model.parameters()).device
    batch = encoder.encode(list(texts))
    ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
    with torch.inference_mode():
        for one, other in ((ids, mask), (ids.flip(1), mask.flip(1)), (ids[:1], mask[:1])):
            expected = model.eval()(one.to(device), other.to(device)).cpu()
            found = reference(input_ids=one, attention_mask=other).logits
            difference = relative_difference(found, expected)
            if difference > SAME_LOGITS:
                raise CheckFailedError(
                    f"PEFT's logits differ from the run's by {difference:.1e}, more than "
                    f"{SAME_LOGITS:.0e}."
                )
