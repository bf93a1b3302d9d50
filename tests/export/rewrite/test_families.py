"""What each rewrite does to each family's graph, and that the answers stay the same."""

import onnx_ir as ir
import pytest

from tests.graphs import make
from tests.graphs.make import Graph
from trainkit.export.parity import TOLERANCES
from trainkit.export.rewrite.table import REWRITES

pytestmark = pytest.mark.slow

TOLERANCE = TOLERANCES["fp32"]
PACKED = {"fuse_attention": 3, "narrow_last_layer": 1, "flatten_tokens": 17}
# One more product: the first token is chosen on (batch, 1, hidden), whose axes stay three.
PADDED = PACKED | {"flatten_tokens": 18}
NOTHING = dict.fromkeys(PACKED, 0)
DECODER = NOTHING | {"flatten_tokens": 22}

# How many places each rewrite changes, so that one that stops firing is noticed.
EXPECTED = {
    ("bert", "packed", 23): PACKED,
    ("bert", "packed", 18): PACKED,
    ("bert", "prefix", 23): PACKED,
    ("bert", "legacy", 14): PADDED,
    ("bert", "legacy", 17, "eager"): PADDED,
    ("roberta", "legacy", 17): PADDED,
    ("distilbert", "legacy", 14): PADDED,
    ("distilbert", "legacy", 17, "eager"): PADDED,
    ("albert", "legacy", 17): PADDED | {"flatten_tokens": 19},
    ("mobilebert", "legacy", 17): PADDED | {"flatten_tokens": 34},
    ("mpnet", "legacy", 17, "eager"): PADDED,
    ("modernbert", "legacy", 17): NOTHING | {"flatten_tokens": 12},
    ("qwen2", "legacy", 17): DECODER,
    # Its embeddings are projected to the hidden size first.
    ("electra", "legacy", 17): PADDED | {"flatten_tokens": PADDED["flatten_tokens"] + 1},
    ("gemma3_text", "legacy", 17): DECODER,
    ("llama", "legacy", 17): DECODER,
    ("deberta-v2", "legacy", 17, "eager"): NOTHING | {"flatten_tokens": 24},
    ("bert", "padded", 18): PADDED,
    ("bert", "padded", 23): PADDED,
    ("bert", "prefix", 18): PACKED,
    ("roberta", "packed", 23): PACKED,
    ("xlm-roberta", "packed", 23): PACKED,
    ("camembert", "packed", 23): PACKED,
    ("electra", "packed", 23): PACKED | {"flatten_tokens": PACKED["flatten_tokens"] + 1},
    ("distilbert", "packed", 23): PACKED,
    ("distilbert", "packed", 18): PACKED,
    ("mobilebert", "packed", 23): PACKED | {"flatten_tokens": 33},
    ("albert", "padded", 23): PADDED | {"flatten_tokens": 19},
    ("modernbert", "padded", 23): NOTHING | {"flatten_tokens": 12},
    ("qwen2", "padded", 23): DECODER,
}
GRAPHS = [
    pytest.param(graph, counts, id="-".join(map(str, graph))) for graph, counts in EXPECTED.items()
]


def test_every_committed_graph_is_rewritten_here():
    assert {Graph(*graph) for graph in EXPECTED} == set(make.GRAPHS)
    assert set(make.HERE.glob("*.xz")) == {graph.path for graph in make.GRAPHS}


@pytest.mark.parametrize("graph", [("bert", "prefix", 23), ("bert", "legacy", 14)])
def test_a_new_trace_equals_the_committed_graph(graph):
    traced = ir.from_proto(ir.to_proto(make.trace(Graph(*graph))))  # as a file has its numbers
    committed = make.read(Graph(*graph))
    assert structure(traced) == structure(committed)
    node = next(node for node in traced.graph if node.op_type == "MatMul")
    node.replace_input_with(0, node.inputs[1])
    assert structure(traced) != structure(committed)


def structure(model):
    """Return a graph without names and weights: its nodes in order, and what each one reads."""
    places = {value: value.name for value in model.graph.inputs}

    def place(value):
        if value is None or not value.is_initializer():
            return places.get(value)
        return value.dtype, value.shape

    nodes = []
    for number, node in enumerate(model.graph):
        places |= {value: (number, place) for place, value in enumerate(node.outputs)}
        attributes = sorted((name, str(a.value)) for name, a in node.attributes.items())
        nodes.append((node.domain, node.op_type, list(map(place, node.inputs)), attributes))
    outputs = [(value.name, value.dtype, place(value)) for value in model.graph.outputs]
    return nodes, outputs


@pytest.mark.parametrize(("graph", "counts"), GRAPHS)
def test_each_rewrite_fires_where_it_is_expected_to(graph, counts, journey):
    found = {name: outcome.rewritten for name, (outcome, *_) in journey(*graph).items()}
    assert {name: found[name] for name in counts} == counts


@pytest.mark.parametrize(("graph", "counts"), GRAPHS)
def test_a_rewrite_that_changes_nothing_says_why(graph, counts, journey):
    for name, (outcome, *_) in journey(*graph).items():
        assert outcome.name == name
        if not outcome.rewritten and name in counts:
            assert outcome.declined


@pytest.mark.parametrize(("graph", "counts"), GRAPHS)
def test_no_rewrite_fires_twice(graph, counts, journey):
    assert {again for _, again, _ in journey(*graph).values()} == {0}


@pytest.mark.parametrize(("graph", "counts"), GRAPHS)
@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"])
def test_the_answers_stay_the_same_after_each_rewrite(
    graph, counts, level, journey, exported, answers
):
    expected = answers(exported(*graph), "ORT_DISABLE_ALL")
    for name, (outcome, _, path) in journey(*graph).items():
        if outcome.rewritten:
            for case, logits in answers(path, level).items():
                limit = TOLERANCE.absolute + TOLERANCE.relative * abs(expected[case]).max()
                assert abs(logits - expected[case]).max() <= limit, (name, case)


def test_the_graph_takes_and_gives_what_it_took_and_gave(journey, exported):
    graph = ("bert", "legacy", 14)
    before = ir.load(exported(*graph)).graph
    after = ir.load(journey(*graph)[REWRITES[-1].name][2]).graph
    for old, new in ((before.inputs, after.inputs), (before.outputs, after.outputs)):
        assert [(v.name, v.dtype, v.shape) for v in old] == [
            (v.name, v.dtype, v.shape) for v in new
        ]


def test_the_comparison_notices_one_perturbed_weight(journey, answers, exported, tmp_path):
    graph = ("bert", "legacy", 14)
    model = ir.load(journey(*graph)["flatten_tokens"][2])
    weights = (node.inputs[1] for node in model.graph if node.op_type == "MatMul")
    value = next(value for value in weights if value.const_value is not None)
    weights = value.const_value.numpy().copy()
    weights[0, 0] += 0.05
    value.const_value = ir.tensor(weights, name=value.name)
    ir.save(model, tmp_path / "changed.onnx")
    expected, found = answers(exported(*graph)), answers(tmp_path / "changed.onnx")
    assert max(abs(found[case] - expected[case]).max() for case in expected) > 2e-5
