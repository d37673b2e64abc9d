// The page: images are dropped, segmented by the service, shown, corrected, compared and downloaded.
import * as charts from "./charts.js";
import * as downloads from "./downloads.js";
import * as files from "./files.js";
import {Growth} from "./growth.js";
import {Picture, median} from "./images.js";
import * as labels from "./labels.js";
import {Queue} from "./queue.js";
import {References} from "./references.js";
import * as service from "./service.js";
import {Table} from "./table.js";
import {View, scaleColour} from "./view.js";

const SLIDERS = ["threshold", "prominence", "smoothing", "min_area", "min_score"];
const SLIDER_MS = 60; // a moving slider sends at most one request in this time
const LOWEST_SCORE = 0.4; // start of the colour scale of scores: few cells have less
const NAMED = 3; // files in a message
const MAX_SHOWN = 2 ** 27, MAX_SIDE = 32767; // pixels that browsers draw on one canvas
const element = (id) => document.getElementById(id);

const pictures = [];
const options = new Map(); // option of /segment -> value that the person has set
const drops = []; // until the service answers
let model = null, current = null, downloading = false;

const view = new View(element("canvas"), {hover, pick, line: useLine});
const table = new Table({columns: element("columns"), rows: element("rows")},
  {open, check, remove, isOutdated: (picture) => queue.isOutdated(picture)});
const growth = new Growth({
  section: element("growth"), frames: element("frames"), hours: element("frame-hours"), notes: element("growth-notes"),
  curves: element("curves"),
}, refuse);
const references = new References((picture) => { if (picture === current) showReference(); update(); }, fail);

const queue = new Queue(pictures, options, {
  current: () => current,
  changed: async (picture) => {
    references.scoreSoon(picture, 0);
    if (picture === current) await open(picture);
  },
  progress: update,
  refused: refuse,
});

// ---- Service

async function connect() {
  try {
    model = await service.model();
  } catch (error) {
    element("model").textContent = "not ready";
    refuse(error);
    return;
  }
  element("token-form").hidden = true;
  element("message").hidden = true;
  element("model").textContent = `network ${model.fingerprint.slice(0, 12)}, ${model.targets}`;
  showThresholds();
  for (const drop of drops.splice(0)) await add(drop);
  queue.resume();
}

/** Show an error, with a button to try again if there is something to repeat. */
function fail(text, again) {
  const message = element("message");
  const button = document.createElement("button");
  button.textContent = again ? "Try again" : "Close";
  button.onclick = () => { message.hidden = true; again?.(); };
  message.replaceChildren(text, button);
  message.hidden = false;
}

/** Show the error of a request. After one that can pass, no further requests are sent until the person agrees. */
function refuse(error) {
  if (!error.isTemporary) {
    fail(error.message);
    return;
  }
  queue.isPaused = true;
  if (error.status !== 401) {
    fail(error.message, connect);
    return;
  }
  if (!element("token-form").hidden) fail("this is not the token of this service");
  element("token-form").hidden = false;
  element("model").textContent = "token needed";
  element("token").focus();
}

// ---- Images

const more = (count) => (count > 0 ? ` and ${count} more` : "");

/** Add dropped files: images, and the label images that belong to them or to earlier images. */
async function add(listed) {
  const visible = listed.filter(({path}) => !path.split("/").some((part) => part.startsWith(".")));
  if (!visible.length) return;
  if (!model) {
    drops.push(visible); // until the service answers
    return;
  }
  const files = new Map(visible.map(({path, file}) => [path, file]));
  const earlier = pictures.filter((picture) => !files.has(picture.path));
  let pairs;
  try {
    const paths = new Set([...files.keys(), ...earlier.map((picture) => picture.path)]);
    pairs = await service.pageData("pairs", {paths: [...paths]});
  } catch (error) {
    drops.push(visible);
    refuse(error);
    return;
  }
  const images = pairs.images.filter((path) => files.has(path));
  const unpaired = pairs.unpaired.filter((path) => files.has(path));
  const labelled = Object.entries(pairs.labels).filter(([, path]) => files.has(path));
  if (visible.length === 1 && !labelled.length && !images.length && (!unpaired.length || !pictures.length)) {
    images.push(visible[0].path); // whatever its name says
    unpaired.length = 0;
  }
  images.sort((a, b) => a.localeCompare(b, "en", {numeric: true}));
  const added = images.map((path) => new Picture(path, files.get(path)));
  pictures.push(...added);
  const known = new Set([...images, ...unpaired, ...labelled.map(([, path]) => path)]);
  const others = [...files.keys()].filter((path) => !known.has(path));
  if (unpaired.length) fail(`${unpaired.length} label images belong to no image here, or to several, such as ${unpaired[0]}`);
  else if (others.length) fail(`left out, not an image: ${others.slice(0, NAMED).join(", ")}${more(others.length - NAMED)}`);
  for (const [image, path] of labelled) {
    const candidates = added.some((picture) => picture.path === image) ? added : earlier;
    candidates.filter((picture) => picture.path === image && !picture.plane)
      .forEach((picture) => references.set(picture, files.get(path)));
  }
  if (!current && pictures.length) await open(pictures[0]);
  queue.fill();
}

