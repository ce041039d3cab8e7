"use strict";
// Everything that comes from the run goes through make(), which knows text nodes and attributes only: nothing is ever parsed as HTML.
const R = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const state = { target: 0, look: -1 };

// --- text and numbers ---------------------------------------------------------

const CONTROL = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g;
function visible(text) { // control characters and marks that turn the direction of writing, as signs one can see; lone surrogates as U+FFFD
  return text.toWellFormed().replace(CONTROL, (c) => {
    const n = c.charCodeAt(0);
    return n < 32 ? String.fromCharCode(0x2400 + n) : n === 127 ? "\u2421" : `[U+${n.toString(16).toUpperCase().padStart(4, "0")}]`;
  });
}
function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes))
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== false && value != null) node.setAttribute(key, value === true ? "" : value);
  for (const child of children.flat()) if (child) node.append(typeof child === "string" ? visible(child) : child);
  return node;
}
const make = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes = {}, ...children) => fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const name = (text) => make("bdi", {}, text);

const minus = (text) => text.replace("-", "\u2212");
const number = (x, digits = 3) => x == null ? "\u2013" : minus(x.toLocaleString("en", { maximumSignificantDigits: digits }));
const signed = (x, digits = 3) => (x > 0 ? "+" : "") + number(x, digits);
const percent = (x) => x == null ? "\u2013" : minus((100 * x).toFixed(Math.abs(x) < 0.0995 && x !== 0 ? 1 : 0)) + "%";
const whole = (x) => Math.round(x).toLocaleString("en");
const sup = (n) => [...String(n)].map((c) => "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"["-0123456789".indexOf(c)]).join("");
const large = (n) => n >= 1e9 ? `${number(n / 1e9)} billion` : n >= 1e6 ? `${number(n / 1e6)} million` : whole(n);
const power = (x) => x === 0 ? "0" : `${x < 0 ? "\u2212" : "+"}10${sup(Math.round(Math.log10(Math.abs(x))))}`;
function nats(x, digits = 3) { // one value with a unit that suits it
  if (!x) return x === 0 ? "0" : "\u2013";
  const e = 3 * Math.floor(Math.log10(Math.abs(x)) / 3 + 1e-9);
  return e === 0 ? signed(x, digits) : `${signed(x / 10 ** e, digits)} \u00b7 10${sup(e)}`;
}
const plural = (n, one) => `${whole(n)} ${one}${n === 1 ? "" : "s"}`;
const perToken = (x) => x == null ? null : x / 10 ** R.spread.exponent;
const unit = R.spread.exponent === 0 ? "nats" : `10${sup(R.spread.exponent)} nats`;
const sum = (list) => list.reduce((a, b) => a + b, 0);
const extent = (list) => list.reduce(([low, high], x) => x == null ? [low, high] : [Math.min(low, x), Math.max(high, x)], [0, 0]);
const level = (x, largest) => { // -5 to 5; the root lets small ones be seen
  const n = largest > 0 ? Math.round(5 * Math.sqrt(Math.abs(x) / largest)) : 0;
  return n === 0 ? "" : `v${x < 0 ? "-" : ""}${n}`;
};

// --- charts -------------------------------------------------------------------

