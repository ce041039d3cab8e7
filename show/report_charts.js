// The charts. Each draws itself anew, in the width that its place has.

// --- axes -----------------------------------------------------------------------

function canvas(host, height, title) {
  const width = Math.max(120, host.clientWidth);
  const attributes = { viewBox: `0 0 ${width} ${height}`, width, height };
  const made = draw("svg", { ...attributes, role: "img", "aria-label": visible(title) });
  host.replaceChildren(made);
  return [made, width];
}

function line(kind, x1, y1, x2, y2) {
  return draw("line", { class: kind, x1, y1, x2, y2 });
}

function label(text, x, y, anchor = "middle") {
  return draw("text", { class: "tick", x, y, "text-anchor": anchor }, text);
}

// About n round numbers from low to high; at least two.
function ticks(low, high, n) {
  const raw = (high - low || 1) / Math.max(1, n);
  const base = 10 ** Math.floor(Math.log10(raw));
  const step = base * [1, 2, 5, 10].find((m) => m * base >= raw);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i <= high / step + 1e-9; i++) {
    found.push(i * step || 0); // no -0
  }
  return found.length < 2 && n < 12 ? ticks(low, high, 2 * n + 1) : found;
}

function linear(low, high, from, to) {
  return (x) => from + ((x - low) / (high - low || 1)) * (to - from);
}

// A text cut to a width in pixels; the whole of it is its title.
function fitted(node, text, width) {
  const whole = visible(text);
  let n = whole.length;
  node.textContent = whole;
  while (n > 1 && node.getComputedTextLength() > width) {
    n = Math.floor(n * 0.94);
    node.textContent = `${whole.slice(0, n)}\u2026`;
  }
  if (node.textContent !== whole) node.append(draw("title", {}, whole));
}

// A chart with a row for each of a list: {name, note, ...}. range: of the axis. format: a tick's
// text. mark(row, x, y) -> what is drawn of a row.
function rowChart(host, list, { what, range, format, axis, mark, noteWidth = 150 }) {
  const [made, width] = canvas(host, 10, what);
  const narrow = width < 520;
  const height = narrow ? 40 : 24;
  const left = narrow ? 8 : Math.min(190, width * 0.28);
  const right = width - (narrow ? 12 : noteWidth);
  const bottom = 6 + list.length * height;
  const x = linear(...range, left, right);
  made.setAttribute("height", bottom + 46);
  made.setAttribute("viewBox", `0 0 ${width} ${bottom + 46}`);
  for (const t of ticks(...range, Math.floor((right - left) / 90))) {
    made.append(line(Math.abs(t) < 1e-12 ? "zero" : "grid", x(t), 4, x(t), bottom));
    const text = label(format(t), x(t), bottom + 17);
    made.append(text);
    const half = text.getComputedTextLength() / 2;
    text.setAttribute("x", Math.max(half, Math.min(x(t), width - half)));
  }
  made.append(label(axis, (left + right) / 2, bottom + 37));
  list.forEach((row, i) => {
    const y = 6 + i * height + (narrow ? 28 : height / 2);
    const base = narrow ? y - 13 : y + 4;
    const note = draw("text", { x: width - 1, y: base, "text-anchor": "end" }, row.note);
    const at = narrow
      ? { x: left, "text-anchor": "start" }
      : { x: left - 10, "text-anchor": "end" };
    const text = draw("text", { ...at, y: base });
    made.append(draw("g", { class: row.side }, ...mark(row, x, y)), note, text);
    const room = narrow ? width - left - note.getComputedTextLength() - 14 : left - 12;
    fitted(text, row.name, room);
  });
}

// --- domains --------------------------------------------------------------------

