import { Failure, describe, explain, predict, useKey } from "./service.js";

const MEGABYTE = 1_000_000;
const PHOTO = -1;        // in place of a map's number: the picture without a map
const at = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));

let limits = null;       // the answer of GET /model
let names = new Map();   // class -> its name as people read it
let picture = null;      // the current file
let maps = new Map();    // target, or null for the maps of the parts -> the answer of /explain
let shown = null;        // the answer that is shown
let running = new AbortController();

// ---- choosing a picture

at.file.addEventListener("change", () => give(at.file));
at.capture.addEventListener("change", () => give(at.capture));

function give(input) {
  take(input.files);
  input.value = "";  // the same file may be chosen again
}

document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) {
    event.preventDefault();
    take(event.clipboardData.files);
  }
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  if (event.dataTransfer.files.length) take(event.dataTransfer.files);
  else complain("That is not a file. Save the picture first, then drop the file here.");
});

function take([file, ...others]) {
  if (!file) return;
  clear();
  picture = file;
  attempt(async (options) => {
    await look(options);
    return others.length ? `This is the first of ${1 + others.length} pictures; the others were ignored.` : "";
  });
}

// ---- the camera: a phone's camera app by a file input, elsewhere the browser's, available on https:// and localhost

const phone = matchMedia("(pointer: coarse)");
at.photograph.hidden = !phone.matches && !navigator.mediaDevices;
at.photograph.addEventListener("click", () => (phone.matches ? at.capture.click() : openCamera()));
at.leave.addEventListener("click", () => at.camera.close());
at.camera.addEventListener("close", release);
at.video.addEventListener("loadeddata", () => {
  at.shoot.disabled = false;
  at.shoot.focus();
});
at.shoot.addEventListener("click", () => {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [at.video.videoWidth, at.video.videoHeight];
  canvas.getContext("2d").drawImage(at.video, 0, 0);
  at.camera.close();
  canvas.toBlob((blob) => take([new File([blob], "photo.jpg", { type: blob.type })]), "image/jpeg", 0.95);
});

async function openCamera() {
  at.error.textContent = "";
  at.shoot.disabled = true;
  at.camera.showModal();
  try {
    const video = { facingMode: "environment", width: { ideal: 1280 }, height: { ideal: 960 } };
    at.video.srcObject = await navigator.mediaDevices.getUserMedia({ video });
    if (!at.camera.open) release();
  } catch (error) {
    at.camera.close();
    const denied = error.name === "NotAllowedError";
    complain(denied ? "The browser does not allow access to the camera." : "No camera is available.");
  }
}

function release() {
  at.video.srcObject?.getTracks().forEach((track) => track.stop());
  at.video.srcObject = null;
}

// ---- asking the service

async function look(options) {
  if (!limits) await introduce(options);
  const { max_upload_mb: most } = limits;
  if (picture.size > most * MEGABYTE) {
    throw new Failure(`${picture.name} has ${(picture.size / MEGABYTE).toFixed(1)} MB; the limit is ${most} MB.`);
  }
  say(`Classifying ${picture.name} …`);
  await keep(options);
  await preview(options);
  let prediction;
  try {
    prediction = await predict(picture, options);
    showPrediction(prediction);
  } catch (failure) {
    if (!options.signal.aborted) at.result.hidden = true;
    throw failure;
  }
  showSimilar(prediction.neighbors ?? []);
  if (limits.explains) await showMaps(null, options);
}

// Read the picture into memory, so that it can be sent again if its file changes.
async function keep({ signal }) {
  const { name, type } = picture;
  const content = await picture.arrayBuffer().catch(() => {
    throw new Failure(`${name} cannot be read. Is it a folder, or was it moved?`);
  });
  signal.throwIfAborted();
  picture = new File([content], name, { type });
}

// Show the whole picture at once. A format that the browser cannot draw, but the service may read, has no preview.
async function preview({ signal }) {
  const source = await new Promise((resolve) => {
    const reader = new FileReader();
    reader.addEventListener("loadend", () => resolve(reader.result));
    reader.readAsDataURL(picture);
  });
  const image = Object.assign(new Image(), { src: source ?? "" });
  const drawable = await image.decode().then(() => true, () => false);
  signal.throwIfAborted();
  at.looks.hidden = !drawable;
  if (!drawable) return;
  at.seen.src = source;
  at.seen.alt = picture.name;
  at.caption.textContent = picture.name;
  at.overlay.hidden = true;
  at.seen.classList.remove("grey");
  at.regions.toggleAttribute("hidden", true);
  at.result.hidden = false;
}

