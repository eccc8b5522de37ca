// The page. It asks the server for runs, which come back as sprites (rows of small pictures in one PNG) or as paths of
// particles, and plays them here, so that dragging the time costs nothing.

const SAMPLERS = { sde: "Reverse SDE", pc: "Predictor-corrector", ode: "Probability flow" };
const $ = (id) => document.getElementById(id);
const session = Math.random().toString(36).slice(2);

// ------------------------------------------------------------------ what has been chosen, kept in the address

const START = { model: "", mixture: "islands", cloud: 0, seed: 0, label: "", steps: 25, guidance: 2, view: "states", a: 0, b: 1 };
const chosen = { ...START };

function readAddress() {
  const found = new URLSearchParams(location.hash.split("?")[1] ?? "");
  for (const [name, value] of found) {
    if (!(name in START)) continue;
    const number = Number(value);
    if (typeof START[name] !== "number") chosen[name] = value;
    else if (Number.isSafeInteger(number) && number >= 0) chosen[name] = number;
  }
}

function writeAddress(part) {
  const changed = Object.entries(chosen).filter(([name, value]) => value !== START[name]);
  const section = part ?? (location.hash.slice(1).split("?")[0] || "particles");
  history.replaceState(null, "", `#${section}${changed.length ? "?" + new URLSearchParams(changed) : ""}`);
}

const freshSeed = () => Math.floor(Math.random() * 1e6);

// ------------------------------------------------------------------ the server

function say(text) {
  $("toast").textContent = text;
  $("toast").classList.add("shown");
  clearTimeout(say.timer);
  say.timer = setTimeout(() => $("toast").classList.remove("shown"), 6000);
}

// Runs one function of the server; `part` is called for each part of its result.
async function run(name, settings, part) {
  const reply = await fetch(`runs/gradio_api/call/${name}`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ data: [settings], session_hash: `${session}-${name}` }),
  });
  if (!reply.ok) throw new Error(reply.status === 503 ? "Many people are here just now. Try again in a minute." : "The server did not answer.");
  const { event_id: event } = await reply.json();
  return new Promise((resolve, reject) => {
    const source = new EventSource(`runs/gradio_api/call/${name}/${event}`);
    let seen = false;
    source.addEventListener("generating", (message) => {
      seen = true;
      part(JSON.parse(message.data)[0]);
    });
    source.addEventListener("complete", (message) => {
      source.close();
      if (!seen) part(JSON.parse(message.data)[0]);
      resolve();
    });
    source.addEventListener("error", (message) => {
      source.close();
      const text = message.data ? (JSON.parse(message.data)?.error ?? "Something went wrong.") : "The connection was lost.";
      reject(new Error(text));
    });
  });
}

// The latest wish counts: while a run is on its way, a newer one of the same kind replaces the one that waits.
function latest(work) {
  let running = false, waiting = false;
  return async function start() {
    if (running) { waiting = true; return; }
    running = true;
    do {
      waiting = false;
      try { await work(); } catch (error) { say(error.message); }
    } while (waiting);
    running = false;
  };
}

async function busy(elements, work) {
  elements.forEach((e) => { e.classList.add("working"); if ("disabled" in e) e.disabled = true; });
  try { await work(); } finally {
    elements.forEach((e) => { e.classList.remove("working"); if ("disabled" in e) e.disabled = false; });
  }
}

// ------------------------------------------------------------------ parts

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in made && typeof value !== "string") made[name] = value; else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function chips(id, options, value, change) {
  const place = $(id);
  place.replaceChildren();
  for (const [key, text] of Object.entries(options)) {
    const chip = element("button", { type: "button", "aria-pressed": String(key === String(value)) }, text);
    chip.onclick = () => {
      for (const other of place.children) other.setAttribute("aria-pressed", String(other === chip));
      change(key);
    };
    place.append(chip);
  }
}

