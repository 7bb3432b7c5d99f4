// The viewer's page: draws what /api/state describes with NiiVue. All texts come in as text, never as HTML.

const { Niivue, NVImage, cmapper, SLICE_TYPE, SHOW_RENDER, MULTIPLANAR_TYPE, DRAG_MODE } = window.niivue;

// Okabe-Ito, as in the figures of common/figures.py: dark, between and bright without colour
const COLOURS = { NCR: [0, 114, 178], ED: [0, 158, 115], ET: [240, 228, 66] };
const LABELS = ["NCR", "ED", "ET"]; // of the system, from 1
const REGIONS = ["WT", "TC", "ET"];
const WORDS = { prediction: "model", truth: "truth" };
const LAYOUTS = {
  all: SLICE_TYPE.MULTIPLANAR, axial: SLICE_TYPE.AXIAL, coronal: SLICE_TYPE.CORONAL,
  sagittal: SLICE_TYPE.SAGITTAL, render: SLICE_TYPE.RENDER,
};
const OUTLINE_ONLY = 0.02; // NiiVue draws the rim of a drawing only where the drawing is not invisible
const OPACITY = 0.4; // of what is filled, at first
const POLL_MS = 500;

const $ = (id) => document.getElementById(id);
const element = (tag, text = "", attributes = {}) => {
  const made = Object.assign(document.createElement(tag), { textContent: text });
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
};

let state = null; // what the server said last
let viewer = null; // NiiVue, made with the first subject
let images = {}; // loaded volumes by name
let modality = "";
let loadedVersion = -1;
const shown = new Set(LABELS);
const layers = {
  prediction: { on: true, opacity: OPACITY, fill: true },
  truth: { on: true, opacity: OPACITY, fill: true },
};

// ---- talking to the server

async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { cache: "no-store", ...options });
  } catch {
    throw [{ what: "The program that shows this page does not answer.", remedy: "Start it again." }];
  }
  if (answer.ok) return answer;
  let problems = [{ what: `The program refused it (${answer.status}).`, remedy: "" }];
  try {
    problems = (await answer.json()).problems ?? problems;
  } catch { /* not from the viewer itself */ }
  throw problems;
}

async function look() {
  state = await (await ask("api/state")).json();
  show();
  if (state.subject !== null && state.version !== loadedVersion) await load();
  else if ("prediction" in (state.volumes ?? {}) && !images.prediction) await addPrediction();
  return state;
}

async function follow() {
  for (;;) {
    try {
      if ((await look()).job.state !== "running") return;
    } catch (problems) {
      complain(problems);
      return;
    }
    await new Promise((done) => setTimeout(done, POLL_MS));
  }
}

// ---- the picture

async function begin() {
  if (!document.createElement("canvas").getContext("webgl2")) {
    $("empty").hidden = true;
    throw [{
      what: "This browser cannot draw in three dimensions (WebGL2)",
      remedy: "Take another browser, or switch on its hardware acceleration.",
    }];
  }
  $("canvas").hidden = false;
  viewer = new Niivue({
    dragAndDropEnabled: false, // NiiVue would show the file without the checks
    isRadiologicalConvention: true,
    multiplanarLayout: MULTIPLANAR_TYPE.GRID,
    multiplanarShowRender: SHOW_RENDER.ALWAYS,
    dragMode: DRAG_MODE.contrast,
    viewModeHotKey: "",
    cycleClipPlaneHotKey: "",
    clipPlaneHotKey: "",
    crosshairColor: [0.8, 0.8, 0.8, 0.6],
    crosshairWidth: 0.5,
    crosshairWidthUnit: "mm",
    crosshairGap: 8,
    fontColor: [0.85, 0.85, 0.85, 1],
    logLevel: "error",
    showLegend: false,
  });
  await viewer.attachToCanvas($("canvas"));
  viewer.drawRimOpacity = 1;
  viewer.onLocationChange = (place) => tell(place);
}

async function volume(name, options = {}) {
  const buffer = await (await ask(`api/volumes/${name}.nii`)).arrayBuffer();
  return NVImage.loadFromUrl({ url: buffer, name: `${name}.nii`, colorbarVisible: false, ...options });
}

