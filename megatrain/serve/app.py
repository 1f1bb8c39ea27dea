"""The application: which path is answered by what."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from megatrain.serve import answers, generating, reading
from megatrain.serve.errors import answer_errors
from megatrain.serve.guard import Guard
from megatrain.serve.schemas import ChatRequest, ClassifyRequest, CompletionRequest, EmbeddingRequest
from megatrain.serve.service import Service

PAGE = Path(__file__).with_name("page.html")
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page loads nothing and speaks with this server alone."""
REFUSALS = {
    400: "The request is wrong.",
    401: "A key is missing or wrong.",
    404: "There is no such model.",
    408: "The request did not arrive in time.",
    413: "The request is too large.",
    429: "Too many texts run and wait.",
    500: "The server failed.",
    503: "The server is about to stop.",
    504: "The answer took too long.",
}
EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
"""An event of a stream: `data` is a chunk as OpenAI's API has it, in JSON; the last one is `[DONE]`."""
Refusals = dict[int | str, dict[str, Any]]


def make_app(service: Service, keys: Sequence[str] = ()) -> Guard:
    """Return the application for a model. With `keys`, requests of the API need one of them."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(title="MegaTrain", docs_url=None, redoc_url=None, lifespan=lifespan)
    answer_errors(app)
    _add_api(app, service)
    _add_others(app, service)
    paths = frozenset(getattr(route, "path", "") for route in app.routes)
    return Guard(app, service=service, keys=keys, paths=paths)


def _add_api(app: FastAPI, service: Service) -> None:
    stream = {"text/event-stream": {"schema": EVENT}}
    refusals: Refusals = {
        status: {"model": answers.Error, "description": text} for status, text in REFUSALS.items()
    }

    def streamed(model: type[answers.Answer]) -> Refusals:
        return refusals | {200: {"model": model, "content": stream, "description": "The answer."}}

    @app.get("/v1/models", response_model=answers.Models, responses=refusals)
    async def models() -> dict[str, Any]:
        """List the model."""
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name}", response_model=answers.Model, responses=refusals)
    async def model(name: str) -> dict[str, Any]:
        """Describe the model."""
        service.require_model(name)
        return _model(service)

    @app.post("/v1/completions", responses=streamed(answers.Completion))
    async def completions(asked: CompletionRequest, http: Request) -> Response:
        """Continue prompts."""
        return await generating.complete(service, asked, http)

    @app.post("/v1/chat/completions", responses=streamed(answers.ChatCompletion))
    async def chat(asked: ChatRequest, http: Request) -> Response:
        """Continue a conversation."""
        return await generating.chat(service, asked, http)

    @app.post("/v1/embeddings", responses=refusals | {200: {"model": answers.Embeddings}})
    async def embeddings(asked: EmbeddingRequest, http: Request) -> Response:
        """Make a vector of each text."""
        return JSONResponse(await reading.embed(service, asked, http))

    @app.post("/v1/classify", responses=refusals | {200: {"model": answers.Classes}})
    async def classify(asked: ClassifyRequest, http: Request) -> Response:
        """Choose a label for each text."""
        return JSONResponse(await reading.classify(service, asked, http))


def _add_others(app: FastAPI, service: Service) -> None:
    unwell: Refusals = {503: {"model": answers.Health}, 500: {"model": answers.Error}}

    @app.get("/health", responses=unwell | {200: {"model": answers.Health}})
    async def health() -> Response:
        """Tell whether the server takes requests."""
        status = "draining" if service.is_draining else "ready" if service.engine.is_alive else "failed"
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        """Say what has been counted, for Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    page = PAGE.read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def try_it() -> Response:
        """Show a page on which the model can be tried."""
        return HTMLResponse(
            page, headers={"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
        )


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "megatrain",
        "max_model_len": service.trained.context,
    }