function timeline(id, draw) {
  const place = $(id);
  const button = element("button", { type: "button", "aria-label": "Play or pause" }, "❚❚");
  const range = element("input", { type: "range", min: "0", max: "1000", value: "0", "aria-label": "Time, from noise to data" });
  const label = element("output");
  place.append(button, range, label);
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  let playing = !still, last = 0, held = 0;
  const set = (value) => { range.value = value; label.textContent = draw(value / 1000); };
  const show = () => { button.textContent = playing ? "❚❚" : "▶"; };
  button.onclick = () => { playing = !playing; if (playing && +range.value >= 1000) set(0); show(); };
  range.oninput = () => { playing = false; show(); set(+range.value); };
  let seen = false;
  new IntersectionObserver((entries) => { seen = entries[0].isIntersecting; }).observe(place.parentElement);
  function tick(now) {
    const passed = Math.min(now - last, 50);
    last = now;
    if (playing && seen) {
      if (+range.value < 1000) set(Math.min(1000, +range.value + passed / 5));
      else if ((held += passed) > 2500) { held = 0; set(0); }
    }
    requestAnimationFrame(tick);
  }
  requestAnimationFrame(tick);
  show();
  if (still) range.value = 1000;
  return { redraw: () => set(+range.value), restart: () => { if (!still) { playing = true; show(); } held = 0; set(still ? 1000 : 0); } };
}

function panels(id, size) {
  const made = {};
  for (const [name, title] of Object.entries(SAMPLERS)) {
    const canvas = element("canvas", { width: size[0], height: size[1] });
    const note = element("small");
    const panel = element("div", { class: "panel" }, element("h3", { class: name }, title, " ", note), canvas);
    $(id).append(panel);
    made[name] = { panel, canvas, note };
  }
  return made;
}

const loaded = (address) => new Promise((resolve, reject) => {
  const image = new Image();
  image.onload = () => resolve(image);
  image.onerror = () => reject(new Error("A picture could not be read."));
  image.src = address;
});

const ratio = (sigma) => sigma === 0 ? "no noise" : `noise ${sigma >= 10 ? sigma.toFixed(0) : sigma >= 0.1 ? sigma.toFixed(1) : sigma.toFixed(3)}`;

// Draws cell (column, row) of a sprite; a weight blends it over what is there.
function cell(canvas, sprite, model, column, row, x, y, size, weight = 1) {
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = true;
  context.imageSmoothingQuality = "high";
  context.globalAlpha = weight;
  // The edges are taken half a pixel inside, so that the neighbours in the sprite do not shine through.
  const { width: w, height: h } = model;
  const inset = 0.02;
  context.drawImage(sprite, column * w + inset, row * h + inset, w - 2 * inset, h - 2 * inset, x, y, size, size);
  context.globalAlpha = 1;
}

function cells(sprite, model, count, size = 96) {
  return Array.from({ length: count }, (_, i) => {
    const canvas = element("canvas", { width: size, height: size });
    cell(canvas, sprite, model, i, 0, 0, 0, size);
    return canvas;
  });
}

// ------------------------------------------------------------------ particles

const RANGE = 2.6;
const cloud = { data: null, shades: [], panels: panels("particles-stage", [440, 440]) };

function shade(k) {
  if (cloud.shades[k]) return cloud.shades[k];
  const { centres, std, levels } = cloud.data, n = 88, [alpha, sigma] = levels[k];
  const variance = (alpha * std) ** 2 + sigma ** 2;
  const canvas = element("canvas", { width: n, height: n }), context = canvas.getContext("2d");
  const image = context.createImageData(n, n), values = new Float64Array(n * n);
  let most = 0;
  for (let j = 0; j < n; j++) for (let i = 0; i < n; i++) {
    const x = ((i + 0.5) / n * 2 - 1) * RANGE, y = (1 - (j + 0.5) / n * 2) * RANGE;
    let sum = 0;
    for (const [a, b] of centres) sum += Math.exp(-((x - alpha * a) ** 2 + (y - alpha * b) ** 2) / (2 * variance));
    values[j * n + i] = sum;
    most = Math.max(most, sum);
  }
  for (let p = 0; p < n * n; p++) {
    const v = Math.sqrt(values[p] / most);
    image.data.set([60 + 60 * v, 90 + 90 * v, 150 + 80 * v, 175 * v], 4 * p);
  }
  context.putImageData(image, 0, 0);
  return (cloud.shades[k] = canvas);
}