function canvas(host, height, title) {
  const width = Math.max(120, host.clientWidth);
  const made = draw("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": title });
  host.replaceChildren(made);
  return [made, width];
}
const line = (kind, x1, y1, x2, y2) => draw("line", { class: kind, x1, y1, x2, y2 });
const label = (text, x, y, anchor = "middle") => draw("text", { class: "tick", x, y, "text-anchor": anchor }, text);
function ticks(low, high, n) {
  const raw = (high - low || 1) / Math.max(1, n), base = 10 ** Math.floor(Math.log10(raw));
  const step = base * [1, 2, 5, 10].find((m) => m * base >= raw), found = [];
  for (let i = Math.ceil(low / step - 1e-9); i <= high / step + 1e-9; i++) found.push(i * step || 0); // no -0
  return found.length < 2 && n < 12 ? ticks(low, high, 2 * n + 1) : found;
}
const linear = (low, high, from, to) => (x) => from + ((x - low) / (high - low || 1)) * (to - from);
function fitted(node, text, width) { // cut to a width in pixels, the whole of it as a title
  text = visible(text);
  node.textContent = text;
  for (let n = text.length; node.getComputedTextLength() > width && n > 1; ) node.textContent = text.slice(0, (n = Math.floor(n * 0.94))) + "\u2026";
  if (node.textContent !== text) node.append(draw("title", {}, text));
}
function rows(id, what, list, [low, high], format, title, mark) { // list: [{name, note}]; mark(row, x, y) -> shapes
  const [made, width] = canvas($(id), 10, what), narrow = width < 560, height = narrow ? 42 : 27;
  const left = narrow ? 8 : Math.min(190, width * 0.26), right = width - (narrow ? 12 : 150), bottom = 6 + list.length * height,
    x = linear(low, high, left, right);
  made.setAttribute("height", bottom + 46);
  made.setAttribute("viewBox", `0 0 ${width} ${bottom + 46}`);
  for (const t of ticks(low, high, Math.floor((right - left) / 80))) {
    made.append(line(Math.abs(t) < 1e-12 ? "zero" : "grid", x(t), 4, x(t), bottom));
    const text = label(format(t), x(t), bottom + 17);
    made.append(text);
    const over = x(t) + text.getComputedTextLength() / 2 - width;
    if (over > 0) text.setAttribute("x", x(t) - over);
  }
  made.append(label(title, (left + right) / 2, bottom + 37));
  list.forEach((row, i) => {
    const y = 6 + i * height + (narrow ? 29 : height / 2), base = narrow ? y - 14 : y + 4;
    const note = draw("text", { x: narrow ? width - 2 : width, y: base, "text-anchor": "end" }, row.note);
    const text = draw("text", { x: narrow ? left : left - 10, y: base, "text-anchor": narrow ? "start" : "end" });
    made.append(draw("g", {}, ...mark(row, x, y)), note, text);
    fitted(text, row.name, narrow ? width - left - note.getComputedTextLength() - 14 : left - 12);
  });
}

function drawSpread() {
  const k = state.target, S = R.spread;
  const list = R.domains.map((text, d) => ({
    name: text, q: S.quantiles[k][d].map(perToken), mean: perToken(S.mean[k][d]), error: perToken(S.error[k][d]),
    tokens: S.tokens[k][d] / sum(S.tokens[k]), value: S.sum[k][d], negative: S.negative[k][d],
  })).sort((a, b) => b.q[2] - a.q[2]);
  for (const row of list) row.note = `${number(row.q[2])}  (${number(row.mean)}${row.error == null ? "" : ` \u00b1 ${number(row.error, 2)}`})`;
  const reach = extent(list.flatMap((row) => row.q)), within = (v) => Math.max(reach[0], Math.min(reach[1], v));
  rows("spread", `Value per token by domain for ${R.targets[k]}`, list, reach, (t) => number(t),
    `value per token, ${unit}`, ({ q, mean, error, negative, name }, x, y) => {
      const side = q[2] < 0 ? "hurt" : "help";
      return [
        draw("title", {}, `${name}: median ${number(q[2])}, middle half ${number(q[1])} to ${number(q[3])}, 5th to 95th percentile ` +
          `${number(q[0])} to ${number(q[4])}, ${percent(negative)} negative`),
        line("stem", x(q[0]), y, x(q[4]), y),
        draw("rect", { class: `box ${side}`, x: x(q[1]), width: Math.max(1, x(q[3]) - x(q[1])), y: y - 6, height: 12 }),
        line(`mid ${side}`, x(q[2]), y - 7, x(q[2]), y + 7),
        error && draw("line", { class: "zero", x1: x(within(mean - error)), x2: x(within(mean + error)), y1: y, y2: y, "stroke-width": 2 }),
        mean != null && within(mean) === mean && draw("circle", { class: "mean", cx: x(mean), cy: y, r: 4 }),
      ];
    });

  const total = sum(list.map((row) => row.value)), size = sum(list.map((row) => Math.abs(row.value))), cancel = total < 0.2 * size;
  $("share-note").textContent = cancel
    ? "The domains' values nearly cancel or are negative in all, so shares of their sum would mean little: shown are shares of the sum of their " +
      "sizes."
    : "Where the diamond lies to the right of the circle, the domain gave more value than its tokens alone would let one expect. A share below " +
      "0: in all it raised the target's loss.";
  for (const row of list) {
    row.share = row.value / ((cancel ? size : total) || 1);
    row.note = `${percent(row.tokens)} \u2192 ${percent(row.share)}`;
  }
  rows("shares", "Share of tokens and share of value by domain", list, extent(list.flatMap((row) => [row.tokens, row.share])), percent,
    "share of tokens (circle), of value (diamond)", ({ tokens, share }, x, y) => [
      line("stem", x(tokens), y, x(share), y),
      draw("circle", { class: "hollow", cx: x(tokens), cy: y, r: 5 }),
      draw("path", { class: share < 0 ? "hurt" : "help", d: `M${x(share)} ${y - 6}l6 6l-6 6l-6 -6z` }),
    ]);

  const value = (key, digits) => ({ value: (row) => row[key], cell: (row) => number(row[key], digits), numeric: true });
  sortable($("domain-table"), "Domains", [
    { title: "Domain", value: (row) => row.name, cell: (row) => name(row.name) },
    { title: "Tokens", value: (row) => row.tokens, cell: (row) => percent(row.tokens), numeric: true },
    { title: "Value", value: (row) => row.share, cell: (row) => percent(row.share), numeric: true },
    { title: "Negative", value: (row) => row.negative, cell: (row) => percent(row.negative), numeric: true },
    { title: `Mean, ${unit}`, ...value("mean") },
    { title: "\u00b1", ...value("error", 2) },
    ...["5%", "25%", "Median", "75%", "95%"].map((title, i) => ({ title, value: (row) => row.q[i], cell: (row) => number(row.q[i]), numeric: true })),
  ], 4)(list);
}

