"""Judge models behind an OpenAI-compatible endpoint: OpenAI itself, vLLM, llama.cpp, Ollama and others.

The client library does retries with exponential back-off and honours Retry-After. The key comes from an environment
variable, goes into the client and nowhere else: errors and replies are searched for it before anybody sees them.
"""

from __future__ import annotations

import ipaddress
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from sgworkbench.errors import WorkbenchError
from sgworkbench.evaluation.judges.backend import NO_REPLY, Reply, Request
from sgworkbench.evaluation.text_stream import replace_lone_surrogates

DEFAULT_KEY_VARIABLE = "OPENAI_API_KEY"
OPENAI_HOST = "api.openai.com"
# What servers without keys are sent; the library insists on some text.
_NO_KEY = "none"
_HIDDEN = "[key]"
# Refusals of one request, not of the client or the server.
_REQUEST_FAULTS = (400, 413, 422)
_MESSAGE_CHARACTERS = 200


class EndpointBackend:
    """An endpoint and a model on it.

    Attributes:
        identity: URL and model.
        chunk: requests handed over at once.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_variable: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        concurrency: int = 8,
    ) -> None:
        """Make a client; nothing is sent yet.

        Args:
            url: base URL, such as http://localhost:8000/v1.
            model: the model's name there.
            key_variable: environment variable with the key. None takes OPENAI_API_KEY where it is set, except over
                plain http to another machine, which would show the key to the network.
            timeout: seconds to wait for the endpoint, each attempt.
            retries: attempts after the first one.
            concurrency: requests under way at once.

        Raises:
            WorkbenchError: the openai package is missing, an impossible URL or number, or no key where one is needed.
        """
        try:
            import openai
        except ImportError:
            raise WorkbenchError(
                "Judging over an endpoint needs the openai package: `pip install 'sgworkbench[judges]'`."
            ) from None
        check_url(url)
        if timeout <= 0 or retries < 0 or concurrency < 1:
            raise WorkbenchError(
                f"Timeout must be positive, retries at least 0 and concurrency at least 1; found {timeout:g}, "
                f"{retries} and {concurrency}."
            )
        self._openai = openai
        self._key = read_key(url, key_variable)
        self._client = openai.OpenAI(api_key=self._key or _NO_KEY, base_url=url, timeout=timeout, max_retries=retries)
        self._attempts = retries + 1
        self._timeout = timeout
        self._concurrency = concurrency
        self.url = url
        self.model = model
        self.identity: Mapping[str, Any] = {"backend": "endpoint", "url": url.rstrip("/"), "model": model}
        self.chunk = 16 * concurrency

    def answer(self, requests: Sequence[Request], keep: Callable[[int, Reply], None]) -> list[Reply]:
        """Ask everything, `concurrency` requests at a time; see `Backend.answer`."""
        replies: list[Reply | None] = [None] * len(requests)
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for position in range(len(requests)):
            waiting.put(position)
        lock, stop, raised = threading.Lock(), threading.Event(), []

        def work() -> None:
            while not stop.is_set():
                try:
                    position = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    reply = self._ask(requests[position])
                    with lock:
                        if not stop.is_set():
                            replies[position] = reply
                            keep(position, reply)
                except BaseException as error:
                    raised.append(error)
                    stop.set()

        # Daemon threads: a request that hangs must not keep a stopped program alive.
        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(self._concurrency, len(requests)))]
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads) and not stop.is_set():
                for thread in threads:
                    thread.join(0.05)
        finally:
            stop.set()
        if raised:
            raise raised[0]
        return [reply for reply in replies if reply is not None]

    def _ask(self, request: Request) -> Reply:
        settings = request.decoding
        try:
            # A server may answer with anything, so nothing about the shape of the answer is believed.
            if request.messages is None:
                answer: Any = self._client.completions.create(
                    model=self.model,
                    prompt=request.text or "",
                    temperature=settings.temperature,
                    max_tokens=settings.max_tokens,
                )
            else:
                answer = self._client.chat.completions.create(
                    model=self.model,
                    messages=request.chat(),
                    temperature=settings.temperature,
                    max_tokens=settings.max_tokens,
                )
        except self._openai.APITimeoutError:
            return self._failed(f"it took longer than {self._timeout:g} s ({self._tries()})")
        except self._openai.APIConnectionError as error:
            return self._failed(f"it cannot be reached ({error.__cause__ or error}; {self._tries()})")
        except self._openai.APIStatusError as error:
            return self._refused(error)
        except (self._openai.OpenAIError, ValueError, TypeError, AttributeError, LookupError):
            return self._failed("it does not answer as an OpenAI-compatible endpoint does")
        return self._reply(answer, chat=request.messages is not None)

    def _reply(self, answer: Any, *, chat: bool) -> Reply:
        choices = getattr(answer, "choices", None)
        if not isinstance(choices, list) or not choices:
            return self._failed("it does not answer as an OpenAI-compatible endpoint does")
        choice = choices[0]
        text = getattr(choice, "text", None)
        if chat:
            message = getattr(choice, "message", None)
            # A refusal in the field for refusals is a reply too: one without a verdict.
            text = getattr(message, "content", None) or getattr(message, "refusal", None)
        reason = getattr(choice, "finish_reason", None)
        if not isinstance(text, str) or not text.strip():
            why = " (cut at its token limit)" if reason == "length" else ""
            return self._failed(f"it returned no text{why}", fault="request")
        return Reply(self._without_key(text), cut=reason == "length")

    def _refused(self, error: Any) -> Reply:
        status = int(error.status_code)
        # Other servers' messages may repeat the request, so only those that speak of the model are shown.
        said = f": {' '.join(str(error.message).split())[:_MESSAGE_CHARACTERS]}" if status == 404 else ""
        hint = {
            401: "; the key is missing or wrong",
            403: "; the key does not give access to this",
            404: "; check the URL and the model's name",
            429: f"; too many requests or no credit left ({self._tries()})",
        }.get(status, "")
        fault = "request" if status in _REQUEST_FAULTS else "backend"
        return self._failed(f"it answers with HTTP status {status}{hint}{said}", fault=fault)

    def _failed(self, why: str, fault: Any = "backend") -> Reply:
        sentence = f"{NO_REPLY} {self.model!r} at {self.url}: {why.rstrip('.')}."
        return Reply(None, error=self._without_key(sentence), fault=fault)

    def _tries(self) -> str:
        return f"{self._attempts} attempt{'s' if self._attempts > 1 else ''}"

    def _without_key(self, text: str) -> str:
        text = replace_lone_surrogates(text)
        return text.replace(self._key, _HIDDEN) if self._key else text


def check_url(url: str) -> None:
    """Refuse what is not a base URL, and a URL that carries a password or key (it would end up in files).

    Raises:
        WorkbenchError: saying which of the two.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host, parts = None, urlsplit("")
    if parts.scheme not in ("http", "https") or not host:
        raise WorkbenchError("The endpoint must be a base URL such as http://localhost:8000/v1.")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise WorkbenchError(
            "The endpoint's URL must hold no user name, password or query, because it is written to files; put the "
            "key into an environment variable and name it with --api-key-env."
        )


def read_key(url: str, variable: str | None) -> str | None:
    """Return the key for an endpoint from the environment, or None where none is sent.

    Raises:
        WorkbenchError: the named variable is not set, or OpenAI is asked without a key.
    """
    parts = urlsplit(url)
    if variable is not None:
        key = os.environ.get(variable, "").strip()
        if not key:
            # What was given may be a key by mistake, so it is not repeated.
            raise WorkbenchError(
                "The environment variable given with --api-key-env is not set; it takes the name of a variable that "
                "holds the key, not the key."
            )
        return key
    key = os.environ.get(DEFAULT_KEY_VARIABLE, "").strip()
    if not key and parts.hostname == OPENAI_HOST:
        raise WorkbenchError(
            f"{OPENAI_HOST} needs a key: set {DEFAULT_KEY_VARIABLE}, or name another endpoint with --endpoint or a "
            f"model folder with --local-model."
        )
    if parts.scheme == "http" and not _is_this_machine(parts.hostname or ""):
        return None
    return key or None


def _is_this_machine(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