function drawCloud(time) {
  if (!cloud.data) return "";
  const { levels, particles, scale, paths } = cloud.data;
  const exact = time * (levels.length - 1), k = Math.min(Math.floor(exact), levels.length - 2), part = exact - k;
  for (const [name, { canvas }] of Object.entries(cloud.panels)) {
    const context = canvas.getContext("2d"), size = canvas.width, path = paths[name];
    const place = (f, p, axis) => path[(f * particles + p) * 2 + axis] / scale;
    const onX = (v) => (v / RANGE + 1) / 2 * size, onY = (v) => (1 - v / RANGE) / 2 * size;
    context.fillStyle = "#05070b";
    context.fillRect(0, 0, size, size);
    context.imageSmoothingEnabled = true;
    context.drawImage(shade(Math.round(exact)), 0, 0, size, size);
    const colour = { sde: "255,180,84", pc: "255,107,157", ode: "92,200,255" }[name];
    context.lineWidth = 1;
    for (let back = 7; back >= 0; back--) {
      const from = k - back;
      if (from < 0) continue;
      const until = back === 0 ? part : 1;
      context.strokeStyle = `rgba(${colour},${0.26 * (1 - back / 8)})`;
      context.beginPath();
      for (let p = 0; p < particles; p++) {
        const x = place(from, p, 0), y = place(from, p, 1);
        context.moveTo(onX(x), onY(y));
        context.lineTo(onX(x + until * (place(from + 1, p, 0) - x)), onY(y + until * (place(from + 1, p, 1) - y)));
      }
      context.stroke();
    }
    context.fillStyle = `rgb(${colour})`;
    for (let p = 0; p < particles; p++) {
      const x = place(k, p, 0), y = place(k, p, 1);
      const u = x + part * (place(k + 1, p, 0) - x), v = y + part * (place(k + 1, p, 1) - y);
      context.beginPath();
      context.arc(onX(u), onY(v), 2.4, 0, 7);
      context.fill();
    }
  }
  const [alpha, sigma] = levels[Math.round(exact)];
  return ratio(sigma / alpha);
}

const cloudTime = timeline("particles-time", drawCloud);

const runCloud = latest(async () => {
  await busy([$("particles-stage")], () => run("particles", { mixture: chosen.mixture, seed: chosen.cloud }, (found) => {
    for (const name of Object.keys(found.paths)) {
      const bytes = Uint8Array.from(atob(found.paths[name]), (c) => c.charCodeAt(0));
      const view = new DataView(bytes.buffer);
      found.paths[name] = Int16Array.from({ length: bytes.length / 2 }, (_, i) => view.getInt16(2 * i, true));
    }
    cloud.data = found;
    cloud.shades = [];
    cloudTime.restart();
  }));
});

function choosePanel(name) {
  for (const [key, { panel }] of Object.entries(cloud.panels)) panel.classList.toggle("chosen", key === name);
}

// ------------------------------------------------------------------ pictures that form

let models = [], model = null;
const forming = { sprites: {}, sigmas: [], panels: panels("form-stage", [300, 200]) };

// Six pictures in two rows of three or, on a phone, where three samplers beside each other would be tiny, in one row.
const narrow = matchMedia("(max-width: 44rem)");
function layOut() {
  for (const { canvas } of Object.values(forming.panels)) {
    [canvas.width, canvas.height] = narrow.matches ? [603, 98] : [300, 200];
  }
}
layOut();

function drawForming(time) {
  const { sigmas, sprites } = forming;
  if (!sigmas.length) return "";
  const exact = time * (sigmas.length - 1), k = Math.min(Math.floor(exact), sigmas.length - 2);
  for (const [name, { canvas }] of Object.entries(forming.panels)) {
    const found = sprites[name];
    if (!found || found.rows <= k + 1) continue;
    const size = 98, columns = narrow.matches ? 6 : 3;
    for (let i = 0; i < found.images; i++) {
      const x = (i % columns) * 101, y = Math.floor(i / columns) * 102;
      cell(canvas, found[chosen.view], model, i, k, x, y, size);
      if (exact > k) cell(canvas, found[chosen.view], model, i, k + 1, x, y, size, exact - k);
    }
  }
  return ratio(sigmas[Math.round(exact)]);
}