async function open(picture) {
  if (picture !== current || picture.labels !== view.labels) {
    view.detach();
    say("");
  }
  current = picture;
  element("start").hidden = true;
  for (const id of ["work", "images"]) element(id).hidden = false;
  const ready = picture.state === "ready";
  let problem = picture.state === "failed" ? picture.error : ready ? "" : "finding cells";
  const {labels: cells} = picture;
  if (ready && (cells.data.length > MAX_SHOWN || Math.max(cells.width, cells.height) > MAX_SIDE)) {
    problem = "too large to be drawn; the download contains its cells";
  }
  if (ready && !problem) {
    try {
      const image = await createImageBitmap(picture.png);
      if (picture !== current || cells !== picture.labels) return; // a later call shows it
      view.open(image, cells);
    } catch (error) {
      problem = `this browser cannot draw the image: ${error.message}`;
    }
  }
  if (problem) view.close();
  const note = element("stage-note");
  note.hidden = !problem;
  note.textContent = problem;
  note.className = picture.state === "failed" ? "bad" : "soft";
  showCells();
}

async function step(by) {
  const next = pictures[pictures.indexOf(current) + by];
  if (!next) return;
  await open(next);
  say(`${next.name}: ${next.state === "ready" ? `${next.cells.size} cells` : next.error || "waiting"}`);
  queue.fill();
}

/** Show the current picture's cells and numbers. */
function showCells() {
  const ready = current?.state === "ready", areas = ready ? current.areas : [];
  element("count").textContent = ready ? areas.length : "-";
  element("confluence").textContent = ready ? `${(100 * current.confluence).toFixed(1)} %` : "-";
  element("median").textContent = median(areas) ?? "-";
  element("score").textContent = areas.length ? current.meanScore.toFixed(2) : "-";
  element("histogram").replaceChildren(charts.histogram(areas));
  element("canvas").setAttribute("aria-label", current ? `${current.name}: ${areas.length} cells` : "Image with cells");
  if (ready) for (const label of view.selected) if (!current.cells.has(label)) view.selected.delete(label);
  showReference();
  update();
}

/** Map of label -> 0 to 1 for the chosen scale; null without one. */
function scaleValues() {
  const kind = element("colour").value, {areas} = current;
  element("scale").hidden = kind === "cell";
  if (kind === "cell") return null;
  const last = areas.length - 1;
  const [low, high] = kind === "area" ? [areas[Math.floor(0.02 * last)] ?? 0, areas[Math.ceil(0.98 * last)] ?? 1]
    : [LOWEST_SCORE, 1];
  element("scale-low").textContent = low;
  element("scale-high").textContent = high;
  const value = kind === "area" ? (label) => Math.log(current.cells.get(label).area / low) / (Math.log(high / low) || 1)
    : (label) => (current.score(label) - low) / (high - low);
  return new Map([...current.cells.keys()].map((label) => [label, value(label)]));
}

function update() {
  const ready = pictures.filter((picture) => picture.state === "ready");
  const finished = pictures.filter((picture) => !queue.isOutdated(picture)).length;
  const failed = pictures.filter((picture) => picture.state === "failed").length;
  element("progress").max = Math.max(pictures.length, 1);
  element("progress").value = finished;
  element("progress").hidden = finished === pictures.length;
  element("progress-text").textContent = `${finished} of ${pictures.length}${failed ? `, ${failed} without result` : ""}`;
  element("download").disabled = !ready.length || finished < pictures.length || downloading;
  const approved = ready.filter((picture) => picture.approved).length;
  element("download-corrections").disabled = !approved || downloading;
  element("download-corrections").textContent = `Download corrections${approved ? ` (${approved})` : ""}`;
  element("undo").disabled = !current?.done.length;
  element("redo").disabled = !current?.undone.length;
  element("delete").disabled = view.selected.size < 1;
  element("merge").disabled = view.selected.size < 2;
  element("split").disabled = view.selected.size !== 1;
  element("thresholds").disabled = Boolean(current?.approved);
  element("fixed-note").hidden = !current?.approved;
  table.draw(pictures, current);
  growth.schedule(pictures);
}

/** Remove an image, after a question if it has corrections. */
function remove(picture) {
  if (picture.corrected && !confirm(`Remove ${picture.name} with its corrections?`)) return;
  picture.busy?.abort();
  const place = pictures.indexOf(picture);
  pictures.splice(place, 1);
  if (picture === current) {
    const next = pictures[Math.min(place, pictures.length - 1)];
    if (next) open(next);
    else close();
  }
  queue.fill();
}

