"""LitServe around the ONNX model of a bundle, with LitServe's own batching.

``python litserve_app.py BUNDLE MAX_BATCH TIMEOUT_MS THREADS`` prints its address and serves. Texts
are tokenised one request at a time as they are decoded, by the tokenizers library; a batch is
padded to its longest row. Nothing of trainkit is imported.
"""

import json
import socket
import sys
from pathlib import Path
from typing import Any

import litserve
import numpy as np
import onnxruntime
from tokenizers import Tokenizer


class Api(litserve.LitAPI):  # type: ignore[misc]  # litserve ships no types
    """One request holds one or more texts; a batch holds one or more requests."""

    def __init__(self, folder: Path, threads: int, **batching: Any) -> None:
        super().__init__(api_path="/classify", **batching)
        self.folder = folder
        self.threads = threads

    def setup(self, device: str) -> None:
        """Open the model in the inference process."""
        manifest = json.loads((self.folder / "trainkit.json").read_bytes())
        self.labels: list[str] = manifest["labels"]
        self.pad_id: int = manifest["pad_id"]
        self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(manifest["max_length"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        self.session = onnxruntime.InferenceSession(self.folder / "model.onnx", options)
        self.names = [tensor.name for tensor in self.session.get_inputs()]

    def decode_request(self, request: dict[str, list[str]]) -> list[list[int]]:
        """Tokenise the texts of one request."""
        return [found.ids for found in self.tokenizer.encode_batch_fast(request["texts"])]

    def batch(self, inputs: list[list[list[int]]]) -> list[list[list[int]]]:
        """Keep requests apart: how many texts each has is needed to take the answers apart."""
        return inputs

    def predict(self, requests: list[list[list[int]]]) -> list[np.ndarray]:
        """Compute the probabilities of each request's texts, (n, C)."""
        rows = [row for request in requests for row in request]
        longest = max(map(len, rows))
        input_ids = np.full((len(rows), longest), self.pad_id, dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        for number, row in enumerate(rows):
            input_ids[number, : len(row)] = row
            attention_mask[number, : len(row)] = 1
        tensors = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": np.zeros_like(input_ids),
        }
        (logits,) = self.session.run(["logits"], {name: tensors[name] for name in self.names})
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        ends = np.cumsum([len(request) for request in requests])[:-1]
        return np.split(odds / odds.sum(axis=1, keepdims=True), ends)

    def unbatch(self, output: list[np.ndarray]) -> list[np.ndarray]:
        """Give each request its own answer."""
        return output

    def encode_response(self, output: np.ndarray) -> dict[str, list[dict[str, object]]]:
        """Name the best label of each text."""
        return {
            "predictions": [
                {"label": self.labels[row.argmax()], "score": float(row.max())} for row in output
            ]
        }


def main(folder: str, max_batch: str, timeout_ms: str, threads: str) -> None:
    """Serve until a signal comes."""
    api = Api(
        Path(folder),
        int(threads),
        max_batch_size=int(max_batch),
        batch_timeout=float(timeout_ms) / 1000,
    )
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    with socket.socket() as free:  # LitServe does not take port 0
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    print(f"http://127.0.0.1:{port}", flush=True)
    server.run(host="127.0.0.1", port=port, num_api_servers=1, generate_client_file=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
