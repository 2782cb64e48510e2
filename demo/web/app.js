// One file, two roles: the page, and the worker that it starts so that detecting never freezes it.
// Pixels as test_image.py reads them: upright, colors as stored, those under transparency kept.
const AS_STORED = { imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none" };

// The worker: an image and two thresholds in, detections out.
async function work() {
  const ort = await import("./onnxruntime/ort.wasm.bundle.min.js");
  ort.env.wasm.numThreads = crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  const session = await ort.InferenceSession.create("detector.onnx", { logSeverityLevel: 3 });
  const scalar = (value) => new ort.Tensor("float32", [value], []);
  let image;
  async function detect({ bitmap, score, nms }) {
    if (bitmap) {
      image = undefined; // not the last one, should reading this one fail
      image = new ort.Tensor("uint8", readPixels(bitmap), [bitmap.height, bitmap.width, 3]);
      bitmap.close();
    }
    const begin = performance.now();
    const inputs = { image, score_threshold: scalar(score), nms_threshold: scalar(nms) };
    const { boxes, labels, scores, matched } = await session.run(inputs);
    const milliseconds = performance.now() - begin;
    const box = (k) => Array.from(boxes.data.slice(4 * k, 4 * k + 4));
    const detection = (score, k) => (
      { score, box: box(k), label: Number(labels.data[k]), matched: Number(matched.data[k]) });
    return { milliseconds, detections: Array.from(scores.data, detection) };
  }
  onmessage = async ({ data }) => postMessage(await detect(data).catch((error) => ({ error: error.message ?? error })));
  postMessage({}); // ready
}

// RGB of a bitmap, (H, W, 3). A 2D canvas loses what is under transparent pixels; WebGL, where there is one, keeps it.
function readPixels(bitmap) {
  const { width, height } = bitmap;
  const canvas = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  canvas.drawImage(bitmap, 0, 0);
  const { data } = canvas.getImageData(0, 0, width, height);
  const opaque = new Uint32Array(data.buffer).every((pixel) => pixel >= 0xff000000); // little-endian: alpha is on top
  const rgba = opaque ? data : readTexture(bitmap) ?? data;
  if (rgba === data && !data.some(Boolean)) throw new Error("it is too large for this browser");
  const rgb = new Uint8Array(width * height * 3);
  for (let from = 0, to = 0; from < rgba.length; from++) if (from % 4 !== 3) rgb[to++] = rgba[from];
  return rgb;
}

let gl; // browsers allow a few such contexts only
function readTexture(bitmap) {
  gl ??= new OffscreenCanvas(1, 1).getContext("webgl");
  if (!gl || gl.isContextLost()) return;
  const rgba = new Uint8Array(bitmap.width * bitmap.height * 4), texture = gl.createTexture();
  gl.bindTexture(gl.TEXTURE_2D, texture);
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, bitmap);
  gl.bindFramebuffer(gl.FRAMEBUFFER, gl.createFramebuffer());
  gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, texture, 0);
  gl.readPixels(0, 0, bitmap.width, bitmap.height, gl.RGBA, gl.UNSIGNED_BYTE, rgba);
  gl.deleteTexture(texture);
  return gl.getError() ? undefined : rgba;
}

const $ = (id) => document.getElementById(id);
let about, worker, latest; // detector.json; what detects; the photo or camera turned to last
let size, detections = [], selected; // width and height of the image shown; what was found in it; the one looked inside
let next, again, running; // an image to come; whether to detect once more; the promise of what is under way

const say = (text) => { $("status").textContent = text; };
const complain = (text) => void ($("trouble").textContent.includes(text) || $("trouble").append(text, " "));

async function start() {
  document.ondragover = document.ondrop = (event) => event.preventDefault(); // else the browser leaves the page
  if (typeof WebAssembly === "undefined") {
    return say("This browser has no WebAssembly, which the detector needs: allow it in its settings, or try another.");
  }
  about = await (await get("detector.json")).json();
  say(`Loading the detector: ${about.megabytes} MB…`);
  $("title").textContent = about.title;
  about.classes.slice(1).forEach((name, k) => paint(add("classes", "li", name), k + 1));
  for (const { cells } of about.feature_maps) addGrid(add("maps", "figure", `${cells} × ${cells}`), cells);
  worker = new Worker(import.meta.url, { type: "module" });
  const ready = ask();
  const photos = about.photos.map(async (photo) => ({ ...photo, blob: await (await get(photo.file)).blob() }));
  for (const photo of await Promise.all(photos)) addPhoto(photo);
  const { error } = await ready;
  if (error) throw new Error(error);
  listen();
  await show(await photos[0]);
}

