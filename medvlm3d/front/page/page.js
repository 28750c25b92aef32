"use strict";
// One page, one visit. The server does the reading and answering; this file shows and asks.

const $ = id => document.getElementById(id);
const PLANES = ["sagittal", "coronal", "axial"];            // of the axes x, y, z
const ENDS = [["L", "R"], ["P", "A"], ["I", "S"]];
const RULES = ["cosine", "uniform", "random", "k-centre", "cosine-bins", "patch-bins"];
let token = null, scan = null, models = [], nv = null, stopping = null, kept = [], turn = 0;
const scans = new Map();                                    // id → {facts, label}

// --- talking to the service -------------------------------------------------------------------------------

async function call(method, path, body, signal) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const raw = body instanceof Blob;
  if (body !== undefined && !raw) headers["Content-Type"] = "application/json";
  const sent = body === undefined || raw ? body : JSON.stringify(body);
  const reply = await fetch(path, { method, headers, body: sent, signal });
  if (reply.ok) return reply;
  let message = `the service answered ${reply.status}`;
  try { message = (await reply.json()).error.message; } catch (_) { /* the number has to do */ }
  throw new Error(message);
}

const json = async (...args) => (await call(...args)).json();

async function begin() {
  token = null;
  token = (await json("POST", "visits")).visit;
}

function say(text) { $("status").textContent = text; }

function fail(error) {
  say("");
  $("error").textContent = error ? error.message : "";
  $("error").hidden = !error;
}

function make(kind, text, parent, attributes = {}) {
  const node = document.createElement(kind);
  if (text !== undefined && text !== null) node.textContent = text;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (parent) parent.append(node);
  return node;
}

function fill(select, rows) {
  select.replaceChildren(...rows.map(([value, text]) => make("option", text, null, { value })));
}

// --- files ------------------------------------------------------------------------------------------------

async function filesOf(entry, path = "") {
  if (entry.isFile) return [[path + entry.name, await new Promise((ok, no) => entry.file(ok, no))]];
  const reader = entry.createReader(), found = [];
  for (;;) {                                                // a reader gives a hundred entries at a time
    const some = await new Promise((ok, no) => reader.readEntries(ok, no));
    if (!some.length) break;
    for (const one of some) found.push(...await filesOf(one, `${path}${entry.name}/`));
  }
  return found;
}

const hidden = name => /(^|\/)(\.DS_Store|Thumbs\.db|desktop\.ini|\._[^/]*)$/i.test(name);

async function sendFiles(files) {
  await call("DELETE", "files");
  let done = 0;
  for (const [name, file] of files) {
    if (files.length > 1 && hidden(name)) continue;
    await call("PUT", "files/" + name.split("/").map(encodeURIComponent).join("/"), file);
    say(`${++done} of ${files.length} files sent`);
  }
}

function readingOptions() {
  const options = {};
  for (const name of ["series", "frame"]) if ($(name).value) options[name] = Number($(name).value);
  for (const name of ["axis_order", "modality", "intensity"]) if ($(name).value) options[name] = $(name).value;
  if ($("resample").checked) options.resample = true;
  return options;
}

async function bring(files) {
  fail(null);
  document.body.dataset.scan = "reading";
  try {
    if (files) {
      if (!files.length) return;
      await sendFiles(files);
    }
    say("reading the scan");
    const facts = await json("POST", "volumes", readingOptions());
    scans.set(facts.id, { facts, label: `${scans.size + 1}: ${facts.modality} ${facts.shape.join("×")}` });
    while (scans.size > 3) scans.delete(scans.keys().next().value);
    await show(facts.id);
    document.body.dataset.scan = "shown";
  } catch (error) {
    fail(error);
    document.body.dataset.scan = "failed";
  }
}

// --- the viewer -------------------------------------------------------------------------------------------