const formTime = timeline("form-time", drawForming);
narrow.addEventListener("change", () => { layOut(); formTime.redraw(); });

// Which pictures are to be seen, where they are not all of the class that has been chosen.
const named = (classes) => new Set(classes).size > 1 ? `In this order: ${classes.join(", ")}.` : "";

const runForm = latest(async () => {
  await busy([$("form-stage")], async () => {
    const pictures = [];
    forming.sprites = {};
    await run("form", { model: model.name, seed: chosen.seed, label: label(), steps: chosen.steps, guidance: guidance() }, (part) => {
      pictures.push((async () => {
        const [states, guesses] = await Promise.all([loaded(part.states), loaded(part.guesses)]);
        forming.sprites[part.sampler] = { states, guesses, images: part.images, rows: part.sigmas.length };
        forming.panels[part.sampler].note.textContent = `${part.calls} calls`;
        forming.sigmas = part.sigmas;
        $("form-names").textContent = named(part.classes);
      })());
    });
    await Promise.all(pictures);
  });
  formTime.restart();
  for (const easel of [complete, likely]) if (easel.untouched) takePicture(easel);
});

// The class that is drawn; without one the pictures take turns. And how strongly they are pulled towards it.
const label = () => model.classes.includes(chosen.label) ? chosen.label : "";
const guidance = () => model.guidance.includes(chosen.guidance) ? chosen.guidance : null;

// ------------------------------------------------------------------ drawing

const COLOURS = ["#ffffff", "#000000", "#d7263d", "#f4b942", "#3fa34d", "#2f7ed8", "#8d5a2b"];

// A picture at the network's own size, drawn on by a finger, and a mask of what is to be drawn anew.
function easel(id) {
  const canvas = $(id), made = { canvas, tool: "draw", colour: "#ffffff", untouched: true };
  made.reset = () => {
    for (const layer of ["picture", "mask"]) {
      made[layer] = element("canvas", { width: model.width, height: model.height });
      const context = made[layer].getContext("2d", { willReadFrequently: true });
      context.fillStyle = "#000";
      context.fillRect(0, 0, model.width, model.height);
    }
    made.show();
  };
  made.show = () => {
    const context = canvas.getContext("2d"), size = canvas.width;
    context.imageSmoothingEnabled = false;
    context.drawImage(made.picture, 0, 0, size, size);
    const { width: w, height: h } = model, mask = made.mask.getContext("2d").getImageData(0, 0, w, h).data;
    context.fillStyle = "rgba(255,140,0,.82)";
    // Whole pixels of the screen, because two colours that are half transparent make a line where they meet.
    const x = (i) => Math.round(i / w * size), y = (j) => Math.round(j / h * size);
    for (let p = 0; p < w * h; p++) if (mask[4 * p] >= 128) {
      const i = p % w, j = Math.floor(p / w);
      context.fillRect(x(i), y(j), x(i + 1) - x(i), y(j + 1) - y(j));
    }
  };
  let last = null;
  const stroke = (event) => {
    const box = canvas.getBoundingClientRect(), { width: w, height: h } = model;
    const x = (event.clientX - box.left) / box.width * w, y = (event.clientY - box.top) / box.height * h;
    const layer = made.tool === "hole" ? made.mask : made.picture, context = layer.getContext("2d");
    context.lineCap = "round";
    context.lineWidth = made.tool === "hole" ? Math.max(1.6, w / 7) : Math.max(1.1, w / 13);
    context.strokeStyle = made.tool === "hole" ? "#fff" : made.colour;
    context.beginPath();
    context.moveTo(...(last ?? [x - 0.01, y]));
    context.lineTo(x, y);
    context.stroke();
    last = [x, y];
    made.untouched = false;
    made.show();
  };
  canvas.onpointerdown = (event) => { canvas.setPointerCapture(event.pointerId); last = null; stroke(event); };
  canvas.onpointermove = (event) => { if (event.buttons) stroke(event); };
  return made;
}