async function get(file) {
  const response = await fetch(file);
  return response.ok ? response : Promise.reject(new Error(`${file}: ${response.status} ${response.statusText}`));
}

// What the worker answers to a message, or to none, when it starts. One question at a time.
function ask(message) {
  return new Promise((resolve) => {
    worker.onmessage = ({ data }) => resolve(data);
    worker.onerror = (event) => resolve({ error: event.message ?? "its worker does not start" });
    if (message) worker.postMessage(message);
  });
}

function listen() {
  for (const controls of document.querySelectorAll("[inert]")) controls.inert = false;
  $("file").onchange = () => { takeFiles($("file").files); $("file").value = ""; };
  $("camera").onclick = () => (latest?.video ? turnTo() : startCamera());
  document.onpaste = (event) => takeFiles(event.clipboardData.files);
  document.ondrop = (event) => { event.preventDefault(); takeFiles(event.dataTransfer.files); };
  $("score").oninput = $("nms").oninput = ({ target }) => {
    target.previousElementSibling.textContent = Number(target.value).toFixed(2);
    if (size) detect();
  };
  const look = ({ target }) => select(target.closest("li")?.detection);
  for (const event of ["pointerover", "focusin"]) document.addEventListener(event, look);
}

function takeFiles(files) {
  const photos = Array.from(files, (blob) => ({ shows: blob.name, blob }));
  photos.forEach(addPhoto);
  if (photos.length) show(photos[0]);
}

function addPhoto(photo) {
  const button = add("strip", "button"), image = add(button, "img");
  image.alt = photo.shows;
  image.src = URL.createObjectURL(photo.blob);
  image.onload = () => URL.revokeObjectURL(image.src);
  image.onerror = () => { button.remove(); complainOf(photo); };
  button.onclick = () => show(photo);
}

const complainOf = ({ shows }) => complain(`${shows}: not an image that this browser can read.`);

// From now on only images of this photo or camera, if any, are to be shown.
function turnTo(source) {
  release(latest);
  latest = source;
  $("trouble").textContent = "";
  $("camera").ariaPressed = Boolean(source?.video);
  $("status").ariaLive = $("origin").ariaLive = source?.video ? "off" : "polite"; // not every frame is worth reading out
}

const release = (source) => source?.video?.srcObject?.getTracks().forEach((track) => track.stop());

async function show(photo) {
  turnTo(photo);
  const bitmap = await createImageBitmap(photo.blob, AS_STORED).catch(() => complainOf(photo));
  if (bitmap) await detect(bitmap, photo);
}

async function startCamera() {
  const video = Object.assign(document.createElement("video"), { muted: true, playsInline: true });
  const camera = { shows: "Camera", video };
  turnTo(camera);
  try {
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    if (latest === camera) await video.play();
    while (latest === camera) {
      if (!video.srcObject.active) throw new Error("unplugged");
      await detect(await createImageBitmap(video), camera);
      await new Promise(requestAnimationFrame);
    }
  } catch {
    if (latest !== camera) return;
    turnTo();
    const where = isSecureContext ? "" : " Browsers allow it at https:// addresses and on localhost only.";
    complain(`No camera: there is none, or this page may not use it.${where}`);
  } finally {
    release(camera);
  }
}

// Detect in a new image, or once more in the last; what comes while that is under way waits, and only the latest stays.
function detect(bitmap, source) {
  if (bitmap && source !== latest) return bitmap.close();
  if (bitmap) {
    next?.bitmap.close();
    next = { bitmap, source };
  }
  again = $("detections").ariaBusy = true;
  return running ??= detectAll().finally(() => { running = undefined; });
}

async function detectAll() {
  while (again) {
    const { bitmap, source } = next ?? {};
    again = next = undefined;
    const message = { bitmap, score: Number($("score").value), nms: Number($("nms").value) };
    const { error, milliseconds, ...answer } = await ask(message);
    if (bitmap) showImage(bitmap, source);
    detections = answer.detections ?? [];
    const count = `${detections.length || "No"} detection${detections.length === 1 ? "" : "s"}`;
    const took = Math.round(milliseconds);
    say(error ? `The detector failed on this image: ${error}` : `${count} (network: ${took} ms)`);
    render();
  }
  $("detections").ariaBusy = false;
}