async function load() {
  const version = state.version;
  if (!viewer) await begin();
  const name = state.modalities.includes(modality)
    ? modality
    : state.modalities.find((other) => other === "flair") ?? state.modalities[0];
  const [base, truth] = await Promise.all([
    volume(name, { ignoreZeroVoxels: true }), "truth" in state.volumes ? volume("truth") : null,
  ]);
  modality = name;
  images = { [name]: base };
  layers.truth.fill = true;
  viewer.closeDrawing();
  viewer.volumes = [];
  viewer.addVolume(base);
  if (truth) {
    images.truth = truth;
    viewer.loadDrawing(truth);
  }
  loadedVersion = version;
  $("empty").hidden = true;
  $("toolbar").hidden = $("location").hidden = false;
  goToTumour();
  if ("prediction" in state.volumes) return addPrediction();
  paint();
  show();
}

async function addPrediction() {
  const version = state.version;
  const image = await volume("prediction");
  if (version !== loadedVersion) return;
  images.prediction = image;
  viewer.volumes = [viewer.volumes[0], image];
  viewer.overlays = [image];
  layers.truth.fill = false; // but outlined, over the filled prediction
  if (images.truth) viewer.createOnLocationChange(); // it is at the tumour, or where the user went
  else goToTumour();
  paint();
  show();
}

async function choose(name) {
  if (!state.modalities.includes(name) || name === modality) return;
  modality = name;
  show();
  images[name] ??= await volume(name, { ignoreZeroVoxels: true });
  if (modality !== name) return; // another one was chosen while this one was on its way
  viewer.volumes = [images[name], ...viewer.volumes.slice(1)];
  viewer.setVolume(images[name], 0);
}

function colours(layer) {
  // an outline in the colour of the filling that it lies on would not be seen
  const white = layer === "truth" && !layers.truth.fill;
  const channel = (index) => [0, ...LABELS.map((name) => (white ? 255 : COLOURS[name][index]))];
  return {
    R: channel(0), G: channel(1), B: channel(2),
    A: [0, ...LABELS.map((name) => (shown.has(name) ? 255 : 0))],
    I: [0, 1, 2, 3],
  };
}

function paint() {
  const { truth, prediction } = layers;
  if (images.prediction) {
    images.prediction.setColormapLabel(colours("prediction"));
    images.prediction.opacity = prediction.on ? prediction.opacity : 0;
  }
  viewer.drawRimOpacity = truth.on ? 1 : -1;
  viewer.drawOpacity = !truth.on ? 0 : truth.fill ? truth.opacity : OUTLINE_ONLY;
  // what viewer.setDrawColormap does, but without the scan itself, whose gradients take most time
  viewer.drawLut = cmapper.makeDrawLut(colours("truth"));
  viewer.refreshColormaps();
  if (images.prediction) viewer.refreshLayers(images.prediction, 1);
  viewer.drawScene();
}

let painting = 0;
function paintSoon() { // a slider moves faster than a picture is drawn
  cancelAnimationFrame(painting);
  painting = requestAnimationFrame(paint);
}

function goToTumour() {
  const image = images.truth ?? images.prediction;
  const [, x, y] = image?.dimsRAS ?? [];
  const voxels = image?.img;
  if (!voxels) return;
  // the axial slice with most tumour, and the middle of the tumour in it; the files are RAS already
  let best = { count: 0 };
  for (let z = 0; z * x * y < voxels.length; z++) {
    const here = { count: 0, i: 0, j: 0, z };
    for (let at = z * x * y, end = at + x * y; at < end; at++) {
      if (voxels[at]) {
        here.count++;
        here.i += at % x;
        here.j += Math.floor(at / x) % y;
      }
    }
    if (here.count > best.count) best = here;
  }
  if (best.count === 0) return;
  viewer.scene.crosshairPos = viewer.vox2frac([
    Math.round(best.i / best.count), Math.round(best.j / best.count), best.z,
  ]);
  viewer.createOnLocationChange();
}

