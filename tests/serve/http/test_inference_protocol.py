"""The protocol's bytes: as its texts show them, as tritonclient writes them, and never a crash."""

import json
import struct

import msgspec
import numpy as np
import pytest
import tritonclient.http as triton
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.serve.encoding import Tokens
from trainkit.serve.http.inference_protocol import (
    DecodedRequest,
    ProtocolError,
    Signature,
    decode,
    encode,
)

SIGNATURE = Signature(vocabulary_size=177, max_length=24, token_types=False, texts=64)
WITH_TYPES = SIGNATURE._replace(token_types=True)
TEXTS = ["How far is Mars?", "Wer schrieb „Faust“?", "東京はどこですか。"]
ALL = (("label", False), ("probabilities", False), ("logits", False))


def body(*inputs, **rest):
    return json.dumps({"inputs": inputs, **rest}).encode()


def text(data=("How far is Mars?",), shape=None, **rest):
    shape = [len(data)] if shape is None else shape
    return {"name": "text", "datatype": "BYTES", "shape": shape, "data": data, **rest}


def ids(name="input_ids", data=((5, 6, 7), (8, 9, 0)), shape=None, datatype="INT64", **rest):
    shape = [len(data), len(data[0])] if shape is None else shape
    return {"name": name, "datatype": datatype, "shape": shape, "data": data, **rest}


def mask(data=((1, 1, 1), (1, 1, 0)), **rest):
    return ids("attention_mask", data, **rest)


def test_the_text_of_a_request_is_read():
    found = decode(body(text(TEXTS), id="42"), None, SIGNATURE)
    assert found == DecodedRequest(TEXTS, None, ALL, "42", None)


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (text(["a", "b"], [2, 1]), ["a", "b"]),
        (text([["a"], ["b"]], [2, 1]), ["a", "b"]),
        (text(["a", "b", "c", "d"], [2, 2]), [("a", "b"), ("c", "d")]),
        (text([["a", "b"], ["c", "d"]], [2, 2]), [("a", "b"), ("c", "d")]),
    ],
)
def test_data_is_flat_or_nested_and_pairs_are_two_columns(tensor, expected):
    assert decode(body(tensor), None, SIGNATURE).texts == expected


def test_the_binary_form_is_that_of_the_extension_byte_for_byte():
    header = body(text(None, [2], parameters={"binary_data_size": 13}))
    binary = b"\x02\x00\x00\x00ab" + b"\x03\x00\x00\x00\xe6\x9d\xb1"
    assert decode(header + binary, len(header), SIGNATURE).texts == ["ab", "東"]


def test_an_answer_is_that_of_the_extension_byte_for_byte():
    request = DecodedRequest(
        [], None, (("label", True), ("logits", True), ("probabilities", False)), "7"
    )
    logits = np.array([[1.0, -2.0]], dtype=np.float32)
    found, length = encode(request, ("m", "1"), ["NUM", "LOC"], logits, np.float32([[0.75, 0.25]]))
    header = (
        b'{"model_name":"m","model_version":"1","outputs":['
        b'{"name":"label","datatype":"BYTES","shape":[1],"parameters":{"binary_data_size":7}},'
        b'{"name":"logits","datatype":"FP32","shape":[1,2],"parameters":{"binary_data_size":8}},'
        b'{"name":"probabilities","datatype":"FP32","shape":[1,2],"data":[0.75,0.25]}],"id":"7"}'
    )
    assert found == header + b"\x03\x00\x00\x00NUM" + b"\x00\x00\x80\x3f\x00\x00\x00\xc0"
    assert length == len(header)


@pytest.mark.parametrize("binary", [True, False])
def test_what_tritonclient_writes_is_read_and_what_is_written_it_reads(binary):
    tensor = triton.InferInput("text", [3], "BYTES")
    tensor.set_data_from_numpy(np.array([t.encode() for t in TEXTS], dtype=object), binary)
    wanted = [triton.InferRequestedOutput(name, binary) for name in ("logits", "label")]
    sent, length = triton.InferenceServerClient.generate_request_body(
        [tensor], outputs=wanted, request_id="r", timeout=2500
    )
    request = decode(sent, length, SIGNATURE)
    assert request == DecodedRequest(
        TEXTS, None, (("logits", binary), ("label", binary)), "r", 0.0025
    )
    logits = np.float32([[0.1, 0.3], [7, 5], [1e-30, 3]])
    answer, length = encode(request, ("m", "1"), ["a", "ß"], logits, logits)
    assert (length is not None) == binary
    read = triton.InferenceServerClient.parse_response_body(answer, header_length=length)
    np.testing.assert_array_equal(read.as_numpy("logits"), logits)
    labels = [x.decode() if isinstance(x, bytes) else x for x in read.as_numpy("label")]
    assert labels == ["ß", "a", "ß"]


