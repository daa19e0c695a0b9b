"""Verb of experts as APIs: `spolia serve`."""

from __future__ import annotations

import os
import sys
from typing import Annotated, get_args

import typer

from spolia.errors import SpoliaError, did_you_mean


def serve(
    experts: Annotated[
        list[str], typer.Argument(metavar="EXPERT...", help="digits:01, a folder of transformers, or NAME=either.")
    ],
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: a free one.", min=0, max=65535)] = 8080,
    answers: Annotated[str, typer.Option(help="logits, probabilities, top or label.")] = "probabilities",
    top: Annotated[int, typer.Option(help="Classes that answers of kind top name.", min=1)] = 1,
    decimals: Annotated[int | None, typer.Option(help="Round answers.", min=1, max=6)] = None,
    most: Annotated[int, typer.Option(help="Inputs of one request.", min=1)] = 256,
    token: Annotated[str | None, typer.Option(help="Environment variable with the token that requests bear.")] = None,
    seed: Annotated[int, typer.Option(help="Of experts trained on the spot.", min=0)] = 0,
) -> None:
    """Serve experts over HTTP, by the Open Inference Protocol, until Ctrl-C."""
    from spolia.parts.api_answers import Answering
    from spolia.runs.serve_experts import Served
    from spolia.runs.serve_experts import serve as serve_until_interrupted

    known = get_args(Answering)
    if answers not in known:
        raise SpoliaError(f"`{answers}` is no kind of answer", where="--answers", mend=did_you_mean(answers, known))
    secret = None if token is None else os.environ.get(token)
    if token is not None and not secret:
        raise SpoliaError("is not set", where=token, mend=f"export {token}=…, or leave --token away")

    def ready(url: str, served: list[Served]) -> None:
        for expert in served:
            print(f"{url}/v2/models/{expert.name}  classes {', '.join(expert.contract.classes)}")
        print("stop with Ctrl-C", file=sys.stderr, flush=True)
        sys.stdout.flush()

    how = {"top": top, "decimals": decimals, "most": most, "token": secret, "seed": seed}
    serve_until_interrupted(experts, host=host, port=port, answers=answers, ready=ready, **how)  # type: ignore[arg-type]
