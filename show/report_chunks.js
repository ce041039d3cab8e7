// Tables that sort, and the list of chunks with their texts and coloured tokens.

// A table whose heads are buttons that sort it -> show(rows). by: the column that it is sorted by.
// paint(rows) -> table rows; without it each row is one.
function sortable(host, what, columns, by, { down = true, paint = null } = {}) {
  let list = [];
  let sort = { by, down };
  const body = make("tbody");
  const heads = columns.map((column, i) => {
    const button = make("button", { type: "button", onclick: () => sortBy(i) }, column.title);
    return make("th", { scope: "col", class: column.numeric && "num" }, button);
  });
  const head = make("thead", {}, make("tr", {}, heads));
  host.replaceChildren(make("table", { "aria-label": what }, head, body));

  function sortBy(i) {
    const first = Boolean(columns[i].numeric); // figures begin with the largest, texts with A
    sort = { by: i, down: sort.by === i ? !sort.down : first };
    show(list);
  }

  function show(rows) {
    const value = columns[sort.by].value;
    const factor = sort.down ? -1 : 1;
    list = [...rows].sort((a, b) => factor * order(value(a), value(b)));
    heads.forEach((node, i) => {
      if (i !== sort.by) node.removeAttribute("aria-sort");
      else node.setAttribute("aria-sort", sort.down ? "descending" : "ascending");
    });
    body.replaceChildren(...(paint ? paint(list) : list.map(plainRow)));
  }

  function plainRow(row) {
    const cells = columns.map((c) => make("td", { class: c.numeric && "num" }, c.cell(row)));
    return make("tr", {}, cells);
  }
  return show;
}

function order(a, b) {
  if (typeof a === "string") return a.localeCompare(b);
  return (a ?? -Infinity) - (b ?? -Infinity);
}

// --- the list -------------------------------------------------------------------

const PAGE = 20; // chunks that are shown at a time
const opened = new Set();
let shown = PAGE;

function worth(row) {
  return row.values[state.target];
}

function signedCell(text, x) {
  return make("span", { class: x < 0 ? "negative" : "positive" }, text);
}

// How many times the mean size of its step's values a chunk's value was.
function times(x) {
  return plus(x) + minus(x.toFixed(2));
}

const columns = [
  {
    title: "Value, 1e-6 nats",
    value: worth,
    cell: (row) => signedCell(micro(worth(row)), worth(row)),
    numeric: true,
  },
  {
    title: "Share",
    value: (row) => row.score[state.target],
    cell: (row) => times(row.score[state.target]),
    numeric: true,
    label: "share",
  },
  {
    title: "Domain",
    value: (row) => R.domains[row.domain],
    cell: (row) => name(R.domains[row.domain]),
  },
  {
    title: "Chunk",
    value: (row) => row.chunk,
    cell: (row) => whole(row.chunk),
    numeric: true,
    label: "chunk",
  },
  {
    title: "Step",
    value: (row) => row.step,
    cell: (row) => whole(row.step) + (row.early ? " early" : ""),
    numeric: true,
    label: "step",
  },
  {
    title: "Loss",
    value: (row) => row.loss,
    cell: (row) => number(row.loss),
    numeric: true,
    label: "loss",
  },
];
if (R.smoothed)
  columns.splice(2, 0, {
    title: "Smoothed",
    value: (row) => row.smoothed[state.target],
    cell: (row) => times(row.smoothed[state.target]),
    numeric: true,
    label: "smoothed",
  });
const SHARE = 1; // the column that the list is sorted by at first

const showChunks = sortable(
  $("chunk-table"),
  "Chunks",
  [...columns, { title: "Text", value: (row) => row.text }],
  SHARE,
  { paint: paintChunks },
);

function paintChunks(list) {
  const left = list.length - shown;
  $("more").hidden = left <= 0;
  $("more").textContent = `Show ${Math.min(PAGE, left)} more of ${left}`;
  return list.slice(0, shown).flatMap(chunkRows);
}

// A chunk's row, and the row below it that opens.
function chunkRows(row) {
  const cell = make("td", { colspan: columns.length + 1, class: "wide" });
  const detail = make("tr", { class: "detail", hidden: true }, cell);
  const button = make("button", {
    type: "button",
    class: "open",
    "aria-label": `Whole text of chunk ${row.chunk}`,
    onclick: () => toggle(detail.hidden),
  });

  function toggle(open) {
    detail.hidden = !open;
    if (open) opened.add(row);
    else opened.delete(row);
    button.setAttribute("aria-expanded", String(open));
    const invitation = row.tokens ? "Open, tokens coloured" : "Open";
    button.textContent = open ? "Close" : invitation;
    cell.replaceChildren(...(open ? chunkDetail(row) : []));
  }
  toggle(opened.has(row));
  const preview = make("div", { class: "text preview" }, row.text.trimStart().slice(0, 300));
  const cells = columns.map((column) => {
    const attributes = { class: column.numeric && "num", "data-name": column.label };
    return make("td", attributes, column.cell(row));
  });
  return [make("tr", {}, cells, make("td", { class: "wide" }, preview, button)), detail];
}