async function startViewer() {
  if (nv) return;
  nv = new niivue.Niivue({
    isRadiologicalConvention: true, sagittalNoseLeft: true, show3Dcrosshair: true, dragAndDropEnabled: false,
    multiplanarShowRender: niivue.SHOW_RENDER.ALWAYS, multiplanarLayout: niivue.MULTIPLANAR_TYPE.GRID,
    multiplanarForceRender: true, multiplanarPadPixels: 14, isCornerOrientationText: false, showAllOrientationMarkers: true, crosshairWidth: 1,
    crosshairColor: [1, 0.75, 0.2, 0.8], loadingText: "", isRuler: true, rulerColor: [0.7, 0.7, 0.7, 0.8], logLevel: "error",
  });
  nv.onLocationChange = moved;
  await nv.attachToCanvas($("canvas"));
  nv.setSliceType(Number($("view").value));
}

async function show(id) {
  scan = scans.get(id).facts;
  $("viewer").hidden = false;
  say("loading the picture");
  const view = await (await call("GET", `volumes/${id}/view.nii`)).arrayBuffer();
  await startViewer();
  while (nv.volumes.length) nv.removeVolumeByIndex(nv.volumes.length - 1);
  await nv.loadFromArrayBuffer(view, "scan.nii");
  const dims = nv.volumes[0].dimsRAS;
  for (const [axis, plane] of PLANES.entries()) {
    const slider = $(plane), n = dims[axis + 1];
    Object.assign(slider, { min: 0, max: n - 1, step: 1 });
  }
  fill($("window"), Object.keys(scan.windows).concat("own").map(name => [name, name]));
  $("window").value = scan.windows["soft tissue"] ? "soft tissue" : "whole range";
  preset();
  facts();
  listScans();
  $("send").disabled = false;
  moveTo([0.5, 0.5, 0.5]);
  fail(null);
  say("finding the slices that the model keeps");
  await showKept(settings(""));
  say("");
}

function listScans() {
  const rows = [...scans].map(([id, { label }]) => [id, label]);
  fill($("scans"), rows);
  $("scans").value = scan.id;
  $("scans-label").hidden = rows.length < 2;
  fill($("scan2"), [["", "the same"], ...rows]);
}

function facts() {
  const rows = {
    "modality, unit": `${scan.modality}, ${scan.intensity}`, "acquired plane": scan.plane,
    "voxels": scan.shape.join(" × "), "spacing": `${scan.spacing.join(" × ")} mm`, "extent": `${scan.extent.join(" × ")} mm`,
  };
  if (scan.thinned > 1) rows["shown"] = `every ${scan.thinned}th voxel of the plane`;
  if (scan.warnings.length) rows["notes of the reader"] = scan.warnings.join("; ");
  const nodes = Object.entries(rows).flatMap(([name, value]) => [make("dt", name), make("dd", value)]);
  $("facts").replaceChildren(...nodes);
}

function preset() {
  const limits = scan.windows[$("window").value];
  if (limits) [$("low").value, $("high").value] = limits.map(v => Number(v.toPrecision(4)));
  applyWindow();
}

function applyWindow() {
  const low = Number($("low").value), high = Number($("high").value);
  if (!(low < high)) return;
  Object.assign(nv.volumes[0], { cal_min: low, cal_max: high });
  nv.updateGLVolume();
}

function moveTo(frac) {
  nv.scene.crosshairPos = frac.map(v => Math.min(1, Math.max(0, v)));
  nv.drawScene();
  nv.createOnLocationChange();
}

function slide(event) {
  const axis = Number(event.target.dataset.axis), n = Number(event.target.max) + 1;
  const frac = [...nv.scene.crosshairPos];
  frac[axis] = (Number(event.target.value) + 0.5) / n;
  moveTo(frac);
}

