"""ComfyUI's door to the pack."""

from __future__ import annotations

import logging
from importlib.util import find_spec

from comfy_api.latest import ComfyExtension, io

WEB_DIRECTORY = "./featinv_nodes/web"


class FeatInv(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        from .featinv_nodes.nodes import ALL

        return ALL


async def comfy_entrypoint() -> ComfyExtension:
    from .featinv_nodes.host import folders

    folders.register()
    if find_spec("timm") is None:
        logging.warning(
            "FeatInv: the package timm is missing; run `pip install timm` with the Python that runs ComfyUI"
        )
    return FeatInv()
