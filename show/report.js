// The first screen, trust, the run, and what the settings do.

// --- the first screen -----------------------------------------------------------

function writeLead() {
  const run = R.run;
  document.title = visible(`${run.name}: what the training data was worth`);
  const done = run.step < run.max_iters ? `after ${whole(run.step)} of` : "trained to its end,";
  $("lead").append(
    "Run ",
    name(run.name),
    `: a GPT of about ${large(run.size)} parameters, ${done} ${plural(run.max_iters, "step")}. ` +
      `Values of ${plural(run.used, "chunk")} of ${plural(R.domains.length, "domain")}. `,
    make("b", {}, R.hindsight ? "Values in hindsight: " : "Values in their steps: "),
    kindOfValue(),
  );
  $("next").textContent = visible(R.next);
}

// What a value of this page is, in a sentence.
function kindOfValue() {
  if (!R.hindsight) return "what a chunk did to the target's loss in the steps that trained on it.";
  return `what the visits of a chunk are worth for the target's loss${R.hindsight.when}.`;
}

function drawFindings() {
  const { found, stood_out, trust, cautions } = R.findings[state.target];
  const unbroken = found.replaceAll("e-6", "e\u20116"); // no line ends within a number
  const items = [unbroken, stood_out, trust].map((text) => make("li", {}, name(text)));
  $("findings").replaceChildren(...items);
  const warnings = cautions.map((text) => {
    return make("p", { class: "warning" }, make("b", {}, "Caution: "), name(text));
  });
  $("cautions").replaceChildren(...warnings);
}

// --- trust ----------------------------------------------------------------------

const PARTS = {
  data: "the chunks of the step: their values",
  momentum: "momentum: earlier chunks, still at work",
  decay: "weight decay",
  residual: "not accounted for",
};

// A target's card, and a function that draws its chart.
function trustCard(row, k) {
  const host = make("div", { class: "chart" });
  const card = make("article", { class: "card" }, make("h3", {}, name(R.targets[k])));
  if (R.hindsight) {
    const loss = `Its loss at the end is ${nats(R.hindsight.loss_at_end[k])} nats.`;
    card.append(make("p", {}, loss), ...checkParagraphs(k));
  } else {
    card.append(...bookParagraphs(row, host), auditParagraph(row.audit), ...checkParagraphs(k));
  }
  return { card, paint: () => drawParts(row, host) };
}

function bookParagraphs(row, host) {
  const measured = plural(row.steps, "measured step");
  if (!row.steps) {
    const words = "No step was measured yet: nothing can be said of how well the values add up.";
    return [make("p", {}, words)];
  }
  if (row.parts.residual == null) {
    const fall = `Over ${measured} the loss did not fall (${signedNats(-row.drop)} nats)`;
    const words = `${fall}: there is no drop to be explained.`;
    return [make("p", {}, words)];
  }
  const known = make("span", { class: "big" }, percent(1 - row.parts.residual));
  const words =
    " of the drop is what values, momentum and decay add up to; 100% would be exact. " +
    `Over ${measured} the loss fell by ${nats(row.drop)} nats.`;
  const found = [make("p", {}, known, words), host];
  if (Object.values(row.parts).some((part) => part < 0 || part > 1)) {
    found.push(make("p", { class: "soft" }, beyond(row.parts)));
  }
  if (row.early && row.rest != null) {
    const without = `Without ${plural(row.early, "measured step")} marked early: `;
    found.push(make("p", { class: "soft" }, `${without}${percent(1 - row.rest)}.`));
  }
  return found;
}

// Why a part is below 0 or above 100%.
function beyond({ data, momentum, decay }) {
  const first =
    "A part below 0 raised the loss, and the others are above 100% together: all of them add up " +
    "to 100%.";
  if (momentum < 0 && momentum <= decay) {
    return `${first} Here the momentum of earlier chunks pulls against the chunks of the step.`;
  }
  if (data < 0)
    return `${first} Here momentum did the work, and the step's own chunks pulled back.`;
  return first;
}

function auditParagraph(audit) {
  if (!audit) {
    const option = make("code", {}, "--audit_interval=N");
    const words = " compares the values of some steps with exact Shapley values.";
    return make("p", {}, "No step was audited: ", option, words);
  }
  const [pearson, spearman] = [audit.pearson, audit.spearman].map(
    ([mean, lowest]) => `${number(mean, 4)} (lowest ${number(lowest, 4)})`,
  );
  const words =
    `Against exact Shapley values in ${plural(audit.steps, "audited step")}: Pearson ${pearson}, ` +
    `Spearman ${spearman}, relative L2 error ${percent(audit.rel_l2)} (median). ` +
    "1 would be perfect agreement, an error of 0% too.";
  return make("p", {}, words);
}

