"""What the commands gave at 904615f, recorded: ``python tests/golden/behaviour.py TRAINKIT``.

TRAINKIT is the ``trainkit`` command of the installation to record. ``tests/test_golden.py`` runs
the same commands today and compares. Record again only if a change of behaviour is intended.
"""

import csv
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
RECORDED = HERE / "behaviour.json"
BUNDLE = HERE / "bundle"
RESULTS = HERE.parents[1] / "bench" / "results"
QUESTIONS = [
    "How far is Mars?",
    "Who wrote the Odyssey?",
    "Why do cats purr?",
    "What does DNA stand for?",
    "Where is the Eiffel Tower?",
]
COLUMNS = ("workload", "engine", "texts_per_s", "ratio_median", "p50_ms", "wrong", "rounds")
CLASSIFY = "/classify"
INFER = "/v2/models/golden/infer"
TEXTS = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [2], "data": QUESTIONS[:2]}]}
IDS = {
    "id": "7",
    "inputs": [
        {
            "name": "input_ids",
            "datatype": "INT64",
            "shape": [2, 4],
            "data": [2, 5, 9, 3, 2, 7, 3, 0],
        },
        {
            "name": "attention_mask",
            "datatype": "INT64",
            "shape": [2, 4],
            "data": [1, 1, 1, 1, 1, 1, 1, 0],
        },
    ],
}
REQUESTS: list[tuple[str, str, object]] = [
    ("GET", "/v2", None),
    ("GET", "/v2/health/live", None),
    ("GET", "/v2/health/ready", None),
    ("GET", "/v2/models/golden", None),
    ("GET", "/v2/models/golden/ready", None),
    ("GET", "/v2/models/other", None),
    ("GET", "/nowhere", None),
    ("PUT", CLASSIFY, {}),
    ("POST", CLASSIFY, {"texts": QUESTIONS}),
    ("POST", CLASSIFY, {"texts": QUESTIONS[:1], "top_k": 3}),
    ("POST", CLASSIFY, {"texts": []}),
    ("POST", CLASSIFY, {"texts": "one"}),
    ("POST", CLASSIFY, {"texts": QUESTIONS[:1], "model": "other"}),
    ("POST", CLASSIFY, "not JSON"),
    ("POST", INFER, TEXTS),
    ("POST", INFER, IDS),
    ("POST", INFER, {"inputs": []}),
    ("POST", INFER, {"inputs": [{**TEXTS["inputs"][0], "shape": [3]}]}),
]


def record(trainkit: str, folder: Path) -> dict[str, object]:
    """Run every command with outputs in ``folder``; return what it gave."""
    return {
        "train": {kind: trained(trainkit, kind, folder) for kind in ("prefix", "simple")},
        "export": exported(trainkit, folder),
        "http": answers(trainkit),
        "bench": benchmarked(trainkit),
    }


def run(*command: object) -> str:
    """Run a command; return its standard output."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def trained(trainkit: str, kind: str, folder: Path) -> dict[str, object]:
    """Train on the sample questions; return the scores of the two held-out sets."""
    settings = ["--data", "sample", "--model", kind, "--epochs", "2", "--seed", "0"]
    settings += ["--max-length", "24", "--runs", str(folder), "--name", kind]
    run(trainkit, "train", *settings)
    reports = (
        json.loads((folder / kind / f"{name}.json").read_text()) for name in ("valid", "test")
    )
    return {
        name: {key: report[key] for key in ("accuracy", "loss") if key in report}
        for name, report in zip(("valid", "test"), reports, strict=True)
    }


def exported(trainkit: str, folder: Path) -> dict[str, object]:
    """Export the prefix run; return its answers and the operators of the graph that count."""
    import onnx

    bundle = folder / "prefix-onnx"
    run(trainkit, "export", folder / "prefix", "--format", "onnx", "--out", bundle)
    lines = run(trainkit, "predict", bundle, *QUESTIONS).splitlines()
    operators = Counter(node.op_type for node in onnx.load(bundle / "model.onnx").graph.node)
    kept = ("MultiHeadAttention", "Attention", "Softmax", "NonZero", "CumSum", "Where", "Expand")
    return {
        "answers": [json.loads(line) for line in lines],
        "operators": {name: operators[name] for name in kept},
        "nodes": sum(operators.values()),
    }


def answers(trainkit: str) -> list[dict[str, object]]:
    """Serve the golden bundle; return status and body for every request."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [trainkit, "serve", f"golden={BUNDLE}", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        wait_until_ready(port)
        return [answer(port, *request) for request in REQUESTS]
    finally:
        server.terminate()
        server.communicate(timeout=30)


def wait_until_ready(port: int) -> None:
    """Return once the server answers; fail after a minute."""
    for _ in range(600):
        try:
            if answer(port, "GET", "/v2/health/ready", None)["status"] == 200:
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise AssertionError("the server was not ready after a minute")


def answer(port: int, method: str, path: str, document: object) -> dict[str, object]:
    """Send one request; return what came back."""
    body = None
    if document is not None:
        body = (document if isinstance(document, str) else json.dumps(document)).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, method=method)
    request.add_header("Content-Type", "application/json")
    try:
        reply = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        reply = error
    with reply:
        text = reply.read().decode()
    found: dict[str, object] = {"request": [method, path, document], "status": reply.status}
    try:
        found["body"] = json.loads(text)
    except json.JSONDecodeError:
        found["body"] = text
    return found


def benchmarked(trainkit: str) -> dict[str, object]:
    """Compare two kept results and take advice from one; return the figures."""
    suites = [RESULTS / f"suite-minilm-{data}.json" for data in ("trec", "newsgroups20")]
    pairs = json.loads(run(trainkit, "bench", "compare", *suites, "--json"))["pairs"]
    same = json.loads(run(trainkit, "bench", "compare", suites[0], suites[0], "--json"))["pairs"]
    advice = {
        options: json.loads(
            run(trainkit, "bench", "recommend", suites[0], *options.split(), "--json")
        )
        for options in ("--throughput", "--latency-below 20", "--throughput --precision int8")
    }
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "tables.csv"
        run(trainkit, "bench", "report", suites[1], "--csv", table)
        rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    return {
        "compare": [
            [pair[key] for key in ("engine_b", "workload", "ratio")] for pair in pairs + same
        ],
        "recommend": {options: found["choice"] for options, found in advice.items()},
        "report": [[row[key] for key in COLUMNS] for row in rows],
    }


def lines(document: dict[str, object]) -> str:
    """Return ``document`` as JSON with one line per entry of its sections."""
    text = ["{"]
    for name, section in document.items():
        entries = section.items() if isinstance(section, dict) else enumerate(section)
        opened, closed = ("{", "}") if isinstance(section, dict) else ("[", "]")
        rows = [
            (f"{json.dumps(key)}: " if isinstance(section, dict) else "")
            + json.dumps(entry, ensure_ascii=False)
            for key, entry in entries
        ]
        text.append(f'"{name}": {opened}\n' + ",\n".join(rows) + f"\n{closed},")
    text[-1] = text[-1].rstrip(",")
    return "\n".join([*text, "}"]) + "\n"


def main(trainkit: str) -> None:
    """Write :data:`RECORDED`."""
    with tempfile.TemporaryDirectory() as folder:
        document = record(trainkit, Path(folder))
    RECORDED.write_text(lines(document), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
