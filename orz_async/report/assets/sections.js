// What the page shows of its runs: tiles, curves, timeline, funnel. `state` is set by page.js.

const run = () => state.runs[state.run];
const many = () => state.runs.length > 1;
const shorten = (name) => name.replace(/^generator-/, "").replace(/^learner-/, "learner ");
const all = (name, extra = {}) => state.runs.map((r, i) => ({label: many() ? r.name : extra.label, colour: `--c${many() ? i : extra.tone || 0}`,
  x: r.series[state.axis], y: r.series[name] || [], ...extra.line}));
const held = (name, bands) => state.runs.map((r, i) => ({label: many() ? `${r.name}, held-out` : "held-out", colour: `--c${many() ? i : 1}`, points: true,
  x: r.evals.map((e) => state.axis === "step" ? e.version : e[state.axis]), y: r.evals.map((e) => e[name]),
  ...(bands ? {low: r.evals.map((e) => e.accuracy_low), high: r.evals.map((e) => e.accuracy_high)} : {})}));
const byLag = (name) => Object.entries(run().by_lag).map(([lag, curves]) => ({label: `lag ${lag}`, colour: `--c${lag}`, x: run().series[state.axis], y: curves[name]}));
const stack = (curves, tone) => Object.entries(curves).map(([name, y], i) => ({label: name.replace(/^wait_/, "waits for "), colour: tone ? tone(name, i) : `--c${i}`, x: run().series[state.axis], y}));

const passes = (e) => Object.entries(e.passes ?? {}).filter(([k]) => k !== "1").map(([k, v]) => `; pass@${k} ${percent(v)}`).join("");
const CAUSES = ["rollouts", "leases", "weights", "learner", "eval", "window", "leader", "load"];
const WORK = ["--work", "--work2", "--work3"];
function tones(states) {
  const found = {}; let idle = 0, work = 0;
  for (const name of [...states].sort()) {
    const cause = name.replace(/^wait_/, "");
    if (name.startsWith("wait_")) { const at = CAUSES.indexOf(cause); found[name] = `--c${[1, 4, 3, 5, 2, 6, 0, 7][at >= 0 ? at : (idle++ + 5) % 8]}`; }
    else found[name] = WORK[work++ % 3];
  }
  return found;
}

function tiles() {
  const s = run().summary, r = run(), last = r.evals.at(-1), first = r.evals[0];
  const idle = (causes) => Object.values(causes).reduce((a, b) => a + b, 0);
  const main = (causes) => { const [top] = Object.entries(causes).sort((a, b) => b[1] - a[1]); return top && top[1] >= 0.005 ? `mostly for ${top[0]}` : ""; };
  const reward = r.series.reward.at(-1);
  const rows = [
    ["Held-out accuracy", last ? percent(last.accuracy) : "–", last ? `from ${percent(first.accuracy)}; 95 %: ${percent(last.accuracy_low)} to ${percent(last.accuracy_high)}${passes(last)}` : "not evaluated"],
    ["Reward, last step", plain(reward), r.series.reward.length ? `from ${plain(r.series.reward[0])}` : ""],
    ["Response length", last ? plain(last.length) : plain(r.series.length.at(-1)), first ? `tokens, from ${plain(first.length)}` : "tokens"],
    ["Steps", plain(s.steps), `of ${plain(r.planned_steps)}${s.finished ? ", finished" : ", not finished"}${s.restarts ? `, resumed ${s.restarts} times` : ""}`],
    ["Training time", clock(s.train_wall_s), s.train_wall_s ? `${plain(s.rollouts.trained / s.train_wall_s)} rollouts/s` : ""],
    ["Generators", `${plain(s.generator_tokens_per_s)}/s`, `tokens; idle ${percent(idle(s.generator_idle))} ${main(s.generator_idle)}`],
    ["Learner", `${plain(s.learner_tokens_per_s)}/s`, `tokens; idle ${percent(idle(s.learner_idle))} ${main(s.learner_idle)}`],
    ["Lag", `${s.max_lag_observed} of ${s.max_lag}`, s.mismatch_max === null ? "versions, observed of allowed" : `versions; log-prob mismatch ${plain(s.mismatch_max)} at most`],
  ];
  document.getElementById("tiles").replaceChildren(...rows.map(([name, value, note]) =>
    el("dl", {class: "tile"}, el("dt", {}, name), el("dd", {}, value), el("dd", {class: "small"}, note))));
  document.getElementById("subtitle").textContent = `run ${s.run_id || "unnamed"} · configuration ${s.config_hash} · ` +
    `${plain(r.rollouts_per_step)} rollouts a step · ${new Date(r.timeline.start * 1e3).toISOString().slice(0, 16).replace("T", " ")} UTC`;
  document.getElementById("notes").replaceChildren(...r.notes.map((note) => el("li", {}, note)));
  document.getElementById("footer").textContent = Object.entries(s.versions).map(([k, v]) => `${k} ${v}`).join(" · ");
}

