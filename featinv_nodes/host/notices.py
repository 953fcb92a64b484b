"""Messages while the sampler runs, on the node and in the log."""

from __future__ import annotations

import logging
import sys

from comfy_execution.utils import get_executing_context

_standing: set[str] = set()  # nodes that show a text which has to go when it no longer holds


def executing_node() -> str | None:
    """The id of the node that the host executes now; None outside of a prompt."""
    context = get_executing_context()
    return context.node_id if context else None


def tell(node: str | None, wrong: list[str], notes: list[str], fits: str) -> None:
    """Shows problems and notes on a node, in the browser that queued the prompt, and logs them; problems as
    warnings. Without either, `fits` replaces the text of an earlier run. Without a node or a server they are only
    logged."""
    text = "\n".join([*wrong, *notes])
    if not text and node not in _standing:
        return
    level = logging.WARNING if wrong else logging.INFO
    logging.log(level, "FeatInv: %s", (text or fits).replace("\n", " "))
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is None or node is None:
        return
    server.send_progress_text(text or fits, node, server.client_id)
    (_standing.add if text else _standing.discard)(node)


def tell_counts(node: str | None, latents: int, batches: list[tuple[int, str]], wrong: list[str] | None = None) -> None:
    """Shows how batches fit a number of latents. batches: the size and the name of each, "feature map" first.
    wrong: other problems."""
    amiss = filter(None, (uneven(given, latents, name) for given, name in batches))
    notes = filter(None, (repeated(given, latents, name) for given, name in batches))
    tell(node, [*amiss, *(wrong or [])], list(notes), f"{count(*batches[0])} for {count(latents, 'latent')}")


def count(number: int, name: str) -> str:
    """ "1 latent", "3 latents"."""
    return f"{number} {name}{'' if number == 1 else 's'}"


def uneven(given: int, latents: int, name: str = "feature map") -> str:
    """The problem of a batch of maps with another number of latents; empty if each latent has its own map, or
    each map serves equally many."""
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