// The domains of the chosen target, the highest median first; those of few chunks come last.
function domainRows() {
  const k = state.target;
  const S = R.spread;
  const chunks = sum(S.chunks[k]);
  const list = R.domains.map((text, d) => ({
    name: text,
    chunks: S.chunks[k][d],
    part: S.chunks[k][d] / chunks,
    few: S.few[k][d],
    median: S.median[k][d],
    error: S.error[k][d],
    quantiles: S.quantiles[k][d],
    negative: S.negative[k][d],
    share: S.share[k][d],
    mean: S.mean[k][d],
    sum: S.sum[k][d],
    heavy: S.heavy[k][d],
    heavyShare: S.heavy_share[k][d],
    side: side(S.median[k][d], S.error[k][d]),
  }));
  for (const row of list) row.note = medianNote(row);
  return list.sort((a, b) => a.few - b.few || b.median - a.median);
}

function medianNote({ median, error, few, chunks }) {
  if (few) return `${micro(median)} (${plural(chunks, "chunk")})`;
  return `${micro(median)} \u00b1 ${size(error)}`;
}

function medianTitle(row) {
  const { quantiles } = row;
  const half = `middle half ${micro(quantiles[1])} to ${micro(quantiles[3])}`;
  const negative = `${percent(row.negative)} negative`;
  return draw("title", {}, `${row.name}: median ${medianNote(row)}, ${half}, ${negative}`);
}

function drawDomains() {
  const list = domainRows();
  drawMedians(list);
  drawSpread(list);
  drawShares(list);
  drawDomainTable(list);
}

// The picture of the first screen: medians with two errors on each side.
function drawMedians(list) {
  const compared = list.filter((row) => !row.few);
  const ends = compared.flatMap((row) => [row.median - 2 * row.error, row.median + 2 * row.error]);
  const all = compared.length ? ends : list.map((row) => row.median);
  const range = extent(all.map((x) => 1e6 * x));
  const within = (x) => Math.max(range[0], Math.min(range[1], 1e6 * x));
  rowChart($("medians"), list, {
    what: `Median value of a chunk by domain for ${R.targets[state.target]}`,
    range,
    format: tick,
    axis: "median chunk \u00b1 two errors, 1e-6 nats",
    mark: (row, x, y) => {
      const at = x(within(row.median));
      const shapes = [medianTitle(row)];
      if (row.few) {
        shapes.push(draw("circle", { class: "hollow", cx: at, cy: y, r: 4 }));
        return shapes;
      }
      const low = x(within(row.median - 2 * row.error));
      const high = x(within(row.median + 2 * row.error));
      shapes.push(line("from-zero", x(0), y, at, y));
      shapes.push(line("whisker", low, y, high, y));
      shapes.push(draw("circle", { class: "point", cx: at, cy: y, r: 5 }));
      return shapes;
    },
  });
}

function drawSpread(list) {
  const range = extent(list.flatMap((row) => row.quantiles.map((q) => 1e6 * q)));
  rowChart($("spread"), list, {
    what: `Values of chunks by domain for ${R.targets[state.target]}`,
    range,
    format: tick,
    axis: "value of a chunk, 1e-6 nats",
    mark: (row, x, y) => {
      const [p5, p25, p50, p75, p95] = row.quantiles.map((q) => x(1e6 * q));
      const wide = Math.max(1, p75 - p25);
      return [
        medianTitle(row),
        line("stem", p5, y, p95, y),
        draw("rect", { class: "box", x: p25, width: wide, y: y - 6, height: 12 }),
        line("mid", p50, y - 7, p50, y + 7),
      ];
    },
  });
}

function drawShares(list) {
  const shown = list.map((row) => ({
    ...row,
    note: `${percent(row.part)} \u2192 ${percent(row.share)}`,
    side: Math.sign(row.share) === Math.sign(row.median) ? row.side : "even",
  }));
  rowChart($("shares"), shown, {
    what: "Share of chunks and share of value by domain",
    range: extent(shown.flatMap((row) => [row.part, row.share])),
    format: percent,
    axis: "share of chunks (circle), of value (diamond)",
    mark: (row, x, y) => [
      line("stem", x(row.part), y, x(row.share), y),
      draw("circle", { class: "hollow", cx: x(row.part), cy: y, r: 5 }),
      draw("path", { class: "point", d: `M${x(row.share)} ${y - 6}l6 6l-6 6l-6 -6z` }),
    ],
  });
}