def test_a_request_without_outputs_gets_all_of_them_as_binary_where_it_says_so():
    found = decode(body(text(), parameters={"binary_data_output": True}), None, SIGNATURE)
    assert found.outputs == (("label", True), ("probabilities", True), ("logits", True))
    outputs = [{"name": "logits", "parameters": {"binary_data": False}}, {"name": "label"}]
    found = decode(
        body(text(), outputs=outputs, parameters={"binary_data_output": True}), None, SIGNATURE
    )
    assert found.outputs == (("logits", False), ("label", True))


@pytest.mark.parametrize("datatype", ["INT64", "INT32"])
@pytest.mark.parametrize("binary", [True, False])
def test_ids_lose_their_padding_and_keep_a_mask_with_gaps(datatype, binary):
    arrays = {
        "input_ids": [[5, 6, 7, 0], [0, 0, 8, 9], [1, 2, 3, 4]],
        "attention_mask": [[1, 1, 1, 0], [0, 0, 1, 1], [1, 0, 1, 0]],
    }
    tensors = []
    for name, values in arrays.items():
        tensors.append(triton.InferInput(name, [3, 4], datatype))
        array = np.array(values, dtype=datatype.lower())
        tensors[-1].set_data_from_numpy(array, binary)
    sent, length = triton.InferenceServerClient.generate_request_body(tensors)
    assert decode(sent, length, SIGNATURE).rows == [
        Tokens([5, 6, 7], [0, 0, 0]),
        Tokens([0, 0, 8, 9], [0, 0, 0, 0], mask=[0, 0, 1, 1]),
        Tokens([1, 2, 3], [0, 0, 0], mask=[1, 0, 1]),
    ]


def test_token_types_go_along_where_the_model_takes_them():
    types = ids("token_type_ids", [[0, 0, 1], [0, 1, 0]])
    found = decode(body(types, ids(), mask()), None, WITH_TYPES)
    assert found.rows == [Tokens([5, 6, 7], [0, 0, 1]), Tokens([8, 9], [0, 1])]
    with pytest.raises(ProtocolError, match="inputs must be text alone, or input_ids"):
        decode(body(ids(), mask()), None, WITH_TYPES)
    with pytest.raises(ProtocolError, match="got 'token_type_ids', 'input_ids'"):
        decode(body(types, ids(), mask()), None, SIGNATURE)