function moved(place) {
  const frac = nv.scene.crosshairPos;
  for (const [axis, plane] of PLANES.entries()) {
    const slider = $(plane), n = Number(slider.max) + 1, mm = place.mm[axis];
    slider.value = Math.min(n - 1, Math.floor(frac[axis] * n));
    const text = `${Math.abs(mm).toFixed(1)} mm ${ENDS[axis][mm < 0 ? 0 : 1]}, ${Number(slider.value) + 1} of ${n}`;
    slider.nextElementSibling.parentElement.nextElementSibling.textContent = text;
    slider.setAttribute("aria-valuetext", text);
  }
  const value = place.values && place.values[0] ? place.values[0].value : null;
  $("where").textContent = value === null ? "" : `value at the cross: ${Number(value.toFixed(2))} ${unit()}`;
  markStrip();
}

const unit = () => ({ HU: "HU", SUV: "SUV" }[scan.intensity] || "");

// --- kept slices ------------------------------------------------------------------------------------------

function settings(suffix) {
  const set = { model: $("model" + suffix).value, selection: $("selection" + suffix).value || null };
  set.rho = $("rho" + suffix).value ? Number($("rho" + suffix).value) : null;
  return set;
}

function query(set) {
  const given = Object.entries(set).filter(([, value]) => value !== null && value !== "");
  return new URLSearchParams(given).toString();
}

async function showKept(set) {
  const mine = ++turn, id = scan.id;
  const found = await json("GET", `volumes/${id}/kept?${query(set)}`);
  if (mine !== turn) return;
  kept = found.kept;
  drawMarks();
  $("strip").replaceChildren();
  for (const [k, one] of kept.entries()) {
    const text = `${one.slice + 1} of ${one.of}`;
    const button = make("button", null, $("strip"), { type: "button", "aria-label": `kept slice ${text}` });
    const picture = make("img", null, button, { alt: "" });
    make("span", text, button);
    button.onclick = () => moveTo(fracOf(one));
    const blob = await (await call("GET", `volumes/${id}/kept/${k}?${query(set)}`)).blob();
    if (mine !== turn) return;
    picture.src = URL.createObjectURL(blob);
    picture.onload = () => URL.revokeObjectURL(picture.src);
  }
  markStrip();
}

const axisOf = one => PLANES.indexOf(one.plane);

function fracOf(one) {
  const frac = [...nv.scene.crosshairPos];
  frac[axisOf(one)] = nv.mm2frac(one.mm)[axisOf(one)];
  return frac;
}

function drawMarks() {
  for (const marks of document.querySelectorAll(".marks")) marks.replaceChildren();
  for (const one of kept) {
    const marks = $(one.plane).nextElementSibling, frac = nv.mm2frac(one.mm)[axisOf(one)];
    make("b", null, marks, { style: `left: calc(8px + ${frac.toFixed(4)} * (100% - 16px))` });
  }
}

function markStrip() {
  if (!kept.length || !nv) return;
  const axis = axisOf(kept[0]), here = nv.scene.crosshairPos[axis];
  const half = 0.5 / kept[0].of;
  for (const [k, button] of [...$("strip").children].entries())
    button.setAttribute("aria-pressed", Math.abs(nv.mm2frac(kept[k].mm)[axis] - here) <= half);
}

// --- questions and answers --------------------------------------------------------------------------------

function card(place, title) {
  const node = make("article", null, place);
  make("h3", title, node);
  const words = make("p", "", node, { class: "words" });
  return { node, words };
}

async function* eventsOf(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line.slice(6));
  }
}

async function askOne(body, { node, words }) {
  words.textContent = "…";
  let begun = false;
  const reply = await call("POST", "answers", { ...body, stream: true }, stopping.signal);
  for await (const event of eventsOf(reply)) {
    if (event.error) throw new Error(event.error.message);
    if (event.words) {
      words.textContent = (begun ? words.textContent : "") + event.words;
      begun = true;
    }
    if (event.answer) return finish(node, words, event.answer);
  }
}