function drawDomainTable(list) {
  function figure(title, value, format) {
    return { title, value, cell: (row) => format(value(row)), numeric: true };
  }
  const columns = [
    { title: "Domain", value: (row) => row.name, cell: (row) => name(row.name) },
    figure("Chunks", (row) => row.chunks, whole),
    figure("Median, 1e-6 nats", (row) => row.median, micro),
    figure("\u00b1", (row) => row.error, size),
    figure("25%", (row) => row.quantiles[1], micro),
    figure("75%", (row) => row.quantiles[3], micro),
    figure("Negative", (row) => row.negative, percent),
    figure("Share of value", (row) => row.share, percent),
    figure("Mean, 1e-6 nats", (row) => row.mean, micro),
    figure("Sum, nats", (row) => row.sum, signedNats),
    { title: "One chunk holds", value: (row) => row.heavyShare, cell: heavyNote },
  ];
  sortable($("domain-table"), "Domains", columns, 2)(list);
}

function heavyNote({ heavy, heavyShare }) {
  return heavy == null ? "" : `chunk ${heavy}: ${percent(heavyShare)}`;
}

function drawHeat() {
  if (R.targets.length < 2) return;
  $("heat-part").hidden = false;
  const S = R.spread;
  const isClear = (k, d) => side(S.median[k][d], S.error[k][d]) !== "even";
  const largest = S.median.map((medians, k) => {
    const sizes = medians.filter((_, d) => isClear(k, d)).map(Math.abs);
    return Math.max(0, ...sizes);
  });
  const medians = S.median[state.target];
  const order = R.domains.map((_, d) => d).sort((a, b) => medians[b] - medians[a]);
  function cell(k, d) {
    const median = S.median[k][d];
    const colour = isClear(k, d) ? level(median, largest[k]) : "even";
    return make("td", { class: `num ${colour}` }, micro(median));
  }
  const heads = R.targets.map((text) => make("th", { scope: "col", class: "num" }, name(text)));
  const first = make("th", { scope: "col" }, "Domain");
  const body = order.map((d) => {
    const head = make("th", { scope: "row" }, name(R.domains[d]));
    return make("tr", {}, head, ...R.targets.map((_, k) => cell(k, d)));
  });
  const table = make("table", {}, make("thead", {}, make("tr", {}, first, ...heads)));
  table.append(make("tbody", {}, ...body));
  $("heat").replaceChildren(table);
}

// --- over training --------------------------------------------------------------

// Why a chart over time cannot be drawn for the chosen target; "" where it can.
function whyNot(mode) {
  const values = R.time[mode].values[state.target];
  if (values.some((row) => row.some((x) => x != null))) return "";
  if (mode === "share") return "Shares of the values: every value so far is 0.";
  if (R.hindsight) return "Share of the loss drop: values in hindsight do not add up to it.";
  if (!R.trust[state.target].steps) {
    return "Share of the loss drop: no step of this run was measured yet (--book_interval).";
  }
  return (
    "Share of the loss drop: at no time is this target's mean drop above twice its standard " +
    "error, so shares of it would be noise."
  );
}

// Disables the modes that have no data for the chosen target, and leaves one of them if it is on.
function offerModes() {
  const reasons = [];
  for (const input of document.querySelectorAll("[name=mode]")) {
    const reason = whyNot(input.value);
    input.disabled = reason !== "";
    if (reason) reasons.push(reason);
  }
  $("time-off").textContent = reasons.join(" ");
  $("time-off").hidden = !reasons.length;
  const on = document.querySelector("[name=mode]:checked");
  if (on.disabled) document.querySelector("[name=mode]:enabled").checked = true;
}

const TIME_NOTES = {
  sum:
    "The values of each domain's chunks, summed up from the first step on. A step with large " +
    "values weighs as much as many others, and early steps move the loss most.",
  share:
    "Each bar: the sum of the domain's values in a step over the size (without sign) of all " +
    "values there, as a mean over the bar's steps. So early and late parts of the run can be " +
    "compared, whatever the loss did.",
};

