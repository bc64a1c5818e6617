"""Requests to an OpenAI-compatible endpoint: typed answers, retries, errors that say what to do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

import httpx
import msgspec

from dspark_sglang.errors import DataError

_ATTEMPTS = 4
#: This request is refused, others need not be: malformed, or longer than the context.
_REFUSED = (400, 413, 422)
#: Asking again may help: timeouts, too many requests, and whatever the server broke at.
_AGAIN = (408, 425, 429)


class ChatMessage(msgspec.Struct):
    """A chat message; the reasoning is apart where the server splits it off."""

    content: str | None = None
    #: SGLang's name, and the one of newer vLLM.
    reasoning_content: str | None = None
    reasoning: str | None = None


class Choice(msgspec.Struct):
    """One completion: ``text``, or ``message`` of a chat."""

    finish_reason: str | None = None
    text: str | None = None
    message: ChatMessage = msgspec.field(default_factory=ChatMessage)


class Usage(msgspec.Struct):
    """What the server counted."""

    completion_tokens: int | None = None


class Reply(msgspec.Struct):
    """The part of a completion or chat completion that is used here."""

    choices: Annotated[list[Choice], msgspec.Meta(min_length=1)]
    usage: Usage | None = None


class Refusal(DataError):
    """The endpoint will not answer this request; it may answer others."""


class Endpoint:
    """One endpoint and one of its models.

    Args:
        client: sends the requests.
        url: base address with the version part.
        model: name sent with each request.
        api_key: sent as bearer token; empty for none.
        timeout: seconds a request may take.
        backoff: seconds before the first retry; doubled for each one after it.
        retried: told of each retry.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        url: str,
        model: str,
        *,
        api_key: str = "",
        timeout: float = 600.0,
        backoff: float = 2.0,
        retried: Callable[[], None] = lambda: None,
    ) -> None:
        self._client, self._url, self._model = client, url, model
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout, self._backoff, self._retried = timeout, backoff, retried

    async def post(self, path: str, body: dict[str, Any]) -> Reply:
        """POST to ``completions`` or ``chat/completions``; fields that are None are left out.

        Raises:
            Refusal: the endpoint refuses this request.
            DataError: it keeps failing, or would fail with every request.
        """
        body = {"model": self._model, **{k: v for k, v in body.items() if v is not None}}
        fix = "Check the server and run the same command again; it goes on where it stopped."
        reason = ""
        for attempt in range(_ATTEMPTS):
            if attempt:
                self._retried()
                await asyncio.sleep(self._backoff * 2.0 ** (attempt - 1))
            try:
                answer = await self._client.post(
                    f"{self._url}/{path}", json=body, headers=self._headers, timeout=self._timeout
                )
            except httpx.HTTPError as error:
                reason = repr(error)
                continue
            said = answer.text[:200]
            reason = f"{answer.status_code} {said}"
            if answer.status_code == 200:
                try:
                    return msgspec.json.decode(answer.content, type=Reply)
                except ValueError as error:
                    reason = f"{error} in {said!r}"
            elif answer.status_code in _REFUSED:
                raise Refusal(
                    f"{self._url}/{path} refused a request: {reason}.",
                    expected="a request that fits the target",
                    fix="Lower --max-tokens, or leave out prompts that fill the context.",
                )
            elif answer.status_code < 500 and answer.status_code not in _AGAIN:
                fix = "Check --url (it ends in /v1), --model and OPENAI_API_KEY."
                break
        raise DataError(
            f"{self._url}/{path} failed: {reason}.",
            expected="an OpenAI-compatible endpoint that serves the target",
            fix=fix,
        )