async function introduce(options) {
  limits = await describe(options);
  names = new Map(limits.classes.map((label, number) => [label, limits.display_names[number]]));
  const { model, classes, explains, max_upload_mb: megabytes, max_pixels: pixels } = limits;
  at["key-form"].hidden = true;
  at["top-hint"].hidden = !explains;
  // of images of one's own there is only a format, which says nothing to who looks at the page
  const trained = ["folder", "table", "huggingface", "webdataset"].includes(model.dataset) ? "" : `, trained on ${model.dataset}`;
  at.model.textContent = `${model.method} on ${model.backbone}${trained}: ${classes.length} classes`;
  at.bounds.textContent = `Up to ${megabytes} MB and ${Number((pixels / MEGABYTE).toPrecision(3))} megapixels.`;
}

// Run one action at a time: cancel the previous one, and show an error as a line on the page. The action may return a
// message to show afterwards.
async function attempt(action) {
  running.abort();
  running = new AbortController();
  const { signal } = running;
  document.body.setAttribute("aria-busy", "true");
  at.error.textContent = "";
  const onWait = (seconds) => say(`The service is busy: trying again in ${seconds} s …`);
  try {
    say((await action({ signal, onWait })) ?? "");
  } catch (error) {
    if (signal.aborted) return;
    if (!(error instanceof Failure)) throw error;
    if (error.status === 401) askForKey();
    complain(error.message);
  } finally {
    if (signal === running.signal) document.body.removeAttribute("aria-busy");
  }
}

// ---- the API key

function askForKey() {
  limits = null;
  at["key-form"].hidden = false;
  at.key.focus();
}

at["key-form"].addEventListener("submit", async (event) => {
  event.preventDefault();
  useKey(at.key.value.trim());
  await attempt(introduce);
  if (limits) {
    at.key.value = "";
    picture ? await attempt(look) : at.file.focus();
  }
});

// ---- the answer

function say(text) {
  at.status.textContent = text;
}

function complain(text) {
  say("");
  at.error.textContent = text;
}

function clear() {
  running.abort();
  say("");
  at.error.textContent = "";
  at.result.hidden = at.answer.hidden = at.named.hidden = at.looks.hidden = at.maps.hidden = true;
  picture = null;
  maps = new Map();
  shown = null;
}

function showPrediction({ label, probability, nearest, candidates, top }) {
  const [name, note] = label === null
    ? ["None of the classes", `most similar: ${named(nearest)}, ${percent(probability)}`]
    : [named(label), percent(probability)];
  const className = label === null ? "quiet" : "quiet number";
  at.named.replaceChildren(name, " ", made("span", { className, textContent: note }));
  // a set supposes that the picture shows one of the classes
  at.candidates.hidden = !candidates || label === null;
  if (candidates) {
    at.candidates.textContent = `${Math.round(100 * limits.coverage)}% coverage: ${candidates.map(named).join("; ")}`;
  }
  at.top.replaceChildren(...top.map(ranked));
  at.result.hidden = at.answer.hidden = at.named.hidden = false;
  at.named.focus();
}

function showSimilar(neighbors) {
  at["similar-images"].replaceChildren(...neighbors.map(({ label, similarity, path, webp }) => {
    const item = made("li", { title: path });
    if (webp !== null) item.append(made("img", { src: `data:image/webp;base64,${webp}`, alt: "" }));
    item.append(made("span", { textContent: named(label) }), made("span", { className: "quiet", textContent: similarity.toFixed(2) }));
    return item;
  }));
  at.similar.hidden = !neighbors.length;
}

function ranked({ label, probability }) {
  const bar = made("span", { className: "bar" });
  bar.append(made("span"));
  bar.firstChild.style.width = `${100 * probability}%`;
  const button = made("button", { type: "button", value: label, disabled: !limits.explains });
  button.append(
    made("span", { className: "label", textContent: named(label) }), bar,
    made("span", { className: "number", textContent: percent(probability) }),
  );
  button.setAttribute("aria-pressed", "false");
  button.addEventListener("click", () =>
    attempt((options) => showMaps(label === shown?.target ? null : label, options)));
  const item = made("li");
  item.append(button);
  return item;
}

at.back.addEventListener("click", async () => {
  await attempt((options) => showMaps(null, options));
  at.choices.querySelector(":checked").focus();
});