WRONG = {
    "not JSON": (b"{", "not the JSON of an inference"),
    "no inputs": (b"{}", "missing required field `inputs`"),
    "nested too deep": (b'{"id":' + b"[" * 100_000, "too deep|not the JSON"),
    "deep data": (
        b'{"inputs":[{"name":"text","shape":[1],"datatype":"BYTES","data":' + b"[" * 9999,
        "too deep|not the JSON",
    ),
    "no tensor": (body(), "got none"),
    "unknown tensor": (body(text() | {"name": "txet"}), "got 'txet'"),
    "a long name": (body(text() | {"name": "x" * 9999}), "x…'"),
    "text and ids": (body(text(), ids(), mask()), "text alone, or"),
    "ids alone": (body(ids()), "input_ids, attention_mask"),
    "twice": (body(text(), text()), "'text' is there twice"),
    "wrong datatype": (body(text() | {"datatype": "FP32"}), "must be BYTES, not 'FP32'"),
    "ids as FP32": (body(ids(datatype="FP32"), mask()), "must be INT64 or INT32"),
    "no row": (body(text([], [0])), "N at least 1"),
    "no shape": (body(text(["a"], [])), "N at least 1"),
    "negative": (body(text(["a"], [-1])), "N at least 1"),
    "negative twice": (body(text(["a"], [-1, -1])), "N at least 1"),
    "overflow": (body(text(["a"], [1 << 62, 2])), "rows, and a request may have 64"),
    "a fraction": (body(text(["a"], [1.5])), "Expected `int`"),
    "three axes": (body(text(["a"], [1, 1, 1])), r"\[N, 2\]"),
    "three columns": (body(text(["a", "b", "c"], [1, 3])), r"\[N, 2\]"),
    "too few": (body(text(["a"], [2])), "has 1 elements; its shape needs 2"),
    "nested otherwise": (body(text([["a"], ["b", "c"]], [2, 2])), "nested unlike its shape"),
    "number as text": (body(text([7])), "Expected `str`, got `int`"),
    "null as text": (body(text([None])), "Expected `str`, got `null`"),
    "no data": (body(text(None, [1])), "either data or binary_data_size"),
    "both": (body(text(parameters={"binary_data_size": 0})), "either data or binary"),
    "too large": (body(text(None, [1], parameters={"binary_data_size": 1})), "at most the 0"),
    "size true": (body(text(None, [1], parameters={"binary_data_size": True})), "number of bytes"),
    "size negative": (body(text(None, [1], parameters={"binary_data_size": -1})), "number of byte"),
    "shared memory": (
        body(text(parameters={"shared_memory_region": "x"})),
        "shared_memory_region of input 'text' is not supported",
    ),
    "classification": (
        body(text(), outputs=[{"name": "logits", "parameters": {"classification": 2}}]),
        "classification of output 'logits'",
    ),
    "unknown output": (body(text(), outputs=[{"name": "scores"}]), "there is no output 'scores'"),
    "output twice": (body(text(), outputs=[{"name": "label"}] * 2), "'label' is wanted twice"),
    "binary_data": (
        body(text(), outputs=[{"name": "label", "parameters": {"binary_data": 1}}]),
        "binary_data must be true or false",
    ),
    "timeout": (body(text(), parameters={"timeout": 1.5}), "timeout must be a whole number"),
    "timeout negative": (body(text(), parameters={"timeout": -1}), "timeout must be"),
    "NaN": (b'{"inputs":[],"parameters":{"timeout":NaN}}', "not the JSON"),
    "infinite": (b'{"inputs":[],"parameters":{"timeout":1e999}}', "not the JSON"),
    "not UTF-8": (body(text(["ab"])).replace(b"ab", b"\xff"), "not the JSON"),
    "half a surrogate": (body(text(["\ud800"])), "not the JSON"),
    "an id too high": (body(ids(data=[[177]]), mask([[1]])), "input_ids must be from 0 to 176"),
    "an id below 0": (body(ids(data=[[-1]]), mask([[1]])), "input_ids must be from 0 to 176"),
    "an id beyond INT64": (body(ids(data=[[1 << 70]]), mask([[1]])), "not an INT64"),
    "a mask of 2": (body(ids(data=[[5]]), mask([[2]])), "attention_mask must be from 0 to 1"),
    "no mask": (body(ids(data=[[5]]), mask([[0]])), "row 1 of attention_mask is all 0"),
    "too long": (body(ids(data=[[1] * 25]), mask([[1] * 25])), "S from 1 to 24"),
    "one axis": (body(ids(data=[5], shape=[1]), mask([[1]])), r"must be \[N, S\]"),
    "two shapes": (body(ids(), mask([[1, 1]])), "must have one shape"),
}


@pytest.mark.parametrize("name", WRONG)
def test_every_fault_is_one_sentence(name):
    sent, expected = WRONG[name]
    with pytest.raises(ProtocolError, match=expected) as error:
        decode(sent, None, SIGNATURE)
    assert str(error.value).endswith(".")
    assert len(str(error.value)) < 250


def binary_text(binary, shape, size=None):
    size = len(binary) if size is None else size
    return body(text(None, shape, parameters={"binary_data_size": size})), binary


