// What stands out in a run: steps down of the loss where an epoch ends, which are memorisation; overfitting; passages
// copied from the training text; spikes. In the words and by the limits of the training code where that has some.

import { short } from "./chart_scale.js";

// As in training/run/state.py and training/monitoring/samples.py.
const OVERFITTING_EVALUATIONS = 3;
const MEMORISED = 16;
// A step down: so many standard errors, and this part of the loss, beyond what the slope before it explains.
const STANDARD_ERRORS = 3;
const PART = 0.015;
const LEAST_WINDOW = 4;
const MOST_WINDOW = 60;

/** Findings `{kind, step, title, words, x?}` of a run, by step; `drop` ones have `size`, the nats of the step down. */
export function findings(run) {
  return [...drops(run), ...spikes(run), ...gaps(run), ...overfitting(run), ...copies(run)].sort((one, other) => one.step - other.step);
}

/**
 * Where the loss steps down as an epoch begins: its texts are read for the second time, and remembered. Levels of equal
 * stretches before and after are compared, less what the slope over the two stretches before would have given.
 */
export function drops(run) {
  const recorded = run.events.filter((event) => /epoch/.test(event.event) && Number.isFinite(event.step));
  if (recorded.length) return recorded.map(recordedDrop);
  const { updates, epochSteps } = run;
  if (!epochSteps || updates.length < 3 * LEAST_WINDOW) return [];
  const apart = run.every ?? 1;
  const length = Math.min(MOST_WINDOW, Math.floor(epochSteps / apart / 3));
  if (length < LEAST_WINDOW) return [];
  const found = [];
  const last = updates.at(-1).step;
  for (let epoch = 1; epoch * epochSteps < last; epoch++) {
    const boundary = Math.round(epoch * epochSteps);
    // The first update of the next epoch is step boundary + 1.
    const first = updates.findIndex((update) => update.step > boundary);
    const before = losses(updates, first - length, first);
    const earlier = losses(updates, first - 2 * length, first - length);
    const after = losses(updates, first, first + length);
    if (after.length < length || before.length < length) continue;
    const slope = earlier.length === length ? Math.max(0, mean(earlier) - mean(before)) : 0;
    const size = mean(before) - mean(after) - slope;
    const error = Math.sqrt((variance(before) + variance(after) + (slope ? variance(earlier) : 0)) / length);
    if (size > STANDARD_ERRORS * error && size > PART * mean(before)) {
      found.push(drop(boundary, epoch, size, mean(before), mean(after)));
    }
  }
  return found;
}

function drop(step, epoch, size, before, after) {
  const words =
    `The loss steps down from ${before.toFixed(3)} to ${after.toFixed(3)} as epoch ${epoch + 1} begins, ${size.toFixed(3)} more than ` +
    "its slope explains: the texts are read again, and the network remembers them. This is memorisation, not progress; the validation loss says what was learned.";
  return { kind: "drop", step, size, title: `Memorisation: −${size.toFixed(2)} at the end of epoch ${epoch}`, words };
}

function recordedDrop(event) {
  const size = Number(event.size ?? event.drop ?? NaN);
  const known = Number.isFinite(size) ? `: −${size.toFixed(2)}` : "";
  return {
    kind: "drop", step: event.step, size, title: `Memorisation${known} at an epoch's end`,
    words: `The loss steps down as an epoch begins${known}: the texts are read again, and the network remembers them.`,
  };
}

function spikes(run) {
  return run.events
    .filter((event) => Number.isFinite(event.step) && !/epoch/.test(event.event))
    .map((event) => {
      const loss = event.loss === null || event.loss === undefined ? "no number" : short(event.loss);
      const row = event.rows?.[0];
      const returned = event.returned_to === undefined ? "" : ` The run returned to step ${event.returned_to}.`;
      const words = `The loss was ${loss}, its running level ${short(event.level)}.${returned}${row ? ` Worst row: ${row.origin}: “${row.text}”` : ""}`;
      return { kind: "warning", step: event.step, title: event.event === "spike" ? "Loss spike" : `Loss: ${event.event}`, words };
    });
}

/** A curve can't show what is no number; that it is there must not be missed. */
function gaps(run) {
  const found = run.updates.filter((update) => !Number.isFinite(update.loss));
  if (!found.length) return [];
  const words = `${found.length === 1 ? "One step has" : `${found.length.toLocaleString("en")} steps have`} a loss that is no number, the last one step ${found.at(-1).step.toLocaleString("en")}. The curves leave them out.`;
  return [{ kind: "warning", step: found[0].step, title: "Loss: not a number", words }];
}

function overfitting(run) {
  let [best, since] = [null, 0];
  for (const each of run.evaluations) {
    if (!Number.isFinite(each.validation_loss) || !each.step) continue;
    if (best === null || each.validation_loss < best.validation_loss) [best, since] = [each, 0];
    else since++;
    if (since < OVERFITTING_EVALUATIONS || !(each.train_loss < best.train_loss)) continue;
    const words =
      `Validation was best at step ${best.step.toLocaleString("en")} (${best.validation_loss.toFixed(3)}) and has not come back in ${since} ` +
      `evaluations, while the training loss went on falling (${each.train_loss.toFixed(3)}). The best checkpoint is the one to serve.`;
    const last = run.evaluations.findLast((one) => Number.isFinite(one.validation_loss));
    // A better one came later: then it was a pause.
    if (last && run.evaluations.some((one) => one.step > each.step && one.validation_loss < best.validation_loss)) continue;
    return [{ kind: "warning", step: best.step, title: "Overfitting since", words }];
  }
  return [];
}

function copies(run) {
  const first = run.copies.find(
    ({ copied_from_training: own, copied_from_validation: other }) => own >= MEMORISED && own >= 2 * (other ?? 0),
  );
  if (!first) return [];
  const words = `A sample repeats ${first.copied_from_training} tokens of the training text word for word (of the validation text ${first.copied_from_validation ?? 0}).`;
  return [{ kind: "drop", step: first.step, title: "Memorising: a sample copies", words }];
}

function losses(updates, from, to) {
  if (from < 0) return [];
  return updates.slice(from, to).map((update) => update.loss).filter(Number.isFinite);
}

function mean(values) {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

function variance(values) {
  const middle = mean(values);
  return values.reduce((sum, value) => sum + (value - middle) ** 2, 0) / Math.max(1, values.length - 1);
}
