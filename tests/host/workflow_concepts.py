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
        f"**Turn a concept down.** The feature map is decomposed into concepts. One of them ({name}) is multiplied by"
        " the factor, and the result is inverted. The list shows all concepts; try another. *Scope* says whether the"
        " changed map is like that of an image. If it is not, the sampler gives the nearest image, and the concept"
        " may still be there. So Concept Closed Loop measures this in the image, and tries other factors until the"
        " concept has the requested strength or the rounds are used up."
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
    g.add("PreviewAny", title="Factors applied", source=found[1])
    result = g.add("FeatInv_Viz", pictures=found[4], edit=found[6], backbone=backbone, threshold=0.33)
    g.add("PreviewImage", title=RESULT, images=result[0])
    g.add("PreviewAny", title=REPORT, source=result[4])
    g.add("PreviewImage", title="Difference", images=result[1])
    g.add("PreviewImage", title="Darker (blue) or brighter (red)", images=result[2])
    g.add("PreviewImage", title=ORIGINAL, images=world.as_seen(features))
    compare(world, found[5], backbone, found[4], "All reconstructions")
    return (
        "**Where is a concept?** FeatInv-Viz (the paper's Algorithm 1) samples five images of the map, and five of each"
        " map with a concept turned down, from the same noise. The pixels that change belong to the concept. The"
        " backbone then reads the images again; the *slope* is the share of the concept that it still finds. If it"
        " differs from the factor, Concept Closed Loop tries other factors, as often as its rounds allow. The paper's"
        f" factor is 0.25; 0 removes the concept. Semicolons separate variants, as in {names!r}; commas turn concepts"
        f" down together. {world.batch[1]} sets the number of seeds. Use a sampler that adds no noise (ddim, euler)."
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
        else "the images of one class, in the folder `my_class` of ComfyUI's input folder"
    )
    return (
        f"**Which concepts does the model have?** Concepts are groups of directions in feature space, found in {where}"
        " without labels (multi-dimensional concept discovery). The images show where each is active, and what"
        " the inversion gives when one is turned down. The list says how much of the features each explains, and which"
        " classes it supports. Try other numbers in Concept Attenuate."
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
        "**Which parts does the model see in an image?** Concepts are groups of directions in feature space, found in"
        " this one image without labels (multi-dimensional concept discovery). Two images are sampled from the same"
        " noise: of the unchanged feature map, and with concept 1 at a quarter. See where each concept is active, and"
        " try other numbers in Concept Attenuate."
    )