function build() {
  const at = (id) => document.getElementById(id);
  const line = (parent, title, hint, format, spec) => new Chart(at(parent), title, hint, format, spec);
  line("learning-charts", "Accuracy and reward", "mean reward of training, accuracy held out", plain, () => ({yMin: 0, yMax: 1.03, series: [...all("reward", {label: "training", line: {faint: !many()}}), ...held("accuracy", true)]}));
  line("learning-charts", "Response length", "mean tokens", plain, () => ({series: [...all("length", {label: "training"}), ...held("length")]}));
  line("learning-charts", "Truncated", "responses cut at the length limit", percent, () => ({yMin: 0, series: all("truncated", {label: "truncated"})}));
  line("learning-charts", "Verdicts", "share of trained rollouts", percent, () => { const v = run().verdicts, names = Object.keys(v), total = (i) => names.reduce((a, n) => a + v[n][i], 0) || 1;
    return {stacked: true, yMin: 0, yMax: 1, series: stack(Object.fromEntries(names.map((n) => [n, v[n].map((c, i) => c / total(i))])), (name, i) => name === "correct" ? "--c2" : name === "wrong" ? "--c1" : `--c${i + 3}`)}; });
  line("learning-charts", "Explained variance of the critic", "1 is perfect, 0 no better than the mean", plain, () => ({yMax: 1.02, series: all("explained_variance", {label: "explained variance"}), guides: [0]}));
  line("learning-charts", "Calibration of the critic", "mean return by predicted value; on the diagonal is right", plain, () => ({yMin: -0.1, yMax: 1.1, diagonal: true, xFormat: plain, xLabel: "predicted value",
    series: run().calibration.filter((_, i, whole) => i === 0 || i === whole.length - 1).map((w, i, whole) => { const most = Math.max(...w.bins.map((b) => b.tokens)); return {label: w.first === w.last ? `step ${w.first}` : `steps ${w.first}–${w.last}`, colour: `--c${i}`, faint: i < whole.length - 1,
      bare: i < whole.length - 1, points: true, x: w.bins.map((b) => b.value), y: w.bins.map((b) => b.return), sizes: w.bins.map((b) => 2 + 4 * Math.sqrt(b.tokens / most)), note: w.bins.map((b) => `${plain(b.tokens)} tokens`)}; })}));
  line("learning-charts", "Value and return", "means over the trained tokens", plain, () => ({series: [...all("value_mean", {label: "predicted value"}), ...(many() ? [] : all("return_mean", {label: "return", tone: 1}))]}));
  line("learning-charts", "Entropy", "of the policy, nats a token", plain, () => ({yMin: 0, series: all("entropy", {label: "entropy"})}));
  line("learning-charts", "Gradient norms", "before clipping", plain, () => ({yMin: 0, series: [...all("grad_norm", {label: "policy"}), ...(many() ? [] : all("critic_grad_norm", {label: "critic", tone: 1}))]}));

  line("policy-charts", "Tokens by lag", "trained tokens by the age of the policy that sampled them", plain, () => { const h = Object.entries(run().lag_histogram); return {bars: true, xFormat: (x) => `${x}`, xLabel: "lag", xTicks: h.map(([lag]) => +lag),
    series: [{label: "tokens", colour: "--c0", x: h.map(([lag]) => +lag), y: h.map(([, n]) => n)}]}; });
  line("policy-charts", "Distance by lag", "mean |log ratio| to the policy that sampled", plain, () => ({yMin: 0, series: byLag("abs_delta")}));
  line("policy-charts", "Ratio by lag", "mean of current / sampled probability", plain, () => ({series: byLag("ratio"), guides: [1]}));
  line("policy-charts", "Outside the clip range by lag", "share of tokens, whatever their advantage", percent, () => ({yMin: 0, series: byLag("outside_clip")}));
  line("policy-charts", "Clipped", "share of tokens whose gradient a bound removed", percent, () => ({yMin: 0, series: [...all("clip_low", {label: "below"}), ...(many() ? [] : all("clip_high", {label: "above", tone: 1}))]}));
  line("policy-charts", "Largest and smallest ratio", "of a step", plain, () => ({guides: [1], series: [...all("ratio_max", {label: "largest"}), ...(many() ? [] : all("ratio_min", {label: "smallest", tone: 1}))]}));
  line("policy-charts", "Mismatch by lag", "largest |learner − engine| log-prob under equal weights", plain, () => { const l = byLag("mismatch_max"); return {log: true, series: l.length ? l : all("mismatch_max", {label: "all lags"})}; });
  line("policy-charts", "KL divergence", "k3 estimate, from the sampling policy to the current one", plain, () => ({yMin: 0, series: all("kl", {label: "KL"})}));
  line("policy-charts", "Effective sample size", "of the ratios, as a share of the tokens", percent, () => ({series: all("ess", {label: "share"})}));

  line("time-charts", "Tokens a second", "sampled by the generators, trained by the learner", plain, () => ({yMin: 0, series: [...all("learner_tokens_s", {label: "learner"}), ...(many() ? [] : all("generator_tokens_s", {label: "generators", tone: 1}))]}));
  line("time-charts", "A step of the learner", "seconds by what it did", seconds, () => { const names = Object.keys(run().step_seconds), tone = stepTones(names); return {stacked: true, series: stack(run().step_seconds, (name) => tone[name])}; });
  line("time-charts", "Weight sync, bytes", "that travelled to a generator, mean and largest", bytes, () => weightSeries({bytes_mean: "mean", bytes_max: "largest"}));
  line("time-charts", "Weight sync, seconds", "publishing holds the learner, a swap its generator", seconds, () => weightSeries({publish_s: "publish", fetch_s_max: "fetch, slowest", swap_s_max: "swap, slowest"}));
}
const stepTones = (names) => { let n = 0; const found = {}, idle = tones(names); for (const name of names) found[name] = name.startsWith("wait_") ? idle[name] : ["--c0", "--c6", "--c2", "--work", "--work2", "--c7", "--work3"][n++ % 7]; return found; };
function weightSeries(names) {
  const rows = run().weights.filter((w) => w.version > 0 || run().weights.length === 1);
  return {yMin: 0, xFormat: plain, xLabel: "version", series: Object.entries(names).map(([key, label], i) => ({label, colour: `--c${i}`, x: rows.map((w) => w.version), y: rows.map((w) => w[key])}))};
}

