// The curves of one run or of several over one another, each chart one question. Runs differ in colour and pattern; of a
// single run, what is trained on and what is held out do.

import { lines } from "./chart.js";
import { short, smoothed } from "./chart_scale.js";
import { clear, element } from "./dom.js";

export const AXES = {
  step: { label: "step", title: "Steps" },
  epoch: { label: "epoch", title: "Epochs" },
  tokens: { label: "tokens", title: "Tokens seen" },
  hours: { label: "hours of training", title: "Time" },
};

const GIB = 2 ** 30;
const KNOWN = new Set(["step", "epoch", "tokens", "train_loss", "validation_loss"]);

/** The charts in `root`, with `update(runs, findings, view)`; a view is `{axis, smoothing, log}`. */
export function charts(root) {
  const made = new Map();
  const place = element("div", { class: "runs-charts" });
  root.append(place);

  function update(runs, findings, view) {
    const wanted = [loss, perplexity, measures, rate, norm, speed, use, copies, processor, memory, gpus, gpuMemory, power]
      .flatMap((make) => make(runs, view))
      .filter((chart) => chart.series.some((series) => series.points.length));
    const keys = wanted.map((chart) => chart.title);
    if (keys.join() !== [...made.keys()].join()) {
      for (const key of made.keys()) if (!keys.includes(key)) made.delete(key);
      for (const key of keys) if (!made.has(key)) made.set(key, lines([], {}));
      const sorted = new Map(keys.map((key) => [key, made.get(key)]));
      made.clear();
      for (const [key, chart] of sorted) made.set(key, chart);
      clear(place).append(...made.values());
    }
    const marks = marked(runs, findings, view);
    for (const chart of wanted) {
      const shown = made.get(chart.title);
      shown.classList.toggle("large", Boolean(chart.large));
      shown.update(chart.series, { title: chart.title, height: chart.large ? 320 : 200, x: chart.x ?? axis(view), y: chart.y ?? {}, marks: chart.plain ? [] : marks });
    }
  }

  return { update };
}

function axis(view) {
  return { label: AXES[view.axis].label, format: short };
}

/** Epochs, steps down at their ends, warnings and the best checkpoint: of one run, or the epochs that several share. */
function marked(runs, findings, view) {
  const found = [];
  const [first] = runs;
  const shared = runs.every((run) => run.epochSteps && Math.abs(run.epochSteps - first.epochSteps) < 1);
  if (first?.epochSteps && (runs.length === 1 || shared || view.axis === "epoch")) {
    const longest = runs.reduce((most, run) => (run.lastStep > most.lastStep ? run : most), first);
    const drops = new Set(findings.filter((each) => each.kind === "drop").map((each) => each.step));
    for (let epoch = 1; epoch * longest.epochSteps <= longest.lastStep && epoch <= 500; epoch++) {
      const step = epoch * longest.epochSteps;
      if (!drops.has(Math.round(step))) found.push({ x: longest.at(step, view.axis), label: `epoch ${epoch}`, kind: "epoch" });
    }
  }
  if (runs.length === 1) {
    for (const each of findings) {
      const label = each.kind === "drop" && Number.isFinite(each.size) ? `memorised −${each.size.toFixed(2)}` : each.title.toLowerCase();
      found.push({ x: first.at(each.step, view.axis), label, kind: each.kind });
    }
    const best = first.details?.best_step;
    if (best) found.push({ x: first.at(best, view.axis), label: "best", kind: "best" });
  }
  return found;
}

function of(runs, own, make) {
  return runs.flatMap((run, index) => make(run, runs.length > 1 ? { name: run.name, colour: index, pattern: index } : { name: own, colour: 0 }));
}

function loss(runs, view) {
  const several = runs.length > 1;
  const series = runs.flatMap((run, index) => {
    const raw = run.points(run.updates, (record) => record.loss, view.axis);
    const held = run.points(run.evaluations, (record) => record.validation_loss, view.axis);
    const trained = run.points(run.evaluations, (record) => record.train_loss, view.axis);
    const own = several ? { colour: index, pattern: index } : { colour: 0 };
    const name = several ? run.name : "training, smoothed";
    const found = view.smoothing > 0
      ? [{ ...own, name: several ? run.name : "training", group: name, points: raw, kind: "faint" },
         { ...own, name, points: smoothed(raw, view.smoothing) }]
      : [{ ...own, name: several ? run.name : "training", points: raw }];
    // What training data an evaluation read is worth a line of its own only where there is one run.
    if (!several && trained.length > 1) found.push({ name: "training, evaluated", colour: 2, points: trained, kind: "line", pattern: 1 });
    found.push({ ...own, colour: several ? index : 1, name: several ? `${run.name}, validation` : "validation", points: held, kind: "dotted" });
    return found;
  });
  return { title: "Loss", large: true, series, y: { label: "nats per token", log: view.log } };
}

function perplexity(runs, view) {
  // Only where the loss is one of tokens: preferences are ranked, not predicted.
  const plain = runs.filter((run) => run.evaluations.some((record) => Number.isFinite(record.validation_loss) || Number.isFinite(record.train_loss)) && !run.evaluations.some((record) => "validation_margin" in record));
  const series = plain.flatMap((run, index) => {
    const held = run.points(run.evaluations, (record) => Math.exp(record.validation_loss ?? NaN), view.axis);
    const trained = run.points(run.evaluations, (record) => Math.exp(record.train_loss ?? NaN), view.axis);
    if (runs.length > 1) return [{ name: run.name, colour: runs.indexOf(run), pattern: index, points: held.length ? held : trained }];
    return [{ name: "training", colour: 2, pattern: 1, points: trained }, { name: "validation", colour: 1, points: held, kind: "dotted" }];
  });
  return { title: "Perplexity", series, y: { label: "e to the loss", log: true } };
}

