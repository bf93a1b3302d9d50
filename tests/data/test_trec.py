import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import pytest

from trainkit.data import trec
from trainkit.serve.errors import InputError

# Stand-ins: the official files are not ours to commit. SHA256 is replaced to match them.
CONTENTS = {
    "train_5500.label": b"LOC:city Which sister\xf0city has Los Angeles ?\n" * 50,
    "TREC_10.label": b"NUM:dist How far is it from Denver to Aspen ?\n" * 5,
}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "official"
    folder.mkdir()
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
        monkeypatch.setitem(trec.SHA256, name, hashlib.sha256(content).hexdigest())
    return folder


@pytest.fixture
def server(source: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    handler = partial(QuietHandler, directory=str(source))
    with HTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        url = f"http://127.0.0.1:{httpd.server_port}/"
        monkeypatch.setattr(trec, "BASE_URL", url)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield url
        httpd.shutdown()
        thread.join()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)


def fault(target: Path, source: Path | None = None) -> str:
    with pytest.raises(InputError) as caught:
        trec.fetch(target, source)
    return str(caught.value)


def test_the_files_come_from_a_folder(tmp_path: Path, source: Path) -> None:
    paths = trec.fetch(tmp_path / "new" / "trec", source)
    assert [path.name for path in paths] == ["train_5500.label", "TREC_10.label"]
    assert [path.read_bytes() for path in paths] == list(CONTENTS.values())
    assert sorted(paths[0].parent.iterdir()) == sorted(paths)


def test_the_files_come_from_the_network(tmp_path: Path, server: str) -> None:
    paths = trec.fetch(tmp_path / "trec")
    assert [path.read_bytes() for path in paths] == list(CONTENTS.values())


@pytest.mark.parametrize("name", list(CONTENTS))
def test_a_flipped_byte_is_refused_and_nothing_is_written(
    tmp_path: Path, source: Path, name: str
) -> None:
    flip_a_byte(source / name)
    message = fault(tmp_path / "trec", source)
    assert f"{source / name} is not the official file" in message
    assert trec.SHA256[name] in message
    assert not (tmp_path / "trec").exists()


def test_a_flipped_byte_from_the_network_is_refused(
    tmp_path: Path, source: Path, server: str
) -> None:
    flip_a_byte(source / "TREC_10.label")
    assert f"{server}TREC_10.label is not the official file" in fault(tmp_path / "trec")
    assert not (tmp_path / "trec").exists()


def test_files_that_are_there_already_are_left_as_they_are(tmp_path: Path, source: Path) -> None:
    paths = trec.fetch(tmp_path, source)
    before = [path.stat().st_mtime_ns for path in paths]
    # No source is needed: neither the folder nor the network is asked.
    assert trec.fetch(tmp_path, tmp_path / "nowhere") == paths
    assert [path.stat().st_mtime_ns for path in paths] == before


def test_only_the_file_that_is_missing_is_fetched(tmp_path: Path, source: Path) -> None:
    paths = trec.fetch(tmp_path, source)
    paths[1].unlink()
    (source / "train_5500.label").unlink()
    assert trec.fetch(tmp_path, source) == paths
    assert paths[1].read_bytes() == CONTENTS["TREC_10.label"]


def test_a_file_with_other_content_is_not_overwritten(tmp_path: Path, source: Path) -> None:
    mine = tmp_path / "TREC_10.label"
    mine.write_text("NUM:dist My own question ?")
    assert f"{mine} is there already" in fault(tmp_path, source)
    assert mine.read_text() == "NUM:dist My own question ?"
    assert not (tmp_path / "train_5500.label").exists()


def test_without_network_the_error_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trec, "BASE_URL", "http://127.0.0.1:1/")  # nobody listens there
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    message = fault(tmp_path / "trec")
    assert "cannot be downloaded" in message
    assert "--from DIR" in message


def test_a_page_that_is_gone_says_how_to_go_on(tmp_path: Path, source: Path, server: str) -> None:
    (source / "TREC_10.label").unlink()
    message = fault(tmp_path / "trec")
    assert "404" in message
    assert "--from DIR" in message


def test_an_endless_download_is_cut_off(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trec, "MAX_BYTES", 100)
    assert "more than 100 bytes" in fault(tmp_path / "trec")


def test_a_source_without_the_files_is_refused(tmp_path: Path, source: Path) -> None:
    assert "No such file" in fault(tmp_path / "trec", tmp_path / "nowhere")


def test_a_target_that_is_a_file_is_refused(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "trec"
    target.write_text("")
    assert "cannot be written to" in fault(target, source)


def test_a_write_that_fails_leaves_no_half_file(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert "No space left" in fault(tmp_path / "trec", source)
    assert list((tmp_path / "trec").iterdir()) == []
