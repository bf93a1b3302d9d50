"""A bundle in transformers.js, against trainkit's own classifier."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).with_name("classify.mjs")


def test_labels_and_scores_are_the_classifiers(
    folder, is_hugging_faces, classify, texts, node_folder
):
    script = shutil.copy(SCRIPT, node_folder)  # node looks for packages beside the script
    model_type = [] if is_hugging_faces else ["bert"]
    done = subprocess.run(
        ["node", script, folder, *model_type],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers, expected = json.loads(done.stdout), classify(texts)
    assert [answer["label"] for answer in answers] == [answer.label for answer in expected]
    np.testing.assert_allclose(
        [answer["score"] for answer in answers], [answer.score for answer in expected], atol=1e-5
    )
