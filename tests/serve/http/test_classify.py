"""What ``/classify`` says of logits: the library's own words."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import msgspec

from trainkit.data.splits import load_sample
from trainkit.serve import Classifier
from trainkit.serve.bundle import open_bundle, write_manifest
from trainkit.serve.http.classify import predictions, thresholds_of
from trainkit.serve.http.messages import ClassifyRequest

TEXTS = [example.text for example in load_sample()[:40]]


def test_thresholds_name_the_labels_of_a_text(golden, tmp_path):
    """Of a model for several labels, whose library has the same ones."""
    folder = Path(shutil.copytree(golden, tmp_path / "bundle"))
    manifest = open_bundle(folder).manifest
    several = msgspec.structs.replace(manifest, problem_type="multi_label_classification")
    write_manifest(folder, several)
    library = Classifier.load(folder, threads=1)
    model = SimpleNamespace(classifier=library, manifest=several)
    own = {several.labels[0]: 0.2, several.labels[1]: 1.0}
    request = ClassifyRequest(texts=TEXTS, thresholds=own)
    thresholds = thresholds_of(request, model)
    assert thresholds == dict.fromkeys(several.labels, 0.5) | own
    rows = library.tokens(TEXTS)
    found = predictions(model, rows, library.logits_of(rows), None, thresholds)
    expected = [[one.label for one in row] for row in library.labels_above(TEXTS, own)]
    assert [one.labels for one in found] == expected
    assert len({len(labels) for labels in expected}) > 1