// How well scores of visits predict what a training without some of them does to a target's loss.
function checkParagraphs(k) {
  const C = R.check;
  if (!C.words[k]) {
    const words = "It was not tried how well these values predict a training without visits: ";
    return [make("p", {}, words, make("code", { class: "long" }, C.command))];
  }
  const steps = ` (visits of steps ${whole(C.first_step)} to ${whole(C.end - 1)})`;
  const sentence = C.words[k][0].toUpperCase() + C.words[k].slice(1);
  const words = make("p", {}, name(sentence), `${steps}.`);
  const heads = ["Score", "Correlation", "95%", "Slope"].map((title, i) => {
    return make("th", { scope: "col", class: i > 0 && "num" }, title);
  });
  const head = make("thead", {}, make("tr", {}, heads));
  const what = { "aria-label": "How well scores predict training again" };
  const table = make("table", what, head, make("tbody", {}, ...C.rows[k].map(checkRow)));
  const host = make("div", { class: "scroll check" }, table);
  const about =
    "Correlation: of the sum of a score over the visits left out with what that did to the loss, " +
    `with its 95% interval. Slope: nats of change per nat predicted, 1 is right; ${NONE} where ` +
    "a score is not in nats.";
  return [words, host, make("p", { class: "soft" }, about)];
}

function checkRow(row) {
  const interval = `${hundredths(row.low)} to ${hundredths(row.high)}`;
  const figures = [hundredths(row.pearson), interval, slope(row)];
  const cells = figures.map((text) => make("td", { class: "num" }, text));
  return make("tr", {}, make("td", {}, name(row.score)), cells);
}

function hundredths(x) {
  return x == null ? NONE : minus(x.toFixed(2));
}

function slope(row) {
  if (row.slope == null) return NONE;
  return `${number(row.slope, 2)} \u00b1 ${number(row.slope_error, 2)}`;
}

function drawParts(row, host) {
  if (!host.isConnected) return;
  const list = Object.entries(row.parts);
  const [low, high] = extent(list.map(([, part]) => part));
  const [made, width] = canvas(host, list.length * 38 + 4, "What the drop was made of");
  const x = linear(low, high, 2, width - 62);
  list.forEach(([key, part], i) => {
    const y = i * 38;
    const box = { x: Math.min(x(0), x(part)), width: Math.max(1, Math.abs(x(part) - x(0))) };
    const kind = part < 0 ? "hurt" : "help";
    made.append(
      draw("text", { x: 2, y: y + 14 }, PARTS[key]),
      draw("rect", { class: kind, ...box, y: y + 20, height: 9 }),
      line("zero", x(0), y + 18, x(0), y + 31),
      draw("text", { x: width, y: y + 29, "text-anchor": "end" }, percent(part)),
    );
  });
}

function writeWarnings() {
  const run = R.run;
  const warnings = [];
  if (run.approximate) warnings.push([`These values are approximate: ${run.approximate}.`]);
  R.trust.forEach((row, k) => {
    if (row.bad_books) warnings.push(bookWarning(row, k));
    if (row.bad_audit) {
      const lowest = number(row.audit.pearson[1]);
      const words = ` found a step whose values correlate only ${lowest} with the exact ones.`;
      warnings.push(["The audit of ", name(R.targets[k]), words]);
    }
  });
  if (run.early) {
    const are = run.early === 1 ? "is" : "are";
    const why = R.hindsight
      ? `${are} marked early. ${R.hindsight.why_early} They`
      : `${are} marked early, when the optimizer's averages were too young for the rule. They`;
    warnings.push([
      `${plural(run.early, "step")} ${why} hold ${run.early_share.map(percent).join(" and ")} ` +
        "of the values' total size. Chunks met there are marked in the list.",
    ]);
  }
  for (const words of warnings) {
    $("warnings").append(make("p", { class: "warning" }, make("b", {}, "Caution. "), ...words));
  }
}

function bookWarning(row, k) {
  const target = name(R.targets[k]);
  if (row.parts.residual == null) {
    const words = " cannot be closed: the loss did not fall at the measured steps.";
    return ["The books of ", target, words];
  }
  const accounted = percent(1 - row.parts.residual);
  const words =
    ` close badly: values, momentum and decay add up to ${accounted} of the measured drop. ` +
    "Read its values as a rough order of the chunks, not as amounts";
  if (R.run.rule === "adamw2") return ["The books of ", target, `${words}.`];
  const option = make("code", {}, "--rule=adamw2");
  return [
    "The books of ",
    target,
    `${words}; `,
    option,
    " follows the optimizer's step more closely.",
  ];
}