function finish(node, words, answer) {
  words.textContent = answer.abstained ? "No answer: its confidence lies below the threshold." : answer.text || "(no words)";
  if (answer.cut) make("p", "Cut at the limit of its length or time.", node, { class: "small" });
  if (answer.probabilities) odds(node, answer);
  if (answer.warnings.length) {
    const list = make("ul", null, node, { class: "warnings", "aria-label": "Warnings" });
    for (const text of answer.warnings) make("li", text, list);
  }
  const line = `${answer.model}; selection ${answer.selection}, ρ ${answer.rho} %, ${answer.kept.length} slices; ${answer.seconds} s. ${answer.notice}`;
  make("p", line, node, { class: "small" });
  if (answer.notes.length) {
    const more = make("details", null, node, { class: "small" });
    make("summary", "Notes", more);
    for (const text of answer.notes) make("p", text, more);
  }
  if (answer.abstained || !answer.text) return answer;
  const button = make("button", "Show where the words looked", node, { type: "button" });
  button.onclick = () => heat(answer, node).catch(fail);
  return answer;
}

function odds(node, answer) {
  const table = make("table", null, node, { class: "odds" });
  for (const [option, p] of Object.entries(answer.probabilities)) {
    const row = make("tr", null, table);
    make("td", `${(100 * p).toFixed(1)} %`, row);
    make("td", option, row);
    make("meter", null, make("td", null, row), { min: 0, max: 1, value: p, "aria-label": option });
  }
}

async function heat(answer, node) {
  say("finding where the words looked");
  const buffer = await (await call("GET", `answers/${answer.id}/heat.nii`)).arrayBuffer();
  if (answer.volume !== scan.id) await show(answer.volume);
  while (nv.volumes.length > 1) nv.removeVolumeByIndex(1);
  await nv.loadFromArrayBuffer(buffer, "heat.nii");
  Object.assign(nv.volumes[1], { colormap: "warm", cal_min: 10, cal_max: 100 });
  nv.setOpacity(1, Number($("opacity").value));
  nv.updateGLVolume();
  for (const other of document.querySelectorAll("article.shown")) other.classList.remove("shown");
  node.classList.add("shown");
  kept = answer.kept;
  drawMarks();
  const best = hottest(nv.volumes[1]);
  if (best) moveTo(best);
  say("heat: where the words of the marked answer looked, in percent of the largest value");
}

function hottest(volume) {                                  // the middle of the hottest place, as a fraction
  const image = volume.img, [, nx, ny] = volume.hdr.dims;
  let at = 0;
  for (let i = 1; i < image.length; i++) if (image[i] > image[at]) at = i;
  if (!image[at]) return null;
  const vox = [at % nx, Math.floor(at / nx) % ny, Math.floor(at / (nx * ny))];
  const mm = volume.hdr.affine.slice(0, 3).map(row => row[0] * vox[0] + row[1] * vox[1] + row[2] * vox[2] + row[3]);
  return [...nv.mm2frac(mm)].slice(0, 3);
}

function bodyOf(suffix) {
  const choices = $("choices").value.split("\n").map(text => text.trim()).filter(Boolean);
  return {
    volume: (suffix && $("scan2").value) || scan.id, question: $("question").value.trim() || null,
    choices: choices.length ? choices : null, max_new_tokens: Number($("max_new_tokens").value) || 256, ...settings(suffix),
  };
}

async function ask(event) {
  event.preventDefault();
  fail(null);
  stopping = new AbortController();
  $("send").disabled = true;
  $("stop").hidden = false;
  const both = $("compare").checked, title = $("question").value.trim() || "Report";
  const place = make("div", null, null, both ? { class: "pair" } : {});
  $("answers").prepend(place);
  const cards = (both ? ["", "2"] : [""]).map(suffix => ({ suffix, ...card(place, title) }));
  try {
    const answers = [];
    for (const one of cards) {
      const body = bodyOf(one.suffix);
      const answer = await askOne(body, one);
      answers.push(Object.assign(answer, { volume: body.volume }));
    }
    say("");
    await showKept(settings(""));
    if ($("show-heat").checked && answers[0].text && !answers[0].abstained) await heat(answers[0], cards[0].node);
  } catch (error) {
    if (error.name === "AbortError") for (const one of cards) make("p", "Stopped.", one.node);
    else fail(error);
  }
  $("send").disabled = false;
  $("stop").hidden = true;
}

