// Charts: lines over a common axis, with values under the pointer or by the arrow keys, and bars. Drawn to the size they
// are shown at; kinds of lines differ in pattern as well as in colour.

import { button, clear, drawing, element, visible } from "./dom.js";
import { extent, nearest, scale, short, thinned, ticks } from "./chart_scale.js";

document.head.append(element("link", { rel: "stylesheet", href: new URL("chart.css", import.meta.url).href }));

const MARGIN = { left: 54, right: 14, top: 20, bottom: 34 };
// Units and the names of marks stand above the plot, where no line crosses them.
const ABOVE = 12;
const PATTERNS = ["", "7 3", "2 3", "9 3 2 3", "12 4", "4 2 1 2", "1 4", "14 3 3 3"];
const LETTER = 6.6;

/**
 * A chart of lines, an element with `update(series, options)`.
 *
 * `series`: `{name, points: [[x, y], …] in order of x, colour: 0 to 7, kind: "line" | "faint" | "dotted", legend}`; faint
 * ones (raw values behind smoothed ones) stand in no legend. Numbers that are none leave a gap.
 * `options`: `title`; `x` and `y`: `{label, format, log, low, high}`; `marks`: `[{x, label, kind: "epoch" | "drop" |
 * "warning" | "best"}]`, lines across; `height`; `empty`, said where there is nothing to draw; `onpick(x)` is told of a click,
 * and of Enter after the arrow keys.
 */
export function lines(series, options = {}) {
  const chart = new Lines();
  chart.update(series, options);
  return chart.figure;
}

class Lines {
  #series = [];
  #options = {};
  #hidden = new Set();
  #at = null;
  #width = 0;
  #drawn = null;
  #waiting = false;

