// What stands below the curves of the Runs tab: samples over time, settings (of several runs those that differ),
// checkpoints with a button that loads one, and the report.

import { request, requestText } from "./api.js";
import { button, clear, element, freshId, visible, visibleNodes } from "./dom.js";
import { clearError, showError } from "./errors.js";
import { models } from "./models.js";

const NOTABLE = 8;
const MOST_SAMPLES = 200;

function part(title, open = false) {
  const content = element("div");
  return { content, element: element("details", { class: "card runs-part", open }, element("summary", {}, title), content) };
}

/** Redraws only when what it shows changed, so that what somebody reads or has folded out stays. */
function changing(show) {
  let before = null;
  return (...seen) => {
    const now = JSON.stringify(seen);
    if (now !== before) show(...seen);
    before = now;
  };
}

/** What the runs wrote, by prompt, the latest step first. */
export function samples() {
  const made = part("Samples", true);
  const prompt = element("select", { id: freshId("prompt") });
  const from = element("input", { type: "range", id: freshId("from"), min: 0, step: 1 });
  const until = element("output");
  const list = element("ol", { class: "runs-samples", "aria-label": "Samples, the latest first", tabindex: 0 });
  const slider = element("div", { class: "field" }, element("label", { for: from.id }, "Up to step "), until, from);
  made.content.append(
    element("div", { class: "runs-sample-choice" }, element("div", { class: "field" }, element("label", { for: prompt.id }, "Prompt"), prompt), slider), list);
  let runs = [];

  function show() {
    const steps = [...new Set(runs.flatMap((run) => run.samples.map((sample) => sample.step)))].sort((one, other) => one - other);
    const atEnd = Number(from.value) >= Number(from.max);
    from.max = Math.max(0, steps.length - 1);
    if (atEnd) from.value = from.max;
    slider.hidden = steps.length < 2;
    const most = steps[Number(from.value)] ?? 0;
    until.textContent = most.toLocaleString("en");
    const found = runs.flatMap((run) => run.samples.filter((sample) => String(sample.prompt) === prompt.value && sample.step <= most).map((sample) => ({ ...sample, run: run.name })));
    found.sort((one, other) => other.step - one.step);
    clear(list).append(...found.slice(0, MOST_SAMPLES).map((sample) => row(sample, runs.length > 1)));
  }

  prompt.addEventListener("change", show);
  from.addEventListener("input", show);
  const changed = changing((names, counts, prompts) => {
    const chosen = prompt.value;
    prompt.replaceChildren(...prompts.map((text) => element("option", { value: text }, visible(text.trim() || "(nothing)").slice(0, 200))));
    if (prompts.includes(chosen)) prompt.value = chosen;
    show();
  });
  return {
    element: made.element,
    update(now) {
      runs = now;
      const prompts = [...new Set(runs.flatMap((run) => run.samples.map((sample) => String(sample.prompt))))];
      made.element.hidden = prompts.length === 0;
      changed(runs.map((run) => run.name), runs.map((run) => [run.samples.length, run.samples.at(-1)?.step]), prompts);
    },
  };
}

function row(sample, several) {
  const copied = sample.copied_from_training;
  const expected = typeof sample.expected === "string" ? [element("span", { class: "note" }, "expected: ", visibleNodes(sample.expected))] : [];
  return element("li", {},
    element("div", { class: "row" },
      element("strong", {}, `${several ? `${visible(sample.run)}, ` : ""}step ${sample.step.toLocaleString("en")}`),
      copied > NOTABLE ? element("span", { class: "chip copied" }, `${copied} tokens as in the training text`) : null),
    element("p", { class: "text" }, element("span", { class: "prompt" }, visibleNodes(sample.prompt ?? "")), visibleNodes(sample.text ?? "")), ...expected);
}