// --- what the model has seen ------------------------------------------------------------------------------

function showSeen() {
  const model = models.find(one => one.name === $("model").value), place = $("seen").lastElementChild;
  place.replaceChildren();
  const seen = model.seen;
  if (!seen || !seen.volumes) return make("p", `${model.name}: ${model.record || "not known"}.`, place, { class: "warnings" });
  const kinds = Object.entries(seen.modalities || {}).map(([name, n]) => `${n} ${name}`).join(", ");
  const planes = Object.entries(seen.planes || {}).map(([name, n]) => `${n} ${name}`).join(", ");
  make("p", `${model.name}: ${seen.volumes} scans${seen.source ? ` (${seen.source})` : ""}; ${kinds}; ${planes}.`, place);
  if (seen.threshold) make("p", `Below a confidence of ${(100 * seen.threshold).toFixed(0)} % it gives no answer.`, place);
}

// --- the beginning ----------------------------------------------------------------------------------------

function listen() {
  const picked = event => bring([...event.target.files].map(file => [file.webkitRelativePath || file.name, file])).then(() => { event.target.value = ""; });
  $("file").onchange = picked;
  $("folder").onchange = picked;
  $("again").onclick = () => bring(null);
  const drop = $("drop");
  document.ondragover = event => { event.preventDefault(); drop.classList.add("over"); };
  document.ondragleave = event => { if (!event.relatedTarget) drop.classList.remove("over"); };
  document.ondrop = async event => {
    event.preventDefault();
    drop.classList.remove("over");
    const entries = [...event.dataTransfer.items].map(item => item.webkitGetAsEntry()).filter(Boolean);
    try { await bring((await Promise.all(entries.map(entry => filesOf(entry)))).flat()); } catch (error) { fail(error); }
  };
  for (const plane of PLANES) $(plane).oninput = slide;
  $("view").onchange = () => nv.setSliceType(Number($("view").value));
  $("window").onchange = preset;
  for (const id of ["low", "high"]) $(id).onchange = () => { $("window").value = "own"; applyWindow(); };
  $("opacity").oninput = () => {
    $("opacity").parentElement.nextElementSibling.textContent = `${Math.round(100 * $("opacity").value)} %`;
    if (nv && nv.volumes.length > 1) nv.setOpacity(1, Number($("opacity").value));
  };
  $("scans").onchange = () => show($("scans").value).catch(fail);
  $("model").onchange = () => { showSeen(); rekeep(); };
  $("selection").onchange = $("rho").onchange = rekeep;
  $("form").onsubmit = ask;
  $("stop").onclick = () => stopping.abort();
  window.addEventListener("pagehide", () => {
    if (token) fetch("visits", { method: "DELETE", headers: { Authorization: `Bearer ${token}` }, keepalive: true });
  });
  window.addEventListener("pageshow", event => { if (event.persisted) location.reload(); });
  setInterval(() => { if (!document.hidden) call("GET", "visits").catch(fail); }, 300000);
}

function rekeep() { if (scan) showKept(settings("")).catch(fail); }

async function start() {
  listen();
  try {
    await begin();
    models = (await json("GET", "models")).models;
    for (const select of document.querySelectorAll(".models")) fill(select, models.map(one => [one.name, one.name]));
    for (const select of document.querySelectorAll(".rules")) fill(select, [["", "the model's own"], ...RULES.map(rule => [rule, rule])]);
    if (models.length > 1) $("model2").value = models[1].name;
    showSeen();
    document.body.dataset.ready = "yes";
  } catch (error) { fail(error); }
}

start();