function dropNote() {
  const { values } = R.time.drop;
  const bars = values[state.target][0];
  const missing = bars.filter((x) => x == null).length;
  const each = Math.round(R.trust[state.target].steps / bars.length);
  const parts = [
    "Each bar: what the domain's chunks got in a step, over what the step lowered the target's " +
      "loss by, both averaged over the bar's steps.",
    `The loss is measured before and after a step every ${plural(R.run.book_interval, "step")}; ` +
      `the bars hold ${plural(each, "measured step")} each.`,
  ];
  if (missing) {
    const are = missing === 1 ? "is" : "are";
    parts.push(
      `${plural(missing, "bar")} of ${bars.length}, grey, ${are} left out: ` +
        "there the mean drop is not above twice its standard error.",
    );
  }
  parts.push(
    "The bars of all domains add up to the part of the drop that the step's own chunks get. " +
      "Momentum has the rest. Where it pulls back, they add up to more than 100%.",
  );
  return parts.join(" ");
}

function drawTime() {
  offerModes();
  const mode = document.querySelector("[name=mode]:checked").value;
  const { edges, values } = R.time[mode];
  const rows = values[state.target];
  $("time-note").textContent = mode === "drop" ? dropNote() : TIME_NOTES[mode];
  const rank = (d) => (mode === "sum" ? rows[d].at(-1) : sum(rows[d].map((x) => x ?? 0)));
  const order = R.domains.map((_, d) => d).sort((a, b) => rank(b) - rank(a));
  const figures = order.map((d) => {
    const caption = make("figcaption", { title: visible(R.domains[d]) }, name(R.domains[d]));
    return make("figure", {}, caption, make("div"));
  });
  $("time").replaceChildren(...figures);
  const common = extent(rows.flat());
  order.forEach((d, i) => {
    const range = $("own").checked ? extent(rows[d]) : common;
    const host = figures[i].lastChild;
    drawPanel(host, `${R.domains[d]} over training`, edges, rows[d], range, mode);
  });
}

const PANEL = { left: 52, top: 6, bottom: 80, height: 104 };

function drawPanel(host, what, edges, row, [low, high], mode) {
  const [made, width] = canvas(host, PANEL.height, what);
  const x = linear(edges[0], edges.at(-1), PANEL.left, width - 4);
  const y = linear(low, high || low + 1e-9, PANEL.bottom, PANEL.top);
  const format = (t) => (mode === "sum" ? number(t, 2) : percent(t));
  for (const t of ticks(low, high, 3)) {
    made.append(line(t === 0 ? "zero" : "grid", PANEL.left, y(t), width - 4, y(t)));
    made.append(label(format(t), PANEL.left - 5, y(t) + 4, "end"));
  }
  made.append(label(whole(edges[0]), PANEL.left, 98, "start"));
  made.append(label(`step ${whole(edges.at(-1))}`, width - 2, 98, "end"));
  made.append(...(mode === "sum" ? panelCurve(edges, row, x, y) : panelBars(edges, row, x, y)));
}

function panelBars(edges, row, x, y) {
  return row.map((share, j) => {
    const steps = `steps ${whole(edges[j])} to ${whole(edges[j + 1] - 1)}`;
    const across = { x: x(edges[j]) + 0.5, width: Math.max(1, x(edges[j + 1]) - x(edges[j]) - 1) };
    if (share == null) {
      const down = { y: PANEL.top, height: PANEL.bottom - PANEL.top };
      const title = draw("title", {}, `${steps}: no drop above its noise`);
      return draw("rect", { class: "gap", ...across, ...down }, title);
    }
    const height = Math.max(0.5, Math.abs(y(share) - y(0)));
    const down = { y: Math.min(y(0), y(share)), height };
    const kind = share < 0 ? "hurt" : "help";
    const title = draw("title", {}, `${steps}: ${percent(share)}`);
    return draw("rect", { class: kind, ...across, ...down }, title);
  });
}

