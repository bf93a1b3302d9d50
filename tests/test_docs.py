"""The code in the documents runs, and prints what it says."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_plain_onnx_runtime_example_classifies(tmp_path):
    document = (ROOT / "docs" / "bundle.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    (tmp_path / "bundle").symlink_to(ROOT / "tests" / "golden" / "bundle")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "NUM\n"
