"use strict";
// Small charts on canvas: lines with bands and points, stacked areas, bars. Colours come from the style sheet.

const el = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children); // strings become text, never markup
  return node;
};
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = (n) => css(`--c${n % 8}`);

const plain = (x) => x === null || x === undefined ? "–" : Number.isInteger(x) && Math.abs(x) < 1e5 ? x.toLocaleString("en")
  : Math.abs(x) >= 1e9 ? `${+(x / 1e9).toPrecision(3)}G` : Math.abs(x) >= 1e6 ? `${+(x / 1e6).toPrecision(3)}M`
  : Math.abs(x) >= 1e4 ? `${+(x / 1e3).toPrecision(3)}k` : x !== 0 && Math.abs(x) < 1e-3 ? x.toExponential(1) : `${+x.toPrecision(3)}`;
const percent = (x) => x === null || x === undefined ? "–" : `${+(x * 100).toFixed(Math.abs(x) < 0.1 ? 2 : 1)} %`;
const bytes = (x) => x === null || x === undefined ? "–" : x >= 1e9 ? `${+(x / 1e9).toPrecision(3)} GB` : x >= 1e6 ? `${+(x / 1e6).toPrecision(3)} MB`
  : x >= 1e3 ? `${+(x / 1e3).toPrecision(3)} kB` : `${x} B`;
const seconds = (x) => x === null || x === undefined ? "–" : x >= 100 ? clock(x) : x >= 1 ? `${+x.toPrecision(3)} s` : `${+(x * 1e3).toPrecision(3)} ms`;
const clock = (s) => { const m = Math.floor(s / 60), h = Math.floor(m / 60), two = (n) => String(Math.floor(n)).padStart(2, "0");
  return h ? `${h}:${two(m % 60)}:${two(s % 60)}` : `${m}:${two(s % 60)}`; };
const AXES = {step: {label: "step", format: plain}, tokens: {label: "trained tokens", format: plain}, wall_s: {label: "training time", format: clock}};

const tip = {
  node: document.getElementById("tip"),
  show(event, head, rows) {
    this.node.replaceChildren(el("b", {}, head), ...rows.map(([name, value, fill]) => {
      const left = el("span", {}, name);
      if (fill) { const mark = el("i"); mark.style.background = fill; left.prepend(mark); }
      return el("div", {}, left, el("b", {}, value));
    }));
    this.node.hidden = false;
    const box = this.node.getBoundingClientRect(), x = event.clientX, y = event.clientY;
    this.node.style.left = `${Math.max(4, x + 16 + box.width > innerWidth ? x - 16 - box.width : x + 16)}px`;
    this.node.style.top = `${Math.max(4, Math.min(y + 12, innerHeight - box.height - 8))}px`;
  },
  hide() { this.node.hidden = true; },
};

function ticks(low, high, most) {
  const span = high - low || 1, raw = span / most, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((n) => n * power).find((n) => n >= raw * 0.999);
  const found = [];
  for (let x = Math.ceil(low / step - 1e-9) * step; x <= high + step * 1e-9; x += step) found.push(Math.abs(x) < step * 1e-6 ? 0 : x);
  return found;
}