/** The settings of one run, or those in which several differ. */
export function differences() {
  const made = part("Settings");
  const summary = made.element.querySelector("summary");
  const show = changing((names, settings) => {
    const several = names.length > 1;
    summary.textContent = several ? "What differs in their settings" : "Settings";
    if (several) made.element.open = true;
    const all = [...new Set(settings.flatMap((each) => Object.keys(each)))];
    const text = (value) => (value === undefined ? "" : typeof value === "string" ? value : JSON.stringify(value));
    const different = (name) => settings.some((each) => text(each[name]) !== text(settings[0][name]));
    const rows = several ? all.filter((name) => name !== "out" && different(name)) : all.filter((name) => text(settings[0][name]) !== "null");
    clear(made.content);
    if (!rows.length) {
      made.content.append(element("p", { class: "note" }, several ? "They have the same settings." : "The run tells none."));
      return;
    }
    const head = several ? element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "setting"), ...names.map((name) => element("th", { scope: "col" }, visible(name))))) : null;
    const body = rows.map((name) => element("tr", {}, element("th", { scope: "row" }, visible(name)), ...settings.map((each) => element("td", {}, visible(text(each[name]))))));
    made.content.append(element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Settings" }, element("table", { class: "runs-settings" }, head, element("tbody", {}, ...body))));
  });
  return { element: made.element, update: (runs) => show(runs.map((run) => run.name), runs.map((run) => run.details.settings)) };
}

/** The checkpoints that the runs kept; a button loads one as `POST /models` does. */
export function checkpoints() {
  const made = part("Checkpoints", true);
  const problems = element("div");
  const rows = element("ul", { class: "runs-checkpoints", "aria-label": "Checkpoints", tabindex: 0 });
  made.content.append(problems, rows);
  let latest = [];

  const show = changing((kept) => {
    const told = kept.map(({ run, ...one }) => ({ run, one }));
    clear(rows).append(...told.map(({ run, one }) => line(run, one)));
    if (!told.length) rows.append(element("li", { class: "note" }, "Nothing has been kept yet: the first save comes with an evaluation."));
  });

  function line(run, one) {
    const marks = ["best", "last"].filter((mark) => one[mark]).map((mark) => element("span", { class: "chip" }, mark));
    const name = loadedName(run, one.step);
    const here = models.get(name);
    const action = here
      ? element("span", {}, "loaded as ", element("a", { href: "#chat" }, visible(name)))
      : button(one.best ? "Load the best checkpoint" : "Load", (event) => load(event.currentTarget, one, name), { class: one.best ? "primary" : null, disabled: one.path === null, "aria-label": `Load step ${one.step} of ${visible(run)}${one.best ? ", the best checkpoint" : ""}` });
    const why = !here && one.path === null ? element("span", { class: "note" }, "outside the directory that the server loads from: start it with --model-directory set to the directory of runs") : null;
    return element("li", { class: "row" }, element("strong", {}, `${latest.length > 1 ? `${visible(run)}, ` : ""}step ${one.step.toLocaleString("en")}`), ...marks, action, why);
  }

  async function load(pressed, one, name) {
    clearError(problems);
    pressed.disabled = true;
    pressed.textContent = "Loading…";
    try {
      await request("POST", "models", { path: one.path, name });
      await models.refresh();
    } catch (error) {
      showError(problems, error);
    }
    update(latest);
  }

  function update(runs) {
    latest = runs;
    const kept = runs.flatMap((run) => run.details.checkpoints.toReversed().map((one) => ({ run: run.name, ...one, here: models.get(loadedName(run.name, one.step)) !== null })));
    kept.sort((one, other) => other.best - one.best);
    // What a failed attempt left of a button is drawn anew, too.
    show(kept, problems.children.length);
  }
  models.addEventListener("change", () => latest.length && update(latest));
  models.known().catch(() => {});
  return { element: made.element, update };
}

/** What the command line would call it, in the signs that a name may have. */
function loadedName(run, step) {
  const name = `${run}-step-${step}`.replace(/[^A-Za-z0-9_.:-]/g, "_").replace(/^[^A-Za-z0-9_]/, "_");
  return name.slice(-128);
}

/** The report of a finished run. */
export function report() {
  const made = part("Report");
  const show = changing(async (run, there) => {
    made.element.hidden = !there;
    if (!there) return;
    clear(made.content);
    try {
      const text = await requestText("GET", `runs/${encodeURIComponent(run)}/report`);
      // Its pictures lie beside it; the curves above show the same and more.
      made.content.append(await rendered(text.replace(/^!\[[^\]]*\]\([^)]*\)$/gm, "")));
    } catch (error) {
      showError(made.content, error);
    }
  });
  return { element: made.element, update: (runs) => show(runs[0].name, runs.length === 1 && runs[0].details.report, runs[0].details.updated) };
}

async function rendered(text) {
  const { render } = await import("./markdown.js");
  return element("div", { class: "runs-report" }, render(text, { wrapped: true }));
}