  constructor() {
    this.title = element("figcaption");
    this.plot = element("div", { class: "chart-plot", tabindex: 0, role: "img" });
    this.legend = element("div", { class: "chart-legend", role: "group", "aria-label": "Lines shown" });
    this.readout = element("div", { class: "chart-readout", "aria-live": "polite" });
    this.figure = element("figure", { class: "chart" }, this.title, this.plot, this.readout, this.legend);
    this.figure.update = (series, options) => this.update(series, options);
    this.plot.addEventListener("pointermove", (event) => this.#point(event));
    this.plot.addEventListener("pointerleave", () => this.#show(null));
    this.plot.addEventListener("blur", () => this.#show(null));
    this.plot.addEventListener("keydown", (event) => this.#key(event));
    this.plot.addEventListener("click", (event) => (this.#point(event), this.#pick()));
    new ResizeObserver(() => {
      if (this.plot.clientWidth === this.#width) return;
      this.#width = this.plot.clientWidth;
      this.#later();
    }).observe(this.plot);
  }

  update(series, options = this.#options) {
    this.#series = series.map((each, index) => ({ colour: index, kind: "line", legend: each.kind !== "faint", ...each }));
    this.#options = options;
    this.title.textContent = options.title ?? "";
    this.title.hidden = !options.title;
    this.#list();
    this.#later();
  }

  get #shown() {
    return this.#series.filter((each) => !this.#hidden.has(each.group ?? each.name) && each.points.length);
  }

  #later() {
    if (this.#waiting) return;
    this.#waiting = true;
    requestAnimationFrame(() => {
      this.#waiting = false;
      this.#draw();
    });
  }

  /** The legend: a button for each line that hides and shows it, and what is raw behind it. */
  #list() {
    const named = this.#series.filter((each) => each.legend);
    this.legend.hidden = named.length < 2;
    const seen = named.map((each) => [each.name, each.colour, each.kind].join()).join("\n");
    if (this.legend.dataset.seen === seen) return;
    this.legend.dataset.seen = seen;
    const entry = (each) => {
      const key = each.group ?? each.name;
      const made = button("", () => {
        if (this.#hidden.has(key)) this.#hidden.delete(key);
        else this.#hidden.add(key);
        made.setAttribute("aria-pressed", String(!this.#hidden.has(key)));
        this.#later();
      }, { "aria-pressed": String(!this.#hidden.has(key)) });
      const sample = drawing("svg", { class: "chart-sample", viewBox: "0 0 26 8", "aria-hidden": "true" },
        drawing("path", { d: "M0 4H26", ...stroke(each) }));
      made.append(sample, visible(each.name));
      return made;
    };
    clear(this.legend).append(...named.map(entry));
  }

  #draw() {
    const { x = {}, y = {}, marks = [], height = 240, empty = "nothing to show yet" } = this.#options;
    const width = this.#width;
    if (!width) return;
    clear(this.plot);
    const range = (values, { low, high, log }) => {
      const found = extent(log ? values.filter((value) => value > 0) : values);
      return found && padded([low ?? found[0], high ?? found[1]], log, low !== undefined);
    };
    const points = this.#shown.flatMap((each) => each.points);
    const across = extent(points.map((point) => point[0]));
    const up = range(points.map((point) => point[1]), y);
    this.#drawn = null;
    this.plot.setAttribute("role", this.#options.onpick ? "group" : "img");
    this.plot.setAttribute("aria-label", this.#summary());
    if (!across || !up) {
      this.plot.append(element("p", { class: "chart-empty" }, empty));
      return;
    }
    const [first, last] = [x.low ?? across[0], x.high ?? across[1]];
    // A single point stands in the middle.
    const ends = last > first ? [first, last] : [first - 0.5, first + 0.5];
    const places = {
      x: scale(ends, [MARGIN.left, width - MARGIN.right], x.log),
      y: scale(up, [height - MARGIN.bottom, MARGIN.top], y.log),
    };
    const svg = drawing("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" });
    svg.append(this.#axes(places, up, ends, width, height));
    svg.append(this.#marks(places, marks, ends, height));
    const order = { faint: 0, line: 1, dotted: 1 };
    for (const each of [...this.#shown].sort((one, other) => order[one.kind] - order[other.kind])) {
      svg.append(drawing("path", { d: path(thinned(each.points, width), places, y.log), fill: "none", ...stroke(each) }));
      if (each.kind === "dotted" && each.points.length <= 60) {
        for (const [at, value] of each.points) {
          if (!Number.isFinite(value) || (y.log && value <= 0)) continue;
          const dot = { cx: places.x.place(at), cy: places.y.place(value), r: 2.6, class: `chart-fill-${each.colour % 8}` };
          svg.append(drawing("circle", dot));
        }
      }
    }
    const cursor = drawing("path", { class: "chart-cursor", d: "" });
    svg.append(cursor);
    this.plot.append(svg);
    this.#drawn = { places, cursor, height, across };
    if (this.#at !== null) this.#show(this.#at);
  }

  #axes(places, up, ends, width, height) {
    const { x = {}, y = {} } = this.#options;
    const group = drawing("g", { class: "chart-axes" });
    for (const tick of ticks(...up, Math.max(3, Math.round(height / 55)), y.log)) {
      const at = places.y.place(tick);
      group.append(drawing("path", { d: `M${MARGIN.left} ${at}H${width - MARGIN.right}` }));
      group.append(drawing("text", { x: MARGIN.left - 7, y: at + 4, "text-anchor": "end" }, (y.format ?? short)(tick)));
    }
    for (const tick of ticks(...ends, Math.max(2, Math.round(width / 110)), x.log)) {
      const at = places.x.place(tick);
      group.append(drawing("path", { d: `M${at} ${height - MARGIN.bottom}v5` }));
      const near = at > width - 40 ? "end" : at < MARGIN.left + 12 ? "start" : "middle";
      group.append(drawing("text", { x: at, y: height - MARGIN.bottom + 17, "text-anchor": near }, (x.format ?? short)(tick)));
    }
    if (x.label) {
      const place = { x: width - MARGIN.right, y: height - 3, "text-anchor": "end", class: "chart-unit" };
      group.append(drawing("text", place, x.label));
    }
    if (y.label) group.append(drawing("text", { x: 4, y: ABOVE, class: "chart-unit" }, y.label));
    return group;
  }

  /** Lines across the chart; of labels that would cover one another the less important ones are left out. */
  #marks(places, marks, ends, height) {
    const group = drawing("g");
    const inside = marks.filter((mark) => mark.x >= ends[0] && mark.x <= ends[1]);
    const crowded = inside.filter((mark) => mark.kind === "epoch").length > 40;
    const taken = [[0, this.#options.y?.label ? LETTER * (this.#options.y.label.length + 2) : 0]];
    const importance = { best: 1, epoch: 2 };
    for (const mark of inside.sort((one, other) => (importance[one.kind] ?? 0) - (importance[other.kind] ?? 0) || one.x - other.x)) {
      if (crowded && mark.kind === "epoch") continue;
      const at = places.x.place(mark.x);
      group.append(drawing("path", { class: `chart-mark ${mark.kind}`, d: `M${at} ${MARGIN.top}V${height - MARGIN.bottom}` }));
      const label = mark.label ?? "";
      const long = LETTER * label.length;
      const from = Math.min(at - 2, this.#width - long);
      if (!label || taken.some(([start, end]) => from < end && from + long > start)) continue;
      taken.push([from - LETTER, from + long + LETTER]);
      group.append(drawing("text", { class: `chart-mark-label ${mark.kind}`, x: from, y: ABOVE }, label));
    }
    return group;
  }

  #summary() {
    const { title = "Chart", x = {} } = this.#options;
    const told = this.#shown.filter((each) => each.legend).map((each) => {
      const [first, last] = [each.points[0], each.points.at(-1)];
      return `${visible(each.name)} from ${short(first[1])} to ${short(last[1])} at ${short(last[0])}`;
    });
    const facts = told.length ? told.join("; ") : "nothing yet";
    return `${title}${x.label ? ` by ${x.label}` : ""}: ${facts}. Left and right arrow keys tell values${this.#options.onpick ? ", Enter goes there" : ""}.`;
  }

  #pick() {
    if (this.#at !== null) this.#options.onpick?.(this.#at);
  }

  #point(event) {
    if (!this.#drawn) return;
    const at = event.clientX - this.plot.getBoundingClientRect().left;
    this.#show(this.#drawn.places.x.value(at), { quiet: true });
  }

  #key(event) {
    const longest = this.#shown.reduce((most, each) => (each.points.length > (most?.length ?? 0) ? each.points : most), null);
    if (event.key === "Enter") return this.#pick();
    const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
    if (!longest || (!step && !["Home", "End", "Escape"].includes(event.key))) return;
    event.preventDefault();
    if (event.key === "Escape") return this.#show(null);
    // Of points at one place, as where a stretch ends and the next begins, a key must not stay at the first for ever.
    const columns = thinned(longest, 200).filter(([x], index, all) => index === 0 || x > all[index - 1][0]);
    const now = this.#at === null ? (step < 0 ? columns.length : -1) : nearest(columns, this.#at);
    const next = event.key === "Home" ? 0 : event.key === "End" ? columns.length - 1 : now + step;
    this.#show(columns[Math.min(columns.length - 1, Math.max(0, next))][0]);
  }

  /** Tell the values at x (null: none) below the chart. */
  #show(x, { quiet = false } = {}) {
    this.#at = x;
    if (!this.#drawn) return;
    this.readout.setAttribute("aria-live", quiet ? "off" : "polite");
    const { places, cursor, height, across } = this.#drawn;
    clear(this.readout);
    cursor.setAttribute("d", "");
    if (x === null) return;
    const { x: axis = {}, y = {} } = this.#options;
    const told = this.#shown.map((each) => ({ each, point: each.points[nearest(each.points, x)] }));
    const main = told.reduce((best, one) => (!best || Math.abs(one.point[0] - x) < Math.abs(best.point[0] - x) ? one : best), null);
    if (!main || x < across[0] - (across[1] - across[0]) || x > across[1] + (across[1] - across[0])) return;
    const at = places.x.place(main.point[0]);
    cursor.setAttribute("d", `M${at} ${MARGIN.top}V${height - MARGIN.bottom}`);
    this.readout.append(element("b", {}, `${axis.label ?? "x"} ${(axis.format ?? short)(main.point[0])}`));
    for (const { each, point } of told) {
      const value = element("span", { class: `chart-text-${each.colour % 8}` }, (y.format ?? short)(point[1]));
      this.readout.append(" · ", visible(each.kind === "faint" ? `${each.name} (raw)` : each.name), " ", value);
    }
  }
}

function stroke(each) {
  const dashes = each.kind === "dotted" ? "2 3" : each.kind === "line" ? PATTERNS[(each.pattern ?? 0) % PATTERNS.length] : "";
  return { class: ["chart-line", each.kind, `chart-stroke-${each.colour % 8}`].join(" "), "stroke-dasharray": dashes || null };
}

function padded([low, high], log, fixed) {
  if (fixed && !log) return [low, high > low ? high + (high - low) * 0.06 : low + 1];
  if (low === high) return log ? [low / 1.1, high * 1.1] : [low - (Math.abs(low) || 1) * 0.05, high + (Math.abs(high) || 1) * 0.05];
  if (log) return [low / (high / low) ** 0.04, high * (high / low) ** 0.04];
  const room = (high - low) * 0.06;
  return [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
}

function path(points, places, log) {
  let [text, pen] = ["", "M"];
  for (const [x, y] of points) {
    if (!Number.isFinite(y) || (log && y <= 0)) {
      pen = "M";
      continue;
    }
    text += `${pen}${places.x.place(x).toFixed(1)} ${places.y.place(y).toFixed(1)}`;
    pen = "L";
  }
  return text;
}

/**
 * A chart of bars, an element with `update(rows, options)`: a list, a row for each bar.
 *
 * `rows`: `{label, value, text, low, high, colour, note}`; `text` is the value in words, `low` to `high` an interval of it.
 * `options`: `title`; `high`, what a whole bar stands for; `mark`, a value with a line across; `log` for values above 0,
 * from `least` on; `format`.
 */
export function bars(rows, options = {}) {
  const title = element("figcaption");
  const list = element("ul", { class: "chart-bars" });
  const figure = element("figure", { class: "chart" }, title, list);
  figure.update = (given, { title: words = "", high, mark = null, log = false, least = 1e-4, format = short } = options) => {
    title.textContent = words;
    title.hidden = !words;
    const values = given.flatMap((row) => [row.value, row.high]);
    const most = high ?? extent(values)?.[1] ?? 1;
    const places = scale(log ? [least, Math.max(most, least * 10)] : [0, most || 1], [0, 100], log);
    const place = (value) => `${Math.min(100, Math.max(0, places.place(log ? Math.max(value, least) : value))).toFixed(2)}%`;
    const bar = (row, index) => {
      const track = element("span", { class: "chart-track", "aria-hidden": "true" });
      const full = element("span", { class: `chart-bar chart-bar-${(row.colour ?? index) % 8}` });
      full.style.width = place(row.value);
      track.append(full);
      if (Number.isFinite(row.low) && Number.isFinite(row.high)) {
        const interval = element("span", { class: "chart-interval" });
        interval.style.left = place(row.low);
        interval.style.right = `calc(100% - ${place(row.high)})`;
        track.append(interval);
      }
      if (mark !== null) {
        const line = element("span", { class: "chart-bar-mark" });
        line.style.left = place(mark);
        track.append(line);
      }
      const told = row.text ?? format(row.value);
      return element("li", { title: row.note ?? null },
        element("span", { class: "chart-bar-label" }, visible(row.label)), track, element("span", { class: "chart-bar-text" }, told));
    };
    clear(list).append(...given.map(bar));
  };
  figure.update(rows, options);
  return figure;
}