function drawHeat() {
  if (R.targets.length < 2) return;
  $("heat-part").hidden = false;
  const largest = R.spread.mean.map((column) => Math.max(...column.map(Math.abs)));
  const order = R.domains.map((_, d) => d).sort((a, b) => R.spread.mean[state.target][b] - R.spread.mean[state.target][a]);
  const cell = (m, k) => make("td", { class: `num ${level(m, largest[k])}` }, signed(perToken(m)));
  $("heat").replaceChildren(make("table", {}, make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "Domain"),
    R.targets.map((text) => make("th", { scope: "col", class: "num" }, name(text))))),
    make("tbody", {}, order.map((d) => make("tr", {}, make("th", { scope: "row" }, name(R.domains[d])), R.targets.map((_,
      k) => cell(R.spread.mean[k][d], k)))))));
}

const clear = (k) => (R.time.share[k][0] ?? []).map((x) => x != null); // which bars stand on a drop above noise
function drawTime() {
  const k = state.target, T = R.time, mode = document.querySelector("[name=mode]:checked").value, share = mode !== "cumulative",
    own = $("own").checked;
  const pick = T.edges.map((_,
    i) => i).filter((i) => i % Math.ceil((T.edges.length - 1) / 16) === 0 || i === T.edges.length - 1); // of the columns, for wider bars
  const between = (sums) => pick.slice(1).map((at, i) => sums[at - 1] - (i ? sums[pick[i] - 1] : 0));
  const size = between(T.size[k]), relative = (sums) => between(sums).map((v, i) => size[i] > 0 ? v / size[i] : null);
  const edges = mode === "drop" ? T.groups : mode === "size" ? pick.map((i) => T.edges[i]) : T.edges;
  const all = mode === "drop" ? T.share[k] : T.cumulative[k].map((sums) => mode === "size" ? relative(sums) : [0, ...sums]);
  const gaps = mode === "drop" ? clear(k).map((is) => !is) : size, missing = mode === "drop" ? gaps.filter(Boolean).length : 0;
  const every = `every ${plural(R.run.book_interval, "step")}`;
  $("time-note").textContent = !share
    ? "The values of each domain's chunks, summed up from the first step on. Early steps move the loss most, so most of it piles up there."
    : mode === "size" ? "Each bar: the sum of the values of the domain's chunks in these steps, over the summed sizes (without sign) of all " +
      "values in the same steps. So early and late parts of the run can be compared, whatever the loss did."
    : !gaps.length ? "No step of this run was measured yet: shares of the loss drop cannot be given."
      : `Each bar: what the domain's chunks got in a step, over what the step lowered the target's loss by, both averaged over the bar's steps. ` +
        `So early and late parts of the run can be compared. The loss is measured before and after a step ${every}; the bars hold ` +
        `${plural(Math.round(R.trust[k].steps / gaps.length), "measured step")} each.` +
        (missing ? ` ${plural(missing, "bar")} of ${gaps.length}, grey, left out: there the mean drop is not above twice its standard error.` : "") +
        " The bars of all domains add up to the part of the drop that the chunks of the step get; momentum has the rest.";
  const rank = (d) => share ? sum(all[d].map((x) => x ?? 0)) : all[d].at(-1), order = R.domains.map((_, d) => d).sort((a, b) => rank(b) - rank(a));
  const common = extent(all.flat());
  $("time").replaceChildren(...order.map((d) => make("figure", {}, make("figcaption", { title: visible(R.domains[d]) }, name(R.domains[d])),
    make("div"))));
  if (share && !gaps.length) return $("time").replaceChildren();
  order.forEach((d, i) => {
    const row = all[d], [low, high] = own ? extent(row) : common;
    const [made, width] = canvas($("time").children[i].lastChild, 104, `${R.domains[d]} over training`);
    const x = linear(edges[0], edges.at(-1), 44, width - 4), y = linear(low, high || low + 1e-9, 80, 6), marks = ticks(low, high, 3);
    const format = (t) => share ? percent(t) : number(t, 2);
    for (const t of marks) made.append(line(t === 0 ? "zero" : "grid", 44, y(t), width - 4, y(t)), label(format(t), 39, y(t) + 4, "end"));
    made.append(label(whole(edges[0]), 44, 98, "start"), label(`step ${whole(edges.at(-1))}`, width - 2, 98, "end"));
    if (share) row.forEach((v, j) => {
      const from = x(edges[j]) + 0.5, wide = Math.max(1, x(edges[j + 1]) - x(edges[j]) - 1), steps = `steps ${edges[j]} to ${edges[j + 1] - 1}`;
      made.append(v == null
        ? draw("rect", { class: "gap", x: from, width: wide, y: 6, height: 74 }, draw("title", {}, `${steps}: drop not above noise`))
        : draw("rect", { class: v < 0 ? "hurt" : "help", x: from, width: wide, y: Math.min(y(0), y(v)), height: Math.max(0.5,
          Math.abs(y(v) - y(0))) }, draw("title", {}, `${steps}: ${percent(v)}`)));
    });
    else {
      const path = row.map((v, j) => `${x(edges[j])} ${y(v)}`).join("L");
      made.append(draw("path", { class: "area", d: `M${x(edges[0])} ${y(0)}L${path}L${x(edges.at(-1))} ${y(0)}z` }), draw("path",
        { class: "curve", d: `M${path}` }, draw("title", {}, `${nats(row.at(-1))} nats`)));
    }
  });
}

