// Opens workflows in the host's real frontend, queues them, and says what happened; one line of JSON.
//
//     node browser.mjs URL OUT FILE...
//
// Needs playwright-core (its folder in PLAYWRIGHT_CORE, or where node finds it) and Chromium (CHROMIUM).
import { createRequire } from "node:module";
import { mkdirSync, readFileSync } from "node:fs";
import { basename, join } from "node:path";

const require = createRequire(join(process.cwd(), "x.js"));
const { chromium } = require(process.env.PLAYWRIGHT_CORE || "playwright-core");
const [url, out, ...files] = process.argv.slice(2);
const RUNS = /^(tiny|photo)_.*\.json$/; // which are queued: they need no download
const HANG = 600000; // milliseconds that only a page that hangs can take
const NODES = () => window.app?.graph && window.app.canvas && Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 100;
mkdirSync(out, { recursive: true });

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM || "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
});
const page = await browser.newPage({ viewport: { width: 1920, height: 1080 } });
const trouble = [];
page.on("pageerror", (error) => trouble.push(`page error: ${error.message}`));
page.on("console", (message) => message.type() === "error" && trouble.push(message.text()));

page.setDefaultTimeout(HANG);
// until the requests and drawings that an action causes are over
const settled = async () => {
  await page.waitForLoadState("networkidle");
  await page.evaluate(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))));
};

await page.goto(url);
await page.waitForFunction(NODES);
await page.evaluate(() => window.app.api.fetchApi("/settings", {
  method: "POST",
  body: JSON.stringify({ "Comfy.TutorialCompleted": true, "Comfy.Workflow.ShowMissingModelsWarning": false, "Comfy.Graph.CanvasInfo": false, "Comfy.Minimap.Visible": false }),
}));
await page.reload();
await page.waitForFunction(NODES);
await settled();
await page.keyboard.press("Escape");

