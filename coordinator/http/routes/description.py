"""`/docs`: the API's description as a page in the dashboard's style, which needs nothing from the internet."""

from __future__ import annotations

import json
import re
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

router = APIRouter(include_in_schema=False)
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


@router.get("/docs")
async def docs(request: Request) -> HTMLResponse:
    """Every operation with its parameters, body and answers."""
    root = str(request.scope.get("root_path", "")).rstrip("/")
    return HTMLResponse(render(request.app.openapi(), root), headers=_HEADERS)


def render(description: dict[str, Any], root: str = "") -> str:
    """An OpenAPI description as an HTML document without scripts."""
    info, home = description["info"], f"{escape(root)}/"
    title = escape(f"{info['title']}: API")
    operations = (
        _operation(method, path, operation)
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    )
    return f"""<!doctype html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <meta name="color-scheme" content="light dark">
  <title>{title}</title>
  <link rel="stylesheet" href="{home}static/dashboard.css">
  <link rel="icon" href="{home}static/icon.svg" type="image/svg+xml">
</head>
<body>
  <header><nav aria-label="Main"><a class="brand" href="{home}">edgestill</a> <span aria-hidden="true">/</span>
    <a href="{home}docs" aria-current="page">API</a></nav></header>
  <main id="content" class="description">
    <h1>{title}</h1>
    <p>{_text(info["description"])} As a file: <a href="{home}openapi.json">openapi.json</a>.</p>
    {"".join(operations)}
  </main>
</body>
</html>
"""


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    parts = [f"<h2><code>{method.upper()} {escape(path)}</code></h2>"]
    said = operation.get("description", "")
    parts.append(f"<p>{_text(said)}{' Needs a device’s bearer token.' if operation.get('security') else ''}</p>")
    if parameters := operation.get("parameters"):
        rows = [(one["name"], one["in"], one.get("description", "")) for one in parameters]
        parts.append(_table(("parameter", "in", "what"), rows))
    for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
        schema = escape(json.dumps(content["schema"], indent=1))
        parts.append(f"<details><summary>Body: {escape(media_type)}</summary><pre>{schema}</pre></details>")
    answers = sorted(operation["responses"].items())
    rows = [(status, answer["description"].replace("Successful Response", "done")) for status, answer in answers]
    parts.append(_table(("answer", "when"), rows))
    return f'<section class="card">{"".join(parts)}</section>'


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    titles = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table>"


def _text(text: str) -> str:
    """Escaped, with what stands in backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