function timeline() {
  const t = run().timeline, box = document.getElementById("timeline"), states = new Set();
  for (const rows of Object.values(t.processes)) Object.keys(rows).forEach((name) => states.add(name));
  const tone = tones(states), total = clock(t.bins * t.width_s);
  box.replaceChildren(el("h3", {}, `Timeline, ${total} from the first event to the last`));
  for (const [name, rows] of Object.entries(t.processes)) {
    const sum = (filter) => Object.entries(rows).filter(([s]) => filter(s)).reduce((a, [, v]) => a + v.reduce((x, y) => x + y, 0), 0);
    const idle = sum((s) => s.startsWith("wait_")) / (sum(() => true) || 1);
    const canvas = el("canvas", {role: "img", "aria-label": `${name}: idle ${percent(idle)}`});
    canvas.style.height = "30px";
    box.append(el("div", {class: "process"}, el("div", {}, el("b", {title: name}, shorten(name)), el("small", {}, `idle ${percent(idle)}`)), canvas));
    paintProcess(canvas, rows, t, tone);
    canvas.addEventListener("pointermove", (event) => {
      const bin = Math.floor(event.offsetX / canvas.clientWidth * t.bins);
      const parts = Object.entries(rows).map(([s, v]) => [s, v[bin] || 0]).filter(([, ms]) => ms > 0).sort((a, b) => b[1] - a[1]);
      tip.show(event, `${shorten(name)} at ${clock(bin * t.width_s)}`, parts.map(([s, ms]) => [s.replace(/^wait_/, "waits for "), seconds(ms / 1e3), css(tone[s])]));
    });
    canvas.addEventListener("pointerleave", () => tip.hide());
  }
  const used = [...states].sort((a, b) => a.startsWith("wait_") - b.startsWith("wait_") || (a < b ? -1 : 1));
  box.append(el("div", {class: "legend"}, ...used.map((s) => { const mark = el("i"); mark.style.background = css(tone[s]); return el("span", {}, mark, s.replace(/^wait_/, "waits for ")); })));
}
function paintProcess(canvas, rows, t, tone) {
  const ratio = devicePixelRatio || 1, width = canvas.clientWidth, height = 30;
  canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
  const g = canvas.getContext("2d"); g.scale(ratio, ratio);
  g.fillStyle = css("--grid"); g.fillRect(0, 0, width, height);
  const order = Object.entries(rows).sort(([a], [b]) => b.startsWith("wait_") - a.startsWith("wait_") || (a < b ? -1 : 1)), full = t.width_s * 1e3;
  const paint = Object.fromEntries(Object.keys(rows).map((s) => [s, css(tone[s])]));
  for (let bin = 0; bin < t.bins; bin++) {
    const x = bin / t.bins * width, wide = width / t.bins + 0.5;
    let y = height;
    for (const [state, values] of order) { const ms = values[bin]; if (!ms) continue; const tall = Math.min(y, ms / full * height); g.fillStyle = paint[state]; g.fillRect(x, y - tall, wide, tall); y -= tall; }
  }
}

