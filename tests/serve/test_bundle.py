"""The bundle's folder: whole or not there, unchanged or refused, and silent about its maker."""

import json
import os
import re
import stat
import tempfile
import zipfile
from pathlib import Path

import msgspec
import pytest

import trainkit
from trainkit.serve import bundle
from trainkit.serve.bundle import (
    MANIFEST,
    Serving,
    open_bundle,
    staged,
    write_manifest,
    write_serving,
)
from trainkit.serve.errors import InputError
from trainkit.serve.files import file_info

ROOT = Path(trainkit.__file__).parents[1]


class BrokenError(Exception):
    """What goes wrong in the middle of an export."""


def write(folder, manifest):
    """Fill a folder with the least that opens as a bundle."""
    (folder / "config.json").write_text("{}")
    return write_manifest(folder, manifest)


@pytest.fixture(scope="module")
def manifest(tiny_bundles):
    return open_bundle(tiny_bundles["onnx"]).manifest


def test_a_target_appears_whole_or_not_at_all(tmp_path, manifest):
    target = tmp_path / "bundle"
    with staged(target) as stage:
        write(stage, manifest)
        assert not target.exists()
        assert stage.parent == tmp_path  # a rename within one file system cannot be half done
    assert open_bundle(target).folder == target
    assert list(tmp_path.iterdir()) == [target]


def export_that_raises(error, target, **how):
    with staged(target, **how) as stage:
        (stage / "model.onnx").write_bytes(b"half")
        raise error


@pytest.mark.parametrize("error", [BrokenError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_nothing(error, tmp_path):
    with pytest.raises(error):
        export_that_raises(error, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_no_new_parents(tmp_path):
    with pytest.raises(BrokenError):
        export_that_raises(BrokenError, tmp_path / "new" / "deep" / "bundle")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [BrokenError, KeyboardInterrupt])
def test_an_error_with_force_keeps_the_bundle_before(error, tmp_path, tree, copied):
    target = copied("onnx")
    before = tree(tmp_path)
    with pytest.raises(error):
        export_that_raises(error, target, force=True)
    assert tree(tmp_path) == before


def test_force_swaps_the_old_bundle_for_the_new(tmp_path, copied):
    target = copied("onnx")
    old = open_bundle(target).manifest
    with staged(target, force=True) as stage:
        write(stage, old)
        assert open_bundle(target).manifest == old
    assert sorted(path.name for path in target.iterdir()) == ["config.json", MANIFEST]
    assert list(tmp_path.iterdir()) == [target]


def test_a_swap_that_fails_brings_the_old_bundle_back(tmp_path, tree, copied, monkeypatch):
    target = copied("onnx")
    before = tree(tmp_path)
    rename = Path.rename

    def fails_for_the_new(path, to):
        if Path(to) == target and not path.name.endswith("-old"):
            raise OSError(28, "No space left on device")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fails_for_the_new)
    with pytest.raises(OSError, match="No space"), staged(target, force=True) as stage:
        (stage / "new").write_text("new")
    monkeypatch.undo()
    assert tree(tmp_path) == before


@pytest.mark.parametrize("force", [False, True])
def test_what_came_to_be_there_meanwhile_is_not_replaced(force, tmp_path):
    target = tmp_path / "bundle"

    def export():
        with staged(target, force=force) as stage:
            (stage / "new").write_text("new")
            target.mkdir()
            (target / "notes.txt").write_text("mine")

    with pytest.raises(InputError, match="bundle"):
        export()
    assert (target / "notes.txt").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("force", [False, True])
def test_a_target_that_is_refused_costs_no_work(force, tmp_path):
    (tmp_path / "bundle").mkdir()
    with (
        pytest.raises(InputError, match="choose another --out"),
        staged(tmp_path / "bundle", force=force),
    ):
        pytest.fail("the block was entered")
    assert list(tmp_path.iterdir()) == [tmp_path / "bundle"]


def test_a_place_that_cannot_be_written_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"), staged(tmp_path / "file" / "bundle"):
        pytest.fail("the block was entered")


def test_the_manifest_names_every_file_and_hashes_itself(tmp_path, manifest, tiny_bundles):
    folder = tiny_bundles["onnx"]
    names = {path.name for path in folder.iterdir()} - {MANIFEST}
    assert set(manifest.files) == names
    assert all(manifest.files[name] == file_info(folder / name) for name in names)
    assert manifest.sha256 == manifest.digest()
    assert msgspec.structs.replace(manifest, pad_id=7).digest() != manifest.sha256
    assert msgspec.structs.replace(manifest, sha256="other").digest() == manifest.sha256


@pytest.mark.parametrize("field", bundle.Manifest.__struct_fields__[:-1])
def test_no_field_of_the_manifest_can_be_edited(field, copied):
    """Well-formed JSON of the right types, as a person would leave it."""
    path = copied("onnx") / MANIFEST
    document = json.loads(path.read_text())
    value = document.get(field)  # `serving` is there only where it was written
    changed = {str: f"{value}x", int: 99, list: [], dict: {}, type(None): {"accuracy": 1.0}}
    changed |= {bool: not value, float: 2.0}
    others = {"format": "torchscript", "precision": "int8", "problem_type": "regression"}
    others["serving"] = {"threads": 1, "batch_size": 8, "provider": "CPUExecutionProvider"}
    document[field] = others.get(field, ["x"] if value == [] else changed[type(value)])
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"was changed after the export|has bundle format 99"):
        open_bundle(path.parent)


