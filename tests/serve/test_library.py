"""docs/library.md: its code runs as one program, and prints what its comments say."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec

from trainkit.serve.bundle import open_bundle, write_manifest

ROOT = Path(__file__).parents[2]


def test_the_code_in_the_document_prints_what_it_says(tmp_path):
    golden = ROOT / "tests" / "golden" / "bundle"
    (tmp_path / "runs" / "latest").mkdir(parents=True)
    (tmp_path / "runs" / "latest" / "onnx").symlink_to(golden)
    tags = shutil.copytree(golden, tmp_path / "tags" / "onnx")
    several = msgspec.structs.replace(
        open_bundle(tags).manifest, problem_type="multi_label_classification"
    )
    write_manifest(tags, several)
    document = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    program = "\n".join(re.findall(r"```python\n(.*?)```", document, re.DOTALL))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = re.findall(r"^ *print\(.*\)  # (.*)$", program, re.MULTILINE)
    assert done.stdout.splitlines() == said
    assert len(said) == program.count("print(")