const complete = easel("complete-canvas"), likely = easel("likelihood-canvas");

function takePicture(easel, index = 0) {
  const found = forming.sprites.ode;
  if (!found) return;
  const { width: w, height: h } = model;
  easel.picture.getContext("2d").drawImage(found.states, index * w, (found.rows - 1) * h, w, h, 0, 0, w, h);
  easel.show();
}

function hideHalf() {
  const context = complete.mask.getContext("2d"), { width: w, height: h } = model;
  context.fillStyle = "#fff";
  context.fillRect(0, Math.floor(h / 2), w, h);
  complete.show();
}

const runComplete = latest(async () => {
  if (!$("complete-results").children.length) $("complete-results").replaceChildren(element("p", { class: "wait" }, "Drawing …"));
  await busy([$("complete-run"), $("complete-results")], () => run("complete", {
    model: model.name, image: complete.picture.toDataURL(), hole: complete.mask.toDataURL(), seed: freshSeed(),
    label: $("complete-class").value,
  }, async (found) => {
    $("complete-results").replaceChildren(...cells(await loaded(found.sheet), model, found.images, 120));
  })).catch((error) => { $("complete-results").replaceChildren(); throw error; });
});

// ------------------------------------------------------------------ between two pictures

const way = { sheet: null, codes: null, images: 0, drawing: null };

function drawWay() {
  if (!way.sheet) return;
  const i = +$("between-position").value;
  cell($("between-code"), way.codes, model, i, 0, 0, 0, 160);
  cell($("between-picture"), way.sheet, model, i, 0, 0, 0, 240);
}

const runBetween = latest(async () => {
  const settings = { model: model.name, seed: chosen.a, other: chosen.b, label: model.any ? "" : label() || model.classes[0] };
  if (way.drawing) settings.drawing = way.drawing;
  await busy([$("between-strip"), $("between-drawing")], () => run("between", settings, async (found) => {
    [way.sheet, way.codes] = await Promise.all([loaded(found.sheet), loaded(found.codes)]);
    way.images = found.images;
    $("between-position").max = found.images - 1;
    const strip = cells(way.sheet, model, found.images, 64);
    strip.forEach((canvas, i) => { canvas.onclick = () => { $("between-position").value = i; drawWay(); }; });
    $("between-strip").replaceChildren(...strip);
    drawWay();
  }));
});

// ------------------------------------------------------------------ likelihood

function plot({ drawing, empty, noise, own }) {
  const all = [drawing, empty, noise, ...own], low = Math.min(...all), high = Math.max(...all);
  const width = Math.max(300, Math.min(520, $("likelihood-result").clientWidth || 520));
  const at = (v) => 20 + (v - low) / (high - low || 1) * (width - 40);
  const line = (y) => `<line class="axis" x1="12" x2="${width - 12}" y1="${y}" y2="${y}"/>`;
  const dot = (v, y, colour, r) => `<circle cx="${at(v).toFixed(1)}" cy="${y}" r="${r}" fill="${colour}" fill-opacity=".85"/>`;
  const text = (v, y, words, kind = "") => {
    const x = at(v), side = x < width / 2 ? "start" : "end";
    return `<text class="${kind}" x="${(x + (side === "start" ? -7 : 7)).toFixed(1)}" y="${y}" text-anchor="${side}">${words}</text>`;
  };
  const mark = (v, y, colour, words) => `${line(y)}${dot(v, y, colour, 7)}${text(v, y - 14, `${words} ${v.toFixed(2)}`)}`;
  const better = own.filter((v) => v < drawing).length;
  const verdict = better === own.length ? `less likely than each of ${own.length} pictures that the model drew`
    : better === 0 ? `more likely than each of ${own.length} pictures that the model drew`
      : `less likely than ${better} of ${own.length} pictures that the model drew`;
  return `<svg viewBox="0 0 ${width} 232" role="img" aria-label="Bits per dimension">
    ${mark(drawing, 40, "var(--sde)", "yours")}
    ${line(88)}${own.map((v) => dot(v, 88, "var(--ode)", 4)).join("")}${text(own[0], 76, "the model's own", "soft")}
    ${mark(empty, 136, "var(--pc)", "an empty page")}${mark(noise, 184, "var(--soft)", "noise")}
    <text class="soft" x="12" y="222">← more likely</text><text class="soft" x="${width - 12}" y="222" text-anchor="end">bits per dimension →</text></svg>
    <p class="verdict">Your picture is ${verdict}.</p>`;
}

