"""What is said while the sampler runs: on the node that it is about, and in the log."""

from __future__ import annotations

import logging
import sys

from comfy_execution.utils import get_executing_context

_standing: dict[str, bool] = {}  # nodes that show a text, and whether it has to go when it no longer holds


def executing_node() -> str | None:
    """The id of the node that the host executes now; None outside of a prompt."""
    context = get_executing_context()
    return context.node_id if context else None


def stands(node: str | None) -> bool:
    """Whether a node shows a text that another has to replace when it no longer holds."""
    return _standing.get(node, False)


def tell(text: str, node: str | None, warn: bool, stands: bool = True) -> None:
    """Shows a text on a node in the browser that queued the prompt, in place of the last one, and writes it to the log
    as a warning, or as information. Without a node or a server there is the log alone. stands: whether the text has to
    go when it no longer holds."""
    logging.log(logging.WARNING if warn else logging.INFO, "FeatInv: %s", text.replace("\n", " "))
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is not None and node is not None:
        server.send_progress_text(text, node, server.client_id)
        _standing[node] = stands


def count(number: int, name: str) -> str:
    """ "1 latent", "3 latents"."""
    return f"{number} {name}{'' if number == 1 else 's'}"


def uneven(given: int, latents: int, name: str = "feature map") -> str:
    """What is amiss with a batch of maps for another number of latents; empty where nothing is: each has its own, or
    each map serves as many."""
    if latents % given == 0:
        return ""
    said = f"{count(given, name)} for {count(latents, 'latent')}: "
    if given > latents:
        return f"{said}those after number {latents} are not used. Give the sampler a batch of {given} latents."
    return (
        f"{said}they repeat in turn, the first ones once more than the others. Give the sampler a multiple of"
        f" {given} latents."
    )


def repeated(given: int, latents: int, name: str = "feature map") -> str:
    """That several maps serve several latents each; empty where they do not."""
    if given == 1 or given == latents or latents % given:
        return ""
    return f"{count(given, name)} for {count(latents, 'latent')}: each serves {latents // given} of them, in turn."
