// The sample browser: a list that draws only what is in sight, filters, and one rollout coloured token by token.

const ROW = 30;
const CHANNELS = {
  value: {label: "value", hint: "the critic's prediction before its update", kind: "unit"},
  advantage: {label: "advantage", hint: "whitened over the step", kind: "both"},
  ratio: {label: "ratio", hint: "current / sampled probability; drawn as its logarithm", kind: "both"},
  lag: {label: "lag", hint: "versions between sampling and training", kind: "steps"},
  gap: {label: "log-prob gap", hint: "learner − engine under equal weights", kind: "both"},
  logprob: {label: "log-prob", hint: "of the engine when it sampled", kind: "low"},
};
const browser = {chosen: [], selected: -1, paint: "value", drawn: new Map(), texts: new Map()};
const index = () => state.rollouts[state.run];

function unpack([scale, text]) {
  const raw = atob(text), view = new DataView(new ArrayBuffer(raw.length));
  for (let i = 0; i < raw.length; i++) view.setUint8(i, raw.charCodeAt(i));
  return Array.from({length: raw.length / 2}, (_, i) => { const n = view.getInt16(i * 2, true); return n === -32768 ? null : n * scale; });
}
function body(n) {
  const chunk = Math.floor(n / 64), key = `texts-${state.run}-${chunk}`;
  if (!browser.texts.has(key)) {
    if (browser.texts.size > 16) browser.texts.delete(browser.texts.keys().next().value);
    browser.texts.set(key, JSON.parse(document.getElementById(key).textContent));
  }
  return browser.texts.get(key)[n % 64];
}

