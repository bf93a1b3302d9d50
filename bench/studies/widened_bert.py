"""A classifier of BERT-base's size, grown from MiniLM so that its answers mean something.

No download has the size and training is dear: every hidden unit becomes two (Net2WiderNet, Chen,
Goodfellow and Shlens 2016), which changes no logit, and every layer is followed by a new one that
passes its input on (as Net2DeeperNet), which changes them a little. One epoch of fine-tuning then
uses all of it. H is MiniLM's hidden size; a widened vector is the old one twice, end to end.
"""

import copy

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.models.bert.modeling_bert import BertLayer

# Of the weights' own spread. Two equal units would get equal gradients and stay one for ever.
NOISE = 0.5


def grow(small: BertForSequenceClassification) -> BertForSequenceClassification:
    """Return a classifier with twice the hidden units, heads twice as wide, and twice the layers.

    The labels are those of ``small``, which is not changed.
    """
    config = copy.deepcopy(small.config)
    assert isinstance(config, BertConfig)
    config.hidden_size *= 2
    config.intermediate_size *= 2
    wide = BertForSequenceClassification(config)
    values = small.state_dict()
    heads = config.num_attention_heads
    wide.load_state_dict({name: _widened(name, value, heads) for name, value in values.items()})
    wide = _deepened(wide)
    wide.eval()
    return wide


def _widened(name: str, value: Tensor, heads: int) -> Tensor:
    """Double the units that a tensor of the small model reads and writes."""
    if ".position_ids" in name or ".token_type_ids" in name:
        return value
    if "embeddings" in name and "LayerNorm" not in name:
        return torch.cat([value, value], dim=1)  # (rows, 2 H)
    head = heads if ".attention.self." in name else 1
    if name.startswith("classifier."):
        return value if value.ndim == 1 else _read_twice(value, 1)
    value = _twice(value, head)
    if value.ndim == 2:
        value = _read_twice(value, heads if ".attention.output.dense." in name else 1)
    if ".self.query." in name:
        # q and k are twice as long: their product doubles, and its divisor grows by the root of 2.
        value = value / 2**0.5
    return value


def _twice(value: Tensor, heads: int) -> Tensor:
    """Give each head's rows twice, one after the other; of one head the whole."""
    rows = value.unflatten(0, (heads, -1))
    return torch.cat([rows, rows], dim=1).flatten(0, 1)


def _read_twice(weight: Tensor, heads: int) -> Tensor:
    """Read each half of a widened input with half of the weight, and noise that cancels out."""
    columns = weight.unflatten(1, (heads, -1))  # the input is head by head behind attention
    noise = NOISE * columns.std() * torch.randn_like(columns)
    return torch.cat([columns / 2 + noise, columns / 2 - noise], dim=2).flatten(1, 2)


def _deepened(model: BertForSequenceClassification) -> BertForSequenceClassification:
    """Put behind each layer one that passes its input on."""
    layers = [one for layer in model.bert.encoder.layer for one in (layer, _passing(layer))]
    model.config.num_hidden_layers = len(layers)
    model.bert.encoder.layer = nn.ModuleList(layers)
    return model


def _passing(layer: nn.Module) -> nn.Module:
    """Copy a layer so that its branches add nothing yet, and its norms undo themselves."""
    new = copy.deepcopy(layer)
    assert isinstance(layer, BertLayer)
    assert isinstance(new, BertLayer)
    scale, shift = layer.output.LayerNorm.weight, layer.output.LayerNorm.bias
    with torch.no_grad():
        for part in (new.attention.output, new.output):
            part.dense.weight.zero_()
            part.dense.bias.zero_()
            # What comes in was normalised, scaled and shifted: about this wide, about this mean.
            part.LayerNorm.weight.fill_((scale.square().mean() + shift.var()).sqrt())
            part.LayerNorm.bias.fill_(shift.mean())
    return new