async function showMaps(target, options) {
  if (!maps.has(target)) {
    say(target === null ? "Computing where the network looks …" : `Computing the evidence for ${named(target)} …`);
    maps.set(target, await explain(picture, target, options));
  }
  const { image, overlays, size, boxes } = maps.get(target);
  // keep the same map selected when the class changes, for comparison
  const comparing = shown && shown.target !== null && target !== null;
  const last = overlays.findIndex(({ stage }) => stage === overlays.at(-1).stage);
  const number = comparing ? chosen() : shown || target !== null ? last : PHOTO;
  shown = { target, overlays };

  at["maps-name"].textContent = target === null ? "Where the network looks" : `Evidence for ${named(target)}`;
  at.back.hidden = target === null;
  for (const button of at.top.querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(button.value === target));
  }
  at.seen.src = png(image);
  at.seen.alt = `${picture.name} as the network saw it`;
  at.seen.width = at.seen.height = size;
  frame(boxes ?? [], size);
  at.choices.replaceChildren(...columns(image, overlays));
  at.maps.hidden = at.looks.hidden = false;
  at.choices.querySelector(`[value="${number}"]`).checked = true;
  choose(number);
}

// Regions that the network examined again: numbered frames, the first on top.
function frame(boxes, size) {
  at.regions.setAttribute("viewBox", `0 0 ${size} ${size}`);
  at.regions.setAttribute("aria-label", `${boxes.length} regions that the network examines again`);
  at.regions.replaceChildren(...boxes.map((box, index) => framed(box, index + 1, size)).reverse());
  at.outlining.hidden = !boxes.length;
  at.regions.toggleAttribute("hidden", !boxes.length || !at.outline.checked);
}

function framed(box, number, size) {
  const [left, top, right, bottom] = box.map((edge) => Math.min(Math.max(edge, 0), size));
  const group = drawn("g");
  for (const className of ["edge", "line"]) {
    group.append(drawn("rect", { class: className, x: left, y: top, width: right - left, height: bottom - top }));
  }
  const text = drawn("text", { x: left, y: top, dx: ".4em", dy: "1.2em", "font-size": size / 18 });
  text.textContent = number;
  group.append(text);
  return group;
}

at.outline.addEventListener("change", () => at.regions.toggleAttribute("hidden", !at.outline.checked));

// The number of the selected map, or PHOTO.
const chosen = () => Number(at.choices.querySelector(":checked").value);

at.choices.addEventListener("change", () => choose(chosen()));
at.strength.addEventListener("input", mix);

function mix() {
  at.overlay.style.opacity = at.strength.value / 100;
  at.share.textContent = `${at.strength.value}%`;
}

function choose(number) {
  const map = shown.overlays[number];
  at.overlay.hidden = !map;
  at.seen.classList.toggle("grey", Boolean(map));
  at.strength.disabled = !map;
  at.caption.textContent = map ? nameOf(map) : "as the network saw it";
  if (map) at.overlay.src = png(map.png);
}

function columns(image, overlays) {
  const stages = new Map();
  for (const [number, map] of overlays.entries()) {
    const text = map.part === null ? "map" : `part ${map.part}`;
    const tiles = stages.get(map.stage) ?? [];
    stages.set(map.stage, [...tiles, choice(image, number, text, nameOf(map), map.png)]);
  }
  at.choices.style.setProperty("--columns", 1 + stages.size);
  const alone = column("picture", [choice(image, PHOTO, "no map", "picture, no map")]);
  return [alone, ...[...stages].map(([stage, tiles]) => column(stage, tiles))];
}

function column(head, tiles) {
  const whole = made("div");
  whole.append(made("span", { className: "head", textContent: head }), ...tiles);
  return whole;
}

function choice(image, number, text, name, map) {
  const input = made("input", { type: "radio", name: "map", value: number, className: "unseen" });
  input.setAttribute("aria-label", name);
  const tile = made("span", { className: "tile" });
  tile.append(made("img", { src: png(image), alt: "", className: map ? "grey" : "" }));
  if (map) tile.append(made("img", { src: png(map), alt: "" }));
  const label = made("label");
  label.append(input, tile, made("span", { textContent: text }));
  return label;
}

const named = (label) => names.get(label) ?? label;
const nameOf = ({ stage, part }) => (part === null ? `${stage} map` : `${stage} part ${part}`);
const png = (base64) => `data:image/png;base64,${base64}`;
const made = (tag, properties = {}) => Object.assign(document.createElement(tag), properties);
const drawn = (tag, attributes = {}) => {
  const element = document.createElementNS(at.regions.namespaceURI, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
};
const percent = (share) => (share > 0 && share < 0.001 ? "<\u00a00.1%" : `${(100 * share).toFixed(1)}%`);

mix();  // a browser that restores the page keeps the slider's value
attempt(introduce);