/** No image is left: show the start. */
function close() {
  current = null;
  view.close();
  element("start").hidden = false;
  for (const id of ["work", "images", "growth"]) element(id).hidden = true;
}

/** The person has ticked or unticked an image as correct. */
function check(picture) {
  picture.busy?.abort();
  if (picture === current) showCells();
  queue.fill();
}

// ---- Thresholds

function showThresholds() {
  for (const name of SLIDERS) {
    const value = options.get(name) ?? model.thresholds[name];
    element(name).value = value;
    document.querySelector(`output[for=${name}]`).textContent = Number(value.toFixed(3));
  }
}

let optionsTimer = 0;

function setOption(name, value) {
  pictures.filter((picture) => !picture.approved).forEach((picture) => { picture.undone = []; });
  if (value === null) options.delete(name);
  else options.set(name, value);
  showThresholds();
  clearTimeout(optionsTimer);
  optionsTimer = setTimeout(() => queue.restart(), SLIDER_MS);
}

// ---- Corrections

/** Whether the cells on the canvas are those of the current picture: while another one is decoded, they are not. */
const isShown = () => current?.state === "ready" && view.labels === current.labels;

function correct(text, action) {
  if (!isShown()) return;
  try {
    current.correct(action);
  } catch (error) {
    say(error.message);
    return;
  }
  showCorrection(text);
}

function showCorrection(text) {
  showCells();
  say(`${text}; ${current.cells.size} cells`);
  references.scoreSoon(current);
  element("canvas").focus({preventScroll: true}); // the button may be disabled now
  queue.fill();
}

function useLine(points, mode) {
  if (mode === "cut") correct("cut", (image, next) => labels.cut(image, points, next));
  else correct("drawn", (image, next) => labels.draw(image, points, next));
}

const selected = () => [...view.selected];
const actions = {
  delete: () => selected().length && correct("deleted", (image) => labels.remove(image, selected())),
  merge: () => correct("merged", (image, next) => labels.merge(image, selected(), next)),
  split: () => selected().length === 1 && correct("split", (image, next) => labels.halve(image, selected()[0], next)),
  undo: () => isShown() && current.undo() && showCorrection("undone"),
  redo: () => isShown() && current.redo() && showCorrection("repeated"),
  "zoom-in": () => view.zoomBy(1.5),
  "zoom-out": () => view.zoomBy(1 / 1.5),
  "zoom-fit": () => view.fit(),
  "mode-look": () => setMode("look"),
  "mode-cut": () => setMode("cut"),
  "mode-draw": () => setMode("draw"),
};

function setMode(mode) {
  view.mode = mode;
  for (const name of ["look", "cut", "draw"]) element(`mode-${name}`).setAttribute("aria-pressed", String(name === mode));
  element("canvas").classList.toggle("line", mode !== "look");
}

// ---- Pointer and keyboard

const describe = (label) => {
  const cell = current.cells.get(label), detail = label < current.firstFree && current.details.get(label);
  const found = !detail ? "corrected" : `score ${detail.score.toFixed(2)}, eccentricity ${detail.eccentricity.toFixed(2)}, ` +
    `brightness ${detail.brightness.toFixed(0)}`;
  return `cell ${label}: ${cell.area} px, ${found}${cell.border ? ", at the border" : ""}`;
};

function hover(label, event) {
  const tip = element("tip"), cell = isShown() && label && current.cells.get(label);
  tip.hidden = !cell;
  if (!cell) return;
  tip.textContent = describe(label).replaceAll(", ", "\n").replace(": ", "\n");
  const box = element("canvas").getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
  tip.style.left = `${Math.min(x + 14, box.width - 160)}px`;
  tip.style.top = `${Math.min(y + 14, box.height - 110)}px`;
}

function pick(label, event) {
  if (view.mode !== "look" || !isShown()) return;
  if (!event.shiftKey) view.selected.clear();
  if (label && !view.selected.delete(label)) view.selected.add(label);
  if (label) say(describe(label));
  view.draw();
  update();
}

/** Select the next cell in the order of rows, or the one before. */
function selectNext(by, extend) {
  if (!isShown() || !current.cells.size) return;
  const order = [...current.cells.keys()], last = selected().pop();
  const label = order[(order.indexOf(last) + by + order.length + (last === undefined && by < 0 ? 1 : 0)) % order.length];
  if (!extend) view.selected.clear();
  view.selected.delete(label);
  view.selected.add(label); // as the last one
  const cell = current.cells.get(label);
  view.reveal(cell.x, cell.y);
  say(`${describe(label)}, at ${Math.round(cell.x)}, ${Math.round(cell.y)}`);
  update();
}