const bent = (s) => (v) => Math.asinh(v / s);
function bentTicks(s, low, high, spacing, x) { // 0 and powers of ten, as many as have room
  const found = [0];
  for (let e = Math.ceil(Math.log10(s)); e < 12; e++) for (const t of [10 ** e, -(10 ** e)]) {
    const at = bent(s)(t);
    if (at <= high && at >= low && found.every((f) => Math.abs(x(bent(s)(f)) - x(at)) >= spacing)) found.push(t);
  }
  return found;
}
function drawValues() {
  const k = state.target, look = state.look, H = R.histogram[k];
  const counts = look < 0 ? H.counts[0].map((_, b) => sum(H.counts.map((row) => row[b]))) : H.counts[look];
  const total = sum(counts), below = sum(counts.slice(0, Math.max(0, -H.first)));
  $("histogram-note").replaceChildren(`${plural(total, "chunk")} by value for `, name(R.targets[k]),
    `: ${percent(total ? below / total : 0)} raised its loss (orange, left of 0), the others lowered it. The axis is linear around 0 and ` +
    `logarithmic on both sides.`);
  let [made, width] = canvas($("histogram"), 300, `Histogram of the values for ${R.targets[k]}`);
  const low = H.first * H.width, high = low + counts.length * H.width, top = Math.max(...counts, 1);
  let x = linear(low, high, 52, width - 14), y = linear(0, top, 250, 8);
  for (const t of ticks(0, top, 4)) if (Number.isInteger(t)) made.append(line("grid", 52, y(t), width - 14, y(t)),
    label(t >= 1e5 ? t.toExponential(0) : whole(t), 46, y(t) + 4, "end"));
  counts.forEach((n, b) => {
    const from = low + b * H.width, edge = (t) => nats(H.s * Math.sinh(t), 2);
    if (n) made.append(draw("rect", { class: from < -1e-9 ? "hurt" : "help", "stroke-width": 0, x: x(from) + 0.5, width: Math.max(1,
      x(from + H.width) - x(from) - 1), y: y(n), height: 250 - y(n) },
      draw("title", {}, `${plural(n, "chunk")} from ${edge(from)} to ${edge(from + H.width)} nats`)));
  });
  made.append(line("zero", x(0), 4, x(0), 256));
  for (const t of bentTicks(H.s, low, high, 46, x)) made.append(label(power(t), x(bent(H.s)(t)), 272));
  made.append(label("value of a chunk, nats", (52 + width - 14) / 2, 294));

  const P = R.points, own = P.domain.map((d, i) => i).filter((i) => look < 0 || P.domain[i] === look);
  $("scatter-note").textContent = `Value against training loss, a point for each visit of a chunk: ${whole(own.length)} ` +
    `shown${look < 0 ? "" : ` of this domain, out of a sample of ${whole(P.domain.length)}`} of ${whole(R.run.visits)} visits in ` +
    `all${P.domain.length < R.run.visits ? ", taken evenly over the run" : ""}.`;
  [made, width] = canvas($("scatter"), 300, `Values for ${R.targets[k]} against training loss`);
  const all = P.values[k].map(bent(H.s)), [down, up] = extent(all), losses = P.loss.filter((l) => l != null);
  const least = losses.reduce((a, b) => Math.min(a, b), Infinity), most = losses.reduce((a, b) => Math.max(a, b), -Infinity);
  x = linear(least, most, 52, width - 14);
  y = linear(down, up, 250, 8);
  for (const t of bentTicks(H.s, down, up, 22, y)) made.append(line(t === 0 ? "zero" : "grid", 52, y(bent(H.s)(t)), width - 14,
    y(bent(H.s)(t))), label(power(t), 46, y(bent(H.s)(t)) + 4, "end"));
  for (const t of ticks(least, most, Math.floor(width / 90))) made.append(label(number(t), x(t), 272));
  made.append(label("training loss of the chunk, nats", (52 + width - 14) / 2, 294));
  for (const [side, wanted] of [["help", (v) => v >= 0], ["hurt", (v) => v < 0]])
    made.append(draw("path", { class: `points ${side}`,
      d: own.filter((i) => wanted(all[i]) && P.loss[i] != null).map((i) => `M${x(P.loss[i]).toFixed(1)} ${y(all[i]).toFixed(1)}h0`).join("") }));
}

