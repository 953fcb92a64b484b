"""ComfyUI's entry point to the pack."""

from __future__ import annotations

import logging
from importlib.metadata import version
from importlib.util import find_spec

from comfy_api.latest import ComfyExtension, io

WEB_DIRECTORY = "./featinv_nodes/web"


class FeatInv(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        from .featinv_nodes.nodes import ALL

        return ALL


async def comfy_entrypoint() -> ComfyExtension:
    from .featinv_nodes.core.requirements import old_timm
    from .featinv_nodes.host import folders, routes

    folders.register()
    routes.register()
    for name in ("timm", "pydantic"):
        if find_spec(name) is None:
            logging.warning(
                f"FeatInv: the package {name} is missing; run `pip install {name}` with the Python that runs ComfyUI"
            )
        elif name == "timm" and (fault := old_timm(version("timm"))):
            logging.warning(f"FeatInv: {fault}")
    return FeatInv()