const canvasKeys = {
  arrowleft: () => view.panBy(-60, 0), arrowright: () => view.panBy(60, 0),
  arrowup: () => view.panBy(0, -60), arrowdown: () => view.panBy(0, 60),
};
const keys = {
  n: (event) => selectNext(1, event.shiftKey), p: (event) => selectNext(-1, event.shiftKey),
  delete: actions.delete, backspace: actions.delete, m: actions.merge, s: actions.split,
  x: actions["mode-cut"], d: actions["mode-draw"],
  escape: () => { setMode("look"); view.selected.clear(); view.cancel(); update(); },
  "+": actions["zoom-in"], "=": actions["zoom-in"], "-": actions["zoom-out"], 0: actions["zoom-fit"],
  pageup: () => step(-1), pagedown: () => step(1),
};

function press(event) {
  const key = event.key.toLowerCase(), control = event.ctrlKey || event.metaKey;
  if (event.altKey || event.target.closest("input, select, form")) return; // they have keys of their own
  const plain = keys[key] ?? (event.target === element("canvas") ? canvasKeys[key] : undefined);
  const action = control ? {z: event.shiftKey ? actions.redo : actions.undo, y: actions.redo}[key] : plain;
  if (!action || !current) return;
  event.preventDefault();
  action(event);
}

const say = (text) => { element("status").textContent = text; };

// ---- Reference, downloads

function showReference() {
  const reference = current?.reference, scores = reference?.scores;
  view.reference = reference?.labels && element("show-reference").checked ? reference.labels : null;
  element("reference-text").textContent = !reference ? "Compare with a label image."
    : !scores ? `${reference.name}: comparing`
    : `${reference.name}: mSA ${scores.msa.toFixed(3)}, SA50 ${scores.sa50.toFixed(3)}, Dice ${scores.dice.toFixed(3)}; ` +
      `${scores.cells} cells, ${scores.true_cells} in the reference`;
  if (view.image && view.labels === current?.labels) view.paint(scaleValues());
}

async function download(name, make) {
  downloading = true;
  update();
  try {
    files.save(name, await make((number, total) => say(`${name}: ${number + 1} of ${total}`)));
    say(`${name} is saved`);
  } catch (error) {
    fail(`${name}: ${error.message}`);
  }
  downloading = false;
  update();
}

// ---- Wiring

for (const [id, action] of Object.entries(actions)) element(id).addEventListener("click", action);
document.addEventListener("keydown", press);
for (const id of ["add-files", "start-files"]) element(id).onclick = () => element("files").click();
for (const id of ["add-folder", "start-folder"]) element(id).onclick = () => element("folder").click();
for (const id of ["files", "folder"]) {
  element(id).onchange = (event) => {
    add(files.readInput(event.target));
    event.target.value = "";
  };
}
element("reference").onclick = () => element("reference-file").click();
element("reference-file").onchange = (event) => {
  if (current && event.target.files.length) references.set(current, event.target.files[0]);
  event.target.value = "";
};
element("show-reference").onchange = showReference;
element("token-form").onsubmit = (event) => {
  event.preventDefault();
  service.useToken(element("token").value);
  connect();
};
for (const name of SLIDERS) element(name).oninput = (event) => setOption(name, Number(event.target.value));
for (const name of ["diameter", "channel"]) {
  element(name).onchange = (event) => setOption(name, event.target.value === "" ? null : Number(event.target.value));
}
element("tta").onchange = (event) => setOption("tta", event.target.checked || null);
element("reset").onclick = () => {
  SLIDERS.forEach((name) => options.delete(name));
  setOption("", null);
};
for (const name of ["outlines", "fills"]) element(name).onchange = (event) => { view.show[name] = event.target.checked; showCells(); };
element("colour").onchange = (event) => { view.show.colour = event.target.value; showCells(); };
element("frame-hours").onchange = update;
element("download").onclick = () => download("raylivecell.zip", (report) => downloads.everything([...pictures], model, growth.page, report));
element("download-corrections").onclick = () => download("corrections.zip", (report) =>
  downloads.corrections(pictures.filter((picture) => picture.state === "ready" && picture.approved), report));
document.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dropping"); });
document.addEventListener("drop", async (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  try {
    await add(await files.readDrop(event.dataTransfer));
  } catch (error) {
    fail(`the dropped files cannot be read: ${error.message}`);
  }
});
window.addEventListener("unhandledrejection", (event) => fail(`unexpected: ${event.reason?.message ?? event.reason}`));
window.addEventListener("beforeunload", (event) => { if (pictures.some((picture) => picture.corrected)) event.preventDefault(); });

const bar = element("scale-bar").getContext("2d");
for (let x = 0; x < 160; x++) {
  bar.fillStyle = `rgb(${scaleColour(x / 159).join(",")})`;
  bar.fillRect(x, 0, 1, 10);
}
connect();