@pytest.mark.parametrize(
    ("header", "binary", "expected"),
    [
        (*binary_text(b"\x01\x00\x00", [1]), "ends before element 1 of 1"),
        (*binary_text(b"\x02\x00\x00\x00a", [1]), "element 1 of text is longer"),
        (*binary_text(b"\xff\xff\xff\xffa", [1]), "element 1 of text is longer"),
        (*binary_text(b"\x01\x00\x00\x00a", [2]), "ends before element 2 of 2"),
        (*binary_text(b"\x01\x00\x00\x00ab", [1]), "1 bytes follow the 1 elements"),
        (*binary_text(b"\x01\x00\x00\x00\xff", [1]), "element 1 of text is not UTF-8"),
        (*binary_text(b"\x01\x00\x00\x00a", [1], 4), "1 bytes after the JSON belong to no input"),
        (body(text()), b"x", "1 bytes after the JSON belong to no input"),
        (
            body(ids(data=None, shape=[1, 2], parameters={"binary_data_size": 8}), mask([[1, 1]])),
            struct.pack("<q", 5),
            "has 8 bytes of binary data; its shape needs 16",
        ),
    ],
)
def test_every_fault_of_binary_data_is_one_sentence(header, binary, expected):
    with pytest.raises(ProtocolError, match=expected):
        decode(header + binary, len(header), SIGNATURE)


@pytest.mark.parametrize("length", [0, 1 << 60])
def test_the_length_of_the_header_must_fit(length):
    with pytest.raises(ProtocolError, match="Inference-Header-Content-Length is"):
        decode(body(text()), length, SIGNATURE)


def test_too_many_rows_are_refused_by_their_shape_alone():
    with pytest.raises(ProtocolError, match="65 rows, and a request may have 64") as error:
        decode(body(text(["a"], [65])), None, SIGNATURE)
    assert error.value.status == 422


PARAMETERS = st.dictionaries(
    st.sampled_from(["binary_data_size", "binary_data", "timeout", "classification", "other"]),
    st.integers(-2, 40) | st.booleans() | st.none() | st.floats(allow_nan=False) | st.text(),
    max_size=2,
)
TENSOR = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["text", "input_ids", "attention_mask", "other"]),
        "shape": st.lists(st.integers(-1, 3) | st.just(1 << 63), max_size=3),
        "datatype": st.sampled_from(["BYTES", "INT64", "INT32", "FP32"]),
    },
    optional={
        "parameters": PARAMETERS,
        "data": st.recursive(
            st.integers() | st.text(max_size=3) | st.none() | st.booleans(),
            lambda inner: st.lists(inner, max_size=3),
            max_leaves=6,
        ),
    },
)
HEADER = st.fixed_dictionaries(
    {"inputs": st.lists(TENSOR, max_size=3)},
    optional={"parameters": PARAMETERS, "id": st.none() | st.text(max_size=3)},
)


@settings(max_examples=400, deadline=None)
@given(HEADER | st.binary(max_size=60), st.binary(max_size=40), st.none() | st.integers(-9, 9))
def test_whatever_comes_it_is_a_request_or_a_protocol_error(header, binary, shift):
    sent = header if isinstance(header, bytes) else msgspec.json.encode(header)
    length = None if shift is None else len(sent) + (shift if abs(shift) > 6 else 0)
    try:
        found = decode(sent + binary, length, SIGNATURE)
    except ProtocolError:
        return
    rows = found.texts or found.rows
    assert 0 < len(rows) <= SIGNATURE.texts
    for row in found.rows or []:
        assert len(row.ids) == len(row.type_ids) <= SIGNATURE.max_length
        assert all(0 <= token < SIGNATURE.vocabulary_size for token in row.ids)


@given(st.lists(st.text(max_size=20), min_size=1, max_size=8))
def test_texts_survive_the_binary_form(texts):
    encoded = [t.encode() for t in texts]
    binary = b"".join(struct.pack("<I", len(t)) + t for t in encoded)
    header, _ = binary_text(binary, [len(texts)])
    assert decode(header + binary, len(header), SIGNATURE).texts == texts


def test_the_label_is_that_of_the_highest_logit_where_probabilities_are_equal():
    """In float32 the sigmoids of 18 and 25 are both 1."""
    logits = np.array([[18, 25]], np.float32)
    request = DecodedRequest(["a"], None, (("label", False),), None, None)
    answer, _ = encode(request, ("m", "1"), ("A", "B"), logits, np.ones((1, 2), np.float32))
    assert json.loads(answer)["outputs"][0]["data"] == ["B"]
