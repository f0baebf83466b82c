"""Errors of the HTTP API. The body of every error response is `{"error": {"message", "type", "param", "code"}}`."""

import math
from collections.abc import Sequence
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.exceptions import HTTPException

from serving.batching import BacklogError

_TYPES = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """A refused request.

    An `HTTPException`, because FastAPI replaces any other exception that is raised while it reads a body.

    Args:
        status: HTTP status code.
        message: one line for the client: the value, what is allowed and what to do.
        code: stable short name of the reason.
        param: the part of the request at fault, such as `input[3]`.
    """

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(status, message)
        self.message = message
        self.code = code
        self.param = param


def error_response(
    status: int, message: str, code: str, param: str | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    """An error response; its `type` follows from the status."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status, headers)


def overloaded(retry_after: int = 1) -> JSONResponse:
    """The 429 response to requests above capacity; `retry_after` in seconds."""
    headers = {"Retry-After": str(retry_after)}
    return error_response(429, "the server is busy; try again", "overloaded", headers=headers)


def install_handlers(api: FastAPI) -> None:
    """Make `api` return every error in the common format."""
    api.add_exception_handler(RequestValidationError, _invalid_request)
    api.add_exception_handler(HTTPException, _http_error)
    api.add_exception_handler(BackPressureError, _overloaded)
    api.add_exception_handler(BacklogError, _backlogged)
    api.add_exception_handler(DeploymentUnavailableError, _unavailable)
    api.add_exception_handler(Exception, _internal)


async def _invalid_request(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        message = f"the body is not valid JSON: {first['ctx']['error']} at character {first['loc'][-1]}"
        return error_response(422, message, "invalid_json")
    param = _dotted(first["loc"][1:]) or None
    message = first["msg"].removeprefix("Value error, ")
    # The message does not repeat the rejected value: it may be a caption or an image.
    return error_response(422, f"{param}: {message}" if param else message, "invalid_value", param)


def _dotted(location: Sequence[str | int]) -> str:
    """`("input", 3, "text")` -> `input[3].text`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        return error_response(error.status_code, error.message, error.code, error.param)
    if error.status_code == 400:  # FastAPI's response to a body that is not text
        return error_response(422, "the body is not valid JSON", "invalid_json")
    headers = dict(error.headers) if error.headers else None
    phrase = HTTPStatus(error.status_code).phrase
    message = f"{request.method} {request.url.path}: {phrase.lower()}"
    return error_response(error.status_code, message, phrase.lower().replace(" ", "_"), headers=headers)


async def _overloaded(request: Request, error: Exception) -> JSONResponse:
    return overloaded()


async def _backlogged(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, BacklogError)
    return overloaded(math.ceil(error.excess))


async def _unavailable(request: Request, error: Exception) -> JSONResponse:
    return error_response(503, "the model is not available at the moment; try again", "unavailable")


async def _internal(request: Request, error: Exception) -> JSONResponse:
    """The response does not reveal the cause; Serve writes it to the server's log."""
    return error_response(500, "internal error; see the server's log for the cause", "internal_error")
