// Gives the pack's wires and sockets colours of their own; the host draws types that it does not know in its default.
import { app } from "../../../scripts/app.js";

const COLORS = {
  FEATINV_BACKBONE: "#f4e9cd",
  FEATINV_FEATURES: "#00e5a8",
  FEATINV_CONTROL_NET: "#3d7bff",
  FEATINV_FEATURE_DECODER: "#ff9f1c",
  FEATINV_CONCEPTS: "#e040fb",
  FEATINV_EDIT: "#c6ff00",
  FEATINV_LINEAR_MAP: "#ff7043",
};

// The host empties the colours of types that are not in its palette whenever it loads one: ours then stay. A palette
// that has a colour for a type of ours wins.
function keep(colors) {
  for (const [type, color] of Object.entries(COLORS)) {
    let now = colors[type] || color;
    Object.defineProperty(colors, type, {
      get: () => now,
      set: (value) => { now = value || color; },
      enumerable: true,
      configurable: true,
    });
  }
}

app.registerExtension({
  name: "FeatInv.Colors",
  setup() {
    keep(app.canvas.default_connection_color_byType);
    keep(window.LGraphCanvas.link_type_colors);
    // the newer kind of nodes reads them from the page's style
    const style = document.createElement("style");
    const lines = Object.entries(COLORS).map(([type, color]) => `--color-datatype-${type}: ${color};`);
    style.textContent = `:root { ${lines.join(" ")} }`;
    document.head.append(style);
    app.canvas.setDirty(true, true);
  },
});