function panelCurve(edges, row, x, y) {
  const points = [0, ...row].map((value, j) => `${x(edges[j])} ${y(value)}`).join("L");
  const area = `M${x(edges[0])} ${y(0)}L${points}L${x(edges.at(-1))} ${y(0)}z`;
  const title = draw("title", {}, `${signedNats(row.at(-1))} nats`);
  return [
    draw("path", { class: "area", d: area }),
    draw("path", { class: "curve", d: `M${points}` }, title),
  ];
}

// --- validation losses ----------------------------------------------------------

function drawLosses() {
  const L = R.losses;
  if (!L) return;
  $("losses").hidden = false;
  const [made, width] = canvas($("losses-chart"), 300, "Validation loss over the steps");
  const steps = L.curves.flatMap((curve) => curve.steps);
  const losses = L.curves.flatMap((curve) => curve.val).filter((x) => x != null);
  const bounds = [Math.min(...losses), Math.max(...losses)];
  const last = Math.max(...steps, 1);
  const x = linear(0, last, 52, width - 14);
  const y = linear(...bounds, 250, 8);
  for (const t of ticks(...bounds, 5)) {
    made.append(line("grid", 52, y(t), width - 14, y(t)), label(number(t), 46, y(t) + 4, "end"));
  }
  for (const t of ticks(0, last, Math.floor(width / 110))) made.append(label(whole(t), x(t), 272));
  made.append(label("steps done", (52 + width - 14) / 2, 294));
  L.curves.forEach((curve, i) => {
    const known = curve.steps.map((_, j) => j).filter((j) => curve.val[j] != null);
    const points = known.map((j) => `${x(curve.steps[j])} ${y(curve.val[j])}`);
    const title = draw("title", {}, L.runs[i]);
    made.append(draw("path", { class: `run run${i % 4}`, d: `M${points.join("L")}` }, title));
    if (points.length > 1) return;
    for (const j of known) {
      const at = { cx: x(curve.steps[j]), cy: y(curve.val[j]), r: 4 };
      made.append(draw("circle", { class: `run run${i % 4}`, ...at }));
    }
  });
}

// What stands around the chart of losses, which no setting changes.
function writeLosses() {
  const L = R.losses;
  if (!L) return;
  const others = L.runs.slice(1);
  others.forEach((text, i) => {
    $("h-losses").append(i ? ", " : " beside ", name(text));
  });
  L.runs.forEach((text, i) => {
    const sample = draw("svg", { width: 34, height: 8, "aria-hidden": "true" });
    sample.append(draw("path", { class: `run run${i % 4}`, d: "M0 4h34" }));
    $("losses-key").append(make("span", { class: "key" }, sample, name(text)));
  });
  const last = L.steps.at(-1);
  const at = L.at.at(-1);
  const note = $("losses-note");
  note.append(`After ${plural(last, "step")} the loss on the validation chunks is `);
  note.append(`${nats(at[0])} nats for `, name(L.runs[0]));
  others.forEach((text, i) => {
    const more = at[i + 1] - at[0];
    const how = more < 0 ? "lower" : "higher";
    note.append(`, ${nats(at[i + 1])} for `, name(text), ` (${nats(Math.abs(more))} ${how})`);
  });
  note.append(". ");
  if (others.length) {
    note.append(
      "One run each says nothing about the spread over seeds: train each with some seeds before " +
        "a small difference is believed.",
    );
  }
  const byStep = L.steps.map((step, i) => ({ head: step, losses: L.at[i] }));
  lossTable("losses-steps", "Losses by step", "Step", byStep, whole);
  $("h-losses-domains").textContent = `By domain after ${plural(last, "step")}, in nats`;
  const byDomain = L.domains.map((text, i) => ({ head: text, losses: L.by_domain[i] }));
  lossTable("losses-domains", "Losses by domain", "Domain", byDomain, name);
}