// What is said of hindsight, or of values in their steps, alone.
function writeKind() {
  const H = R.hindsight;
  $("meaning").textContent = H
    ? H.meaning
    : "A value says by how much a chunk lowered the loss on a target in the steps that trained " +
      "on it.";
  if (!H) return;
  $("about-books").hidden = true;
  $("adjoint-part").hidden = false;
  const early = H.first_late - H.steps[0];
  const shaded = early
    ? ` Shaded: ${plural(early, "early step")}. ${H.why_early} Rather read values of later steps.`
    : " It is never large in the first half, and no step is marked early.";
  $("adjoint-note").textContent =
    "|dL/dw|, on a logarithmic axis: how far the loss at the end moves for a small change of the " +
    `weights that a step left.${shaded}`;
}

// --- the run --------------------------------------------------------------------

function writeFacts() {
  const run = R.run;
  const clip = run.grad_clip || "none";
  const speak = run.target_batch === 1 ? "speaks" : "speak";
  const done = percent(run.step / run.max_iters);
  const used = percent(run.used / run.chunks);
  const facts = [
    [
      "Steps done",
      whole(run.step),
      `of ${whole(run.max_iters)} (${done}), ${plural(run.batch, "chunk")} each`,
    ],
    [
      "Chunks valued",
      whole(run.used),
      `of ${whole(run.chunks)} (${used}), ${plural(run.width, "token")} each`,
    ],
    ["Tokens trained on", large(run.visits * run.width), `${run.tokenizer} tokens`],
    ["Data set", run.data, `${plural(R.domains.length, "domain")} met`],
    ["Model", `${plural(run.n_layer, "layer")}, ${run.n_embd} wide`, plural(run.n_head, "head")],
    [
      "Training",
      run.optimizer,
      `learning rate ${run.learning_rate}, warm-up ${whole(run.warmup_iters)}, clip ${clip}`,
    ],
    ["Rule of the values", run.rule, run.rule_is],
    [
      "Targets",
      String(R.targets.length),
      R.hindsight
        ? "all chunks of each speak for it"
        : `${plural(run.target_batch, "chunk")} ${speak} for each in a step`,
    ],
  ];
  for (const [title, value, note] of facts) {
    const detail = make("dd", {}, name(value), make("small", {}, note));
    $("facts").append(make("div", {}, make("dt", {}, title), detail));
  }
}

const SMOOTHED =
  " Smoothed: as share, by the mean of the target's gradient over the steps. It is a score for " +
  "choosing data, not the chunk's value: the books are not of it.";

function writeNotes() {
  const run = R.run;
  $("chunk-note").textContent =
    "The chunks with the highest and lowest share and value for each target, and a few of each " +
    `domain: ${whole(R.chunks.length)} of ${whole(run.used)}. Share: the chunk's value over the ` +
    "mean size of the values in its step, as a mean over its visits. Steps differ in how far " +
    "they move the loss, so the list is sorted by share." +
    (R.smoothed ? SMOOTHED : "");
  const steps = `steps ${whole(run.first)} to ${whole(run.step)}`;
  $("foot").append(
    `Values of ${plural(run.visits, "visit")}, ${steps}; data ${run.hash}. ` +
      "This page holds everything it shows and loads nothing.",
  );
}

// --- settings -------------------------------------------------------------------

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  if (chosen) return chosen === "dark";
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

// The button says what a press would do.
function nameTheme() {
  $("theme").textContent = isDark() ? "Light" : "Dark";
}

function select(id, list, ...first) {
  const options = list.map((text, i) => make("option", { value: i }, text));
  $(id).append(...first, ...options);
}

const cards = R.trust.map(trustCard);
// what depends on the width of the window
const charts = [drawDomains, drawTime, drawLosses, drawAdjoint, drawValues];
charts.push(...cards.map(({ paint }) => paint));

function drawAll() {
  for (const node of document.querySelectorAll(".target")) {
    node.replaceChildren(name(R.targets[state.target]));
  }
  for (const paint of [drawFindings, ...charts, drawHeat, drawChunks]) paint();
}

function listen(id, event, action) {
  $(id).addEventListener(event, action);
}

function listenToAll() {
  listen("target", "change", () => {
    state.target = Number($("target").value);
    drawAll();
  });
  listen("theme", "click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    nameTheme();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", nameTheme);
  listen("look", "change", () => {
    state.look = Number($("look").value);
    drawValues();
  });
  listen("time-mode", "change", drawTime);
  listen("own", "change", drawTime);
  listen("filters", "submit", (event) => event.preventDefault());
  listen("filters", "input", () => {
    shown = PAGE;
    drawChunks();
  });
  listen("more", "click", () => {
    shown += PAGE;
    drawChunks();
  });
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return; // a phone's address bar changes the height alone
    width = innerWidth;
    for (const paint of charts) paint();
  });
}

select("target", R.targets);
select("look", R.domains, make("option", { value: -1 }, "all"));
select("domain", R.domains, make("option", { value: -1 }, "all"));
$("trust").append(...cards.map(({ card }) => card));
writeLead();
writeWarnings();
writeKind();
writeFacts();
writeNotes();
writeLosses();
nameTheme();
listenToAll();
drawAll();
