"""The two official files of the TREC question classification set, fetched and checked.

Li and Roth, "Learning Question Classifiers", COLING 2002. The files state no licence, so that
trainkit does not ship them.
"""

import hashlib
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

from trainkit.serve.errors import InputError
from trainkit.serve.files import write_atomically

BASE_URL = "https://cogcomp.seas.upenn.edu/Data/QA/QC/"
TIMEOUT_S = 30
MAX_BYTES = 10_000_000

SHA256 = {
    "train_5500.label": "9e4c8bdcaffb96ed61041bd64b564183d52793a8e91d84fc3a8646885f466ec3",
    "TREC_10.label": "033f22c028c2bbba9ca682f68ffe204dc1aa6e1cf35dd6207f2d4ca67f0d0e8e",
}


def fetch(target: Path, source: Path | None = None) -> list[Path]:
    """Put ``train_5500.label`` and ``TREC_10.label`` into ``target`` and return their paths.

    They come from the folder ``source`` where it is given, else from the network. A file that is
    there already with the right content is left as it is. Raises ``InputError`` if one is there
    with other content, cannot be had, or has another sha256; then neither file is written.
    """
    missing = [name for name in SHA256 if not _is_there(target / name)]
    # Both are checked before either is written: they are 0.4 MB together.
    contents = {name: _get(name, source) for name in missing}
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_atomically(target / name, content)
    except OSError as error:
        raise InputError(
            f"{target} cannot be written to ({error.strerror}); choose another folder."
        ) from None
    return [target / name for name in SHA256]


def _is_there(path: Path) -> bool:
    if not path.is_file():
        return False
    if _sha256(_read(path)) != SHA256[path.name]:
        raise InputError(
            f"{path} is there already and is not the official file (sha256 "
            f"{SHA256[path.name][:12]}... expected); move it away or choose another folder."
        )
    return True


def _get(name: str, source: Path | None) -> bytes:
    origin = BASE_URL + name if source is None else str(source / name)
    content = _download(origin) if source is None else _read(source / name)
    if _sha256(content) != SHA256[name]:
        raise InputError(
            f"{origin} is not the official file: sha256 {_sha256(content)}, expected "
            f"{SHA256[name]}; get it from another place and pass its folder with --from DIR."
        )
    return content


def _download(url: str) -> bytes:
    try:
        with urlopen(url, timeout=TIMEOUT_S) as response:
            content: bytes = response.read(MAX_BYTES + 1)
    except (OSError, HTTPException) as error:
        if isinstance(error, HTTPError):
            error.close()  # it holds the connection open
        raise InputError(
            f"{url} cannot be downloaded ({error}); try again, or pass a folder that has the two "
            "files with --from DIR."
        ) from None
    if len(content) > MAX_BYTES:
        raise InputError(
            f"{url} sends more than {MAX_BYTES} bytes, so it is not the official file; pass a "
            "folder that has the two files with --from DIR."
        )
    return content


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); expected the official TREC file there."
        ) from None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
