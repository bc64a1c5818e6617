"""The servers a canary talks to: reached, known, and alike."""

from __future__ import annotations

from typing import Any

import httpx

from dspark_sglang.errors import ConfigError, ServerError

_TIMEOUT_S = 300.0


def client(url: str, key: str | None, concurrency: int) -> httpx.Client:
    """A client of one server.

    Raises:
        ServerError: the address is none.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=2 * concurrency)
    try:
        return httpx.Client(base_url=url, timeout=_TIMEOUT_S, headers=headers, limits=limits)
    except httpx.InvalidURL as error:
        raise ServerError(
            f"{url} is no address: {error}.", expected="http://HOST:PORT", fix="Correct it."
        ) from error


def info(http: httpx.Client) -> dict[str, Any]:
    """``/server_info``.

    Raises:
        ServerError: there is none.
    """
    try:
        answer = http.get("/server_info")
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise ServerError(
            f"{str(http.base_url).rstrip('/')}/server_info gave no usable answer: {error!r}.",
            expected="a running SGLang server",
            fix="Check the address, and API_KEY where it has a key.",
        ) from error
    return found


def same_model(ours: dict[str, Any], plain: dict[str, Any], url: str) -> None:
    """Raise ConfigError where two servers cannot be compared."""
    if plain.get("speculative_algorithm"):
        raise ConfigError(
            f"{url} speculates too ({plain['speculative_algorithm']}).",
            expected="a server without --speculative-algorithm",
            fix="Start one of the same model without it.",
        )
    for name in ("served_model_name", "weight_version", "dtype", "quantization"):
        if ours.get(name) != plain.get(name):
            raise ConfigError(
                f"{url} has {name} {plain.get(name)}.",
                expected=f"{ours.get(name)}, as on the watched server",
                fix="Start both alike: same model, --served-model-name, --weight-version, --dtype.",
            )