/** Whatever else evaluations measured: accuracies and margins of preferences, say. */
function measures(runs, view) {
  const names = new Set(runs.flatMap((run) => run.evaluations.flatMap((record) => Object.keys(record))).filter((name) => !KNOWN.has(name)));
  return [...names].map((name) => ({
    title: name.replaceAll("_", " ").replace(/^./, (letter) => letter.toUpperCase()),
    series: of(runs, name.replaceAll("_", " "), (run, about) => ({ ...about, points: run.points(run.evaluations, (record) => record[name], view.axis) })),
  }));
}

function rate(runs, view) {
  return { title: "Learning rate", series: of(runs, "learning rate", (run, about) => ({ ...about, points: run.points(run.updates, (record) => record.learning_rate, view.axis) })) };
}

function norm(runs, view) {
  return {
    title: "Gradient norm",
    series: of(runs, "gradient norm", (run, about) => {
      const raw = run.points(run.updates, (record) => record.gradient_norm, view.axis);
      return [{ ...about, points: raw, kind: "faint", group: about.name }, { ...about, points: smoothed(raw, view.smoothing) }];
    }),
    y: { log: view.log },
  };
}

function speed(runs, view) {
  return { title: "Speed", series: of(runs, "tokens/s", (run, about) => ({ ...about, points: run.points(run.timings, (record) => record.tokens_per_s, view.axis) })), y: { label: "tokens per second since the start", low: 0 } };
}

function use(runs, view) {
  return {
    title: "Part of the machine's peak (MFU)",
    series: of(runs, "MFU", (run, about) => ({ ...about, points: run.points(run.timings, (record) => 100 * (record.model_flops_utilisation ?? NaN), view.axis) })),
    y: { label: "percent", low: 0 },
  };
}

function copies(runs, view) {
  const series = of(runs, "from the training text", (run, about) => ({ ...about, points: run.points(run.copies, (record) => record.copied_from_training, view.axis) }));
  if (runs.length === 1) series.push({ name: "from the validation text", colour: 1, kind: "dotted", points: runs[0].points(runs[0].copies, (record) => record.copied_from_validation, view.axis) });
  return { title: "Longest copy in the samples", series, y: { label: "tokens", low: 0 } };
}

/** Records of the machine by the time since the first of them: it is looked at by the clock, not by steps. */
function byClock(run, value, { seconds }) {
  const start = run.system[0]?.time;
  return run.system.map((record) => [(record.time - start) / seconds, value(record)]).filter(([, each]) => Number.isFinite(each));
}

/** In what the longest of the runs is told: seconds, minutes or hours. */
function clock(runs) {
  const longest = Math.max(0, ...runs.map((run) => (run.system.at(-1)?.time ?? 0) - (run.system[0]?.time ?? 0)));
  const [seconds, unit] = longest < 180 ? [1, "seconds"] : longest < 3 * 3600 ? [60, "minutes"] : [3600, "hours"];
  return { seconds, x: { label: `${unit} since the run began`, format: short } };
}

function processor(runs) {
  const unit = clock(runs);
  const series = of(runs, "whole machine", (run, about) => ({ ...about, points: byClock(run, (record) => record.cpu_percent, unit) }));
  if (runs.length === 1) series.push({ name: "this run (100 is one core)", colour: 1, pattern: 1, points: byClock(runs[0], (record) => record.process_cpu_percent, unit) });
  return { title: "Processor", series, x: unit.x, plain: true, y: { label: "percent", low: 0 } };
}

function memory(runs) {
  const unit = clock(runs);
  const series = of(runs, "this run", (run, about) => ({ ...about, points: byClock(run, (record) => (record.process_memory ?? NaN) / GIB, unit) }));
  if (runs.length === 1) series.push({ name: "free on the machine", colour: 1, pattern: 1, points: byClock(runs[0], (record) => (record.memory_available ?? NaN) / GIB, unit) });
  return { title: "Memory", series, x: unit.x, plain: true, y: { label: "GiB", low: 0 } };
}

function eachGpu(runs, title, label, value) {
  const unit = clock(runs);
  const series = runs.flatMap((run, index) => {
    const count = Math.max(0, ...run.system.map((record) => record.gpus?.length ?? 0));
    return Array.from({ length: count }, (_, gpu) => ({
      name: `${runs.length > 1 ? `${run.name}, ` : ""}${count > 1 ? `${gpu}: ` : ""}${run.system.find((record) => record.gpus?.[gpu])?.gpus[gpu].name ?? "GPU"}`,
      colour: runs.length > 1 ? index : gpu, pattern: gpu, points: byClock(run, (record) => value(record.gpus?.[gpu] ?? {}), unit),
    }));
  });
  return { title, series, x: unit.x, plain: true, y: { label, low: 0 } };
}

const gpus = (runs) => eachGpu(runs, "GPU", "percent", (gpu) => gpu.use_percent);
const gpuMemory = (runs) => eachGpu(runs, "GPU memory", "GiB", (gpu) => (gpu.memory_used ?? NaN) / GIB);
const power = (runs) => eachGpu(runs, "GPU power", "watts", (gpu) => gpu.power_watts);
