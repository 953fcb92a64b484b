"""The HTTP route for the pack's page scripts."""

from __future__ import annotations

import asyncio
import logging
import sys


def register() -> None:
    """Adds GET /featinv/layers?weights=&timm_name= or ?backbone=: the names of a backbone's layers as JSON, [] where
    it cannot be told. Does nothing in a process that serves no pages."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is None:
        return
    from aiohttp import web

    @server.routes.get("/featinv/layers")
    async def layers(request: web.Request) -> web.Response:
        return web.json_response(await asyncio.to_thread(listed, dict(request.query)))


def listed(query: dict[str, str]) -> list[str]:
    """The layers of the backbone that Load Backbone's widgets or a full name describe; [] where it cannot be told."""
    from . import backbones

    try:
        weights = query.get("weights") or backbones.find_weights(query["backbone"])
        return backbones.layers(weights, query.get("timm_name", ""))
    except Exception as error:  # a page must not fail for what the node will say itself when it runs
        logging.debug("FeatInv: no layers for %s: %s", query, error)
        return []
