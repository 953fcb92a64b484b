// Makes `layer` a list. FeatInv Loader's follows the choice of the backbone; Extract Features' and Discover Concepts' is
// a text to the host, and becomes a list of the connected backbone's layers where these can be told.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { allNodes, originOf } from "./graphs.js";

const LOADERS = ["FeatInv_Loader", "FeatInv_LoadBackbone"];
const answers = new Map(); // query -> promise of names
let layersByBackbone = {}; // of FeatInv Loader

const valueOf = (node, name) => node.widgets?.find((w) => w.name === name)?.value;

function layersOf(query) {
  if (!answers.has(query)) {
    answers.set(query, api.fetchApi(`/featinv/layers?${query}`).then((r) => (r.ok ? r.json() : [])).catch(() => []));
    answers.get(query).then((names) => names.length || answers.delete(query)); // asked again another time
  }
  return answers.get(query);
}

function backboneOf(node) {
  const origin = originOf(node, "backbone");
  return LOADERS.includes(origin?.comfyClass) ? origin : null;
}

function queryOf(loader) {
  const names = loader.comfyClass === "FeatInv_Loader" ? ["backbone"] : ["weights", "timm_name"];
  return new URLSearchParams(names.map((name) => [name, valueOf(loader, name) ?? ""])).toString();
}

// puts a widget in another's place, with its value
function replace(node, old, make) {
  const place = node.widgets.indexOf(old), size = [...node.size];
  node.widgets.splice(place, 1);
  const made = make();
  node.widgets.splice(node.widgets.indexOf(made), 1);
  node.widgets.splice(place, 0, made);
  made.tooltip = old.tooltip;
  made.disabled = old.disabled;
  node.setSize(size);
  return made;
}

async function followBackbone(node) {
  const decided = node.inputs?.find((i) => i.name === "control_net")?.link != null;
  for (const widget of node.widgets ?? []) if (["layer", "pooled"].includes(widget.name)) widget.disabled = decided;
  const loader = backboneOf(node);
  const names = loader ? await layersOf(queryOf(loader)) : [];
  const widget = node.widgets?.find((w) => w.name === "layer");
  if (!widget || loader !== backboneOf(node)) return; // changed meanwhile
  if (widget.type === "combo") widget.options.values = names.length ? names : [widget.value];
  else if (names.length) replace(node, widget, () => node.addWidget("combo", "layer", widget.value, () => {}, { values: names }));
  node.setDirtyCanvas?.(true, true);
}

// chosen: by the user just now, so that a layer which the backbone has not gives way
function followChoice(node, chosen) {
  const widget = node.widgets?.find((w) => w.name === "layer");
  const layers = layersByBackbone[valueOf(node, "backbone")];
  if (!widget || !layers) return;
  widget.options.values = layers;
  if (chosen && !layers.includes(widget.value)) widget.value = layers.includes("last") ? "last" : layers[0];
  node.setDirtyCanvas?.(true, true);
}

function refreshAll() {
  for (const node of allNodes()) node.featinvLayers?.(false);
}

app.registerExtension({
  name: "FeatInv.Layers",
  beforeRegisterNodeDef(nodeType, { name, input }) {
    if (!name.startsWith("FeatInv_")) return;
    if (name === "FeatInv_Loader") {
      layersByBackbone = input.required.layer[1].layers_of;
      nodeType.prototype.featinvLayers = function (chosen) { followChoice(this, chosen); };
      const configured = nodeType.prototype.onConfigure;
      nodeType.prototype.onConfigure = function () {
        configured?.apply(this, arguments);
        this.featinvLayers(false);
      };
    } else if (input?.required?.layer && input.required.backbone) {
      nodeType.prototype.featinvLayers = function () { followBackbone(this); };
      const changed = nodeType.prototype.onConnectionsChange;
      nodeType.prototype.onConnectionsChange = function () {
        changed?.apply(this, arguments);
        this.featinvLayers();
      };
    }
  },
  nodeCreated(node) {
    node.featinvLayers?.(true);
    if (!LOADERS.includes(node.comfyClass)) return;
    for (const widget of node.widgets ?? []) {
      const callback = widget.callback;
      widget.callback = function () {
        callback?.apply(this, arguments);
        node.featinvLayers?.(widget.name !== "layer");
        refreshAll();
      };
    }
  },
  afterConfigureGraph: refreshAll,
  refreshComboInNodes(defs) {
    layersByBackbone = defs.FeatInv_Loader?.input.required.layer[1].layers_of ?? layersByBackbone;
    answers.clear();
    refreshAll();
  },
});
