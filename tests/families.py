"""Small random classifiers of every family of Hugging Face's that trainkit exports."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from trainkit.data.splits import load_sample
from trainkit.data.vocabulary import PAD_ID, word_tokenizer
from trainkit.export.source import ExportSource, from_transformers
from trainkit.models import hub_classifier
from trainkit.serve.encoding import TextEncoder

__all__ = ["FAMILIES", "MAX_LENGTH", "SIZES", "random_classifier", "random_source"]

MAX_LENGTH = 40

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 66,
}
_DECODER = {"num_key_value_heads": 2, "use_cache": False}
# By transformers' `model_type`; what each needs beside SIZES to be itself.
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "xlm-roberta": {},
    "camembert": {},
    "electra": {"embedding_size": 24},
    "distilbert": {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48},
    "albert": {"embedding_size": 16},
    "mpnet": {},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "type_vocab_size": 0,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_buckets": 8,
    },
    "modernbert": {"global_attn_every_n_layers": 3, "local_attention": 8},
    "mobilebert": {
        "embedding_size": 16,
        "intra_bottleneck_size": 32,
        "true_hidden_size": 32,
        "num_feedforward_networks": 2,
    },
    "fnet": {},
    "qwen2": _DECODER,
    "llama": _DECODER,
    "gemma3_text": {
        **_DECODER,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
}


def random_classifier(family: str, vocabulary: int, **settings: Any) -> PreTrainedModel:
    """Build a small classifier with large random weights: small ones would hide faults."""
    torch.manual_seed(0)
    ids = {f"{name}_token_id": i for i, name in enumerate(("cls", "sep", "bos", "eos"), start=1)}
    config = AutoConfig.for_model(
        family,
        **{
            "vocab_size": vocabulary,
            "pad_token_id": PAD_ID,
            "num_labels": 3,
            **ids,
            **SIZES,
            **FAMILIES[family],
            **settings,
        },
    )
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config).eval()
    # About 1 / sqrt(fan-in): more, and attention saturates until rounding alone decides.
    std = 1.13 / config.hidden_size**0.5
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=std)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            torch.nn.init.zeros_(module.weight[module.padding_idx])  # as training leaves it
    return model


def random_source(family: str, **settings: Any) -> ExportSource:
    """Return the source of a random classifier with a tokenizer of the sample's words."""
    tokenizer = word_tokenizer([example.text for example in load_sample()], min_count=4)
    model = random_classifier(family, tokenizer.get_vocab_size(), **settings)
    encoder = TextEncoder(
        tokenizer, MAX_LENGTH, PAD_ID, token_types=hub_classifier.takes_token_types(model)
    )
    loaded = hub_classifier.pack(model, encoder)
    return from_transformers(loaded, {"kind": "classifier", "backbone": family})
