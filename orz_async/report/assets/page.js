// Reads the data blocks, draws everything, and again when a choice, the width or the colour scheme changes.

const parse = (id) => JSON.parse(document.getElementById(id).textContent);
const state = {runs: parse("runs"), rollouts: parse("rollouts"), run: 0, axis: "step"};

function drawRun() { // what is of the chosen run alone
  tiles(); timeline(); funnel(); buildFilters();
  document.getElementById("sample-notes").textContent = index().notes.join(". ") + (index().notes.length ? "." : "");
  browser.texts.clear(); filter();
}
const drawCharts = () => charts.forEach((chart) => chart.load());

document.getElementById("title").textContent = state.runs.map((r) => r.name).join(" · ");
if (many()) {
  const select = document.getElementById("run");
  state.runs.forEach((r, i) => select.append(el("option", {value: `${i}`}, r.name)));
  select.onchange = () => { state.run = +select.value; drawRun(); drawCharts(); };
  document.getElementById("run-choice").hidden = false;
}
document.getElementById("axis").onchange = (event) => { state.axis = event.target.value; drawCharts(); };
build(); buildBrowser(); drawRun(); drawCharts();

let pending = 0;
const redraw = () => { cancelAnimationFrame(pending); pending = requestAnimationFrame(() => { timeline(); funnel(); charts.forEach((chart) => chart.load()); drawRows(); }); };
let width = document.body.clientWidth;
new ResizeObserver(() => { if (document.body.clientWidth !== width) { width = document.body.clientWidth; redraw(); } }).observe(document.body);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
document.documentElement.dataset.ready = "yes";
