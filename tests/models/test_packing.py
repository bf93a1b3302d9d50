"""Packed Hugging Face encoders against Hugging Face's own padded forward."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from transformers import AutoModel

from trainkit.models.backbone import load_pretrained, max_positions
from trainkit.models.backbone_classifier import BackboneClassifier
from trainkit.models.config import BackboneConfig, ModelConfig
from trainkit.models.packing import _running, pack_encoder
from trainkit.serve.errors import InputError

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "vocab_size": 90}
BERT_LIKE = SIZES | {"intermediate_size": 64, "max_position_embeddings": 40}
CONFIGS = {
    "bert": transformers.BertConfig(**BERT_LIKE),
    "roberta": transformers.RobertaConfig(**BERT_LIKE),
    "electra": transformers.ElectraConfig(**BERT_LIKE, embedding_size=16),
    "distilbert": transformers.DistilBertConfig(
        vocab_size=90, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=40
    ),
}
PADDED = {
    "albert": transformers.AlbertConfig(**BERT_LIKE, embedding_size=16),
    "mpnet": transformers.MPNetConfig(**BERT_LIKE),
    "modernbert": transformers.ModernBertConfig(**SIZES, intermediate_size=64, pad_token_id=0),
}
MASKS = {
    "full": [[1] * 6, [1] * 6],
    "right": [[1] * 6, [1, 1, 0, 0, 0, 0]],
    "left": [[1] * 6, [0, 0, 0, 0, 1, 1]],
    "gapped": [[1, 0, 1, 1, 0, 1], [1, 1, 0, 1, 1, 0]],
    "one row blank": [[1, 1, 1, 1, 0, 0], [0] * 6],
}


def on_encoder(model, prefix_length=0):
    """A classifier of three labels on ``model``."""
    described = BackboneConfig(name="random", architecture={}, fingerprint="")
    config = ModelConfig(
        kind="prefix" if prefix_length else "finetune",
        labels=("a", "b", "c"),
        max_length=32,
        pad_id=0,
        prefix_length=prefix_length,
        backbone=described,
    )
    return BackboneClassifier(model, config)


def random_encoder(config):
    torch.manual_seed(5)
    config = copy.deepcopy(config)
    config.initializer_range = 0.3  # small weights would hide a wrong mask under the tolerance
    return AutoModel.from_config(config).eval()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("family", CONFIGS)
def test_packed_states_are_hugging_faces(family, mask):
    reference = random_encoder(CONFIGS[family])
    packed = copy.deepcopy(reference)
    assert pack_encoder(packed).declined is None
    ids = torch.randint(5, 90, (2, 6))
    attention_mask = torch.tensor(MASKS[mask])
    with torch.inference_mode():
        expected = reference(input_ids=ids, attention_mask=attention_mask).last_hidden_state
        states = packed(input_ids=ids, attention_mask=attention_mask).last_hidden_state
    kept = attention_mask.bool()
    kept[:, 0] = True  # a query for Hugging Face, and heads pool it
    torch.testing.assert_close(states[kept], expected[kept], rtol=1e-5, atol=1e-5)
    assert torch.isfinite(states).all()


@pytest.mark.parametrize("mask", ["right", "left", "one row blank"])
def test_a_head_that_pools_the_first_position_reads_its_own_row(mask):
    torch.manual_seed(5)
    reference = transformers.BertForSequenceClassification(CONFIGS["bert"]).eval()
    packed = copy.deepcopy(reference)
    assert pack_encoder(packed.base_model).declined is None
    ids = torch.randint(5, 90, (2, 6))
    attention_mask = torch.tensor(MASKS[mask])
    with torch.inference_mode():
        torch.testing.assert_close(
            packed(input_ids=ids, attention_mask=attention_mask).logits,
            reference(input_ids=ids, attention_mask=attention_mask).logits,
            rtol=1e-5,
            atol=1e-5,
        )


def test_linear_layers_see_no_padding():
    model = random_encoder(CONFIGS["bert"])
    pack_encoder(model)
    seen = []
    feed_forward = model.encoder.layer[0].intermediate
    feed_forward.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    model(input_ids=torch.full((2, 6), 7), attention_mask=torch.tensor(MASKS["right"]))
    assert seen == [(1, 8, 32)]


def test_forwards_in_threads_keep_their_own_masks():
    model = on_encoder(random_encoder(CONFIGS["bert"]), prefix_length=2).eval()
    batches = [
        (torch.randint(5, 90, (2, 6)), torch.tensor(MASKS[name])) for name in ("left", "right")
    ]
    with torch.inference_mode():
        expected = [model(*batch) for batch in batches]

    def run(number):
        with torch.inference_mode():
            return all(torch.equal(model(*batches[number]), expected[number]) for _ in range(20))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, [0, 1, 0, 1])) == [True] * 4


def test_a_forward_that_fails_leaves_nothing_behind():
    model = random_encoder(CONFIGS["bert"])
    pack_encoder(model)
    ids, mask = torch.randint(5, 90, (2, 6)), torch.tensor(MASKS["right"])
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
        hook = model.encoder.layer[1].register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(input_ids=ids, attention_mask=mask)
        hook.remove()
        assert _running.get(None) is None
        assert torch.equal(model(input_ids=ids, attention_mask=mask).last_hidden_state, expected)
    with pytest.raises(ValueError, match="needs an attention_mask"):
        model(input_ids=ids)


def test_a_copy_of_a_packed_encoder_computes_with_its_own_weights():
    model = random_encoder(CONFIGS["bert"])
    pack_encoder(model)
    other = copy.deepcopy(model)
    torch.nn.init.zeros_(other.encoder.layer[1].output.LayerNorm.weight)
    ids, mask = torch.randint(5, 90, (2, 6)), torch.tensor(MASKS["right"])
    with torch.inference_mode():
        states = other(input_ids=ids, attention_mask=mask).last_hidden_state
        assert torch.equal(states, other.encoder.layer[1].output.LayerNorm.bias.expand(2, 6, -1))
        assert model(input_ids=ids, attention_mask=mask).last_hidden_state.abs().max() > 0


def test_a_probe_with_another_result_declines():
    model = random_encoder(CONFIGS["bert"])
    layer = model.encoder.layer[0].output
    forward = layer.forward
    # A layer that looks at its neighbours' positions, as a convolution does, cannot be packed.
    layer.forward = lambda states, residual: forward(states, residual).roll(1, dims=1)
    packing = pack_encoder(model)
    assert packing.declined is not None
    assert "differ" in packing.declined
    assert model.config._attn_implementation != "trainkit"


@pytest.mark.parametrize("family", PADDED)
def test_a_family_that_cannot_be_packed_stays_as_it_was(family):
    reference = random_encoder(PADDED[family])
    model = copy.deepcopy(reference)
    assert on_encoder(model).eval().padded_because
    ids, mask = torch.randint(5, 90, (2, 6)), torch.tensor(MASKS["right"])
    with torch.inference_mode():
        expected = reference(input_ids=ids, attention_mask=mask).last_hidden_state
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
        assert torch.equal(states, expected)
    with pytest.raises(InputError, match="a prefix cannot be joined"):
        on_encoder(copy.deepcopy(reference), prefix_length=4)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_prefix_freezes_the_encoder_and_reaches_every_layer(family):
    classifier = on_encoder(random_encoder(CONFIGS[family]), prefix_length=3).train()
    trained = {n: w for n, w in classifier.model.named_parameters() if w.requires_grad}
    assert len(trained) == 2 * SIZES["num_hidden_layers"]
    assert sum(w.numel() for w in trained.values()) == 2 * 2 * 3 * 32
    logits = classifier(torch.randint(5, 90, (2, 6)), torch.tensor(MASKS["gapped"]))
    logits.square().sum().backward()
    assert all(w.grad is not None and w.grad.abs().max() > 0 for w in trained.values())
    assert not any(module.training for module in classifier.model.modules())


def test_positions_before_the_padding_id_are_not_counted():
    assert max_positions(random_encoder(CONFIGS["bert"])) == 40
    assert max_positions(random_encoder(CONFIGS["roberta"])) == 38


def test_a_decoder_is_refused_as_a_backbone(tmp_path):
    torch.manual_seed(5)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 40, "vocab_size": 90}
    transformers.GPT2Model(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="does not see those after it"):
        load_pretrained(str(tmp_path))


def test_a_backbone_with_missing_weights_is_refused(tmp_path):
    """transformers would make up the rest at random, and only print it."""
    model = random_encoder(CONFIGS["bert"])
    del model.encoder.layer[1]
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"lacks 16 of the weights.*encoder\.layer\.1"):
        load_pretrained(str(tmp_path))
