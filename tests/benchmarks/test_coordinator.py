"""`edgestill bench coordinator`: its client against a small server of ours, and the whole of it, small."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest

from edgestill.benchmarks.coordinator_load import LoadSettings, make_body, vary
from edgestill.benchmarks.http_load import Answer, Connection, Polls, hold_polls
from edgestill.runtime.cli import main
from edgestill.runtime.device.outputs import unpack


def exchange(answers: list[bytes], requests: list[tuple]) -> tuple[list[Answer], bytes]:
    """Answers to requests over one connection, from a server that sends prepared bytes; and all it received."""

    async def run() -> tuple[list[Answer], bytes]:
        received = bytearray()
        prepared = iter(answers)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                received.extend(head + await reader.readexactly(length))
                writer.write(next(prepared))
                await writer.drain()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        connection = Connection("127.0.0.1", server.sockets[0].getsockname()[1])
        found = [await connection.request(*request) for request in requests]
        connection.close()
        server.close()
        return found, bytes(received)

    return asyncio.run(run())


def test_answers_of_both_forms_are_read_over_one_connection() -> None:
    answers = [
        b"HTTP/1.1 201 Created\r\nContent-Length: 2\r\nX-Thing: a\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n\r\n",
    ]
    requests = [("PUT", "/a", {"X": "1"}, b"body"), ("GET", "/b"), ("POST", "/c")]
    found, received = exchange(answers, requests)
    assert [(answer.status, answer.body) for answer in found] == [(201, b"{}"), (200, b"abcde"), (204, b"")]
    assert found[0].headers["x-thing"] == "a" and found[0].json() == {}
    assert (
        received.startswith(b"PUT /a HTTP/1.1\r\n")
        and b"X: 1\r\nContent-Length: 4\r\n\r\nbodyGET /b" in received
    )


def test_a_poll_that_is_answered_otherwise_is_an_error() -> None:
    async def run() -> Polls:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        polls = Polls()
        await hold_polls("127.0.0.1", server.sockets[0].getsockname()[1], ["t", "u"], 1.0, polls, {})
        server.close()
        return polls

    polls = asyncio.run(run())
    assert len(polls.errors) == 2 and "401" in polls.errors[0] and polls.held == 0


def test_polls_count_the_fewest_that_were_held() -> None:
    polls = Polls()
    polls.change(+3)
    polls.begin_count()
    for by in (-1, -1, +2, +1):
        polls.change(by)
    assert (polls.held, polls.fewest) == (4, 1)


def test_bodies_differ_and_all_are_uploads() -> None:
    settings = LoadSettings(samples=5, latent_size=3)
    base = make_body(settings, 0)
    bodies = {vary(base, index) for index in range(3000)}
    assert len(bodies) == 3000
    expected = unpack(base, "identity", {"latents": (5, 3)})[0]["latents"]
    for body in (vary(base, 0), vary(base, 2999)):
        arrays, metadata = unpack(body, "identity", {"latents": (5, 3)})
        assert metadata["samples"] == "100"
        np.testing.assert_array_equal(arrays["latents"][:4], expected[:4])


@pytest.mark.contract
def test_a_small_load_on_a_real_server(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "coordinator", "--uploads", "30", "--long-polls", "20", "--samples", "50", "--json"]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert "holding" in captured.err and "upload 0 of" in captured.err
    result = json.loads(captured.out)
    assert tuple(result)[:4] == ("uploads_per_s", "p99_ms", "long_polls", "errors")
    assert result["uploads"] == 30 and result["long_polls"] == 20 and result["errors"] == 0
    assert result["uploads_per_s"] > 0 and result["p99_ms"] >= result["p50_ms"] > 0
