"""Errors as OpenAI's API writes them."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

TYPES = {
    401: "authentication_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
    504: "timeout_error",
}
"""Types by status code; all others are `invalid_request_error`."""


class RefusedError(Exception):
    """A request is not answered."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        """Say why, with a status code of HTTP.

        Args:
            code: what programs look for. param: the field that is wrong. retry_after: seconds to wait before another
                try.
        """
        super().__init__(message)
        self.status = status
        self.body = error_body(status, message, code=code, param=param)
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    def response(self) -> JSONResponse:
        """Return it as an answer."""
        return JSONResponse(self.body, self.status, headers=self.headers)


def error_body(
    status: int, message: str, *, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """Return the JSON object of an error."""
    kind = TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def answer_errors(app: FastAPI) -> None:
    """Let the application answer every error in that form."""

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        where, message = _explained(error.errors())
        return JSONResponse(error_body(400, message, code="invalid_value", param=where or None), 400)

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> JSONResponse:
        headers = dict(error.headers or {})
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        return JSONResponse(
            error_body(error.status_code, str(error.detail), code=code), error.status_code, headers=headers
        )

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body(500, "The server failed on this request; its log says why."), 500)


def _explained(problems: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Return which field is wrong, and why; where it may have several forms, why it has none of them."""
    first = problems[0]
    where = _field(first)
    if first["type"] == "extra_forbidden":
        return where, f"{where}: there is no such parameter here."
    if first["type"] == "json_invalid":
        return where, f"The body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}."
    said = dict.fromkeys(str(each["msg"]) for each in problems if _field(each) == where)
    text = "; or: ".join(list(said)[:4])
    return where, f"{where}: {text}." if where else f"{text}."


def _field(problem: Mapping[str, Any]) -> str:
    """Return the path of a field, without the names that the library has for the forms of a union."""
    path = [str(part) for part in problem["loc"] if part != "body"]
    return ".".join(itertools.takewhile(lambda part: part.isidentifier() or part.isdigit(), path))