function reset() {
  for (const name of state.modalities) {
    const image = images[name];
    if (image) Object.assign(image, { cal_min: image.robust_min, cal_max: image.robust_max });
  }
  viewer.setPan2Dxyzmm([0, 0, 0, 1]);
  viewer.setScale(1);
  viewer.setRenderAzimuthElevation(110, 10);
  setLayout("all");
  for (const name of LABELS) shown.add(name);
  for (const layer of Object.values(layers)) Object.assign(layer, { on: true, opacity: OPACITY });
  layers.truth.fill = !images.prediction;
  goToTumour();
  paint();
  show();
}

function setLayout(name) {
  viewer.setSliceType(LAYOUTS[name]);
  for (const button of document.querySelectorAll("[data-layout]")) {
    button.setAttribute("aria-pressed", String(button.dataset.layout === name));
  }
}

function nextLayout() {
  const names = Object.keys(LAYOUTS);
  const now = document.querySelector('[data-layout][aria-pressed="true"]').dataset.layout;
  setLayout(names[(names.indexOf(now) + 1) % names.length]);
}

function tell(place) {
  const mm = [...place.mm].slice(0, 3).map((value) => value.toFixed(0)).join(", ");
  const parts = [`${mm} mm`];
  const at = place.vox;
  if (at && images[modality]) {
    parts.push(`${modality} ${Number(images[modality].getValue(...at).toPrecision(4))}`);
    for (const layer of ["prediction", "truth"]) {
      if (images[layer]) {
        parts.push(`${WORDS[layer]}: ${LABELS[images[layer].getValue(...at) - 1] ?? "no tumour"}`);
      }
    }
  }
  $("location").textContent = parts.join("   ·   ");
}

// ---- the panel

function show() {
  const { job, subject } = state;
  $("subject").textContent = subject ?? "fedbrats viewer";
  document.title = subject ? `${subject} · fedbrats viewer` : "fedbrats viewer";
  $("about").textContent = subject
    ? `${state.shape.join("×")} voxels of ${state.spacing.join("×")} mm`
    : "";
  if (state.model) $("about").textContent += `${subject ? " · " : ""}model ${state.model.name}`;
  if (subject === null) {
    $("empty").textContent = job.state === "running" ? "Reading the scans…" : "Choose the scans to segment.";
  }
  showJob(job);
  if (subject !== null) {
    $("modalities").replaceChildren(...state.modalities.map((name) => {
      const button = element("button", name, { type: "button", "aria-pressed": String(name === modality) });
      button.onclick = () => choose(name).catch(complain);
      return button;
    }));
    showVolumes();
    $("notes").hidden = state.findings.length === 0;
    $("notes").querySelector("ul").replaceChildren(...state.findings.map((finding) => said(finding, "li")));
  }
  if (state.model && !$("files").hasChildNodes()) offerUpload();
}

function showJob(job) {
  $("status").hidden = !["running", "failed"].includes(job.state);
  if (job.state === "running") {
    $("status").replaceChildren(element("p", `Segmenting, ${job.seconds.toFixed(0)} s …`));
  } else if (job.state === "failed") complain(job.problems, "It cannot be segmented");
}

function said(finding, tag = "p") {
  const file = finding.file ? `${finding.file}: ` : "";
  const text = `${file}${finding.what.replace(/\.$/, "")}. ${finding.remedy}`;
  return element(tag, text.trim(), { class: finding.severity === "warning" ? "note" : "problem" });
}

function complain(problems, heading = "") {
  const known = Array.isArray(problems);
  if (!known) console.error(problems);
  const listed = known ? problems : [{ what: "The page failed; see the browser's console", remedy: "" }];
  $("status").hidden = false;
  $("status").replaceChildren(...(heading ? [element("h2", heading)] : []), ...listed.map((p) => said(p)));
}

const ml = (value) => `${value.toFixed(value < 10 ? 2 : 1)}`;