// --- tables -------------------------------------------------------------------

function sortable(host, what, columns, by, paint) { // -> show(rows); the headers are buttons. paint(rows) -> table rows, else one a row
  let list = [], sort = { by, down: true };
  const body = make("tbody"), heads = columns.map((column, i) => make("th", { scope: "col", class: column.numeric && "num" },
    make("button", { type: "button", onclick: () => {
      sort = { by: i, down: sort.by === i ? !sort.down : Boolean(column.numeric) };
      show(list);
    } }, column.title)));
  host.replaceChildren(make("table", { "aria-label": what }, make("thead", {}, make("tr", {}, heads)), body));
  paint ??= (rows) => rows.map((row) => make("tr", {}, columns.map((column) => make("td", { class: column.numeric && "num" }, column.cell(row)))));
  function show(rows) {
    const value = columns[sort.by].value, order = (a, b) => typeof a === "string" ? a.localeCompare(b) : (a ?? -Infinity) - (b ?? -Infinity);
    list = [...rows].sort((a, b) => (sort.down ? -1 : 1) * order(value(a), value(b)));
    heads.forEach((head, i) => i === sort.by ? head.setAttribute("aria-sort",
      sort.down ? "descending" : "ascending") : head.removeAttribute("aria-sort"));
    body.replaceChildren(...paint(list));
  }
  return show;
}

