// The dashboard's page: shows what /api/events tells. Names and reasons come from hospitals, so they
// only ever become text (textContent), never markup.

const SILENT_SECONDS = 15; // the server says at least every 5 s that it is there
const RETRY_SECONDS = 3;
const COLOURS = 6;
const DASHES = [[], [7, 4], [2, 3], [10, 3, 2, 3]]; // with the colours: 24 sites before two look alike
const CHART_HEIGHT = 230;
const WORDS = ["site", "state", "why"]; // columns
const REGIONS = ["WT", "TC", "ET"];

let recorded = null;
let live = null;
let heard = Date.now(); // when the server last said something
let lost = false;
let source = null;
const hidden = new Set();
const charts = [];
const byId = (id) => document.getElementById(id);

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children.map((child) => (typeof child === "object" ? child : String(child))));
  return made;
}

const number = (value, digits = 3) =>
  value === null || value === undefined ? "–" : value.toFixed(digits);

function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 120) return `${value.toFixed(value < 10 ? 1 : 0)} s`;
  return value < 7200 ? `${Math.round(value / 60)} min` : `${(value / 3600).toFixed(1)} h`;
}

function size(bytes) {
  return bytes ? `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB` : "–";
}

// in the browser's time zone, as every time on this page
const when = (stamp) => (stamp ? new Date(stamp).toLocaleString() : "–");

const last = (list) => (list && list.length ? list[list.length - 1] : null);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function siteNames() {
  return [...new Set([...Object.keys(recorded?.sites ?? {}), ...Object.keys(live?.sites ?? {})])].sort();
}

const styleOf = (index) => ({
  colour: `--c${index % COLOURS}`,
  dash: DASHES[Math.floor(index / COLOURS) % DASHES.length],
});

// ---- words and tables

function showHeader() {
  const done = last(recorded?.rounds) ?? 0;
  const planned = recorded?.rounds_planned;
  const rounds = planned ? `round ${done} of ${planned}` : `round ${done}`;
  const name = recorded?.name || "fedbrats";
  const state = live?.state ?? "…";
  byId("name").textContent = name;
  byId("progress-text").textContent = `${rounds}${recorded?.aggregation ? `, ${recorded.aggregation}` : ""}`;
  byId("progress").max = planned || Math.max(done, 1);
  byId("progress").value = recorded?.complete ? byId("progress").max : done;
  const badge = byId("state");
  badge.textContent = state;
  const bad = ["failed", "gone", "unknown"].includes(state);
  const idle = ["stopped", "not running", "waiting for sites"].includes(state);
  badge.className = `badge ${bad ? "error" : idle ? "warning" : "good"}`;
  document.title = `${rounds} (${state}) – ${name}`;
}

function showAlerts() {
  const alerts = live?.alerts ?? [];
  const items = alerts.map((alert) =>
    element("li", { class: alert.level }, element("b", {}, alert.level), alert.text),
  );
  if (!items.length) {
    const text = recorded?.problem && !recorded.rounds.length ? recorded.problem : "None.";
    items.push(element("li", { class: "none" }, text));
  }
  replaceIfOther(byId("alert-list"), items); // else a screen reader would read the same again
  byId("alerts-title").textContent = alerts.length ? `Alerts (${alerts.length})` : "Alerts";
}

function replaceIfOther(parent, children) {
  const next = element("div", {}, ...children);
  if (next.innerHTML !== parent.innerHTML) parent.replaceChildren(...next.childNodes);
}

function showFigures() {
  const done = recorded.rounds.length;
  const times = recorded.seconds.slice(-10).filter((value) => value !== null).sort((a, b) => a - b);
  const usual = times.length ? times[Math.floor(times.length / 2)] : null;
  const left = recorded.rounds_planned ? recorded.rounds_planned - done : null;
  const figures = [
    ["Mean Dice", number(last(recorded.mean_dice)), change(recorded.mean_dice)],
    ["Worst site", number(last(recorded.worst_dice)), last(recorded.worst_site) ?? ""],
    ["Validation loss", number(last(recorded.loss)), change(recorded.loss)],
    ["Learning rate", last(recorded.learning_rate) ?? "–", ""],
    ["Round took", seconds(last(recorded.seconds)), usual === null ? "" : `usually ${seconds(usual)}`],
    ["Time left", !recorded.complete && left > 0 && usual !== null ? seconds(left * usual) : "–",
      recorded.complete ? "complete" : "at the usual pace"],
  ];
  byId("figures").replaceChildren(
    ...figures.map(([title, value, remark]) =>
      element("div", {}, element("dt", {}, title),
        element("dd", {}, value, " ", element("small", {}, remark)))),
  );
}

