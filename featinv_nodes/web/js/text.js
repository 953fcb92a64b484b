// Shows what a node of the pack finds out as a text on the node. The host sends such texts for every node, but its
// frontend shows them on its own text nodes only.
import { app } from "../../../scripts/app.js";
import { nodeAt } from "./graphs.js";

const NAME = "featinv_text";
const LETTER = 6; // pixels
// pixels of a line and around the text; more lines scroll, so that no node grows over the next
const OLDER = { line: 13, around: 18, most: 12 }, NEWER = { line: 16, around: 30, most: 9 };

function heightOf(text, width) {
  const wide = Math.max((width - 36) / LETTER, 10);
  const lines = text.split("\n").reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / wide)), 0);
  const kind = window.LiteGraph?.vueNodesMode ? NEWER : OLDER; // the newer kind of nodes also shows a label
  return kind.around + kind.line * Math.min(lines, kind.most);
}

function added(node) {
  const widget = app.widgets.STRING(node, NAME, ["STRING", { multiline: true }], app).widget;
  if (widget.element) widget.element.readOnly = true;
  widget.label = "found";
  // neither part of a saved workflow nor of what is sent to the host
  widget.serialize = false;
  widget.options.serialize = false;
  return widget;
}

function show(node, output) {
  if (!node?.comfyClass?.startsWith("FeatInv") || !Array.isArray(output?.text)) return;
  const text = output.text.join("\n");
  const widget = node.widgets?.find((w) => w.name === NAME) ?? added(node);
  const height = heightOf(text, node.size[0]);
  widget.value = text;
  widget.options.getMinHeight = widget.options.getMaxHeight = () => height;
  node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
  node.setDirtyCanvas?.(true, true);
}

app.registerExtension({
  name: "FeatInv.Text",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("FeatInv")) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      show(this, output);
    };
  },
  // another workflow's tab, or a run of the history, was opened
  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs)) show(nodeAt(id), output);
  },
});
