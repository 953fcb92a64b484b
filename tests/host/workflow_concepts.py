"""The workflows about concepts. Each function adds its nodes and returns its note."""

from __future__ import annotations

from layout import SEEN
from workflow_parts import (
    ORIGINAL,
    REPORT,
    RESULT,
    add_control,
    closed_loop,
    compare,
    draw,
    extract,
    sample,
    start,
    turned_down,
)
from workflow_worlds import World


def attenuate(world: World) -> str:
    g = world.graph
    backbone, control = start(world)
    picture, features = extract(world, backbone, 3)
    concepts = world.concepts(backbone, picture)
    name = "water" if world.name == "drawn" else "0"
    weaker = turned_down(world, features, concepts, control, name, 0.25)
    settings = world.settings(world.kind)
    steered, latent = add_control(world, weaker[0], control, settings), world.empty(1)
    pictures = sample(world, steered, settings, latent)
    g.add("PreviewImage", title="Without the closed loop", images=world.enlarged(pictures[0]))
    found = closed_loop(world, weaker, backbone, steered, settings, latent)
    compare(world, weaker[0], backbone, found[0])
    g.add("PreviewAny", title=REPORT, source=found[1])
    g.add("PreviewImage", title=ORIGINAL, images=world.as_seen(features))
    previews = g.add("FeatInv_ConceptMap", features=features[0], concepts=concepts[0])
    g.add("PreviewImage", title="Where each concept is active", stage=SEEN, images=previews[0])
    g.add("PreviewAny", title="The concepts", stage=SEEN, source=concepts[1])
    return (
        f"**Turn a concept down.** The feature map is taken apart into concepts; one of them ({name}) is multiplied by"
        " the factor, and the result is drawn. Names and numbers of the concepts are listed; try another. *Scope* says"
        " whether the changed map is like one that a picture has; where it is not, the sampler draws the nearest"
        " that is, and the concept may still be there. So Concept Closed Loop draws, lets the backbone read the"
        " picture, and commands another factor, until the picture shows what was asked or the rounds are used up."
    )


def viz(world: World) -> str:
    g = world.graph
    backbone, control = start(world)
    picture, features = extract(world, backbone, 4)
    names, factor = ("object; sky", 0.0) if world.name == "drawn" else ("0; 1; 2", 0.25)
    weaker = turned_down(world, features, world.concepts(backbone, picture), control, names, factor)
    settings = world.settings(world.kind)
    steered = add_control(world, weaker[0], control, settings)
    found = closed_loop(world, weaker, backbone, steered, settings, world.empty(5))
    g.add("PreviewAny", title="What was commanded", source=found[1])
    result = g.add("FeatInv_Viz", pictures=found[4], edit=found[6], backbone=backbone, threshold=0.33)
    g.add("PreviewImage", title=RESULT, images=result[0])
    g.add("PreviewAny", title=REPORT, source=result[4])
    g.add("PreviewImage", title="Difference", images=result[1])
    g.add("PreviewImage", title="Darker (blue) or brighter (red)", images=result[2])
    g.add("PreviewImage", title=ORIGINAL, images=world.as_seen(features))
    compare(world, found[5], backbone, found[4], "All reconstructions")
    return (
        "**Where does a concept live?** FeatInv-Viz (the paper's Algorithm 1): five pictures of the map, and five of"
        " each map with a concept turned down, seed by seed from the same noise; the pixels that change are the"
        " concept's. The *slope* says whether the pictures show what was asked: the backbone reads them again, and"
        " finds the concept at that share of what it was. Where the factor asked does not do that, Concept Closed Loop"
        " commands others, up to its number of rounds; with 1 it draws what was asked. Semicolons part variants, as in"
        f" {names!r}; commas would turn concepts down together. The paper's factor is 0.25; 0 removes the concept."
        " Change the number of seeds in"
        f" {world.batch[1]}, and keep to samplers without noise of their own (ddim, euler)."
    )


def discover(world: World) -> str:
    g = world.graph
    backbone, control = start(world)
    picture, features = extract(world, backbone, 5)
    concepts = g.add(
        "FeatInv_DiscoverConcepts",
        backbone=backbone,
        layer="last",
        method="mcd",
        vectors=20_000,
        seed=0,
        fit="crop",
        **world.many(),
    )
    g.add("PreviewAny", title="The concepts", stage=SEEN, source=concepts[1])
    previews = g.add("FeatInv_ConceptMap", features=features[0], concepts=concepts[0])
    g.add("PreviewImage", title=ORIGINAL, images=world.as_seen(features))
    g.add("PreviewImage", title="Result: where each concept is active", images=previews[0])
    weaker = turned_down(world, features, concepts, control, "2", 0.25)
    compare(world, weaker[0], backbone, draw(world, weaker[0], control)[0])
    where = (
        "64 scenes"
        if world.name == "drawn"
        else "the pictures of one class, in the folder `my_class` of ComfyUI's input folder"
    )
    return (
        f"**Which concepts does the model have?** Directions in feature space that belong together, found in {where}"
        " without any labels (multi-dimensional concept discovery). Then: where each is active in one picture, and"
        " what is drawn when one is turned down. The list says how much of the features each is, and which classes it"
        " speaks for; put another number into Concept Attenuate."
    )


def concept(world: World) -> str:
    g = world.graph
    backbone, control = start(world)
    picture, features = extract(world, backbone, 0)
    concepts = world.concepts(backbone, picture)
    g.add("PreviewAny", title="The concepts", stage=SEEN, source=concepts[1])
    weaker = turned_down(world, features, concepts, control, "1", 0.25)
    paired = g.add("FeatInv_PairedLatents", edit=weaker[1], latent=world.empty(1))
    compare(world, paired[0], backbone, draw(world, paired[0], control, latent=paired[1])[0])
    previews = g.add("FeatInv_ConceptMap", features=features[0], concepts=concepts[0])
    g.add("PreviewImage", title=ORIGINAL, images=world.as_seen(features))
    g.add("PreviewImage", title=f"{RESULT}: where each concept is active", images=previews[0])
    return (
        "**What is the picture made of, to the model?** Concepts, directions in feature space that belong together,"
        " found in this one picture without any labels (multi-dimensional concept discovery). Then two pictures from"
        " the same noise: of the feature map as it is, and with concept 1 at a quarter. See where each concept is"
        " active, and put another number into Concept Attenuate."
    )
