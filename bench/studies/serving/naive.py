"""The service that everyone writes first: FastAPI around a transformers pipeline, nothing batched.

``python naive.py FOLDER`` serves a Hugging Face folder on a free port and prints its address. The
endpoint is a plain ``def``: FastAPI runs it in a thread, and torch takes all cores.
"""

import socket
import sys

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import pipeline


class Texts(BaseModel):
    """What a request holds."""

    texts: list[str]


def main(folder: str) -> None:
    """Serve until a signal comes."""
    app = FastAPI()
    classify = pipeline("text-classification", model=folder, device="cpu")

    @app.post("/classify")
    def answer(request: Texts) -> dict[str, list[dict[str, object]]]:
        return {"predictions": classify(request.texts, truncation=True)}

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        uvicorn.Server(uvicorn.Config(app)).run(sockets=[listener])


if __name__ == "__main__":
    main(sys.argv[1])