const filters = {};
function buildFilters() {
  const form = document.getElementById("filters"), rows = index().rows, distinct = (name) => [...new Set(rows[name] || [])].filter((v) => v !== null).sort((a, b) => a < b ? -1 : a > b ? 1 : 0);
  const choice = (name, label, options) => { const select = el("select", {name}, el("option", {value: ""}, "all"), ...options.map(([value, text]) => el("option", {value}, text)));
    filters[name] = select; return el("label", {}, `${label} `, select); };
  const range = (name, label) => { const low = el("input", {type: "number", name: `${name}-low`, placeholder: "from", "aria-label": `${label} from`}), high = el("input", {type: "number", name: `${name}-high`, placeholder: "to", "aria-label": `${label} to`});
    filters[`${name}-low`] = low; filters[`${name}-high`] = high; return el("label", {}, `${label} `, low, " ", high); };
  for (const name of Object.keys(filters)) delete filters[name];
  const values = el("input", {type: "checkbox", name: "values"}); filters.values = values;
  form.replaceChildren(
    choice("kind", "Set", [["train", "training"], ["eval", "held-out"]]),
    choice("verdict", "Verdict", distinct("verdict").map((v) => [v, v])),
    choice("lag", "Lag", distinct("lag").map((v) => [`${v}`, `${v}`])),
    range("reward", "Reward"), range("length", "Length"), range("step", "Step"),
    el("label", {}, values, " with values"), el("output", {id: "count"}));
  filters.kind.value = (rows.kind || []).includes("train") ? "train" : "";
  form.oninput = () => filter();
  form.onsubmit = (event) => event.preventDefault();
}
function filter() {
  const rows = index().rows, count = (rows.kind || []).length, chosen = [];
  const tests = [];
  for (const name of ["kind", "verdict"]) if (filters[name].value) tests.push((n) => rows[name][n] === filters[name].value);
  if (filters.lag.value) { const lag = +filters.lag.value; tests.push((n) => rows.lag[n] === lag); }
  for (const name of ["reward", "length", "step"]) {
    const low = filters[`${name}-low`].value, high = filters[`${name}-high`].value;
    if (low !== "") tests.push((n) => rows[name][n] !== null && rows[name][n] >= +low);
    if (high !== "") tests.push((n) => rows[name][n] !== null && rows[name][n] <= +high);
  }
  if (filters.values.checked) tests.push((n) => rows.values[n]);
  for (let n = 0; n < count; n++) if (tests.every((test) => test(n))) chosen.push(n);
  browser.chosen = chosen;
  document.getElementById("count").textContent = `${chosen.length.toLocaleString("en")} of ${count.toLocaleString("en")}`;
  document.getElementById("list").scrollTop = 0;
  document.getElementById("rows").style.height = `${(chosen.length + 1) * ROW}px`;
  browser.drawn.clear();
  document.getElementById("rows").replaceChildren(el("div", {class: "row head"}, ...["step", "reward", "verdict"].map((t) => el("span", {}, t)), ...["tokens", "lag"].map((t) => el("span", {class: "r"}, t))));
  drawRows();
  select(chosen.length ? Math.max(0, chosen.findIndex((n) => rows.values[n])) : -1);
}
function drawRows() {
  const list = document.getElementById("list"), box = document.getElementById("rows"), rows = index().rows;
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 6), last = Math.min(browser.chosen.length, first + Math.ceil(list.clientHeight / ROW) + 14);
  for (const [at, node] of browser.drawn) if (at < first || at >= last) { node.remove(); browser.drawn.delete(at); }
  for (let at = first; at < last; at++) {
    if (browser.drawn.has(at)) continue;
    const n = browser.chosen[at], text = (v) => v === null ? "–" : `${v}`;
    const node = el("div", {class: at === browser.selected ? "row on" : "row", role: "option"},
      el("span", {}, rows.kind[n] === "eval" ? `v${text(rows.step[n])}` : text(rows.step[n])), el("span", {}, plain(rows.reward[n])), el("span", {}, rows.kind[n] === "eval" ? `${rows.verdict[n]} · held-out` : rows.verdict[n]),
      el("span", {class: "r"}, plain(rows.length[n])), el("span", {class: "r"}, text(rows.lag[n])));
    node.style.top = `${(at + 1) * ROW}px`;
    node.onclick = () => select(at);
    box.append(node); browser.drawn.set(at, node);
  }
}
function select(at) {
  browser.drawn.get(browser.selected)?.classList.remove("on");
  browser.selected = at;
  browser.drawn.get(at)?.classList.add("on");
  const detail = document.getElementById("detail");
  if (at < 0) { detail.replaceChildren(el("p", {class: "quiet"}, "No rollout fits these filters.")); return; }
  show(browser.chosen[at], detail);
}
function show(n, detail) {
  const rows = index().rows, b = body(n), eval_ = rows.kind[n] === "eval";
  const channels = Object.fromEntries(Object.entries(b.channels).map(([name, packed]) => [name, unpack(packed)]));
  if (channels.log_ratio) channels.ratio = channels.log_ratio;
  delete channels.log_ratio;
  const versions = b.pieces.map((_, i) => b.spans.findLast(([, start]) => start <= i)[0]);
  if (!eval_ && rows.step[n] !== null) channels.lag = versions.map((v) => rows.step[n] - 1 - v);
  const names = Object.keys(CHANNELS).filter((name) => channels[name]);
  if (!names.includes(browser.paint)) browser.shown = names[0]; else browser.shown = browser.paint;
  const picker = el("select", {id: "paint", "aria-label": "Colour by"}, ...names.map((name) => { const o = el("option", {value: name}, CHANNELS[name].label); o.selected = name === browser.shown; return o; }));
  picker.onchange = () => { browser.paint = browser.shown = picker.value; paint(); };
  const text = el("div", {class: "text"}), scale = el("span", {class: "scale"}), hint = el("span", {class: "quiet"});
  const spans = b.pieces.map((piece, i) => { const s = el("span", {}, piece); if (i === b.pieces.length - 1 && rows.finish[n] === "stop") s.className = "stop"; return s; });
  text.append(...spans);
  text.onpointermove = (event) => { const i = spans.indexOf(event.target); if (i < 0) { tip.hide(); return; }
    tip.show(event, `token ${i + 1} of ${spans.length}: ${JSON.stringify(b.pieces[i])}`, [["version", `${versions[i]}`], ...names.map((name) => [CHANNELS[name].label, name === "ratio" && channels.ratio[i] !== null ? plain(Math.exp(channels.ratio[i])) : plain(channels[name][i])])]); };
  text.onpointerleave = () => tip.hide();
  const paint = () => {
    const values = channels[browser.shown], kind = CHANNELS[browser.shown].kind, numbers = values.filter((v) => v !== null);
    const most = kind === "unit" ? 1 : Math.max(...numbers.map(Math.abs), 1e-12);
    values.forEach((v, i) => { spans[i].style.backgroundColor = v === null ? "transparent" : shade(v / most, kind); });
    hint.textContent = CHANNELS[browser.shown].hint;
    scale.replaceChildren(...legend(most, kind));
  };
  const when = rows.step[n] === null ? "not trained yet" : eval_ ? `held-out, version ${rows.step[n]}` : `trained in step ${rows.step[n]}`;
  detail.replaceChildren(
    el("h3", {}, `${eval_ ? "Held-out rollout" : "Rollout"} ${rows.rollout[n].toLocaleString("en")}: ${rows.verdict[n]}, reward ${plain(rows.reward[n])}`),
    el("div", {class: "quiet"}, `${when} · ${plain(rows.length[n])} tokens, ${rows.finish[n] === "stop" ? "ended by itself" : "cut at the length limit"} · ` +
      `${b.generator}, ${seconds(b.seconds)} · versions ${[...new Set(versions)].join(", ")} · prompt ${b.prompt_id}, sample ${b.sample}${b.attempt ? `, attempt ${b.attempt + 1}` : ""}`),
    el("div", {class: "prompt"}, b.prompt),
    el("div", {class: "paint"}, el("label", {}, "Colour by ", picker), scale, hint), text);
  paint();
  detail.scrollTop = 0;
}
const WARM = [224, 112, 32], COOL = [52, 120, 200];
function shade(x, kind) {
  const [r, g, b] = kind === "both" && x < 0 ? WARM : kind === "low" ? WARM : COOL;
  const strength = Math.min(1, Math.abs(x)) ** (kind === "both" ? 0.7 : 1);
  return `rgba(${r}, ${g}, ${b}, ${(0.62 * strength).toFixed(3)})`;
}
function legend(most, kind) {
  const canvas = el("canvas"); canvas.width = 128; canvas.height = 12;
  const g = canvas.getContext("2d"), signed = kind === "both";
  for (let i = 0; i < 128; i++) { g.fillStyle = shade(kind === "low" ? 1 - i / 127 : signed ? i / 63.5 - 1 : i / 127, kind); g.fillRect(i, 0, 1, 12); }
  const end = (x) => browser.shown === "ratio" ? plain(Math.exp(x)) : plain(x);
  return [end(kind === "low" || signed ? -most : 0), canvas, end(kind === "low" ? 0 : most)];
}
function buildBrowser() {
  const list = document.getElementById("list");
  list.onscroll = () => drawRows();
  list.onkeydown = (event) => {
    const move = {ArrowDown: 1, ArrowUp: -1, PageDown: 12, PageUp: -12}[event.key];
    if (!move || !browser.chosen.length) return;
    event.preventDefault();
    const at = Math.max(0, Math.min(browser.chosen.length - 1, browser.selected + move));
    const y = (at + 1) * ROW;
    if (y - ROW < list.scrollTop) list.scrollTop = y - ROW; else if (y + ROW > list.scrollTop + list.clientHeight) list.scrollTop = y + ROW - list.clientHeight;
    drawRows(); select(at);
  };
}