function change(values) {
  const [before, now] = values.slice(-2);
  if (values.length < 2 || before === null || now === null) return "";
  return `${now >= before ? "+" : "−"}${Math.abs(now - before).toFixed(3)}`;
}

function swatch(index) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  svg.setAttribute("aria-hidden", "true");
  svg.setAttribute("class", "line");
  const { colour: name, dash } = styleOf(index);
  const given = { x1: 0, y1: 5, x2: 28, y2: 5, stroke: colour(name), "stroke-width": 3 };
  for (const [key, value] of Object.entries(given)) line.setAttribute(key, value);
  if (dash.length) line.setAttribute("stroke-dasharray", dash.join(" "));
  svg.append(line);
  return svg;
}

function heads(...titles) {
  return element("tr", {}, ...titles.map((text) =>
    element("th", { scope: "col", class: WORDS.includes(text) ? "words" : null }, text)));
}

function showLegend() {
  const legend = byId("legend");
  const names = siteNames();
  const buttons = [...legend.querySelectorAll("button.site")];
  if (names.join("\n") !== buttons.map((button) => button.dataset.site).join("\n")) {
    buttons.forEach((button) => button.remove());
    legend.append(...names.map((site, index) => {
      const button = element("button", { type: "button", class: "site", title: site },
        swatch(index), element("span", {}, site));
      button.dataset.site = site;
      button.addEventListener("click", () => toggle(site));
      return button;
    }));
  }
  for (const button of legend.querySelectorAll("button.site")) {
    button.setAttribute("aria-pressed", String(!hidden.has(button.dataset.site)));
  }
}

function showSites() {
  showLegend();
  const anyEpsilon = Object.values(recorded.sites).some((site) => site.epsilon_spent !== null);
  const headings = ["site", "state", "Dice", ...REGIONS, "IoU", "loss", "time", "sent",
    ...(anyEpsilon ? ["ε of budget"] : []), "trains on", "held out", "rounds", "last contact"];
  const table = byId("site-table");
  table.tHead.replaceChildren(heads(...headings));
  table.tBodies[0].replaceChildren(...siteNames().map((site, index) => {
    const about = recorded.sites[site];
    const now = live?.sites?.[site];
    const dice = (region) => number(last(about?.dice[region]));
    const cells = [
      dice("mean"), ...REGIONS.map(dice), number(last(about?.iou.mean)), number(last(about?.loss)),
      seconds(last(about?.seconds)), size(about?.bytes),
      ...(anyEpsilon ? [`${number(about?.epsilon_spent, 2)} / ${number(about?.budget, 1)}`] : []),
      about?.trains === false ? "no" : about?.n_training ?? "–", about?.n_held_out ?? "–",
      about?.contributed ?? "–", when(now?.last_contact),
    ];
    const released = about?.released ? ` (metrics ${about.released})` : "";
    return element("tr", {}, element("th", { scope: "row", title: site }, swatch(index), site),
      element("td", { class: "words" }, (now?.state ?? "–") + released),
      ...cells.map((text) => element("td", {}, text)));
  }));
}

function showFinal() {
  const final = recorded.final;
  byId("final").hidden = !final;
  if (!final) return;
  byId("final-title").textContent = `Final model (of round ${final.round}) on held-out subjects`;
  const name = (key) => {
    const [metric, region] = key.split("/");
    return `${{ dice: "Dice", iou: "IoU", hd95: "HD95 mm" }[metric]} ${region}`;
  };
  const digits = (index) => (final.keys[index].startsWith("hd95") ? 1 : 3);
  const row = (site, values, n, kind) =>
    element("tr", { class: kind }, element("th", { scope: "row" }, site),
      ...values.map((value, index) => element("td", {}, number(value, digits(index)))),
      element("td", {}, n));
  const sites = Object.entries(final.sites).sort(([a], [b]) => (a < b ? -1 : 1));
  byId("final-table").tHead.replaceChildren(heads("site", ...final.keys.map(name), "n"));
  byId("final-table").tBodies[0].replaceChildren(
    // not exact: noised, or withheld
    ...sites.map(([site, about]) =>
      row(site, about.values, [about.n || null, about.released].filter(Boolean).join(" ") || "0")),
    row("mean over sites", final.mean, sites.reduce((sum, [, about]) => sum + about.n, 0), "total"));
}

