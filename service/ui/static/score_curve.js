// A curve along a text: bits per token of each stretch, by the place of its bytes, for one checkpoint or two.

import { scale, short, ticks } from "./chart_scale.js";
import { drawing, element } from "./dom.js";

const WIDTH = 800;
const HEIGHT = 190;
const LEFT = 38;
const BOTTOM = 24;
const TOP = 8;

function bits(segment) {
  return segment.scored_tokens ? segment.nll / Math.LN2 / segment.scored_tokens : null;
}

/**
 * `series` are `{name, segments, dashed}`. `onpick(byte)` is told of a click, and of Enter after the arrow keys have moved
 * the mark. -> an element.
 */
export function curve(series, { onpick = null, label = "Bits per token along the text" } = {}) {
  const length = Math.max(...series.map(({ segments }) => segments.at(-1)?.end_byte ?? 1), 1);
  const most = Math.max(...series.flatMap(({ segments }) => segments.map(bits)).filter((each) => each !== null), 1) * 1.05;
  const across = scale([0, length], [LEFT, WIDTH - 6]);
  const x = across.place;
  const y = scale([0, most], [HEIGHT - BOTTOM, TOP]).place;
  const picture = drawing("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "curve", role: "img", "aria-label": label });
  for (const tick of ticks(0, most, 4)) {
    picture.append(
      drawing("line", { x1: LEFT, x2: WIDTH - 6, y1: y(tick), y2: y(tick), class: "curve-grid" }),
      drawing("text", { x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end", class: "curve-words" }, short(tick)),
    );
  }
  for (const tick of ticks(0, length, 5)) {
    picture.append(drawing("text", { x: x(tick), y: HEIGHT - 6, "text-anchor": "middle", class: "curve-words" }, short(tick)));
  }
  for (const { segments, dashed } of series) {
    let path = "";
    for (const segment of segments) {
      const value = bits(segment);
      if (value === null) continue;
      path += `${path ? "L" : "M"}${x(segment.start_byte).toFixed(1)} ${y(value).toFixed(1)}L${x(segment.end_byte).toFixed(1)} ${y(value).toFixed(1)}`;
    }
    picture.append(drawing("path", { d: path, class: dashed ? "curve-line dashed" : "curve-line" }));
  }
  const mark = drawing("line", { y1: TOP, y2: HEIGHT - BOTTOM, class: "curve-mark", visibility: "hidden" });
  picture.append(mark);
  const told = element("p", { class: "note", role: "status" }, onpick ? "Bits per token, by bytes of the text. Click, or use the arrow keys and Enter, to go to a place." : "Bits per token, by bytes of the text.");
  const names = series.length > 1
    ? element("ul", { class: "token-legend" }, ...series.map(({ name, dashed }) => element("li", {}, drawing("svg", { viewBox: "0 0 30 8", width: 30, height: 8, "aria-hidden": "true" }, drawing("line", { x1: 0, x2: 30, y1: 4, y2: 4, class: dashed ? "curve-line dashed" : "curve-line" })), name)))
    : null;
  const root = element("div", { class: "curve-place", tabindex: onpick ? 0 : null, role: onpick ? "group" : null, "aria-label": onpick ? label : null }, picture);
  let at = 0;

  function point(byte) {
    at = Math.max(0, Math.min(length - 1, byte));
    mark.setAttribute("x1", x(at));
    mark.setAttribute("x2", x(at));
    mark.setAttribute("visibility", "visible");
    const words = series.map(({ name, segments }) => {
      const segment = segments.find((each) => each.end_byte > at) ?? segments.at(-1);
      const value = segment && bits(segment);
      return `${series.length > 1 ? `${name}: ` : ""}${value === null ? "not scored" : `${value.toFixed(2)} bits per token`}`;
    });
    told.textContent = `Byte ${Math.round(at).toLocaleString("en")}: ${words.join(", ")}`;
  }

  function byteOf(event) {
    const box = picture.getBoundingClientRect();
    return across.value(((event.clientX - box.left) / box.width) * WIDTH);
  }

  root.addEventListener("pointermove", (event) => point(byteOf(event)));
  if (onpick) {
    root.addEventListener("click", (event) => {
      point(byteOf(event));
      onpick(at);
    });
    root.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -length / 100, ArrowRight: length / 100, Home: -length, End: length }[event.key];
      if (event.key === "Enter") onpick(at);
      else if (step !== undefined) point(at + step);
      else return;
      event.preventDefault();
    });
  }
  return element("div", {}, root, names, told);
}
