// The draggable plane: see steering.py. Units of the drawing are units of the plane, y upwards.
const REACH = 4;
const SVG = "http://www.w3.org/2000/svg";

const plus = (a, b) => [a[0] + b[0], a[1] + b[1]];
const times = (s, a) => [s * a[0], s * a[1]];
const dot = (a, b) => a[0] * b[0] + a[1] * b[1];
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
const round = (x) => Math.round(x * 20) / 20;
const signed = (x) => (x > -0.005 ? "+" : "−") + Math.abs(x).toFixed(2);

function unit(d) {
  const norm = Math.hypot(...d);
  return norm ? times(1 / norm, d) : [0, 0];
}

// Every state on the way: h first, then one more per step. A zero direction moves nothing.
function path(h, d, { steps, strength, high }) {
  const u = unit(d);
  const states = [h];
  for (const step of steps) {
    const x = states.at(-1);
    const along = dot(u, x);
    if (step === "add") states.push(plus(x, times(strength, d)));
    if (step === "project") states.push(plus(x, times(-along, u)));
    if (step === "cap") states.push(plus(x, times(clamp(along, -high, high) - along, u)));
  }
  return states;
}

function node(name, attributes = {}, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

function line(a, b, attributes) {
  return node("line", { x1: a[0], y1: -a[1], x2: b[0], y2: -b[1], ...attributes });
}

function arrow(a, b, colour, className = "arrow") {
  const made = node("g", { stroke: colour, fill: colour });
  const along = unit(plus(b, times(-1, a)));
  const length = Math.hypot(b[0] - a[0], b[1] - a[1]);
  if (length < 0.02) return made;
  const head = Math.min(0.22, length);
  const base = plus(b, times(-head, along));
  const side = times(head * 0.42, [-along[1], along[0]]);
  const corners = [b, plus(base, side), plus(base, times(-1, side))];
  made.append(line(a, base, { class: className }));
  made.append(node("polygon", {
    points: corners.map(([x, y]) => `${x},${-y}`).join(" "),
    stroke: "none",
  }));
  return made;
}

function name(at, text, colour) {
  const away = unit(at[0] || at[1] ? at : [1, 1]);
  const [x, y] = plus(at, times(0.36, away));
  const where = { x, y: -y, fill: colour, "text-anchor": "middle", "dominant-baseline": "central" };
  return node("text", where, text);
}

function background() {
  const made = node("g");
  for (let i = -REACH; i <= REACH; i++) {
    const className = i ? "grid" : "axis";
    made.append(line([i, -REACH], [i, REACH], { class: className }));
    made.append(line([-REACH, i], [REACH, i], { class: className }));
  }
  return made;
}

function band(u, high, colour) {
  const ends = [[1, 1], [1, -1], [-1, -1], [-1, 1]].map(([across, far]) =>
    plus(times(across * high, u), times(far * 3 * REACH, [-u[1], u[0]])));
  return node("polygon", {
    points: ends.map(([x, y]) => `${x},${-y}`).join(" "), fill: colour, class: "band",
  });
}

function drawing(state, colours) {
  const { h, d, steps, strength } = state;
  const u = unit(d);
  const states = path(h, d, state);
  const result = states.at(-1);
  const made = node("g", { "pointer-events": "none" });
  const far = 3 * REACH;
  if (steps.includes("cap")) made.append(band(u, state.high, colours.d));
  if (steps.some((step) => step !== "add")) {
    made.append(line(times(-far, u), times(far, u), { stroke: colours.d, class: "span" }));
  }
  if (steps.includes("project")) {
    const v = [-u[1], u[0]];
    made.append(line(times(-far, v), times(far, v), { stroke: colours.result, class: "span" }));
  }
  made.append(arrow([0, 0], d, colours.d), arrow([0, 0], h, "currentColor"));
  // With several steps all paths are parallel to u; a gap keeps them apart.
  const aside = (k, [a, b]) => {
    const by = times(steps.length > 1 ? 0.13 * k : 0, [-u[1], u[0]]);
    return [plus(a, by), plus(b, by)];
  };
  states.slice(1).forEach((to, i) => {
    const colour = steps[i] === "add" ? colours.d : colours.result;
    made.append(arrow(...aside(-i, [states[i], to]), colour, "thin"));
  });
  if (steps.length > 1) {
    // The path without the addition ends in the same point.
    const direct = path(h, d, { ...state, steps: steps.slice(1) }).at(-1);
    const plain = arrow(...aside(1, [h, direct]), "currentColor", "thin");
    plain.setAttribute("opacity", 0.6);
    made.append(plain);
    const between = steps[0] === "add" ? `h ${signed(strength)} d` : "";
    made.append(name(states[1], between, colours.d));
  }
  made.append(arrow([0, 0], result, colours.result), name(result, "h′", colours.result));
  return made;
}

// Two clouds of one shape around the means h and d, their difference, and the middle between them.
// Short strokes on the line through both means are the points' projections on it.
function clouds({ h, d, cloud }, colours) {
  const made = node("g", { "pointer-events": "none" });
  const difference = plus(h, times(-1, d));
  const u = unit(difference);
  const v = [-u[1], u[0]];
  const middle = times(0.5, plus(h, d));
  const far = 3 * REACH;
  made.append(line(plus(middle, times(-far, v)), plus(middle, times(far, v)), {
    stroke: "currentColor", class: "span",
  }));
  for (const [mean, colour, side] of [[h, colours.result, 1], [d, colours.d, -1]]) {
    for (const offset of cloud) {
      const [x, y] = plus(mean, offset);
      const where = side > 0 ? { x: x - 0.07, y: -y - 0.07, width: 0.14, height: 0.14 }
        : { cx: x, cy: -y, r: 0.085 };
      made.append(node(side > 0 ? "rect" : "circle", { ...where, fill: colour, class: "point" }));
      const foot = plus(middle, times(dot(u, plus([x, y], times(-1, middle))), u));
      made.append(line(foot, plus(foot, times(0.18 * side, v)), { stroke: colour, class: "foot" }));
    }
  }
  made.append(arrow(d, h, "currentColor"), name(middle, "d", "currentColor"));
  return made;
}

// How many points are on the side of their own group; for each, the means are those without it.
function onOwnSide({ h, d, cloud }) {
  const u = unit(plus(h, times(-1, d)));
  const n = cloud.length;
  const right = (mean, other) => cloud.filter((offset) => {
    const x = dot(u, plus(mean, offset));
    const centre = (n * dot(u, mean) - x) / (n - 1);
    return (x - (centre + dot(u, other)) / 2) * (centre - dot(u, other)) > 0;
  }).length;
  return right(h, d) + right(d, h);
}

function handle(key, label, colour, says) {
  const made = node("g", {
    class: "handle", tabindex: 0, role: "slider", "aria-label": says, "data-vector": key,
  });
  made.append(node("circle", { class: "reach", r: 0.4 }));
  made.append(node("circle", { class: "knob", r: 0.13, fill: colour, stroke: colour }));
  made.append(node("text", {
    fill: colour, "text-anchor": "middle", "dominant-baseline": "central",
  }, label));
  return made;
}

function place(made, at) {
  const away = times(0.36, unit(at[0] || at[1] ? at : [1, 1]));
  made.setAttribute("transform", `translate(${at[0]} ${-at[1]})`);
  made.lastChild.setAttribute("x", away[0]);
  made.lastChild.setAttribute("y", -away[1]);
  made.setAttribute("aria-valuetext", `${at[0].toFixed(2)} across, ${at[1].toFixed(2)} up`);
}

function range(label, low, high, colour, read, write) {
  const made = document.createElement("label");
  const words = document.createElement("span");
  const input = document.createElement("input");
  Object.assign(input, { type: "range", min: low, max: high, step: 0.05, value: read() });
  input.style.setProperty("--steer", colour);
  const say = () => { words.textContent = `${label} ${Number(read()).toFixed(2)}`; };
  input.addEventListener("input", () => { write(Number(input.value)); say(); });
  say();
  made.append(words, input);
  return { made, update: () => { input.value = read(); say(); } };
}

function render({ model, el }) {
  const colours = model.get("colours");
  const steps = model.get("steps");
  const root = document.createElement("div");
  root.className = "plane";
  const svg = node("svg", {
    viewBox: `${-REACH - 0.1} ${-REACH - 0.1} ${2 * REACH + 0.2} ${2 * REACH + 0.2}`,
    role: "group", "aria-label": "a plane with two vectors to drag",
  });
  const ink = node("g");
  const cloud = model.get("cloud");
  const handles = cloud.length ? {
    d: handle("d", "m₋", colours.d, "mean of the points without the property"),
    h: handle("h", "m₊", colours.result, "mean of the points with the property"),
  } : {
    d: handle("d", "d", colours.d, "tip of d"),
    h: handle("h", "h", "currentColor", "tip of h"),
  };
  svg.append(background(), ink, handles.d, handles.h);
  const output = document.createElement("output");
  root.append(svg);
  const sliders = [];
  const slider = (label, low, high, key) => {
    const set = (value) => { model.set(key, value); draw(); later(); };
    sliders.push(range(label, low, high, colours.d, () => model.get(key), set));
    root.append(sliders.at(-1).made);
  };
  if (steps.includes("add")) slider("strength α", -3, 3, "strength");
  if (steps.includes("cap")) slider("bound", 0, 4, "high");
  root.append(output);
  el.append(root);

  function state() {
    const keys = ["h", "d", "strength", "high"];
    return { steps, cloud, ...Object.fromEntries(keys.map((key) => [key, model.get(key)])) };
  }

  function draw() {
    const now = state();
    ink.replaceChildren((cloud.length ? clouds : drawing)(now, colours));
    place(handles.h, now.h);
    place(handles.d, now.d);
    if (cloud.length) {
      const difference = plus(now.h, times(-1, now.d));
      const [right, all] = [onOwnSide(now), 2 * cloud.length];
      output.textContent = `d = (${difference.map(signed).join(", ")}), length `
        + `${Math.hypot(...difference).toFixed(2)}; ${right} of ${all} points on their own side`;
      output.dataset.result = JSON.stringify([...difference, right]);
      return;
    }
    const u = unit(now.d);
    const after = path(now.h, now.d, now).at(-1);
    const [from, to] = [dot(u, now.h), dot(u, after)];
    output.textContent = `u·h = ${signed(from)}  →  u·h′ = ${signed(to)}, a change of ${signed(to - from)}`;
    if (steps.includes("add") && steps.length === 1) {
      output.textContent += ` = α‖d‖`;
    }
    output.dataset.result = JSON.stringify(after);
  }

  // The picture follows every move; Python hears of it ten times a second and at the end.
  let waiting = null;
  function later() {
    waiting ??= setTimeout(() => { waiting = null; model.save_changes(); }, 100);
  }

  function move(key, to) {
    model.set(key, to.map((x) => round(clamp(x, -REACH, REACH))));
    draw();
    later();
  }

  for (const [key, made] of Object.entries(handles)) {
    made.addEventListener("pointerdown", (event) => {
      made.setPointerCapture(event.pointerId);
      event.preventDefault();
      made.focus({ preventScroll: true });
    });
    made.addEventListener("pointermove", (event) => {
      if (!made.hasPointerCapture(event.pointerId)) return;
      const at = new DOMPoint(event.clientX, event.clientY);
      const { x, y } = at.matrixTransform(svg.getScreenCTM().inverse());
      move(key, [x, -y]);
    });
    made.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
      if (!by[event.key]) return;
      event.preventDefault();
      move(key, plus(model.get(key), times(event.shiftKey ? 0.5 : 0.1, by[event.key])));
    });
  }
  const changed = () => { draw(); sliders.forEach((one) => one.update()); };
  model.on("change", changed);
  draw();
  return () => { model.off("change", changed); clearTimeout(waiting); };
}

export default { render };
