"""`/docs`: the API's description as a page of its own, which needs nothing from the internet."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

router = APIRouter(include_in_schema=False)
_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:auto;padding:1rem}
code,pre{font-family:ui-monospace,monospace;font-size:.9em}pre{overflow:auto;padding:.5rem;border:1px solid #8888}
h2{margin-top:2.5rem;overflow-wrap:anywhere}table{border-collapse:collapse}
td,th{border:1px solid #8888;padding:.2rem .6rem;text-align:left;vertical-align:top}:root{color-scheme:light dark}"""
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


@router.get("/docs")
async def docs(request: Request) -> HTMLResponse:
    """Every operation with its parameters, body and answers."""
    root = str(request.scope.get("root_path", "")).rstrip("/")
    return HTMLResponse(render(request.app.openapi(), root), headers=_HEADERS)


def render(description: dict[str, Any], root: str = "") -> str:
    """An OpenAPI description as an HTML document without scripts."""
    info = description["info"]
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(info['title'])}: API</title>"
        f'<meta name=viewport content="width=device-width"><style>{_STYLE}</style>'
        f"<main><h1>{escape(info['title'])}: API</h1><p>{escape(info['description'])}</p>"
        f'<p><a href="{escape(root)}/openapi.json">openapi.json</a></p>'
    ]
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            parts.append(_operation(method, path, operation))
    return "\n".join([*parts, "</main></html>\n"])


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    parts = [f"<h2><code>{method.upper()} {escape(path)}</code></h2>"]
    parts.append(f"<p>{escape(operation.get('description', ''))}</p>")
    if operation.get("security"):
        parts.append("<p>Needs a device's bearer token.</p>")
    if parameters := operation.get("parameters"):
        rows = [(one["name"], one["in"], one.get("description", "")) for one in parameters]
        parts.append(_table(("parameter", "in", "what"), rows))
    for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
        schema = escape(json.dumps(content["schema"], indent=1))
        parts.append(f"<details><summary>Body: {escape(media_type)}</summary><pre>{schema}</pre></details>")
    rows = [(status, answer["description"]) for status, answer in sorted(operation["responses"].items())]
    parts.append(_table(("answer", "when"), rows))
    return "".join(parts)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}' for cell in row)}" for row in rows)
    return f"<table><tr>{''.join(f'<th scope=col>{cell}' for cell in head)}{lines}</table>"