function lossTable(id, what, head, list, format) {
  const columns = [{ title: head, value: (row) => row.head, cell: (row) => format(row.head) }];
  R.losses.runs.forEach((text, i) => {
    const value = (row) => row.losses[i];
    columns.push({ title: text, value, cell: (row) => nats(value(row)), numeric: true });
    if (i === 0) return;
    const more = (row) => row.losses[i] - row.losses[0];
    const title = `${text} \u2212 ${R.losses.runs[0]}`;
    columns.push({ title, value: more, cell: (row) => signedNats(more(row)), numeric: true });
  });
  sortable($(id), what, columns, 0, { down: false })(list);
}

// --- hindsight ------------------------------------------------------------------

// |dL/dw| after each step for the chosen target, on a logarithmic axis; the early part is shaded.
function drawAdjoint() {
  const H = R.hindsight;
  if (!H) return;
  const [made, width] = canvas($("adjoint"), 260, "The size of dL/dw by step");
  const norms = H.norms[state.target].map((norm) => (norm > 0 ? Math.log10(norm) : null));
  const known = norms.filter((norm) => norm != null);
  const low = Math.floor(Math.min(...known, 0));
  const high = Math.ceil(Math.max(...known, low + 1));
  const last = Math.max(H.steps.at(-1), H.steps[0] + 1);
  const x = linear(H.steps[0], last, 62, width - 14);
  const y = linear(low, high, 210, 8);
  if (H.first_late > H.steps[0]) {
    const wide = x(Math.min(last, H.first_late)) - x(H.steps[0]);
    const box = { x: x(H.steps[0]), width: wide, y: 8, height: 202 };
    const title = draw("title", {}, `early: before step ${whole(H.first_late)}`);
    made.append(draw("rect", { class: "gap", ...box }, title));
    if (wide > 40) made.append(label("early", x(H.steps[0]) + wide / 2, 24));
  }
  for (const t of ticks(low, high, 5).filter(Number.isInteger)) {
    made.append(line("grid", 62, y(t), width - 14, y(t)));
    made.append(label(powerOfTen(t), 56, y(t) + 4, "end"));
  }
  for (const t of ticks(H.steps[0], last, Math.floor(width / 110)).filter(Number.isInteger)) {
    made.append(label(whole(t), x(t), 232));
  }
  made.append(label("step", (62 + width - 14) / 2, 254));
  const points = norms.map((norm, i) => (norm == null ? null : `${x(H.steps[i])} ${y(norm)}`));
  const path = points.filter((point) => point != null).join("L");
  if (path) made.append(draw("path", { class: "curve", d: `M${path}` }));
}

function powerOfTen(e) {
  return e >= -3 && e <= 4 ? number(10 ** e) : `1e${minus(String(e))}`;
}

// --- single values --------------------------------------------------------------

// An axis that is linear around 0 and logarithmic on both sides.
function bent(s) {
  return (value) => Math.asinh(value / s);
}

// 0 and powers of ten (of 1e-6 nats), as many as have room.
function bentTicks(s, low, high, spacing, x) {
  const place = bent(s);
  const found = [0];
  for (let e = Math.ceil(Math.log10(s) - 1e-9); e < 12; e++) {
    for (const t of [10 ** e, -(10 ** e)]) {
      const at = place(t);
      const isFree = found.every((f) => Math.abs(x(place(f)) - x(at)) >= spacing);
      if (at <= high && at >= low && isFree) found.push(t);
    }
  }
  return found;
}

function drawValues() {
  drawHistogram();
  drawScatter();
}

