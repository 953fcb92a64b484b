// The page's graphs: the workflow's own and those of its subgraphs.
import { app } from "../../../scripts/app.js";

const FROM_OUTSIDE = -10; // the host's number of what feeds a subgraph's inputs
const DEEP = 100; // links followed one after the other; only a circle has more

const rootGraph = () => app.rootGraph ?? app.graph?.rootGraph ?? app.graph;

const subgraphs = () => [...(rootGraph()?.subgraphs?.values() ?? [])];

export const allNodes = () => [rootGraph(), ...subgraphs()].flatMap((graph) => graph?._nodes ?? []);

// locator: the host's name of a node, "7" or "ID OF A SUBGRAPH:7"
export function nodeAt(locator) {
  const at = locator.lastIndexOf(":");
  const graph = at < 0 ? rootGraph() : rootGraph()?.subgraphs?.get(locator.slice(0, at));
  return graph?.getNodeById(locator.slice(at + 1)) ?? null;
}

// The node that feeds an input, through reroutes and the borders of subgraphs; null where there is none.
export function originOf(node, name) {
  let slot = node.inputs?.findIndex((input) => input.name === name) ?? -1;
  for (let step = 0; step < DEEP && node?.graph; step++) {
    const inside = node.graph;
    let link = inside.getLink(node.inputs?.[slot]?.link);
    if (link?.origin_id === FROM_OUTSIDE) {
      node = allNodes().find((n) => n.subgraph === inside);
      slot = link.origin_slot;
      continue;
    }
    let origin = link && inside.getNodeById(link.origin_id);
    while (origin?.subgraph) {
      link = origin.subgraph.getLink(origin.subgraph.outputs[link.origin_slot]?.linkIds[0]);
      origin = link && origin.subgraph.getNodeById(link.origin_id);
    }
    if (origin?.type !== "Reroute") return origin ?? null;
    [node, slot] = [origin, 0];
  }
  return null;
}