def test_a_manifest_may_be_laid_out_anew(copied, manifest):
    """The digest is of the content: an editor that indents otherwise does no harm."""
    folder = copied("onnx")
    document = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(dict(reversed(document.items()))))
    assert open_bundle(folder).manifest == manifest


def test_serving_settings_are_sealed_with_the_rest(copied, manifest, tree):
    folder = copied("onnx")
    before = tree(folder)
    assert "serving" not in json.loads((folder / MANIFEST).read_text())
    serving = Serving(threads=3, batch_size=8, provider="CPUExecutionProvider")
    written = write_serving(folder, serving)
    assert open_bundle(folder).manifest == written
    assert (
        msgspec.structs.replace(written, serving=msgspec.UNSET, sha256=manifest.sha256) == manifest
    )
    after = tree(folder)
    assert [name for name in before if before[name] != after[name]] == [MANIFEST]
    assert list(after) == list(before)
    path = folder / MANIFEST
    path.write_text(path.read_text().replace('"threads": 3', '"threads": 4'))
    with pytest.raises(InputError, match="was changed after the export"):
        write_serving(folder, serving)


@pytest.mark.parametrize("field", ["threads", "batch_size"])
def test_serving_settings_that_do_not_work_are_refused(field, copied):
    folder = copied("onnx")
    serving = {"threads": 1, "batch_size": 8, "provider": "CPUExecutionProvider"} | {field: 0}
    with pytest.raises(ValueError, match=f"serving {field} must be at least 1, not 0"):
        Serving(**serving)
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"serving": serving}))
    with pytest.raises(InputError, match=f"serving {field} must be at least 1, not 0"):
        open_bundle(folder)


def test_an_unknown_field_of_the_manifest_is_refused(copied):
    path = copied("onnx") / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"colour": "red"}))
    with pytest.raises(InputError, match="unknown field `colour`"):
        open_bundle(path.parent)


def parts(folder):
    """Yield the name and bytes of every file, and of what is packed in it."""
    for path in folder.iterdir():
        yield path.name, path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    yield f"{path.name}/{name}", name.encode() + b"\n" + archive.read(name)


@pytest.mark.parametrize("format", ["onnx", "torchscript"])
def test_a_bundle_tells_nothing_of_the_machine_that_made_it(format, tiny_bundles):
    places = [ROOT, tempfile.gettempdir(), Path.home(), tiny_bundles[format].parents[1].name]
    traces = [str(place).encode() for place in places] + [b"site-packages", b"dist-packages"]
    for name, content in parts(tiny_bundles[format]):
        for trace in traces:
            assert trace not in content, name
        # TorchScript's own code records are called .py; elsewhere it would be a source file.
        if format == "onnx":
            assert not re.search(rb"[\w/-]{3}\.pyc?\b", content), name


def test_the_search_for_traces_finds_them(copied):
    folder = copied("onnx")
    model = folder / "model.onnx"
    model.write_bytes(model.read_bytes() + str(ROOT / "models" / "scratch.py").encode())
    content = dict(parts(folder))["model.onnx"]
    assert str(ROOT).encode() in content
    assert re.search(rb"[\w/-]{3}\.pyc?\b", content)


@pytest.mark.parametrize("format", ["onnx", "torchscript"])
def test_other_users_can_read_a_bundle(format, tiny_bundles):
    mask = os.umask(0)
    os.umask(mask)
    folder = tiny_bundles[format]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444 & ~mask, path.name


def test_a_path_that_no_system_has_is_an_input_error():
    with pytest.raises(InputError, match=r"is not a bundle.*null byte"):
        open_bundle(Path("\0"))