function drawHistogram() {
  const H = R.histogram[state.target];
  const all = H.counts[0].map((_, bin) => sum(H.counts.map((row) => row[bin])));
  const counts = state.look < 0 ? all : H.counts[state.look];
  const total = sum(counts);
  const below = sum(counts.slice(0, Math.max(0, -H.first)));
  $("histogram-note").replaceChildren(
    `${plural(total, "chunk")} by value for `,
    name(R.targets[state.target]),
    `: ${percent(total ? below / total : 0)} raised its loss (orange, left of 0), the others ` +
      "lowered it. The axis is linear around 0 and logarithmic on both sides.",
  );
  const what = `Histogram of the values for ${R.targets[state.target]}`;
  const [made, width] = canvas($("histogram"), 300, what);
  const low = H.first * H.width;
  const high = low + counts.length * H.width;
  const top = Math.max(...counts, 1);
  const x = linear(low, high, 52, width - 14);
  const y = linear(0, top, 250, 8);
  for (const t of ticks(0, top, 4).filter(Number.isInteger)) {
    const text = t >= 1e5 ? t.toExponential(0) : whole(t);
    made.append(line("grid", 52, y(t), width - 14, y(t)), label(text, 46, y(t) + 4, "end"));
  }
  const edge = (t) => micro(H.s * Math.sinh(t));
  counts.forEach((n, bin) => {
    if (!n) return;
    const from = low + bin * H.width;
    const wide = Math.max(1, x(from + H.width) - x(from) - 1);
    const box = { x: x(from) + 0.5, width: wide, y: y(n), height: 250 - y(n) };
    const words = `${plural(n, "chunk")} from ${edge(from)} to ${edge(from + H.width)} (1e-6 nats)`;
    const kind = from < -1e-9 ? "hurt" : "help";
    made.append(draw("rect", { class: `${kind} bin`, ...box }, draw("title", {}, words)));
  });
  made.append(line("zero", x(0), 4, x(0), 256));
  for (const t of bentTicks(H.s, low, high, 50, x)) {
    made.append(label(compact(1e6 * t), x(bent(H.s)(t)), 272));
  }
  made.append(label("value of a chunk, 1e-6 nats", (52 + width - 14) / 2, 294));
}

function drawScatter() {
  const P = R.points;
  const { s } = R.histogram[state.target];
  const look = state.look;
  const own = P.domain.map((_, i) => i).filter((i) => look < 0 || P.domain[i] === look);
  const sampled = whole(P.domain.length);
  const of = look < 0 ? "" : ` of this domain, out of a sample of ${sampled}`;
  const evenly = P.domain.length < R.run.visits ? ", taken evenly over the run" : "";
  $("scatter-note").textContent =
    `Value${R.hindsight ? " in hindsight" : " in its step"} (1e-6 nats) against training loss, ` +
    "a point for each visit of a chunk: " +
    `${whole(own.length)} shown${of} of ${plural(R.run.visits, "visit")} in all${evenly}.`;
  const what = `Values for ${R.targets[state.target]} against training loss`;
  const [made, width] = canvas($("scatter"), 300, what);
  const values = P.values[state.target].map(bent(s));
  const [down, up] = extent(values);
  const losses = P.loss.filter((loss) => loss != null);
  const least = losses.reduce((a, b) => Math.min(a, b), Infinity);
  const most = losses.reduce((a, b) => Math.max(a, b), -Infinity);
  const x = linear(least, most, 52, width - 14);
  const y = linear(down, up, 250, 8);
  for (const t of bentTicks(s, down, up, 22, y)) {
    const at = y(bent(s)(t));
    made.append(line(t === 0 ? "zero" : "grid", 52, at, width - 14, at));
    made.append(label(compact(1e6 * t), 46, at + 4, "end"));
  }
  for (const t of ticks(least, most, Math.floor(width / 90))) {
    made.append(label(number(t), x(t), 272));
  }
  made.append(label("training loss of the chunk, nats", (52 + width - 14) / 2, 294));
  const known = own.filter((i) => P.loss[i] != null);
  const dots = (list) =>
    list.map((i) => `M${x(P.loss[i]).toFixed(1)} ${y(values[i]).toFixed(1)}h0`);
  const helped = dots(known.filter((i) => values[i] >= 0));
  const hurt = dots(known.filter((i) => values[i] < 0));
  made.append(draw("path", { class: "points help", d: helped.join("") }));
  made.append(draw("path", { class: "points hurt", d: hurt.join("") }));
}