const PAGE = 20;
let shown = PAGE;
const opened = new Set();
const worth = (row) => row.values[state.target];
const sizes = R.chunks.flatMap((row) => row.values.map(Math.abs)).sort((a, b) => a - b), middle = sizes[sizes.length >> 1];
const chunkExponent = middle > 0 ? 3 * Math.floor(Math.log10(middle) / 3) : 0;
const columns = [
  { title: `Value, ${chunkExponent ? `10${sup(chunkExponent)} ` : ""}nats`, value: worth, cell: (row) => make("span",
    { class: worth(row) < 0 ? "negative" : "positive" }, signed(worth(row) / 10 ** chunkExponent)), numeric: true },
  { title: "Domain", value: (row) => R.domains[row.domain], cell: (row) => name(R.domains[row.domain]) },
  { title: "Chunk", value: (row) => row.chunk, cell: (row) => whole(row.chunk), numeric: true, label: "chunk" },
  { title: "Step", value: (row) => row.step, cell: (row) => whole(row.step) + (row.early ? " early" : ""), numeric: true, label: "step" },
  { title: "Loss", value: (row) => row.loss, cell: (row) => number(row.loss), numeric: true, label: "loss" },
];
const showChunks = sortable($("chunk-table"), "Chunks", [...columns, { title: "Text", value: (row) => row.text }], 0, (list) => {
  $("more").hidden = list.length <= shown;
  $("more").textContent = `Show ${Math.min(PAGE, list.length - shown)} more of ${list.length - shown}`;
  return list.slice(0, shown).flatMap(chunkRows);
});
function chunkRows(row) {
  const detail = make("tr", { class: "detail", hidden: true }, make("td", { colspan: 6, class: "wide" }));
  const button = make("button", { type: "button", class: "open", "aria-expanded": "false", "aria-label": `Whole text of chunk ${row.chunk}`,
    onclick: () => toggle(detail.hidden) });
  function toggle(open) {
    detail.hidden = !open;
    opened[open ? "add" : "delete"](row);
    button.setAttribute("aria-expanded", String(open));
    button.textContent = open ? "Close" : row.tokens ? "Open, tokens coloured" : "Open";
    detail.firstChild.replaceChildren(...(open ? chunkDetail(row) : []));
  }
  toggle(opened.has(row));
  return [make("tr", {}, columns.map((c) => make("td", { class: c.numeric && "num", "data-name": c.label }, c.cell(row))),
    make("td", { class: "wide" }, make("div", { class: "text preview" }, row.text.trimStart().slice(0, 300)), button)), detail];
}
function chunkDetail(row) {
  const source = ([doc, path, record]) => make("li", {}, `document ${whole(doc)}: `, make("bdi", { title: visible(path) },
    path.split("/").at(-1) || path), `, record ${whole(record)}`);
  const others = R.targets.map((text, k) => [name(text), ` ${nats(row.values[k])} nats`, k < R.targets.length - 1 ? "; " : ""]).flat();
  const found = [make("p", {}, ...others, `. Trained on ${plural(row.visits, "time")}, first at step ` +
    `${whole(row.step)}${row.early ? ", which is marked early" : ""}.`)];
  found.push(make("ul", {}, row.documents.map(source), row.more ? make("li", {}, `and ${plural(row.more, "document")} more`) : null));
  if (row.tokens) found.push(...colouredTokens(row.tokens));
  else found.push(make("div", { class: "text", dir: "auto", tabindex: 0, role: "region", "aria-label": "Text of the chunk" },
    row.text + (row.cut ? "\u2026" : "")));
  if (row.cut && !row.tokens) found.push(make("p", { class: "soft" }, `The first ${whole(row.text.length)} characters: the page has no room for ` +
    `more. The whole of it: python values.py chunk <run> ${row.chunk}`));
  return found;
}
function colouredTokens({ pieces, largest, parts }) {
  const k = state.target, most = largest[k] || 0, value = (i) => (parts[k][i] / 1000) * most,
    shown = (i) => `\u201c${pieces[i].trim() || "\u2423"}\u201d ${nats(value(i), 2)}`;
  const order = pieces.map((_, i) => i).sort((a, b) => parts[k][b] - parts[k][a]), readout = make("output", {},
    "Point at a token, or press the arrow keys, to read its value.");
  const spans = pieces.map((piece, i) => make("span", { class: level(parts[k][i], 1000), title: `${nats(value(i), 2)} nats` }, piece));
  let at = -1;
  const go = (i) => {
    spans[at]?.classList.remove("at");
    at = Math.max(0, Math.min(spans.length - 1, i));
    spans[at].classList.add("at");
    readout.replaceChildren(`Token ${at + 1} of ${spans.length}: `, name(shown(at)), " nats");
  };
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 };
  return [
    make("p", { class: "soft" }, `What each token, as it was read, was worth for `, name(R.targets[k]),
      `. Computed again with the weights after step ${whole(R.token_step)}, so the tokens add up to what the chunk would be worth there, not to ` +
      `its value above.`),
    make("div", { class: "legend", role: "img", "aria-label": `Colours from ${nats(-most)} nats, orange, to ${nats(most)} nats, blue` },
      make("span", {}, `raised the loss ${nats(-most, 2)}`),
      [-5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5].map((n) => make("span", { class: n ? `v${n}` : "" }, n === 0 ? "0" : "\u00a0")), make("span", {},
        `${nats(most, 2)} lowered it`)),
    make("div", { class: "text tokens", dir: "auto", tabindex: 0, role: "group", "aria-label": "Tokens of the chunk; arrow keys read their values",
      onpointerover: (event) => spans.includes(event.target) && go(spans.indexOf(event.target)),
      onkeydown: (event) => { if (event.key in steps) { event.preventDefault(); go(at + steps[event.key]); } } }, spans), readout,
    make("p", {}, "Most helpful: ", name(order.slice(0, 5).map(shown).join(", ")), ". Most harmful: ",
      name(order.slice(-5).reverse().map(shown).join(", ")), "."),
  ];
}
function drawChunks() {
  const words = $("search").value.trim().toLowerCase(), domain = Number($("domain").value), sign = Number($("sign").value);
  const list = R.chunks.filter((row) => (domain < 0 || row.domain === domain) && (!sign || Math.sign(worth(row)) === sign) &&
    (!words || String(row.chunk) === words || [row.text, ...row.documents.map((doc) => doc[1])].some((text) => text.toLowerCase().includes(words))));
  $("found").textContent = `${plural(list.length, "chunk")} of the ${whole(R.chunks.length)} on this page`;
  showChunks(list);
}