const runLikelihood = latest(async () => {
  if (!$("likelihood-result").children.length) {
    $("likelihood-result").innerHTML = '<p class="wait">Measuring; the first time it measures the model\'s own pictures, too …</p>';
  }
  await busy([$("likelihood-run"), $("likelihood-result")], () => run("likelihood", {
    model: model.name, image: likely.picture.toDataURL(),
  }, (found) => { $("likelihood-result").innerHTML = plot(found); })).catch((error) => {
    $("likelihood-result").replaceChildren();
    throw error;
  });
});

// ------------------------------------------------------------------ few calls

const ROWS = {
  "first order": ["Euler's method", "one straight step after another"],
  "nothing set": ["This package, nothing set", "second order, exact for Gaussian data"],
  fitted: ["Fitted to this network", "a few dozen numbers, found in minutes"],
  "100 calls": ["A hundred calls", "for comparison"],
};

const runFew = latest(async () => {
  await busy([$("few-rows")], () => run("few", { model: model.name, seed: chosen.seed, label: label() }, async (found) => {
    const rows = await Promise.all(found.rows.map(async (row) => {
      const size = 96, canvas = element("canvas", { width: found.images * (size + 6) - 6, height: size });
      const sheet = await loaded(row.sheet);
      for (let i = 0; i < found.images; i++) cell(canvas, sheet, model, i, 0, i * (size + 6), 0, size);
      const [title, text] = ROWS[row.name], far = row.name === "100 calls" ? text : `${text}; off by ${row.error.toFixed(3)}`;
      return element("div", { class: "row" }, element("div", {}, element("b", {}, title), element("small", {}, far)), canvas);
    }));
    $("few-rows").replaceChildren(...rows);
    $("few-names").textContent = named(found.classes);
  }));
});

// ------------------------------------------------------------------ start

const lazy = {
  between: runBetween,
  few: runFew,
};
const opened = new Set();

function openWhenSeen() {
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting && model && !opened.has(entry.target.id)) {
      opened.add(entry.target.id);
      lazy[entry.target.id]();
    }
  }, { rootMargin: "300px" });
  for (const id of Object.keys(lazy)) observer.observe($(id));
}

function useModel(name) {
  model = models.find((m) => m.name === name) ?? models[0];
  chosen.model = model === models[0] ? "" : model.name;
  for (const id of ["form-class", "complete-class", "few-class"]) {
    // Names that are numbers would come first in an object.
    const options = model.classes.map((text) => [text, text]);
    if (id !== "complete-class") options.unshift(["", "one of each"]);
    else if (model.any) options.unshift(["", "anything"]);
    $(id).replaceChildren(...options.map(([value, text]) => element("option", { value }, text)));
    if (id !== "complete-class") $(id).value = label();
  }
  document.querySelectorAll(".classes").forEach((e) => { e.style.display = model.classes.length ? "" : "none"; });
  $("form-guiding").style.display = model.guidance.length ? "" : "none";
  const scales = Object.fromEntries(model.guidance.map((scale) => [scale, scale === 1 ? "none" : `${scale}`]));
  chips("form-guidance", scales, guidance() ?? 2, (key) => { chosen.guidance = +key; writeAddress("form"); runForm(); });
  const colours = model.channels === 3 ? COLOURS : [];
  for (const [id, easel] of [["complete-colours", complete], ["likelihood-colours", likely]]) {
    $(id).replaceChildren(...colours.map((colour) => {
      const chip = element("button", { type: "button", class: "colour", "aria-label": colour, "aria-pressed": String(colour === easel.colour) });
      chip.style.background = colour;
      chip.onclick = () => {
        easel.colour = colour;
        for (const other of chip.parentElement.children) other.setAttribute("aria-pressed", String(other === chip));
      };
      return chip;
    }));
    easel.untouched = true;
    easel.reset();
  }
  hideHalf();
  $("complete-results").replaceChildren();
  $("likelihood-result").replaceChildren();
  way.drawing = null;
  $("facts").textContent = `The network of ${model.name}: ${(model.parameters / 1e6).toFixed(2)} million parameters, pictures of ${model.width} × ${model.height} pixels, ${model.channels === 1 ? "grey" : "in colour"}.`;
  runForm();
  for (const id of opened) lazy[id]();
}