function showVolumes() {
  const names = ["prediction", "truth"].filter((name) => name in state.volumes);
  $("segmentation").hidden = names.length === 0;
  $("download").hidden = !("prediction" in state.volumes);
  if (!names.length) return;
  const same = (members) => members.length === shown.size && members.every((name) => shown.has(name));
  $("regions").replaceChildren(...REGIONS.map((region) => {
    const button = element("button", region, {
      type: "button", "data-region": region, "aria-pressed": String(same(state.structures[region])),
      title: state.structures[region].join(" + "),
    });
    button.onclick = () => showRegion(region);
    return button;
  }));
  const dice = state.dice;
  const head = ["ml", ...names.map((name) => WORDS[name]), ...(dice ? ["Dice"] : [])];
  const cells = (structure) => [
    ...names.map((name) => element("td", ml(state.volumes[name][structure]))),
    ...(dice ? [element("td", dice[structure].toFixed(3))] : []),
  ];
  const rows = LABELS.map((label) => {
    const tick = element("input", "", { type: "checkbox", "data-label": label });
    tick.checked = shown.has(label);
    tick.onchange = () => toggle(label);
    const swatch = element("span", "", { class: "swatch" });
    swatch.style.backgroundColor = `rgb(${COLOURS[label].join(" ")})`;
    const name = element("label");
    name.append(tick, " ", swatch, label);
    const heading = element("th", "", { scope: "row" });
    heading.append(name);
    const row = element("tr");
    row.append(heading, ...cells(label));
    return row;
  });
  const wholes = ["TC", "WT"].map((region) => {
    const row = element("tr", "", { class: "whole" });
    row.append(element("th", region, { scope: "row", title: state.structures[region].join(" + ") }), ...cells(region));
    return row;
  });
  const total = element("tr", "", { id: "shown" });
  total.append(element("th", "shown", { scope: "row" }), ...names.map((name) => {
    const sum = [...shown].reduce((so_far, label) => so_far + state.volumes[name][label], 0);
    return element("td", `${ml(sum)} ml`, { "data-layer": name });
  }), ...(dice ? [element("td")] : []));
  const heads = element("tr");
  heads.append(...head.map((text) => element("th", text, { scope: "col" })));
  $("doubts").replaceChildren(...state.warnings.map((text) => element("p", text, { class: "note" })));
  $("volumes").tHead.replaceChildren(heads);
  $("volumes").tBodies[0].replaceChildren(...rows, ...wholes);
  $("volumes").tFoot.replaceChildren(total);
  showLayers(names);
}

function showLayers(names) {
  if ($("layers").dataset.names === names.join() && $("layers").contains(document.activeElement)) return;
  $("layers").dataset.names = names.join();
  $("layers").replaceChildren(...names.map((name) => {
    const layer = layers[name];
    const row = element("label");
    const tick = element("input", "", { type: "checkbox", "data-show": name });
    tick.checked = layer.on;
    tick.onchange = () => { layer.on = tick.checked; paint(); };
    row.append(tick, element("span", `show ${WORDS[name]}`, { class: "kind" }));
    const slider = element("input", "", {
      type: "range", min: "0.05", max: "1", step: "0.05", value: String(layer.opacity), "aria-label": `opacity of ${WORDS[name]}`,
    });
    slider.oninput = () => { layer.opacity = Number(slider.value); paintSoon(); };
    const all = element("div");
    all.append(row, slider);
    if (name === "truth") {
      const outline = element("input", "", { type: "checkbox", "data-outline": name });
      outline.checked = !layer.fill;
      slider.disabled = !layer.fill;
      outline.onchange = () => {
        layer.fill = !outline.checked;
        slider.disabled = !layer.fill;
        paint();
      };
      const outlined = element("label");
      outlined.append(outline, "outline");
      all.append(outlined);
    }
    return all;
  }));
}

function changed() {
  paint();
  showVolumes();
}

function showRegion(region) {
  shown.clear();
  for (const label of state.structures[region]) shown.add(label);
  changed();
}

function toggle(label) {
  if (!shown.delete(label)) shown.add(label);
  changed();
}

function switchLayer(name) {
  if (!images[name]) return;
  layers[name].on = !layers[name].on;
  document.activeElement?.blur();
  changed();
}