function funnel() {
  const f = run().funnel, box = document.getElementById("funnel"), table = el("table");
  const row = (name, n, tone, sub) => { const meter = el("div"); meter.style.width = `${f.granted ? Math.min(100, n / f.granted * 100) : 0}%`; meter.style.background = css(tone); if (!n) meter.style.visibility = "hidden";
    table.append(el("tr", sub ? {class: "sub"} : {}, el("th", {scope: "row"}, name), el("td", {class: "n"}, n.toLocaleString("en")), el("td", {class: "n"}, f.granted ? percent(n / f.granted) : "–"), el("td", {class: "meter"}, meter))); };
  row("granted", f.granted, "--c0"); row("trained", f.trained, "--c2"); row("expired, lent again", f.expired, "--c1");
  for (const [cause, n] of Object.entries(f.expired_by_cause).sort((a, b) => b[1] - a[1])) row(cause, n, "--c1", true);
  row("quarantined", f.quarantined, "--c5"); row("in flight", f.in_flight, "--c7");
  box.replaceChildren(el("h3", {}, f.unaccounted ? `${f.unaccounted} rollouts are unaccounted for` : "All accounted for"), table);
  if (f.abandoned_tokens) box.append(el("p", {}, `${f.abandoned_tokens.toLocaleString("en")} tokens were sampled for leases that were lost`));
  const start = run().timeline.start, events = el("div", {class: "events"});
  const told = (e) => Object.entries(e).filter(([k, v]) => v !== "" && !["t", "process", "kind", "bytes", "pid"].includes(k)).map(([k, v]) => `${k} ${typeof v === "number" ? plain(v) : v}`).join(", ");
  for (const e of run().incidents) events.append(el("div", {}, el("time", {}, clock(Math.max(0, e.t - start))), el("span", {}, `${e.kind}${e.process === "broker" ? "" : ` (${shorten(e.process)})`}: ${told(e)}`)));
  document.getElementById("incidents").replaceChildren(el("h3", {}, "What happened, and when"), events);
}
