"""A load generator for the coordinator: plain HTTP/1.1 over kept-alive connections, as little work a request as
possible, so that the server is what is measured."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SHORT_POLL_S = 0.1


@dataclass(frozen=True)
class Answer:
    """What came back: status, headers by lower-case name, and the body."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Connection:
    """One kept-alive connection; one request at a time. Errors: OSError, asyncio.IncompleteReadError."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def request(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> Answer:
        """Sends one request and reads its whole answer."""
        if self._writer is None or self._writer.is_closing():
            self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self._host}:{self._port}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        lines += [f"Content-Length: {len(body)}", "", ""]
        self._writer.write("\r\n".join(lines).encode("ascii"))
        self._writer.write(body)
        await self._writer.drain()
        return await self._answer()

    async def post(self, path: str, value: Any, token: str | None = None) -> Answer:
        """Sends JSON."""
        headers = {"Content-Type": "application/json"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        return await self.request("POST", path, headers, json.dumps(value).encode())

    async def _answer(self) -> Answer:
        assert self._reader is not None
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *rest = head.split("\r\n")
        headers = {}
        for line in filter(None, rest):
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        if headers.get("transfer-encoding", "").lower() == "chunked":
            body = await self._chunks()
        else:
            body = await self._reader.readexactly(int(headers.get("content-length", "0")))
        if headers.get("connection", "").lower() == "close":
            self.close()
        return Answer(int(first.split(" ", 2)[1]), headers, body)

    async def _chunks(self) -> bytes:
        assert self._reader is not None
        parts = []
        while size := int((await self._reader.readline()).split(b";")[0], 16):
            parts.append(await self._reader.readexactly(size))
            await self._reader.readexactly(2)
        await self._reader.readexactly(2)
        return b"".join(parts)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


@dataclass
class Polls:
    """How many devices poll, with at most a moment between two polls, and the fewest since the count began."""

    held: int = 0
    fewest: int | None = None
    errors: list[str] = field(default_factory=list)

    def begin_count(self) -> None:
        self.fewest = self.held

    def change(self, by: int) -> None:
        self.held += by
        if self.fewest is not None:
            self.fewest = min(self.fewest, self.held)


async def hold_polls(
    host: str, port: int, tokens: Sequence[str], wait_s: float, polls: Polls, status: Mapping[str, Any]
) -> None:
    """Keeps one long poll open for every token, until it is cancelled."""

    async def poll(token: str) -> None:
        connection = Connection(host, port)
        polls.change(+1)
        try:
            while True:
                started_s = time.perf_counter()
                answer = await connection.post(f"/v1/work?wait_s={wait_s:g}", status, token)
                if answer.status != 204:
                    polls.errors.append(f"a long poll was answered {answer.status}: {answer.body[:200]!r}")
                    return
                if time.perf_counter() - started_s < min(wait_s, SHORT_POLL_S):
                    # answered at once: there was no room for it, and it is not held until it asks again
                    polls.change(-1)
                    await asyncio.sleep(0.5)
                    polls.change(+1)
        except (OSError, asyncio.IncompleteReadError) as error:
            polls.errors.append(f"a long poll broke: {error}")
        finally:
            polls.change(-1)
            connection.close()

    async with asyncio.TaskGroup() as group:
        for token in tokens:
            group.create_task(poll(token))
