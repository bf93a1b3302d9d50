"""What a training computes, and what it does not: below a frozen backbone, in scoring, in bf16."""

import shutil

import msgspec
import pytest
import safetensors.torch
import torch
from torch import nn

from trainkit.data.splits import Splits
from trainkit.trainer import checkpoint
from trainkit.trainer.batches import encode, shuffled
from trainkit.trainer.config import TrainConfig
from trainkit.trainer.loop import score
from trainkit.trainer.new_model import make_model
from trainkit.trainer.run import train
from trainkit.trainer.run_config import ModelSpec
from trainkit.trainer.train_step import SparseEmbeddingGrads

SIMPLE = ModelSpec(kind="simple", max_length=24, dropout=0.0)
CONFIG = TrainConfig(epochs=2, batch_size=16, learning_rate=1e-3, device="cpu")


@pytest.fixture(scope="module")
def few(splits):
    return Splits(splits.train[:80], splits.valid[:20], splits.test[:20])


def test_nothing_is_kept_for_a_backward_below_the_lowest_prefix(few):
    new = make_model(ModelSpec(kind="prefix", backbone="minilm", max_length=24), few)
    model = new.model.train()
    data = encode(few.train[:8], new.encoder, model.config.labels)
    ids, mask, labels = data.part(range(8))
    needs = {}

    def keep(name):
        def hook(module, arguments, output):
            needs[name] = output.requires_grad

        return hook

    bert = model.model
    for name, module in bert.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding, nn.LayerNorm)):
            module.register_forward_hook(keep(name))
    loss = nn.functional.cross_entropy(model(ids, mask), labels)
    without = {name for name, needed in needs.items() if not needed}
    first = {f"encoder.layer.0.attention.self.{part}" for part in ("query", "key", "value")}
    embeddings = {name for name in needs if name.startswith("embeddings.")}
    assert embeddings
    assert without == first | embeddings
    loss.backward()
    with_gradient = {name for name, w in model.named_parameters() if w.grad is not None}
    assert with_gradient == {n for n, w in model.named_parameters() if w.requires_grad}


def test_scoring_runs_without_autograd(few, monkeypatch):
    new = make_model(SIMPLE, few)
    data = encode(few.valid, new.encoder, new.model.config.labels)
    seen = []
    forward = type(new.model).forward

    def watched(self, *arguments):
        seen.append(torch.is_inference_mode_enabled())
        return forward(self, *arguments)

    monkeypatch.setattr(type(new.model), "forward", watched)
    score(new.model, data, 16 * 24)
    assert len(seen) > 1
    assert all(seen)


def trained(few, folder, **changed):
    run = train(SIMPLE, few, msgspec.structs.replace(CONFIG, **changed), folder)
    weights = safetensors.torch.load_file(checkpoint.weights_path(folder))
    return run, weights


def test_a_batch_in_parts_comes_to_the_same_weights(few, tmp_path):
    whole, expected = trained(few, tmp_path / "whole", class_weights="balanced")
    parts, weights = trained(few, tmp_path / "parts", class_weights="balanced", batch_tokens=60)
    new = make_model(SIMPLE, few)
    data = encode(few.train, new.encoder, new.model.config.labels)
    cut = [part.ids.numel() for share in shuffled(data, 16, 0, 1, 60) for part in share.parts]
    assert len(cut) > 10
    assert max(cut) <= 60
    # Not closer: AdamW divides a gradient that is all rounding by its own size.
    assert max(float((weights[n] - expected[n]).abs().max()) for n in weights) < 1e-4
    assert whole.trained.history[-1].train_loss == pytest.approx(
        parts.trained.history[-1].train_loss, rel=1e-5
    )


def test_gradients_of_embeddings_by_row_are_the_dense_ones(few):
    new = make_model(SIMPLE, few)
    model = new.model.train()
    table = model.tokens.weight
    data = encode(few.train, new.encoder, model.config.labels)

    def backward():
        model.zero_grad()
        for chosen in (range(8), range(4, 12)):  # two parts of a batch, with texts in both
            ids, mask, labels = data.part(chosen)
            nn.functional.cross_entropy(model(ids, mask), labels).backward()

    backward()
    dense = table.grad
    tables = SparseEmbeddingGrads(model)
    for _ in range(2):  # nothing is left of the step before
        backward()
        assert table.grad.is_sparse
        tables.fill()
        torch.testing.assert_close(table.grad, dense)
        tables.clear()
        assert not table.grad.any()
    backward()
    tables.fill()
    backward()
    tables.fill()
    with pytest.raises(AssertionError):  # not set to zero between: the comparison can fail
        torch.testing.assert_close(table.grad, dense)


def test_bf16_rounds_the_forward_pass_and_keeps_float32_weights(few, tmp_path, monkeypatch):
    seen = set()
    linear = nn.functional.linear

    def watched(*arguments):
        out = linear(*arguments)
        if torch.is_grad_enabled():
            seen.add(out.dtype)
        return out

    exact, exact_weights = trained(few, tmp_path / "fp32")
    monkeypatch.setattr(nn.functional, "linear", watched)
    rounded, weights = trained(few, tmp_path / "bf16", precision="bf16")
    assert seen == {torch.bfloat16}
    kept = {weight.dtype for weight in weights.values() if weight.is_floating_point()}
    assert kept == {torch.float32}
    first, second = (run.trained.history[-1] for run in (exact, rounded))
    assert first.train_loss == pytest.approx(second.train_loss, rel=0.02)
    assert any(not torch.equal(weights[name], exact_weights[name]) for name in weights)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("default")  # the compiler warns of PyTorch's own code
def test_compiled_it_learns_the_same(few, tmp_path):
    exact, _ = trained(few, tmp_path / "eager")
    compiled, weights = trained(few, tmp_path / "compiled", compile=True)
    assert exact.trained.history[-1].train_loss == pytest.approx(
        compiled.trained.history[-1].train_loss, rel=1e-3
    )
    assert checkpoint.load(tmp_path / "compiled").model is not None
    assert not any("_orig_mod" in name for name in weights)