// another palette and back, as a user may choose: the pack's colours must stay
for (const palette of ["light", "dark"]) {
  await page.evaluate((id) => window.app.extensionManager.setting.set("Comfy.ColorPalette", id), palette);
  await settled();
}
// of every node, with its title bar: left, top, right, bottom
const boxes = () => page.evaluate(() => (window.app.graph._nodes ?? window.app.graph.nodes).map((n) => {
  const [width, height] = n.flags?.collapsed ? [n._collapsed_width ?? 0, 0] : n.size;
  return { node: n.type, box: [n.pos[0], n.pos[1] - 30, n.pos[0] + width, n.pos[1] + height] };
}));
const open = async (file) => {
  trouble.length = 0;
  if (file.endsWith(".png")) {
    // as a dropped picture: the frontend reads the workflow out of it
    const bytes = readFileSync(file).toString("base64");
    await page.evaluate(async ([b64, label]) => {
      const blob = await (await fetch(`data:image/png;base64,${b64}`)).blob();
      await window.app.handleFile(new File([blob], label, { type: "image/png" }));
    }, [bytes, basename(file)]);
  } else {
    const workflow = JSON.parse(readFileSync(file, "utf8"));
    await page.evaluate((data) => window.app.loadGraphData(data), workflow);
  }
  await settled();
};
// what a newly opened graph looks like
const look = () => page.evaluate(() => {
  const nodes = window.app.graph._nodes ?? window.app.graph.nodes;
  const dialog = [...document.querySelectorAll('[role="dialog"]')].map((d) => d.innerText.slice(0, 200));
  // the corners of all groups on the page: what covers them
  const { ds, canvas } = window.app.canvas, rect = canvas.getBoundingClientRect();
  const bounds = window.app.graph._groups.map((g) => [g.pos[0], g.pos[1], g.pos[0] + g.size[0], g.pos[1] + g.size[1]]);
  const on = (x, y) => [(x + ds.offset[0]) * ds.scale + rect.left, (y + ds.offset[1]) * ds.scale + rect.top];
  const [left, top] = on(...[0, 1].map((i) => Math.min(...bounds.map((b) => b[i]))));
  const [right, bottom] = on(...[2, 3].map((i) => Math.max(...bounds.map((b) => b[i]))));
  const corners = [[left, top], [right, top], [left, bottom], [right, bottom]];
  const colors = Object.fromEntries([...new Set(nodes.flatMap((n) => (n.outputs ?? []).map((o) => o.type)))].map((type) => [
    type, [window.LGraphCanvas.link_type_colors[type], window.app.canvas.default_connection_color_byType[type]],
  ]));
  return {
    colors,
    covered: corners.filter(([x, y]) => document.elementFromPoint(x, y) !== canvas).map((c) => [...c, document.elementFromPoint(...c)?.className ?? "outside"]),
    scale: ds.scale,
    nodes: nodes.length,
    unknown: nodes.filter((n) => n.has_errors || !(n.type in window.LiteGraph.registered_node_types)).map((n) => n.type),
    dialogs: dialog,
    unlinked: nodes.flatMap((n) => (n.inputs ?? []).filter((i) => i.link != null && !window.app.graph.links.get?.(i.link) && !window.app.graph.links[i.link]).map((i) => `${n.type}.${i.name}`)),
  };
});
// runs the graph that is open
const queue = () => page.evaluate((limit) => new Promise((done) => {
  const api = window.app.api, seen = { progress: 0, pictures: 0 };
  const progress = () => (seen.progress += 1);
  const executed = (event) => (seen.pictures += event.detail?.output?.images?.length ?? 0);
  const end = (error, event) => {
    for (const [type, listener] of Object.entries(listeners)) api.removeEventListener(type, listener);
    done({ ...seen, error, prompt: event?.detail.prompt_id });
  };
  const listeners = { progress, executed, execution_error: (e) => end(e.detail.exception_message, e), execution_success: (e) => end(null, e) };
  for (const [type, listener] of Object.entries(listeners)) api.addEventListener(type, listener);
  window.app.queuePrompt(0);
  setTimeout(() => end("it hangs"), limit);
}), HANG);
const picture = (file) => page.screenshot({ path: join(out, `${basename(file).replace(/\.\w+$/, "")}.png`) });
const found = {};
for (const file of files) {
  await open(file);
  found[basename(file)] = { ...(await look()), opened: await boxes(), trouble: [...trouble] };
  if (!RUNS.test(basename(file))) await picture(file);
}
// all are run after all were opened: the newest host covers a corner for some seconds with its word that a job is done
for (const file of files.filter((f) => RUNS.test(basename(f)))) {
  await open(file);
  const ran = await queue(), state = found[basename(file)];
  await settled();
  await picture(file);
  const widgets = await page.evaluate(() => (window.app.graph._nodes ?? window.app.graph.nodes).flatMap((n) => (n.widgets ?? []).map((w) => ({
    node: n.type, name: w.name, value: w.value, list: w.type === "combo" ? w.options.values : null, kept: w.serialize !== false,
  }))));
  Object.assign(state, { ran, widgets, ended: await boxes(), trouble: [...state.trouble, ...trouble] });
}
// the loader and what reads it become a subgraph, in which another backbone is chosen
const first = files.find((f) => basename(f) === "tiny_reconstruct.json");
if (first) {
  await open(first);
  await page.evaluate(async () => {
    const kinds = ["FeatInv_Loader", "FeatInv_ExtractFeatures"], { canvas, graph, extensionManager } = window.app;
    canvas.deselectAll();
    canvas.selectItems(graph._nodes.filter((n) => kinds.includes(n.type)));
    await extensionManager.command.execute("Comfy.Graph.ConvertToSubgraph");
  });
  await settled();
  const inside = (choose) => page.evaluate((backbone) => {
    const nodes = window.app.graph._nodes.find((n) => n.subgraph).subgraph._nodes;
    const widget = (type, name) => nodes.find((n) => n.type === type).widgets.find((w) => w.name === name);
    if (backbone) {
      widget("FeatInv_Loader", "backbone").value = backbone;
      widget("FeatInv_Loader", "backbone").callback?.(backbone);
    }
    return Object.fromEntries(["FeatInv_Loader", "FeatInv_ExtractFeatures"].map((t) => [t, widget(t, "layer").options.values]));
  }, choose);
  const asked = page.waitForResponse((answer) => answer.url().includes("/featinv/layers"), { timeout: 60000 }).catch(() => {});
  await inside("tf_efficientnet_lite0.in1k");
  await asked;
  await settled();
  const layers = await inside(null);
  found[basename(first)].subgraph = { layers, trouble: [...trouble] };
}
if (process.env.NODE_PICTURES) {
  // each kind of node of the pack, alone, for the help pages
  mkdirSync(process.env.NODE_PICTURES, { recursive: true });
  const types = await page.evaluate(() => Object.keys(window.LiteGraph.registered_node_types).filter((t) => t.startsWith("FeatInv")));
  for (const type of types) {
    const clip = await page.evaluate((type) => {
      window.app.graph.clear();
      const node = window.LiteGraph.createNode(type), ds = window.app.canvas.ds;
      node.pos = [300, 200];
      window.app.graph.add(node);
      node.setSize([Math.max(node.size[0], 320), node.computeSize()[1]]);
      ds.scale = 1.25;
      ds.offset = [0, 0];
      window.app.canvas.setDirty(true, true);
      const box = window.app.canvas.canvas.getBoundingClientRect();
      return { x: box.left + 290 * 1.25, y: box.top + 162 * 1.25, width: (node.size[0] + 20) * 1.25, height: (node.size[1] + 46) * 1.25 };
    }, type);
    await settled();
    await page.screenshot({ path: join(process.env.NODE_PICTURES, `${type}.png`), clip });
  }
}
await browser.close();
console.log(JSON.stringify(found));