// --- the top ------------------------------------------------------------------

function trustCard(row, k) {
  const A = row.audit, said = { data: "the chunks of the step: their values", momentum: "momentum: earlier chunks, still at work",
    decay: "weight decay", residual: "not accounted for" };
  const host = make("div", { class: "chart" }), known = row.parts.residual == null ? null : 1 - row.parts.residual, card = make("article",
    { class: "card" }, make("h3", {}, name(R.targets[k])));
  if (!row.steps) card.append(make("p", {}, "No step was measured yet: nothing can be said of how well the values add up."));
  else if (known == null) card.append(make("p", {}, `Over ${plural(row.steps, "measured step")} the loss did not fall (${signed(-row.drop)} ` +
    `nats): there is no drop to be explained.`));
  else card.append(make("p", {}, make("span", { class: "big" }, percent(known)), ` of the drop is what values, momentum and decay add up to; ` +
    `100% would be exact. Over ${plural(row.steps, "measured step")} the loss fell by ${number(row.drop)} nats.`), host,
    row.early && row.rest != null ? make("p", { class: "soft" }, `Without ${plural(row.early, "measured step")} marked early: ` +
      `${percent(1 - row.rest)}.`) : "");
  card.append(make("p", {}, !A ? ["No step was audited: ", make("code", {}, "--audit_interval=N"),
    " compares the values of some steps with exact Shapley values."]
    : `Against exact Shapley values in ${plural(A.steps, "audited step")}: Pearson ${number(A.pearson[0], 4)} (lowest ` +
      `${number(A.pearson[1], 4)}), Spearman ${number(A.spearman[0], 4)} (lowest ${number(A.spearman[1], 4)}), relative L2 error ` +
      `${percent(A.rel_l2)} (median). 1 would be perfect agreement, an error of 0% too.`));
  return [card, () => {
    if (!host.isConnected) return;
    const list = Object.entries(row.parts), [low, high] = extent(list.map(([, v]) => v)), [made, width] = canvas(host, list.length * 38 + 4,
      "What the drop was made of");
    const x = linear(low, high, 2, width - 62);
    list.forEach(([part, v], i) => made.append(draw("text", { x: 2, y: i * 38 + 14 }, said[part]), draw("rect",
      { class: v < 0 ? "hurt" : "help", x: Math.min(x(0), x(v)), width: Math.max(1, Math.abs(x(v) - x(0))), y: i * 38 + 20, height: 9 }),
      line("zero", x(0), i * 38 + 18, x(0), i * 38 + 31),
      draw("text", { x: width, y: i * 38 + 29, "text-anchor": "end" }, percent(v))));
  }];
}
const cards = R.trust.map(trustCard);

