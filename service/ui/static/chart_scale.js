// What charts compute: scales and their ticks, points thinned to what a screen can show, smoothed values. No elements.

/** From values to places: `place(value)`, and back by `value(place)`. Logarithmic where `log`, for values above 0. */
export function scale([low, high], [from, to], log = false) {
  const make = log ? Math.log : Number;
  const back = log ? Math.exp : Number;
  const start = make(low);
  const width = make(high) - start || 1;
  return {
    place: (value) => from + ((make(value) - start) / width) * (to - from),
    value: (place) => back(start + ((place - from) / (to - from)) * width),
  };
}

/** Round numbers from `low` to `high`, about `count` of them; with `log` powers of ten and, where these are few, parts. */
export function ticks(low, high, count, log = false) {
  if (!(high > low)) return Number.isFinite(low) ? [low] : [];
  if (log) {
    const decades = Math.log10(high / low);
    const factors = decades > count / 2 ? [1] : decades > 1 ? [1, 2, 5] : [1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9];
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
      for (const factor of factors) {
        const tick = Number((factor * 10 ** power).toPrecision(12));
        if (tick >= low && tick <= high) found.push(tick);
      }
    }
    if (found.length >= 2) return every(found, Math.ceil(found.length / (count + 2)));
  }
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((each) => each >= rough * 0.999);
  const found = [];
  for (let number = Math.ceil(low / step - 1e-9); number * step <= high + step * 1e-9; number++) {
    found.push(Number((number * step).toPrecision(12)));
  }
  return found;
}

function every(list, step) {
  return list.filter((_, index) => index % Math.max(1, step) === 0);
}

/** Least and greatest of some numbers, those that are none left out; null where there are none. */
export function extent(values) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (!Number.isFinite(value)) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low > high ? null : [low, high];
}

/**
 * Of points `[x, y]` in order of x: at most the least and the greatest of each column, so that no peak is lost; of values
 * that are not numbers, which leave a gap, the first of each gap.
 */
export function thinned(points, columns) {
  if (points.length <= 2 * columns) return points;
  const [first, last] = [points[0][0], points.at(-1)[0]];
  const width = (last - first) / columns || 1;
  const found = [];
  let [column, least, most] = [0, null, null];
  const finish = () => {
    if (least === null) return;
    found.push(...(least === most ? [least] : least[0] <= most[0] ? [least, most] : [most, least]));
    least = most = null;
  };
  for (const point of points) {
    const own = Math.min(columns - 1, Math.floor((point[0] - first) / width));
    const gap = !Number.isFinite(point[1]);
    if (own !== column || gap) finish();
    column = own;
    if (gap) {
      if (!found.length || Number.isFinite(found.at(-1)[1])) found.push(point);
      continue;
    }
    if (least === null || point[1] < least[1]) least = point;
    if (most === null || point[1] > most[1]) most = point;
  }
  finish();
  return found;
}

/**
 * The exponential moving average of points, which forgets the more the lower `weight` (0 to below 1) is. The first
 * values count for what they are, as in TensorBoard.
 */
export function smoothed(points, weight) {
  if (!(weight > 0)) return points;
  const found = [];
  let [mean, known] = [0, 1];
  for (const [x, y] of points) {
    if (!Number.isFinite(y)) continue;
    mean = weight * mean + (1 - weight) * y;
    known *= weight;
    found.push([x, mean / (1 - known)]);
  }
  return found;
}

/**
 * The index of the point nearest to x among points in order of x; -1 where there are none. Of several at one place it is
 * the last: a stretch that begins where another ends has that place.
 */
export function nearest(points, x) {
  let [low, high] = [0, points.length - 1];
  if (high < 0) return -1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] <= x) low = middle;
    else high = middle;
  }
  return Math.abs(points[low][0] - x) < Math.abs(points[high][0] - x) ? low : high;
}

/** A number in few signs: 12,345, 0.0312, 1.2e-7, 3.4M. */
export function short(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "none";
  const size = Math.abs(value);
  if (size >= 1e6) return value.toLocaleString("en", { notation: "compact", maximumSignificantDigits: 3 });
  if (size >= 1000 || Number.isInteger(value)) return value.toLocaleString("en", { maximumFractionDigits: 0 });
  if (size >= 0.001) return String(Number(value.toPrecision(4)));
  return value.toExponential(1).replace(/\.0e/, "e");
}