function wire() {
  const changed = (part, ...works) => { writeAddress(part); works.forEach((work) => work()); };
  chips("particles-solo", SAMPLERS, "sde", choosePanel);
  choosePanel("sde");
  chips("particles-mixture", { islands: "Islands", ring: "Ring", spiral: "Spiral" }, chosen.mixture, (key) => {
    chosen.mixture = key;
    changed("particles", runCloud);
  });
  $("particles-new").onclick = () => { chosen.cloud = freshSeed(); changed("particles", runCloud); };
  $("form-new").onclick = () => { chosen.seed = freshSeed(); changed("form", runForm); };
  $("few-new").onclick = () => { chosen.seed = freshSeed(); changed("few", runFew); };
  $("form-class").onchange = (event) => { chosen.label = $("few-class").value = event.target.value; changed("form", runForm); };
  $("few-class").onchange = (event) => { chosen.label = $("form-class").value = event.target.value; changed("few", runFew); };
  chips("form-view", { states: "The state", guesses: "The guess" }, chosen.view, (key) => {
    chosen.view = key;
    writeAddress("form");
    formTime.redraw();
  });
  chips("form-steps", { 6: "6", 12: "12", 25: "25", 50: "50" }, chosen.steps, (key) => { chosen.steps = +key; changed("form", runForm); });
  chips("complete-tool", { hole: "To be invented", draw: "Draw" }, "hole", (key) => { complete.tool = key; });
  complete.tool = "hole";
  $("complete-run").onclick = runComplete;
  $("complete-half").onclick = hideHalf;
  $("complete-clear").onclick = () => { complete.untouched = false; complete.reset(); };
  let next = 0;
  const another = (easel) => () => { takePicture(easel, ++next % 6); easel.untouched = false; };
  $("complete-other").onclick = another(complete);
  $("likelihood-other").onclick = another(likely);
  $("likelihood-clear").onclick = () => { likely.untouched = false; likely.reset(); };
  $("likelihood-run").onclick = runLikelihood;
  $("between-position").oninput = drawWay;
  $("between-left").onclick = () => { chosen.a = freshSeed(); way.drawing = null; changed("between", runBetween); };
  $("between-right").onclick = () => { chosen.b = freshSeed(); changed("between", runBetween); };
  $("between-drawing").onclick = () => { way.drawing = complete.picture.toDataURL(); $("between-position").value = 0; runBetween(); };
  document.querySelectorAll("nav a").forEach((link) => {
    link.onclick = (event) => {
      event.preventDefault();
      const part = link.getAttribute("href").slice(1);
      $(part).scrollIntoView();
      writeAddress(part);
    };
  });
  $("share").onclick = async () => {
    try { await navigator.clipboard.writeText(location.href); say("The link is in the clipboard."); } catch { say(location.href); }
  };
}

async function start() {
  readAddress();
  wire();
  runCloud();
  models = await (await fetch("models")).json();
  if (models.length > 1) {
    chips("models", Object.fromEntries(models.map((m) => [m.name, m.name])), chosen.model || models[0].name, (name) => {
      useModel(name);
      writeAddress();
    });
  }
  useModel(chosen.model);
  openWhenSeen();
  const part = location.hash.slice(1).split("?")[0];
  if (part && $(part)) $(part).scrollIntoView();
}

start().catch((error) => say(error.message));