const charts = [];
class Chart {
  // spec: () => {series: [{label, colour, x, y, low, high, points, dash}], stacked, bars, log, yMin, yMax, xLabel, xFormat, diagonal}
  constructor(parent, title, hint, format, spec, height = 190) {
    this.format = format; this.spec = spec; this.height = height; this.seen = false;
    this.canvas = el("canvas", {role: "img", "aria-label": `${title}: ${hint}`});
    this.canvas.style.height = `${height}px`;
    this.legend = el("div", {class: "legend"});
    this.figure = el("figure", {}, el("figcaption", {}, title, el("small", {}, hint)), this.canvas, this.legend);
    parent.append(this.figure);
    this.canvas.addEventListener("pointermove", (event) => this.hover(event));
    this.canvas.addEventListener("pointerleave", () => { tip.hide(); this.draw(); });
    charts.push(this);
  }
  load() {
    this.data = this.spec();
    const series = this.data.series.filter((s) => s.y.some((v) => v !== null && v !== undefined));
    this.figure.hidden = !series.length;
    this.data.series = series;
    const named = series.filter((s, i) => s.label && series.findIndex((t) => t.label === s.label) === i);
    this.legend.replaceChildren(...(named.length > 1 ? named : []).map((s) => {
      const mark = el("i"); mark.style.background = css(s.colour) || s.colour; return el("span", {}, mark, s.label); }));
    if (this.data.stacked) {
      const sum = [];
      for (const s of series) { s.base = s.y.map((_, i) => sum[i] || 0); s.top = s.y.map((v, i) => (sum[i] = (sum[i] || 0) + (v || 0))); }
    }
    this.draw();
  }
  extent() {
    let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
    const see = (v) => { if (v !== null && v !== undefined && Number.isFinite(v) && !(this.data.log && v <= 0)) { y0 = Math.min(y0, v); y1 = Math.max(y1, v); } };
    for (const s of this.data.series) {
      for (const x of s.x) { x0 = Math.min(x0, x); x1 = Math.max(x1, x); }
      (s.top || s.y).forEach(see); (s.low || []).forEach(see); (s.high || []).forEach(see);
      if (s.base) see(0);
    }
    if (this.data.log) { y0 = Math.log10(y0); y1 = Math.log10(y1); }
    const pad = (y1 - y0) * 0.06 || Math.abs(y1) * 0.05 || (this.format === percent ? 0.01 : 0.5);
    y0 = this.data.yMin ?? (this.data.bars || this.data.stacked ? 0 : y0 - pad); y1 = this.data.yMax ?? y1 + pad;
    if (this.data.bars) { x0 -= 0.5; x1 += 0.5; }
    if (x0 === x1) { x0 -= 0.5; x1 += 0.5; }
    return [x0, x1, y0, y1 > y0 ? y1 : y0 + 1];
  }
  draw(at = null) {
    if (!this.data || this.figure.hidden) return;
    const width = this.canvas.clientWidth, height = this.height, ratio = devicePixelRatio || 1;
    if (!width) return;
    this.canvas.width = Math.round(width * ratio); this.canvas.height = Math.round(height * ratio);
    const g = this.canvas.getContext("2d"), [x0, x1, y0, y1] = this.extent(), log = this.data.log;
    g.scale(ratio, ratio); g.font = `11px ${getComputedStyle(document.body).fontFamily}`;
    const whole = log ? ticks(Math.ceil(y0), Math.floor(y1), 4).filter(Number.isInteger) : [];
    const yTicks = whole.length > 1 ? whole : ticks(y0, y1, 4), apart = yTicks[1] - yTicks[0];
    const close = this.format === plain && !log && apart < 0.01 * Math.max(...yTicks.map(Math.abs)) && apart < 1;
    const yText = (t) => log ? (whole.length > 1 ? `1e${t}` : plain(10 ** t)) : close ? t.toFixed(Math.ceil(-Math.log10(apart) + 0.3)) : this.format(t);
    const left = Math.max(24, ...yTicks.map((t) => g.measureText(yText(t)).width)) + 8, bottom = height - 22, top = 8, right = width - 6;
    const X = this.X = (x) => left + (x - x0) / (x1 - x0) * (right - left);
    const Y = (y) => bottom - ((log ? Math.log10(y) : y) - y0) / (y1 - y0) * (bottom - top);
    g.lineWidth = 1; g.strokeStyle = css("--grid"); g.fillStyle = css("--faint"); g.textBaseline = "middle"; g.textAlign = "right";
    for (const t of yTicks) {
      const y = Math.round(Y(log ? 10 ** t : t)) + 0.5;
      g.beginPath(); g.moveTo(left, y); g.lineTo(right, y); g.stroke(); g.fillText(yText(t), left - 7, y);
    }
    const axis = this.data.xFormat ? {format: this.data.xFormat, label: this.data.xLabel} : AXES[state.axis];
    g.textBaseline = "alphabetic"; g.textAlign = "center";
    const xTicks = this.data.xTicks || ticks(x0, x1, Math.max(2, width / 90));
    for (const t of xTicks) { const text = axis.format(t), half = g.measureText(text).width / 2;
      if (X(t) - half >= left - 12 && X(t) + half <= right + 6) g.fillText(text, X(t), height - 6); }
    g.save(); g.beginPath(); g.rect(left - 4, 0, right - left + 8, bottom + 5); g.clip();
    if (this.data.diagonal) { g.strokeStyle = css("--line"); g.beginPath(); g.moveTo(X(y0), Y(y0)); g.lineTo(X(y1), Y(y1)); g.stroke(); }
    for (const guide of this.data.guides || []) { g.strokeStyle = css("--faint"); g.setLineDash([2, 4]); g.beginPath(); g.moveTo(left, Y(guide)); g.lineTo(right, Y(guide)); g.stroke(); g.setLineDash([]); }
    for (const s of this.data.series) this.series(g, s, X, Y, log);
    if (at !== null) { g.strokeStyle = css("--faint"); g.setLineDash([]); g.beginPath(); g.moveTo(X(at), top); g.lineTo(X(at), bottom); g.stroke(); }
    g.restore();
  }
  series(g, s, X, Y, log) {
    const fill = css(s.colour) || s.colour, good = (v) => v !== null && v !== undefined && !(log && v <= 0);
    g.strokeStyle = g.fillStyle = fill; g.lineJoin = "round"; g.lineWidth = s.points ? 1.4 : 1.6;
    if (this.data.bars) {
      const wide = Math.min(46, (X(1) - X(0)) * 0.7);
      s.x.forEach((x, i) => { g.fillRect(X(x) - wide / 2, Y(s.y[i]), wide, Y(0) - Y(s.y[i])); });
      return;
    }
    if (s.base) {
      g.globalAlpha = 0.82; g.beginPath();
      s.x.forEach((x, i) => g.lineTo(X(x), Y(s.top[i])));
      for (let i = s.x.length - 1; i >= 0; i--) g.lineTo(X(s.x[i]), Y(s.base[i]));
      g.fill(); g.globalAlpha = 1; return;
    }
    if (s.low) s.x.forEach((x, i) => { if (!good(s.y[i])) return;
      g.globalAlpha = 0.55; g.beginPath(); g.moveTo(X(x), Y(s.low[i])); g.lineTo(X(x), Y(s.high[i])); g.stroke(); g.globalAlpha = 1; });
    g.globalAlpha = s.faint ? 0.45 : 1; g.setLineDash(s.dash || []); g.beginPath();
    let open = false;
    s.x.forEach((x, i) => { if (!good(s.y[i])) { open = false; return; } open ? g.lineTo(X(x), Y(s.y[i])) : g.moveTo(X(x), Y(s.y[i])); open = true; });
    if (!s.bare) g.stroke();
    g.setLineDash([]); g.globalAlpha = s.faint ? 0.45 : 1;
    const alone = (i) => !good(s.y[i - 1]) && !good(s.y[i + 1]); // a line would leave it out
    s.x.forEach((x, i) => { if (!good(s.y[i]) || !(s.points || alone(i))) return;
      g.beginPath(); g.arc(X(x), Y(s.y[i]), Math.min(9, s.sizes ? s.sizes[i] : 3), 0, 7); g.fill(); });
    g.globalAlpha = 1;
  }
  hover(event) {
    const x = event.offsetX, rows = [];
    let best = null;
    for (const s of this.data.series) for (const at of s.x) if (best === null || Math.abs(this.X(at) - x) < Math.abs(this.X(best) - x)) best = at;
    if (best === null) return;
    for (const s of this.data.series) {
      let near = -1;
      s.x.forEach((at, i) => { if (near < 0 || Math.abs(this.X(at) - this.X(best)) < Math.abs(this.X(s.x[near]) - this.X(best))) near = i; });
      if (near < 0 || Math.abs(this.X(s.x[near]) - this.X(best)) > 24 || s.y[near] === null || s.y[near] === undefined) continue;
      const interval = s.low ? ` (${this.format(s.low[near])} to ${this.format(s.high[near])})` : "";
      rows.push([s.note ? `${s.label}, ${s.note[near]}` : s.label || "value", this.format(s.y[near]) + interval, css(s.colour) || s.colour]);
    }
    const axis = this.data.xFormat ? {format: this.data.xFormat, label: this.data.xLabel} : AXES[state.axis];
    this.draw(best);
    tip.show(event, `${axis.label} ${axis.format(best)}`, rows.slice(0, 12));
  }
}