function chunkDetail(row) {
  const all = make("p", {}, "Values in 1e-6 nats: ");
  R.targets.forEach((text, k) => {
    all.append(k ? "; " : "", name(text), ` ${micro(row.values[k])}`);
  });
  const early = row.early ? ", which is marked early" : "";
  all.append(
    `. Trained on ${plural(row.visits, "time")}, first at step ${whole(row.step)}${early}.`,
  );
  const documents = row.documents.map(documentItem);
  if (row.more) documents.push(make("li", {}, `and ${plural(row.more, "document")} more`));
  const found = [all, make("ul", {}, documents)];
  if (row.tokens) found.push(...colouredTokens(row));
  else found.push(...plainText(row));
  return found;
}

function documentItem([doc, path, record]) {
  const file = make("bdi", { title: visible(path) }, path.split("/").at(-1) || path);
  return make("li", {}, `document ${whole(doc)}: `, file, `, record ${whole(record)}`);
}

function plainText(row) {
  const attributes = { class: "text", dir: "auto", tabindex: 0, role: "region" };
  const text = row.text + (row.cut ? "\u2026" : "");
  const found = [make("div", { ...attributes, "aria-label": "Text of the chunk" }, text)];
  if (row.cut) {
    const words =
      `The first ${plural(row.text.length, "character")}: the page has no room for more. ` +
      `The whole of it: python values.py chunk <run> ${row.chunk}`;
    found.push(make("p", { class: "soft" }, words));
  }
  return found;
}

function drawChunks() {
  const words = $("search").value.trim().toLowerCase();
  const domain = Number($("domain").value);
  const sign = Number($("sign").value);
  const list = R.chunks.filter((row) => {
    if (domain >= 0 && row.domain !== domain) return false;
    if (sign && Math.sign(worth(row)) !== sign) return false;
    return matches(row, words);
  });
  $("found").textContent =
    `${plural(list.length, "chunk")} of the ${whole(R.chunks.length)} on this page`;
  showChunks(list);
}

function matches(row, words) {
  if (!words || String(row.chunk) === words) return true;
  const texts = [row.text, ...row.documents.map((doc) => doc[1])];
  return texts.some((text) => text.toLowerCase().includes(words));
}

// --- coloured tokens ------------------------------------------------------------

const KEYS = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 };

function colouredTokens(row) {
  const k = state.target;
  const { pieces, largest } = row.tokens;
  const parts = row.tokens.parts[k]; // thousandths of the largest
  const most = largest[k] || 0;
  const value = (i) => micro((parts[i] / 1000) * most);
  const named = (i) => `\u201c${pieces[i].trim() || "\u2423"}\u201d ${value(i)}`;
  const readout = make(
    "output",
    {},
    "Point at a token, or press the arrow keys, to read its value.",
  );
  const spans = pieces.map((piece, i) => {
    const title = `${value(i)} (1e-6 nats)`;
    return make("span", { class: level(parts[i], 1000), title }, piece);
  });
  let at = -1;

  function go(i) {
    spans[at]?.classList.remove("at");
    at = Math.max(0, Math.min(spans.length - 1, i));
    spans[at].classList.add("at");
    const place = `Token ${at + 1} of ${spans.length}: `;
    readout.replaceChildren(place, name(named(at)), " (1e-6 nats)");
  }

  function point(event) {
    const i = spans.indexOf(event.target);
    if (i >= 0) go(i);
  }

  function press(event) {
    if (!(event.key in KEYS)) return;
    event.preventDefault();
    go(at + KEYS[event.key]);
  }

  const ranked = pieces.map((_, i) => i).sort((a, b) => parts[b] - parts[a]);
  const best = ranked.slice(0, 5).map(named).join(", ");
  const worst = ranked.slice(-5).reverse().map(named).join(", ");
  const attributes = {
    class: "text tokens",
    dir: "auto",
    tabindex: 0,
    role: "group",
    "aria-label": "Tokens of the chunk; arrow keys read their values",
    onpointerover: point,
    onkeydown: press,
  };
  return [
    twoValues(row),
    legend(most),
    make("div", attributes, spans),
    readout,
    make("p", {}, "Most helpful: ", name(best), ". Most harmful: ", name(worst), "."),
  ];
}

// Why the tokens do not add up to the chunk's value, with both numbers.
function twoValues(row) {
  const k = state.target;
  const own = row.visits === 1 ? `in its own step, ${whole(row.step)}` : "summed over its steps";
  return make(
    "p",
    { class: "soft" },
    "What each token, as it was read, was worth for ",
    name(R.targets[k]),
    `, with the weights after step ${whole(R.token_step)}. There the whole chunk would be worth `,
    make("b", {}, micro(row.tokens.sum[k])),
    ", the sum of its tokens. Its value above, ",
    make("b", {}, micro(row.values[k])),
    R.hindsight
      ? `, is what its visits are worth for the loss${R.hindsight.when}: another thing. ` +
          "Both are in 1e-6 nats."
      : `, is what it was worth ${own}, with the weights and the optimizer of that time. ` +
          "The two differ where training has moved on. Both are in 1e-6 nats.",
  );
}

function legend(most) {
  const levels = [-5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5].map((n) => {
    const text = n === 0 ? "0" : "\u00a0";
    return make("span", { class: n ? `v${n}` : "" }, text);
  });
  const label = `Colours from ${micro(-most)}, orange, to ${micro(most)}, blue, in 1e-6 nats`;
  return make(
    "div",
    { class: "legend", role: "img", "aria-label": label },
    make("span", {}, `raised the loss ${micro(-most)}`),
    levels,
    make("span", {}, `${micro(most)} lowered it`),
  );
}
