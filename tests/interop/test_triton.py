"""A Triton repository against the schema that Triton's own client ships."""

import importlib.util
from pathlib import Path

import pytest
from google.protobuf import text_format

from trainkit.export.triton import write_repository
from trainkit.serve.bundle import open_bundle


@pytest.fixture(scope="module")
def schema():
    """Load the schema's module alone: its package wants grpc, which no configuration needs."""
    found = importlib.util.find_spec("tritonclient")
    (package,) = found.submodule_search_locations
    spec = importlib.util.spec_from_file_location(
        "model_config_pb2", Path(package) / "grpc" / "model_config_pb2.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("triton") / "models"
    return write_repository(open_bundle(folder), out, name=folder.name)


def test_the_config_is_tritons_and_says_what_the_manifest_says(schema, model, folder):
    config = text_format.Parse((model / "config.pbtxt").read_text(), schema.ModelConfig())
    manifest = open_bundle(folder).manifest
    assert (config.name, config.platform) == (folder.name, "onnxruntime_onnx")
    assert [tensor.name for tensor in config.input] == [t.name for t in manifest.inputs]
    assert {tensor.data_type for tensor in config.input} == {schema.TYPE_INT64}
    assert [list(tensor.dims) for tensor in config.output] == [[len(manifest.labels)]]
    assert config.output[0].data_type == schema.TYPE_FP32
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
    assert config.instance_group[0].kind == schema.ModelInstanceGroup.KIND_CPU
    assert {key: p.string_value for key, p in config.parameters.items()} == {
        "intra_op_thread_count": "0",
        "inter_op_thread_count": "1",
        "execution_mode": "0",
    }
    for warmup in config.model_warmup:
        for value in warmup.inputs.values():
            content = (model / "warmup" / value.input_data_file).read_bytes()
            assert len(content) == 8 * value.dims[0]


def test_the_schema_refuses_a_field_that_triton_does_not_know(schema, model):
    config = (model / "config.pbtxt").read_text()
    with pytest.raises(text_format.ParseError):
        text_format.Parse(config.replace("label_filename", "label_file"), schema.ModelConfig())