function head() {
  const run = R.run, used = run.used / run.chunks, list = make("span");
  R.targets.forEach((text, k) => list.append(k ? ", " : "", name(text)));
  document.title = visible(`${run.name}: what the training data was worth`);
  $("lead").append("Run ", name(run.name), `: a GPT of about ${large(run.size)} parameters, ` +
    `${run.step < run.max_iters ? `after ${whole(run.step)} of ${whole(run.max_iters)} steps` : "trained to its end"}, and what each chunk of ` +
    `its training text did for the loss on `, list, ".");
  const facts = [
    ["Steps done", whole(run.step), `of ${whole(run.max_iters)} (${percent(run.step / run.max_iters)}), ${plural(run.batch, "chunk")} each`],
    ["Chunks valued", whole(run.used), `of ${whole(run.chunks)} (${percent(used)}), ${plural(run.width, "token")} each`],
    ["Tokens trained on", large(run.visits * run.width), `${run.tokenizer} tokens`],
    ["Data set", run.data, plural(R.domains.length, "domain") + " met"],
    ["Model", `${run.n_layer} layers, ${run.n_embd} wide`, plural(run.n_head, "head")],
    ["Training", run.optimizer, `learning rate ${run.learning_rate}, warm-up ${whole(run.warmup_iters)}, clip ${run.grad_clip || "none"}`],
    ["Rule of the values", run.rule, run.rule_is],
    ["Targets", String(R.targets.length), `${plural(run.target_batch, "chunk")} speak for each in a step`],
  ];
  $("facts").append(...facts.map(([title, value, note]) => make("div", {}, make("dt", {}, title), make("dd", {}, name(value), make("small", {},
    note)))));
  $("reading").append("A value says by how much a chunk lowered the loss on a target in the steps that trained on it. ", make("b", {},
    "Positive: it helped. Negative: it hurt."),
    ` The unit is the nat, in which the loss is measured: the mean over the target's tokens of the negative logarithm of the probability the ` +
      `model gave them, so \u22120.01 nats make the true next token about 1% more likely. At some steps the loss is measured before and after, ` +
      `and set beside what the values, momentum and decay say (the books); at some the values are set beside exact Shapley values (the audit).`);
  const warnings = [], warn = (...text) => warnings.push(make("p", { class: "warning" }, make("b", {}, "Caution. "), ...text));
  if (run.approximate) warn(`These values are approximate: ${run.approximate}.`);
  R.trust.forEach((row, k) => {
    const text = () => name(R.targets[k]);
    const better = run.rule === "adamw2" ? "." : ["; ", make("code", {}, "--rule=adamw2"), " follows the optimizer's step more closely."];
    if (row.bad_books && row.parts.residual == null) warn("The books of ", text(), " cannot be closed: the loss did not fall at the measured steps.");
    else if (row.bad_books) warn("The books of ", text(), " close badly: values, momentum and decay add up to ", percent(1 - row.parts.residual),
      " of the measured drop. Read its values as a rough order of the chunks, not as amounts", better);
    for (const [step, share, sum] of R.lone[k]) warn(`Step ${whole(step)} alone holds ${percent(share)} of the size of all values for `,
      text(), ` (${signed(sum)} nats together): the rule overshot there. Sums, means and shares on this page leave that step out; medians, the ` +
      `histogram and the list of chunks do not.`);
    if (row.bad_audit) warn("The audit of ", text(), ` found a step whose values correlate only ${number(row.audit.pearson[1])} with the exact ` +
      `ones.`);
  });
  if (run.early) warn(`${plural(run.early, "step")} ${run.early === 1 ? "is" : "are"} marked early, when the optimizer's averages were too ` +
    `young for the rule; they hold ${run.early_share.map(percent).join(" and ")} of the values' total size. Chunks met there are marked in the ` +
    `list.`);
  $("warnings").append(...warnings);
  $("trust").append(...cards.map(([card]) => card));
  $("chunk-note").textContent = `The chunks with the highest and lowest values for each target, and a few of each domain: ` +
    `${whole(R.chunks.length)} of ${whole(run.used)}. Chunks met early in training have the largest values: compare chunks of the same part of ` +
    `the run.`;
  $("foot").append(`Values of ${whole(run.visits)} visits, steps ${whole(run.first)} to ${whole(run.step)}; data ${run.hash}. This page holds ` +
    `everything it shows and loads nothing.`);
  for (const node of document.querySelectorAll(".unit")) node.textContent = unit;
}

function select(id, list, first) {
  $(id).append(...first, ...list.map((text, i) => make("option", { value: i }, text)));
}
const charts = [drawSpread, drawTime, drawValues, () => cards.forEach(([, paint]) => paint())];
function drawAll() {
  for (const node of document.querySelectorAll(".target")) node.replaceChildren(name(R.targets[state.target]));
  for (const paint of [...charts, drawHeat, drawChunks]) paint();
}
const dark = () => (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
function theme(to) {
  if (to) document.documentElement.dataset.theme = to;
  $("theme").setAttribute("aria-pressed", String(dark()));
}

select("target", R.targets, []);
const byName = (id) => select(id, R.domains, [make("option", { value: -1 }, "all")]);
byName("look");
byName("domain");
const bars = R.targets.flatMap((_, k) => clear(k));
if (bars.length && bars.filter(Boolean).length * 2 >= bars.length) document.querySelector("[value=drop]").checked = true;
head();
theme();
drawAll();
$("target").addEventListener("change", () => { state.target = Number($("target").value); drawAll(); });
$("theme").addEventListener("click", () => theme(dark() ? "light" : "dark"));
$("look").addEventListener("change", () => { state.look = Number($("look").value); drawValues(); });
$("time-mode").addEventListener("change", drawTime);
$("own").addEventListener("change", drawTime);
$("filters").addEventListener("submit", (event) => event.preventDefault());
$("filters").addEventListener("input", () => { shown = PAGE; drawChunks(); });
$("more").addEventListener("click", () => { shown += PAGE; drawChunks(); });
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; for (const paint of charts) paint(); } });
