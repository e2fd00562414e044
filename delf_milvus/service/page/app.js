// The page of `delf-milvus serve`: search by photo, add photos, see what is stored. It talks to /v1 of the same origin
// and to nobody else.
"use strict";

const $ = (id) => document.getElementById(id);
const KEY = "delf-milvus-key";
const RETRIES = 5;

/** The status of the service, once it is known, and what ends when that is so, or asking for it failed. */
let status = null;
let known = Promise.resolve();
let key = sessionStorage.getItem(KEY) || "";

// ---- small tools -------------------------------------------------------------------------------------------------

/** An element with properties and children; texts are texts, never markup. */
function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

function svg(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

/** An id in an element, which may break after the signs that ids are made of. */
function named(tag, className, id) {
  return h(tag, { className }, ...id.split(/(?<=[/_\-. ])/).flatMap((part) => [part, document.createElement("wbr")]));
}

const many = (count, one, more = one + "s") => `${count.toLocaleString()} ${count === 1 ? one : more}`;
const wait = (seconds) => new Promise((resolve) => setTimeout(resolve, seconds * 1000));
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

function percent(confidence) {
  if (confidence > 0.999) return "over 99.9 %";
  if (confidence < 0.001) return "under 0.1 %";
  return `${(confidence * 100).toFixed(confidence > 0.1 && confidence < 0.99 ? 0 : 1)} %`;
}

/** "1 in 1000" for a share. */
function oneIn(share) {
  if (!(share > 0)) return "none measured";
  const number = Math.round(1 / share);
  const digits = 10 ** Math.max(0, Math.floor(Math.log10(number)) - 1);
  return `1 in ${(Math.round(number / digits) * digits).toLocaleString()}`;
}

// ---- talking to the service --------------------------------------------------------------------------------------

/** An answer that is an error: its sentence, status and kind. */
class Problem extends Error {
  constructor(message, code = 0, kind = "", retryAfter = 0) {
    super(message);
    Object.assign(this, { code, kind, retryAfter });
  }
}

const headers = () => (key ? { Authorization: `Bearer ${key}` } : {});

function problemOf(code, text, retryAfter) {
  try {
    const { kind, message } = JSON.parse(text).error;
    return new Problem(message, code, kind, Number(retryAfter) || 0);
  } catch {
    return new Problem(`The service answered with status ${code}.`, code);
  }
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The service cannot be reached: does it still run?");
  }
  if (response.ok) return response;
  const problem = problemOf(response.status, await response.text(), response.headers.get("Retry-After"));
  if (problem.code === 401) askForKey(problem);
  throw problem;
}

const imagePath = (id) => `v1/images/${encodeURIComponent(id)}`;

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

/** Photos of stored images as addresses of blobs, for a key cannot stand in `src`. */
const pictures = new Map();

function picture(id, side) {
  const name = `${side} ${id}`;
  if (!pictures.has(name)) {
    const made = ask(`${imagePath(id)}/thumbnail?side=${side}`).then((response) => response.blob()).then((blob) => URL.createObjectURL(blob));
    made.catch(() => pictures.delete(name));
    pictures.set(name, made);
    if (pictures.size > 300) {
      const [oldest, address] = pictures.entries().next().value;
      pictures.delete(oldest);
      address.then(URL.revokeObjectURL, () => {});
    }
  }
  return pictures.get(name);
}

function thumb(id, side) {
  const frame = h("span", { className: "thumb" });
  if (status && !status.service.photos) {
    frame.textContent = "no photo";
    return frame;
  }
  picture(id, side).then(
    (address) => frame.replaceChildren(h("img", { src: address, alt: "", decoding: "async" })),
    () => { frame.textContent = "no photo"; },
  );
  return frame;
}

function loadStatus() {
  return known = askStatus();
}

async function askStatus() {
  try {
    status = await (await ask("v1/status")).json();
  } catch (problem) {
    $("collection").textContent = "";
    if (problem.code !== 401) notice(problem.message);
    return;
  }
  notice("");
  const { store, service } = status;
  $("collection").textContent = `${many(store.images, "photo")} in ${store.collection}`;
  $("key-button").hidden = !service.keys;
  $("top").placeholder = service.top;
  $("bar").options[0].textContent = `as the service is set: ${oneIn(service.max_false_alarm)}`;
  $("add-refused").hidden = service.may_write;
  $("add-panel").hidden = !service.may_write;
  $("add-lead").textContent = "Their features are stored in the collection; a photo with the id of a stored one replaces it." +
    (service.uploads ? " The photos are kept too." : " The photos themselves are not kept.");
  showFilters();
  showAddFields();
}