function showEvents() {
  byId("events").hidden = !recorded.events.length;
  byId("event-table").tHead.replaceChildren(heads("round", "site", "why"));
  byId("event-table").tBodies[0].replaceChildren(...recorded.events.map((event) =>
    element("tr", {}, element("th", { scope: "row" }, event.round),
      element("td", { class: "words" }, event.site), element("td", { class: "words" }, event.text))));
}

// ---- curves

class Chart {
  // curves(): what belongs to no site ([name, values], drawn in ink), and of a site its values
  constructor(title, overall, ofSite, { range, digits = 3 } = {}) {
    Object.assign(this, { title, overall, ofSite, range, digits, plot: null, shape: "" });
    this.readout = element("output", {});
    this.caption = element("span", {});
    this.box = element("div", { class: "plot", tabindex: "0", role: "img" });
    this.table = element("table", {}, element("thead"), element("tbody"));
    this.details = element("details", {}, element("summary", {}, "As a table"),
      element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table" }, this.table));
    this.details.addEventListener("toggle", () => this.showTable());
    this.figure = element("figure", {}, element("figcaption", {}, this.caption, this.readout),
      this.box, this.details);
    byId("chart-list").append(this.figure);
    this.box.addEventListener("keydown", (event) => this.step(event));
    new ResizeObserver(() => this.plot?.setSize({ width: this.width(), height: CHART_HEIGHT }))
      .observe(this.box);
  }

  width() {
    return Math.max(this.box.clientWidth, 200);
  }

  lines() {
    const made = siteNames().map((site, index) => ({
      name: site, site, values: recorded.sites[site] ? this.ofSite(recorded.sites[site]) : null,
      style: styleOf(index),
    }));
    const overall = this.overall().map(([name, values]) => ({ name, values, style: null }));
    return [...made, ...overall].filter((line) => line.values?.some((value) => value !== null));
  }

  show() {
    this.drawn = this.lines();
    this.figure.hidden = !this.drawn.length;
    if (!this.drawn.length) return;
    const title = typeof this.title === "function" ? this.title() : this.title;
    this.caption.textContent = title;
    const newest = [...this.drawn].reverse().map((line) => `${line.name} ${number(last(line.values), this.digits)}`);
    this.box.setAttribute("aria-label",
      `${title}, rounds 1 to ${last(recorded.rounds)}. Last: ${newest.slice(0, 6).join(", ")}`);
    const data = [recorded.rounds, ...this.drawn.map((line) => line.values)];
    const shape = JSON.stringify([title, this.drawn.map((line) => [line.name, line.style])]);
    if (shape !== this.shape || !this.plot) {
      this.shape = shape;
      this.plot?.destroy();
      this.plot = this.make(data);
    } else {
      this.plot.setData(data);
    }
    this.showHidden();
    this.say();
    this.showTable();
  }

  make(data) {
    const axis = (extra) => ({
      stroke: () => colour("--soft"), grid: { stroke: () => colour("--grid"), width: 1 },
      ticks: { stroke: () => colour("--grid"), width: 1 }, ...extra,
    });
    const whole = (u, splits) => splits.map((value) => (Number.isInteger(value) ? value : ""));
    return new uPlot({
      width: this.width(), height: CHART_HEIGHT, legend: { show: false },
      scales: {
        x: { time: false, range: (u, low, high) => (low === high ? [low - 0.5, high + 0.5] : [low, high]) },
        y: this.range ? { range: this.range } : {},
      },
      axes: [axis({ values: whole, label: "round", labelSize: 18, size: 32 }), axis({ size: 52 })],
      focus: { alpha: 0.25 },
      cursor: { focus: { prox: 24 }, drag: { x: false, y: false }, points: { size: 7 } },
      hooks: { setCursor: [() => this.say()], setSeries: [() => this.say()] },
      series: [{}, ...this.drawn.map(({ name, style }) => ({
        label: name, spanGaps: true, width: style ? 2 : 3,
        stroke: () => colour(style ? style.colour : "--ink"), dash: style?.dash,
        points: { show: data[0].length < 30 && (!style || this.drawn.length < 10), size: style ? 5 : 6 },
      }))],
    }, data, this.box);
  }

  showHidden() {
    this.drawn.forEach((line, index) => {
      const shown = !(line.site !== undefined && hidden.has(line.site));
      if (this.plot.series[index + 1].show !== shown) this.plot.setSeries(index + 1, { show: shown });
    });
  }

  say() {
    if (!this.plot) return;
    const index = this.plot.cursor.idx ?? recorded.rounds.length - 1;
    const focused = this.plot.series.findIndex((series, at) => at > 0 && series._focus);
    const line = focused > 0 ? this.drawn[focused - 1] : last(this.drawn); // what is over all sites
    this.readout.textContent =
      `round ${recorded.rounds[index]}: ${line.name} ${number(line.values[index], this.digits)}`;
  }

  step(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (move === undefined || !this.plot) return;
    event.preventDefault();
    const end = recorded.rounds.length - 1;
    const at = Math.min(Math.max((this.plot.cursor.idx ?? end) + move, 0), end);
    const left = this.plot.valToPos(recorded.rounds[at], "x");
    this.plot.setCursor({ left, top: 10 });
  }

  showTable() {
    if (!this.details.open) return;
    this.table.tHead.replaceChildren(heads("round", ...this.drawn.map((line) => line.name)));
    this.table.tBodies[0].replaceChildren(...recorded.rounds.map((round, index) =>
      element("tr", {}, element("th", { scope: "row" }, round),
        ...this.drawn.map((line) => element("td", {}, number(line.values[index], this.digits))))));
  }
}

function toggle(site) {
  if (!hidden.delete(site)) hidden.add(site);
  showLegend();
  charts.forEach((chart) => chart.plot && chart.showHidden());
}

function toggleAll(show) {
  hidden.clear();
  if (!show) siteNames().forEach((site) => hidden.add(site));
  showLegend();
  charts.forEach((chart) => chart.plot && chart.showHidden());
}

function makeCharts() {
  const metric = byId("metric");
  const region = byId("region");
  const what = () => `${metric.selectedOptions[0].text}, ${region.selectedOptions[0].text}`;
  const overSites = () => {
    const lists = Object.values(recorded.sites).map((site) => site[metric.value][region.value]);
    return recorded.rounds.map((_, index) => {
      const told = lists.map((list) => list[index]).filter((value) => value !== null);
      return told.length ? told.reduce((sum, value) => sum + value, 0) / told.length : null;
    });
  };
  charts.push(
    new Chart(() => `${what()}, by site`, () => [["mean over sites", overSites()]],
      (site) => site[metric.value][region.value], { range: [0, 1] }),
    new Chart(() => "Loss: validation, and training by site",
      () => [["validation", recorded.loss]], (site) => site.loss),
    new Chart(() => "ε spent, as stated by site", () => [], (site) => site.epsilon, { digits: 2 }),
    new Chart(() => "Seconds a round, and training by site",
      () => [["whole round", recorded.seconds]], (site) => site.seconds, { digits: 1 }),
  );
  for (const select of [metric, region]) select.addEventListener("change", () => charts[0].show());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    charts.forEach((chart) => chart.plot?.redraw());
    document.querySelectorAll("button.site").forEach((button) => button.remove()); // other colours
    if (recorded?.rounds) showSites();
  });
}