function showImage(bitmap, { shows, credit }) {
  size = [$("image").width, $("image").height] = [bitmap.width, bitmap.height];
  $("image").getContext("2d").drawImage(bitmap, 0, 0);
  bitmap.close();
  $("image").ariaLabel = $("credit").textContent = shows;
  if (credit) $("credit").innerHTML = credit;
}

// Boxes on the image, small ones on top, and the same in words.
function render() {
  fill("boxes", "<span></span>", (box, detection) => {
    const [left, top, right, bottom] = detection.box.map((side, n) => side / size[n % 2]);
    place(box, [left, top, right, bottom]);
    box.style.zIndex = Math.round(1000 * (2 - (right - left) * (bottom - top)));
    box.classList.toggle("low", top * $("stage").clientHeight < 24); // no room for its label above
    box.classList.toggle("right", left > 0.7);
    box.firstChild.textContent = title(detection);
  });
  fill("detections", "<button><b></b> <data></data> <data></data></button>", (item, detection) => {
    const [name, score, box] = item.firstChild.children;
    name.textContent = about.classes[detection.label];
    Object.assign(score, { textContent: detection.score.toFixed(2), value: detection.score });
    Object.assign(box, { textContent: detection.box.map(Math.round).join(", "), value: detection.box });
  });
  const same = detections.find((one) => one.label === selected?.label && one.matched === selected.matched);
  const held = document.querySelector("li:is(:hover, :focus-within)"); // in it a video's next frame has another
  select(selected && (same ?? held?.detection));
}

const title = ({ label, score }) => `${about.classes[label]} ${score.toFixed(2)}`;

// One item for each detection, in its color. Elements are reused, so that the focus stays where it is.
function fill(id, html, update) {
  while ($(id).children.length > detections.length) $(id).lastChild.remove();
  detections.forEach((detection, k) => {
    const item = $(id).children[k] ?? Object.assign(add(id, "li"), { innerHTML: html });
    paint(item, detection.label);
    item.detection = detection;
    update(item, detection);
  });
}

// See inside: show the default box of a detection on its feature map; or none.
function select(detection) {
  selected = detection;
  $("stage").classList.toggle("selecting", Boolean(detection));
  const mark = (element, k) => element.classList.toggle("selected", detections[k] === detection);
  for (const id of ["boxes", "detections"]) Array.from($(id).children, mark);
  for (const mark of document.querySelectorAll("#inside > *, #maps i")) mark.remove();
  $("origin").textContent = "Point at a box, or go through the list: where does it come from?";
  if (!detection) return;
  const [x, y, width, height, number, shape, row, column] = about.default_boxes[detection.matched];
  const { cells, stride, shapes } = about.feature_maps[number];
  const cell = [column, row, column + 1, row + 1];
  place(add(addGrid("inside", about.size / stride), "i"), cell.map((side) => (side * stride) / about.size));
  place(add($("maps").children[number].lastChild, "i"), cell.map((side) => side / cells));
  place(add("inside", "div"), [x - width / 2, y - height / 2, x + width / 2, y + height / 2]);
  for (const id of ["inside", "maps"]) paint($(id), detection.label);
  const pixels = [width, height].map((side) => Math.round(side * about.size)).join("\u00a0×\u00a0");
  $("origin").textContent = `${title(detection)} is from feature map ${number + 1} of ${about.feature_maps.length} `
    + `(${cells} × ${cells} cells), row ${row + 1}, column ${column + 1}, default box ${shape + 1} of ${shapes}: `
    + `${pixels} of the network’s ${about.size} × ${about.size} pixels (dashed), which it moved and stretched.`;
}

function add(parent, tag, text = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  return (typeof parent === "string" ? $(parent) : parent).appendChild(element);
}

function addGrid(parent, cells) {
  const grid = Object.assign(add(parent, "div"), { className: "grid" });
  grid.style.backgroundSize = `${100 / cells}% ${100 / cells}%`;
  return grid;
}

// Place an element within its parent; corners in shares of that, which is right at any size.
function place(element, [left, top, right, bottom]) {
  const sides = { left, top, width: right - left, height: bottom - top };
  for (const [name, share] of Object.entries(sides)) element.style[name] = `${100 * share}%`;
}

// The color of a class, and black or white on it.
const paint = (element, label) => { element.style.cssText += about.colors[label]; };

if (typeof document === "undefined") work().catch((error) => postMessage({ error: String(error) }));
else start().catch((error) => say(`The detector cannot be loaded: ${error.message}`));