// ---- the key -----------------------------------------------------------------------------------------------------

function askForKey(problem) {
  if ($("key-dialog").open) return;
  $("key-button").hidden = false;
  $("key-text").textContent = key && problem
    ? "This service does not know that key. Enter another one."
    : "This service asks for a key. It stays in this tab and is forgotten when you close it.";
  $("key").value = "";
  $("key-dialog").showModal();
}

$("key-button").addEventListener("click", () => askForKey(null));
$("key-cancel").addEventListener("click", () => $("key-dialog").close());
$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
  $("key-dialog").close();
  await loadStatus();
  if (status) showView();
});

// ---- views -------------------------------------------------------------------------------------------------------

const VIEWS = { search: "Search", add: "Add", stored: "Stored" };

function showView() {
  const name = location.hash.slice(1) in VIEWS ? location.hash.slice(1) : "search";
  for (const view of Object.keys(VIEWS)) $(`view-${view}`).hidden = view !== name;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${VIEWS[name]} · delf-milvus`;
  if (name === "stored") listStored(false);
}

window.addEventListener("hashchange", () => {
  if (location.hash.slice(1) in VIEWS || !location.hash) showView();
});

const photosIn = (transfer) => [...(transfer?.files ?? [])].filter((file) => !file.type || file.type.startsWith("image/"));
const adding = () => !$("view-add").hidden;

function take(files) {
  if (!files.length) return;
  if (adding()) addFiles(files);
  else {
    if ($("view-search").hidden) location.hash = "search";
    choose(files[0]);
  }
}

let dragged = 0;
window.addEventListener("dragenter", () => { dragged += 1; document.body.classList.add("over"); });
window.addEventListener("dragleave", () => { dragged -= 1; if (dragged <= 0) document.body.classList.remove("over"); });
window.addEventListener("dragover", (event) => event.preventDefault());
window.addEventListener("drop", (event) => {
  event.preventDefault();
  dragged = 0;
  document.body.classList.remove("over");
  const files = photosIn(event.dataTransfer);
  if (!files.length && event.dataTransfer?.files.length) notice("That is no photo.");
  else take(files);
});
document.addEventListener("paste", (event) => take(photosIn(event.clipboardData)));
for (const id of ["file", "camera", "file-again", "camera-again", "add-files", "add-camera"]) {
  $(id).addEventListener("change", (event) => {
    take([...event.target.files]);
    event.target.value = "";
  });
}

// ---- the query ---------------------------------------------------------------------------------------------------

/** file; address: of its blob; width, height: pixels, 0 where the browser cannot show it; box: x0, y0, x1, y1 or null. */
let query = null;
let asking = null;
let answer = null;

async function choose(file) {
  if (query) URL.revokeObjectURL(query.address);
  const image = $("query-image");
  query = { file, address: URL.createObjectURL(file), width: 0, height: 0, box: null };
  image.src = query.address;
  try {
    await image.decode();
    Object.assign(query, { width: image.naturalWidth, height: image.naturalHeight });
  } catch {
    // Shown by its answers alone.
  }
  $("query-stage").hidden = $("box-button").hidden = $("box-text").hidden = !query.width;
  $("query-none").hidden = Boolean(query.width);
  $("query-panel").hidden = false;
  $("option-search").disabled = false;
  $("drop").hidden = $("lead").hidden = true;
  $("view-search").classList.remove("empty");
  showBox();
  search();
}

function showBox() {
  const box = $("box");
  box.hidden = !query?.box;
  $("box-button").textContent = query?.box ? "Take the whole photo" : "Select a part";
  if (!query?.box) {
    $("box-text").textContent = "Drag on the photo to search for a part of it.";
    return;
  }
  const [x0, y0, x1, y1] = query.box;
  box.style.left = `${(100 * x0) / query.width}%`;
  box.style.top = `${(100 * y0) / query.height}%`;
  box.style.width = `${(100 * (x1 - x0)) / query.width}%`;
  box.style.height = `${(100 * (y1 - y0)) / query.height}%`;
  $("box-text").textContent = `Part of ${Math.round(x1 - x0)} × ${Math.round(y1 - y0)} px, from ${Math.round(x0)}, ${Math.round(y0)}.`;
}

function setBox(x0, y0, x1, y1) {
  const least = Math.max(16, Math.min(query.width, query.height) / 25);
  const left = clamp(Math.min(x0, x1), 0, query.width - least);
  const upper = clamp(Math.min(y0, y1), 0, query.height - least);
  const right = clamp(Math.max(x0, x1), left + least, query.width);
  const lower = clamp(Math.max(y0, y1), upper + least, query.height);
  query.box = [left, upper, right, lower];
  showBox();
}

{
  const stage = $("query-stage");
  let start = null;
  const at = (event) => {
    const frame = stage.getBoundingClientRect();
    return [((event.clientX - frame.left) / frame.width) * query.width, ((event.clientY - frame.top) / frame.height) * query.height];
  };
  stage.addEventListener("pointerdown", (event) => {
    if (!query?.width || event.button) return;
    start = { place: at(event), x: event.clientX, y: event.clientY, moved: false };
    stage.setPointerCapture(event.pointerId);
  });
  stage.addEventListener("pointermove", (event) => {
    if (!start) return;
    start.moved ||= Math.hypot(event.clientX - start.x, event.clientY - start.y) > 8;
    if (start.moved) setBox(...start.place, ...at(event));
  });
  stage.addEventListener("pointerup", () => {
    const moved = start?.moved;
    start = null;
    if (moved) search();
  });
  stage.addEventListener("pointercancel", () => { start = null; });
  $("box").addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (step) {
      event.preventDefault();
      const [x0, y0, x1, y1] = query.box;
      const dx = (step[0] * query.width) / 40;
      const dy = (step[1] * query.height) / 40;
      if (event.shiftKey) setBox(x0, y0, Math.max(x0 + 1, x1 + dx), Math.max(y0 + 1, y1 + dy));
      else {
        const mx = clamp(dx, -x0, query.width - x1);
        const my = clamp(dy, -y0, query.height - y1);
        setBox(x0 + mx, y0 + my, x1 + mx, y1 + my);
      }
    } else if (event.key === "Enter") search();
    else if (event.key === "Escape" || event.key === "Delete") {
      $("box-button").focus();
      query.box = null;
      showBox();
    }
  });
}

$("box-button").addEventListener("click", () => {
  if (query.box) {
    query.box = null;
    showBox();
    search();
    return;
  }
  setBox(query.width / 4, query.height / 4, (query.width * 3) / 4, (query.height * 3) / 4);
  $("box").focus();
});
$("search-button").addEventListener("click", () => search());
$("option-form").addEventListener("submit", (event) => { event.preventDefault(); if (query) search(); });
$("unverified").addEventListener("change", () => { if (answer) showAnswer(); });

// ---- filters -----------------------------------------------------------------------------------------------------

const OPERATORS = { text: { "==": "is", "!=": "is not" }, boolean: { "==": "is" }, number: { "==": "=", "!=": "≠", ">=": "≥", "<=": "≤", ">": ">", "<": "<" } };
const kindOf = (declaration) => declaration.split("=")[0];

/** An input for a value of a declared field. */
function valueInput(name, declaration, label) {
  const kind = kindOf(declaration);
  if (kind === "boolean") {
    return h("select", { "aria-label": label, name }, h("option", { value: "true", textContent: "true" }), h("option", { value: "false", textContent: "false" }));
  }
  const numeric = kind !== "text";
  return h("input", { type: numeric ? "number" : "text", step: kind === "integer" ? "1" : "any", name, "aria-label": label, autocomplete: "off" });
}

function typed(kind, text) {
  if (kind === "boolean") return text === "true";
  return kind === "text" ? text : Number(text);
}

function showFilters() {
  const fields = status.store.fields;
  const some = Object.keys(fields).length > 0;
  $("no-fields").hidden = some;
  $("filter-more").hidden = !some;
  for (const row of [...$("filter-rows").children]) if (!(row.field.value in fields)) row.remove();
}

function addFilter() {
  const fields = status.store.fields;
  const field = h("select", { "aria-label": "Field" }, ...Object.keys(fields).map((name) => h("option", { value: name, textContent: name })));
  const operator = h("select", { "aria-label": "Comparison" });
  const remove = h("button", { type: "button", className: "quiet", textContent: "✕", "aria-label": "Remove this condition" });
  const row = h("div", { className: "filter-row" }, field, operator, h("span"), remove);
  const fit = () => {
    const kind = kindOf(fields[field.value]);
    operator.replaceChildren(...Object.entries(OPERATORS[kind] ?? OPERATORS.number).map(([value, textContent]) => h("option", { value, textContent })));
    row.children[2].replaceWith(valueInput("value", fields[field.value], `Value of ${field.value}`));
  };
  row.field = field;
  row.condition = () => {
    const kind = kindOf(fields[field.value]);
    const text = row.children[2].value;
    return text === "" ? null : [field.value, operator.value, typed(kind, text)];
  };
  field.addEventListener("change", fit);
  remove.addEventListener("click", () => { row.remove(); $("filter-more").focus(); });
  fit();
  $("filter-rows").append(row);
  field.focus();
}

$("filter-more").addEventListener("click", addFilter);

function filterText() {
  const made = {};
  for (const row of $("filter-rows").children) {
    const condition = row.condition();
    if (condition) (made[condition[0]] ??= {})[condition[1]] = condition[2];
  }
  return Object.keys(made).length ? JSON.stringify(made) : "";
}

// ---- searching ---------------------------------------------------------------------------------------------------

async function search() {
  if (!query) return;
  asking?.abort();
  const mine = (asking = new AbortController());
  const form = new FormData();
  const top = Number($("top").value);
  if (top >= 1) form.set("top", String(Math.min(100, Math.floor(top))));
  if ($("bar").value) form.set("max_false_alarm", $("bar").value);
  for (const name of ["parts", "turned"]) if ($(name).checked) form.set(name, "true");
  if (query.box) form.set("box", query.box.map((value) => value.toFixed(1)).join(","));
  const filter = filterText();
  if (filter) form.set("filter", filter);
  form.set("verified_only", "false");
  form.set("correspondences", "true");
  form.set("photo", query.file, query.file.name || "photo");
  answer = null;
  notice("");
  $("verdict").hidden = $("meaning").hidden = true;
  $("hits").replaceChildren(...[1, 2, 3].map(() => h("li", { className: "skeleton", "aria-hidden": "true" })));
  const started = performance.now();
  $("live").textContent = "Searching …";
  const clock = setInterval(() => { $("live").textContent = `Searching … ${((performance.now() - started) / 1000).toFixed(0)} s`; }, 2000);
  try {
    for (let tries = 0; ; tries += 1) {
      try {
        answer = await (await ask("v1/search", { method: "POST", body: form, signal: mine.signal })).json();
        break;
      } catch (problem) {
        if (![429, 503].includes(problem.code) || tries >= RETRIES) throw problem;
        await wait(problem.retryAfter || 2);
        if (mine.signal.aborted) return;
      }
    }
    answer.seconds = (performance.now() - started) / 1000;
    showAnswer();
    // On a phone the answers lie below the photo.
    if ($("hits").getBoundingClientRect().top > window.innerHeight * 0.8) $("live").scrollIntoView({ block: "start" });
  } catch (problem) {
    if (problem.name === "AbortError") return;
    $("hits").replaceChildren();
    $("live").textContent = "";
    if (problem.code !== 401) showProblem(problem);
  } finally {
    clearInterval(clock);
  }
}

function showVerdict(title, ...texts) {
  $("verdict").replaceChildren(h("h2", { textContent: title }), ...texts.filter(Boolean).map((textContent) => h("p", { textContent })));
  $("verdict").hidden = false;
}

function showProblem(problem) {
  showVerdict(problem.code >= 500 || !problem.code ? "The search failed" : "This photo cannot be searched for", problem.message);
  $("live").textContent = "The search failed.";
}

function showAnswer() {
  const proved = answer.hits.filter((hit) => hit.verified);
  const others = answer.hits.filter((hit) => !hit.verified);
  const bar = Number($("bar").value) || status?.service.max_false_alarm || 0.01;
  const uncalibrated = answer.calibrated ? "" : "The figures were measured with another model: take them as a rough guide.";
  if (proved.length) {
    showVerdict(
      `${many(proved.length, "photo")} ${proved.length === 1 ? "shows" : "show"} the same thing`,
      `Each is proved by one geometric transform. About ${oneIn(bar)} photos without a match would be answered by mistake.`,
      uncalibrated,
    );
  } else if (!answer.query_features) {
    showVerdict("Nothing to search for", "There is nothing distinctive in this photo, or in this part of it: no features were found.");
  } else {
    const best = others.find((hit) => hit.compared);
    showVerdict(
      "No match",
      "Nothing that is stored is proved to show the same thing as this photo.",
      best
        ? `The best candidate, ${best.image_id}, has a confidence of ${percent(best.confidence)}: the probability that it shows the same thing, if half of all queries have a match. ${best.false_alarm < 0.5 ? `${oneIn(best.false_alarm)} photos` : "Most photos"} without a match reach as much evidence; the bar is ${oneIn(bar)}.`
        : "There is no candidate either: the collection is empty, or no photo meets the conditions.",
      uncalibrated,
    );
  }
  const shown = $("unverified").checked ? others : [];
  const rows = [...proved, ...shown].map((hit) => hitRow(hit));
  if (shown.length) rows.splice(proved.length, 0, h("li", { className: "divider", textContent: "Candidates without proof:" }));
  $("hits").replaceChildren(...rows);
  $("meaning").hidden = !answer.hits.length;
  $("live").textContent = `${proved.length ? many(proved.length, "match", "matches") : "No match"}, ${answer.seconds.toFixed(1)} s.`;
}

function hitRow(hit) {
  const fill = h("span");
  fill.style.width = `${Math.round(100 * hit.confidence)}%`;
  const figures = hit.compared
    ? [h("span", { textContent: `confidence ${percent(hit.confidence)}` }), h("span", { textContent: many(hit.inliers, "inlier") })]
    : [h("span", { textContent: "alike, but not compared" })];
  const metadata = Object.entries(hit.metadata).filter(([, value]) => value !== "" && value !== null).slice(0, 4)
    .map(([name, value]) => `${name}: ${typeof value === "object" ? JSON.stringify(value) : value}`).join(" · ");
  const row = h(
    "button",
    { type: "button", className: hit.verified ? "hit" : "hit unproved", disabled: !hit.transform },
    thumb(hit.image_id, 320),
    h(
      "span",
      {},
      named("span", "hit-name", hit.image_id),
      hit.compared ? h("span", { className: "meter", "aria-hidden": "true" }, fill) : null,
      h("span", { className: "hit-line" }, h("span", { className: hit.verified ? "badge" : "", textContent: hit.verified ? "✓ proved" : "not proved" }), ...figures),
      metadata ? h("span", { className: "hit-line", textContent: metadata }) : null,
    ),
  );
  row.addEventListener("click", () => openCompare(hit));
  return h("li", {}, row);
}

// ---- comparing ---------------------------------------------------------------------------------------------------

/** hit; base: address of the stored photo or ""; width, height: of the stored photo, pixels. */
let compared = null;

// Cividis, reversed: light is exact. It reads the same with any colour vision.
const STOPS = [[254, 232, 56], [200, 184, 102], [148, 142, 119], [102, 105, 112], [53, 69, 108], [0, 34, 78]];

function colour(share) {
  const place = clamp(share, 0, 1) * (STOPS.length - 1);
  const index = Math.min(Math.floor(place), STOPS.length - 2);
  const mix = STOPS[index].map((low, i) => Math.round(low + (STOPS[index + 1][i] - low) * (place - index)));
  return `rgb(${mix.join(" ")})`;
}

const comparable = () => answer.hits.filter((hit) => hit.transform && (hit.verified || $("unverified").checked));

async function openCompare(hit) {
  const list = comparable();
  const place = list.indexOf(hit);
  $("compare-title").replaceChildren(named("span", "", hit.image_id));
  $("compare-facts").textContent = [
    hit.verified ? "Proved" : "Not proved",
    `${many(hit.inliers, "inlier")} of ${many(hit.putatives, "match", "matches")}`,
    `confidence ${percent(hit.confidence)}`,
    `${oneIn(hit.false_alarm)} photos without a match reach as much`,
  ].join(" · ");
  $("compare-before").disabled = place <= 0;
  $("compare-next").disabled = place >= list.length - 1;
  $("compare-before").onclick = () => openCompare(list[place - 1]);
  $("compare-next").onclick = () => openCompare(list[place + 1]);
  compared = null;
  $("stage").replaceChildren();
  if (!$("compare").open) $("compare").showModal();
  const asked = hit;
  openCompare.last = asked;
  let record, base = "";
  try {
    record = await (await ask(imagePath(hit.image_id))).json();
    if (record.photo) base = await picture(hit.image_id, 1280);
  } catch (problem) {
    if (!record) {
      $("stage").replaceChildren(h("p", { className: "hint", textContent: problem.message }));
      return;
    }
  }
  if (openCompare.last !== asked) return;
  compared = { hit, base, width: record.width, height: record.height };
  $("compare-open").hidden = !base;
  drawCompare();
}

const mode = () => document.querySelector('input[name="mode"]:checked').value;

/** A photo in a frame of its own pixels, scaled by what is given. */
function plate(address, width, height, transform, text) {
  const element = address ? h("img", { src: address, alt: text, draggable: false }) : h("div", { className: "frame", textContent: `${text} is not shown` });
  element.style.width = `${width}px`;
  element.style.height = `${height}px`;
  element.style.transform = transform;
  return element;
}

const roomOfCompare = () => `${$("compare").clientWidth} ${window.innerHeight}`;

function drawCompare() {
  if (!compared || !$("compare").open) return;
  const { hit, base, width, height } = compared;
  const stage = $("stage");
  const swipe = mode() === "swipe";
  const inliers = hit.correspondence;
  const far = Math.max(1, ...inliers.residuals);
  $("legend-end").textContent = `${far.toFixed(0)} px`;
  $("legend").hidden = !$("lines").checked;
  $("swipe-label").hidden = !swipe;
  stage.classList.toggle("swiping", swipe);
  stage.style.width = "100%";
  const room = stage.clientWidth;
  drawCompare.room = roomOfCompare();
  const high = Math.max(240, window.innerHeight * 0.58);
  const drawing = svg("svg", { "aria-hidden": "true" });
  const mine = query.width ? query.address : "";
  const [qw, qh] = query.width ? [query.width, query.height] : [width, height];
  if (swipe) {
    const scale = Math.min(room / width, high / height);
    stage.style.width = `${Math.floor(width * scale)}px`;
    stage.style.height = `${Math.floor(height * scale)}px`;
    // The transform is between centres of pixels at whole numbers; CSS counts from their corners.
    const [[a, b, tx], [c, d, ty]] = hit.transform;
    const cx = tx + 0.5 - 0.5 * (a + b);
    const cy = ty + 0.5 - 0.5 * (c + d);
    const over = h("div", { className: "swiped" }, plate(mine, qw, qh, `scale(${scale}) matrix(${a}, ${c}, ${b}, ${d}, ${cx}, ${cy})`, "Your photo, laid over it"));
    const hand = h("div", { className: "hand" });
    stage.replaceChildren(plate(base, width, height, `scale(${scale})`, "The stored photo"), over, hand, drawing);
    const set = () => {
      const share = 100 - Number($("swipe").value);
      over.style.clipPath = `inset(0 0 0 ${share}%)`;
      hand.style.left = `${share}%`;
    };
    $("swipe").oninput = set;
    set();
    if ($("lines").checked) {
      inliers.image_points.forEach(([x, y], i) => dot(drawing, (x + 0.5) * scale, (y + 0.5) * scale, colour(inliers.residuals[i] / far)));
    }
  } else {
    $("swipe").oninput = null;
    const beside = room > 560;
    const gap = 12;
    const scale = beside
      ? Math.min((room - gap) / (qw * (height / qh) + width), high / height)
      : Math.min(room / width, high / height);
    const own = beside ? (scale * height) / qh : Math.min(room / qw, high / qh);
    const [ox, oy] = beside ? [qw * own + gap, 0] : [0, qh * own + gap];
    stage.style.width = `${Math.ceil(beside ? ox + width * scale : room)}px`;
    stage.style.height = `${Math.ceil(beside ? height * scale : oy + height * scale)}px`;
    stage.replaceChildren(
      plate(mine, qw, qh, `scale(${own})`, "Your photo"),
      plate(base, width, height, `translate(${ox}px, ${oy}px) scale(${scale})`, "The stored photo"),
      drawing,
    );
    if ($("lines").checked) {
      inliers.query_points.forEach(([x, y], i) => {
        const [u, v] = inliers.image_points[i];
        const from = [(x + 0.5) * own, (y + 0.5) * own];
        const to = [ox + (u + 0.5) * scale, oy + (v + 0.5) * scale];
        const tone = colour(inliers.residuals[i] / far);
        const ends = { x1: from[0], y1: from[1], x2: to[0], y2: to[1] };
        drawing.append(svg("line", { ...ends, stroke: "#fff", "stroke-opacity": 0.35, "stroke-width": 2.5 }), svg("line", { ...ends, stroke: tone, "stroke-width": 1.2 }));
        dot(drawing, ...from, tone);
        dot(drawing, ...to, tone);
      });
    }
  }
}

function dot(drawing, cx, cy, fill) {
  drawing.append(svg("circle", { cx, cy, r: 3.2, fill, stroke: "#fff", "stroke-width": 1 }));
}

{
  const stage = $("stage");
  const move = (event) => {
    if (!stage.classList.contains("swiping") || (event.pointerType !== "mouse" && !event.buttons)) return;
    const frame = stage.getBoundingClientRect();
    $("swipe").value = 100 - clamp(((event.clientX - frame.left) / frame.width) * 100, 0, 100);
    $("swipe").oninput?.();
  };
  stage.addEventListener("pointermove", move);
  stage.addEventListener("pointerdown", move);
  for (const input of document.querySelectorAll('input[name="mode"]')) input.addEventListener("change", drawCompare);
  $("lines").addEventListener("change", drawCompare);
  // What is drawn makes the dialog taller, which is no reason to draw it anew.
  new ResizeObserver(() => requestAnimationFrame(() => {
    if (drawCompare.room !== roomOfCompare()) drawCompare();
  })).observe($("compare"));
  $("compare-close").addEventListener("click", () => $("compare").close());
  $("compare").addEventListener("click", (event) => { if (event.target === $("compare")) $("compare").close(); });
  $("compare-open").addEventListener("click", async () => {
    try {
      const blob = await (await ask(`${imagePath(compared.hit.image_id)}/photo`)).blob();
      const address = URL.createObjectURL(blob);
      window.open(address, "_blank", "noopener");
      setTimeout(() => URL.revokeObjectURL(address), 60000);
    } catch (problem) {
      $("compare-facts").textContent = problem.message;
    }
  });
}

// ---- adding ------------------------------------------------------------------------------------------------------

/** Photos to be added: file, id, metadata, row, state ("waits", "sends", "done" or "failed"). */
let uploads = [];
let sending = 0;

function showAddFields() {
  const fields = status.store.fields;
  const inputs = Object.entries(fields).filter(([name]) => name !== status.store.tenant_field).map(([name, declaration]) => {
    const input = valueInput(name, declaration, name);
    const standard = declaration.includes("=") ? declaration.slice(declaration.indexOf("=") + 1) : null;
    if (input.tagName === "SELECT") input.value = standard ?? "false";
    else input.placeholder = standard === null ? "required" : standard || "none";
    input.removeAttribute("aria-label");
    return h("label", {}, name, input);
  });
  $("add-fields").replaceChildren(...inputs);
}

function addMetadata() {
  const made = {};
  for (const input of $("add-fields").querySelectorAll("[name]")) {
    if (input.value !== "") made[input.name] = typed(kindOf(status.store.fields[input.name]), input.value);
  }
  return JSON.stringify(made);
}

function addFiles(files) {
  for (const file of files) {
    const id = $("prefix").value + (file.webkitRelativePath || file.name || `photo-${Date.now()}`);
    const progress = h("progress", { max: 1, value: 0, "aria-label": `Sent of ${id}` });
    const state = h("span", { className: "state", textContent: "waits" });
    const row = h("li", { className: "upload" }, named("span", "name", id), progress, state);
    const upload = { file, id, metadata: addMetadata(), row, progress, stateText: state, state: "waits", tries: 0 };
    uploads.push(upload);
    $("add-list").append(row);
  }
  pump();
}

function pump() {
  while (sending < 2) {
    const upload = uploads.find((one) => one.state === "waits");
    if (!upload) break;
    sending += 1;
    upload.state = "sends";
    send(upload).finally(() => { sending -= 1; pump(); });
  }
  const done = uploads.filter((one) => one.state === "done").length;
  const failed = uploads.filter((one) => one.state === "failed").length;
  const open = uploads.length - done - failed;
  $("add-live").textContent = uploads.length ? `${done} of ${uploads.length} stored${failed ? `, ${failed} failed` : ""}${open ? ` …` : "."}` : "";
  $("add-retry").hidden = !failed || Boolean(open);
  $("add-clear").hidden = !uploads.length || Boolean(open);
  if (uploads.length && !open) loadStatus();
}

async function send(upload) {
  upload.row.querySelector(".problem")?.remove();
  upload.row.classList.remove("done");
  for (;;) {
    try {
      const made = await post(upload);
      upload.state = "done";
      upload.row.classList.add("done");
      upload.progress.value = 1;
      upload.stateText.textContent = `${many(made.stored[0].features, "feature")}${made.stored[0].replaced ? ", replaced" : ""}`;
      for (const name of [...pictures.keys()]) if (name.endsWith(` ${upload.id}`)) pictures.delete(name);
      return;
    } catch (problem) {
      if ([429, 503].includes(problem.code) && upload.tries < RETRIES) {
        upload.tries += 1;
        upload.stateText.textContent = "waits for the service";
        await wait(problem.retryAfter || 2);
        continue;
      }
      if (problem.code === 401) askForKey(problem);
      upload.state = "failed";
      upload.stateText.textContent = "failed";
      upload.row.append(h("span", { className: "problem", textContent: problem.message }));
      return;
    }
  }
}

/** Sends one photo; XMLHttpRequest, because fetch does not tell how much has been sent. */
function post(upload) {
  const form = new FormData();
  form.set("id", upload.id);
  form.set("metadata", upload.metadata);
  form.set("photo", upload.file, upload.file.name || "photo");
  const request = new XMLHttpRequest();
  request.open("POST", "v1/images");
  for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
  return new Promise((resolve, reject) => {
    request.upload.onprogress = (event) => {
      upload.progress.value = event.loaded / event.total;
      upload.stateText.textContent = event.loaded < event.total ? `${Math.round((100 * event.loaded) / event.total)} %` : "being read";
    };
    request.onload = () => {
      if (request.status < 300) resolve(JSON.parse(request.responseText));
      else reject(problemOf(request.status, request.responseText, request.getResponseHeader("Retry-After")));
    };
    request.onerror = () => reject(new Problem("The service cannot be reached: does it still run?"));
    request.send(form);
  });
}

$("add-form").addEventListener("submit", (event) => event.preventDefault());
$("add-retry").addEventListener("click", () => {
  for (const upload of uploads) if (upload.state === "failed") Object.assign(upload, { state: "waits", tries: 0, metadata: addMetadata() });
  pump();
});
$("add-clear").addEventListener("click", () => {
  uploads = [];
  $("add-list").replaceChildren();
  pump();
});

// ---- what is stored ----------------------------------------------------------------------------------------------

let nextPage = null;

async function listStored(more) {
  const parameters = new URLSearchParams({ limit: "60", prefix: $("stored-prefix").value });
  if (more && nextPage !== null) parameters.set("after", nextPage);
  if (!more) $("stored-live").textContent = "Loading …";
  try {
    const page = await (await ask(`v1/images?${parameters}`)).json();
    // Its photos and whether one may delete are in the status, which may come later where this page is opened first.
    await known;
    const cards = page.images.map(storedCard);
    if (more) $("stored-list").append(...cards);
    else $("stored-list").replaceChildren(...cards);
    if (more && cards.length) cards[0].querySelector("button")?.focus();
    nextPage = page.next;
    $("stored-more").hidden = page.next === null;
    const count = $("stored-list").children.length;
    if (count) $("stored-live").textContent = `${many(count, "photo")} shown${page.next === null ? "." : ", there are more."}`;
    else $("stored-live").textContent = $("stored-prefix").value ? "No id starts so." : "Nothing is stored yet: add photos, or run `delf-milvus ingest`.";
  } catch (problem) {
    $("stored-live").textContent = problem.message;
  }
}

function storedCard(record) {
  const find = h("button", { type: "button", className: "quiet", textContent: "Search", "aria-label": `Search with ${record.image_id}`, hidden: !record.photo });
  const remove = h("button", { type: "button", className: "quiet", textContent: "Delete", "aria-label": `Delete ${record.image_id}`, hidden: !status?.service.may_write });
  const card = h(
    "li",
    { className: "card" },
    record.photo ? thumb(record.image_id, 320) : h("span", { className: "thumb", textContent: "photo not shown" }),
    named("span", "name", record.image_id),
    h("span", { className: "hint", textContent: `${record.width} × ${record.height}, ${many(record.feature_count, "feature")}` }),
    h("div", { className: "buttons" }, find, remove),
  );
  find.addEventListener("click", async () => {
    try {
      const blob = await (await ask(`${imagePath(record.image_id)}/photo`)).blob();
      location.hash = "search";
      choose(new File([blob], record.image_id, { type: blob.type }));
    } catch (problem) {
      $("stored-live").textContent = problem.message;
    }
  });
  remove.addEventListener("click", () => {
    $("delete-text").textContent = `${record.image_id} and its features leave the collection${status?.service.uploads ? ", and its photo the folder of uploads" : ""}. This cannot be undone.`;
    $("delete-form").onsubmit = async (event) => {
      event.preventDefault();
      $("delete-dialog").close();
      try {
        await ask(imagePath(record.image_id), { method: "DELETE" });
        card.remove();
        $("stored-live").textContent = `${record.image_id} was deleted.`;
        loadStatus();
      } catch (problem) {
        $("stored-live").textContent = problem.message;
      }
    };
    $("delete-dialog").showModal();
  });
  return card;
}

$("delete-cancel").addEventListener("click", () => $("delete-dialog").close());
$("stored-form").addEventListener("submit", (event) => { event.preventDefault(); listStored(false); });
$("stored-more").addEventListener("click", () => listStored(true));

// ---- start -------------------------------------------------------------------------------------------------------

$("view-search").classList.add("empty");
loadStatus();
showView();