// ---- the connection

function show() {
  showHeader();
  showAlerts();
  if (!recorded?.rounds) return;
  showSites();
}

function showRecorded() {
  show();
  if (!recorded?.rounds) return;
  showFigures();
  showFinal();
  showEvents();
  charts.forEach((chart) => chart.show());
  const shown = charts.filter((chart) => !chart.figure.hidden);
  shown.forEach((chart, index) => // an odd one at the end takes the whole row
    chart.figure.classList.toggle("wide", index === shown.length - 1 && index % 2 === 0));
}

function heardNow() {
  heard = Date.now();
  lost = false;
  const connection = byId("connection");
  connection.textContent = "live";
  connection.className = "";
}

function silent() {
  lost = true;
  const connection = byId("connection");
  const since = `not live since ${new Date(heard).toLocaleTimeString()}`;
  // refused, and not only out of reach: each start of the program has an address of its own
  const other = source?.readyState === EventSource.CLOSED ? "; started again, it has a new address" : "";
  connection.textContent = since + other;
  connection.className = "lost";
}

function connect() {
  source?.close();
  source = new EventSource("api/events");
  source.addEventListener("recorded", (event) => {
    heardNow();
    recorded = JSON.parse(event.data);
    showRecorded();
  });
  source.addEventListener("live", (event) => {
    heardNow();
    live = JSON.parse(event.data);
    show();
  });
  source.addEventListener("alive", heardNow);
  source.addEventListener("error", silent);
}

function watch() {
  const quiet = (Date.now() - heard) / 1000 > SILENT_SECONDS; // a tunnel can die without a word
  if (quiet) silent();
  if (lost && (quiet || source.readyState === EventSource.CLOSED)) connect();
}

makeCharts();
byId("show-all").addEventListener("click", () => toggleAll(true));
byId("show-none").addEventListener("click", () => toggleAll(false));
connect();
setInterval(watch, RETRY_SECONDS * 1000);