// ---- uploading

function offerUpload() {
  const upload = $("upload");
  upload.hidden = false;
  upload.open = state.subject === null;
  $("files").replaceChildren(...state.model.modalities.map((name) => {
    const row = element("label", "", { "data-modality": name });
    row.append(
      element("span", name),
      element("input", "", { type: "file", accept: ".nii,.gz", "data-file": name }),
      element("span", "", { class: "said" }),
    );
    return row;
  }));
}

const rowOf = (name) => $("files").querySelector(`[data-modality="${name}"]`);
const sayOf = (name, text) => { rowOf(name).querySelector(".said").textContent = text; };

async function sort(files) {
  const names = files.map((file) => file.name);
  const roles = await (await ask("api/roles", {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(names),
  })).json();
  const unclear = [];
  files.forEach((file, index) => {
    const row = roles[index] && rowOf(roles[index]);
    if (!row) {
      unclear.push(file.name);
      return;
    }
    const transfer = new DataTransfer();
    transfer.items.add(file);
    row.querySelector("input").files = transfer.files;
  });
  $("status").hidden = true;
  if (unclear.length) {
    complain([{
      what: `No modality of the model can be told from ${unclear.join(", ")}`, severity: "warning",
      remedy: "Choose these files one by one.",
    }]);
  }
}

async function send() {
  const wanted = state.model.modalities.map((name) => [name, rowOf(name).querySelector("input").files[0]]);
  const missing = wanted.filter(([, file]) => !file).map(([name]) => name);
  if (missing.length) {
    throw [{ what: `${missing.join(", ")} is missing`, remedy: "Choose a file for every modality." }];
  }
  await ask("api/upload", { method: "DELETE" });
  for (const [name] of wanted) sayOf(name, "");
  for (const [name, file] of wanted) {
    sayOf(name, "uploading…");
    try {
      const about = await (await ask(`api/upload/${name}`, { method: "PUT", body: file })).json();
      sayOf(name, `${about.shape.join("×")} voxels`);
    } catch (problems) {
      sayOf(name, "refused");
      throw problems;
    }
  }
  await ask("api/segment", { method: "POST" });
  for (const [name] of wanted) sayOf(name, "");
}

const form = document.querySelector("#upload form");
form.onsubmit = async (event) => {
  event.preventDefault();
  const button = form.querySelector("button.main");
  button.disabled = true;
  $("status").hidden = true;
  try {
    await send();
    await follow();
  } catch (problems) {
    complain(problems, "These scans cannot be segmented");
  } finally {
    button.disabled = false;
  }
};
form.onreset = () => {
  $("status").hidden = true;
  for (const name of state.model.modalities) sayOf(name, "");
  ask("api/upload", { method: "DELETE" }).catch(complain);
};

// a file that misses its place must not replace the page
for (const kind of ["dragover", "drop"]) document.addEventListener(kind, (event) => event.preventDefault());
const drop = $("drop");
drop.addEventListener("dragover", () => drop.classList.add("over"));
drop.addEventListener("dragleave", () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => {
  drop.classList.remove("over");
  sort([...event.dataTransfer.files]).catch(complain);
});

// ---- buttons and keys

for (const button of document.querySelectorAll("[data-layout]")) {
  button.onclick = () => setLayout(button.dataset.layout);
}
$("reset").onclick = reset;

const KEYS = {
  w: () => showRegion("WT"), t: () => showRegion("TC"), e: () => showRegion("ET"),
  n: () => toggle("NCR"), d: () => toggle("ED"), h: () => toggle("ET"),
  p: () => switchLayer("prediction"), g: () => switchLayer("truth"),
  o: nextLayout, r: reset,
};
document.addEventListener("keydown", (event) => {
  if (loadedVersion < 0 || event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.target.matches('input[type="range"], input[type="file"]')) return;
  const name = state.modalities[Number(event.key) - 1];
  if (name) choose(name).catch(complain);
  else KEYS[event.key.toLowerCase()]?.();
});

follow();
