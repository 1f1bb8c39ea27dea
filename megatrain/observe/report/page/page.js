"use strict";
// Draws the charts of report.html with uPlot from the JSON in the page. Text only ever enters through textContent.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colour = (number) => css(`--run${number % 8}`);
  const many = data.runs.length > 1;
  const shown = data.runs.map(() => true);
  const view = { axis: "step", smoothing: 0.01, zoom: null };
  const built = [];

  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const format = (value) => {
    if (value === null || value === undefined || !isFinite(value)) return "not finite";
    const size = Math.abs(value);
    if (size >= 1000) return value.toLocaleString("en-US", { maximumFractionDigits: 0 });
    if (size !== 0 && size < 0.001) return value.toExponential(2);
    return String(+value.toPrecision(4));
  };
  const duration = (seconds) => {
    if (seconds < 60) return `${+seconds.toPrecision(3)} s`;
    if (seconds < 3600) return `${+(seconds / 60).toPrecision(3)} min`;
    return seconds < 172800 ? `${+(seconds / 3600).toPrecision(3)} h` : `${+(seconds / 86400).toPrecision(3)} d`;
  };
  const short = (value) => {
    const size = Math.abs(value);
    for (const [unit, word] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
      if (size >= unit) return `${+(value / unit).toPrecision(4)}${word}`;
    }
    return size !== 0 && size < 0.001 ? value.toExponential(0) : String(+value.toPrecision(4));
  };
  const place = (x) => {
    if (view.axis === "seconds") return duration(x);
    return view.axis === "tokens" ? `${short(x)} tokens` : `step ${format(Math.round(x))}`;
  };

  // The value of `to` at `x` of `from`, both rising, between the points that are there.
  const between = (x, from, to) => {
    let low = 0, high = from.length - 1;
    if (x <= from[0]) return from[0] > 0 ? (to[0] * x) / from[0] : to[0];
    if (x >= from[high]) return to[high];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (from[middle] <= x) low = middle; else high = middle;
    }
    return to[low] + ((to[high] - to[low]) * (x - from[low])) / (from[high] - from[low] || 1);
  };
  const across = (steps, run) =>
    view.axis === "step" ? steps : steps.map((x) => between(x, data.runs[run].axes.step, data.runs[run].axes[view.axis]));

  // Means weighted by exp(-distance / span) to both sides, span being `share` of the width: no lag, no pull to an end.
  const smoothed = (x, y, share) => {
    const span = share * (x[x.length - 1] - x[0]) || 1;
    const sums = y.map(() => 0), weights = y.map(() => 0);
    for (const forward of [true, false]) {
      let sum = 0, weight = 0, before = null;
      for (let i = 0; i < y.length; i++) {
        const n = forward ? i : y.length - 1 - i;
        const keep = before === null ? 0 : Math.exp(-Math.abs(x[n] - before) / span);
        before = x[n];
        sum *= keep;
        weight *= keep;
        if (!forward) {  // the point itself counts once
          sums[n] += sum;
          weights[n] += weight;
        }
        if (y[n] !== null) {
          sum += y[n];
          weight += 1;
        }
        if (forward) {
          sums[n] += sum;
          weights[n] += weight;
        }
      }
    }
    return y.map((value, n) => (value === null ? null : sums[n] / weights[n]));
  };
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle; else high = middle;
    }
    return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
  };

  class Chart {
    constructor(spec, parent) {
      this.spec = spec;
      this.log = spec.log;
      this.box = make("figure", "chart");
      this.caption();
      this.plot = make("div", "plot");
      this.plot.tabIndex = 0;
      this.plot.setAttribute("role", "group");
      this.plot.setAttribute("aria-label", this.label());
      this.tip = make("div", "tip");
      this.tip.hidden = true;
      this.box.append(this.plot, this.tip);
      parent.append(this.box);
      this.plot.addEventListener("keydown", (event) => this.key(event));
      this.plot.addEventListener("blur", () => { this.tip.hidden = true; });
      this.draw();
    }

    caption() {
      const head = make("figcaption");
      head.append(make("b", "", this.spec.title), make("span", "", this.spec.unit));
      const kinds = [...new Map(this.spec.lines.map((line) => [line.place, line.label]))];
      if (kinds.length > 1) {
        for (const [number, label] of kinds) {
          const entry = make("span", "");
          const swatch = make("i", many && number ? "swatch dash" : "swatch");
          if (many) swatch.style.borderColor = "currentColor"; else swatch.dataset.run = number;
          entry.append(swatch, label);
          head.append(entry);
        }
      }
      const bad = this.spec.lines.reduce((sum, line) => sum + line.bad, 0);
      if (bad) head.append(make("span", "bad", `\u2715 ${bad.toLocaleString("en-US")} not finite`));
      const label = make("label");
      const box = make("input");
      box.type = "checkbox";
      box.checked = this.log;
      box.addEventListener("change", () => { this.log = box.checked; this.draw(); });
      label.append(box, " log scale");
      head.append(label);
      this.box.append(head);
    }

    label() {
      const ends = this.spec.lines.map((line) => {
        const values = line.y.filter((value) => value !== null);
        const run = many ? `${data.runs[line.run].name}, ` : "";
        return `${run}${line.label} from ${format(values[0])} to ${format(values[values.length - 1])}`;
      });
      return `${this.spec.title}, ${this.spec.unit}: ${ends.slice(0, 6).join("; ")}. Arrow keys read the values.`;
    }

    lines() {
      const found = [];
      for (const line of this.spec.lines) {
        if (!shown[line.run]) continue;
        const own = { ...line, colour: colour(many ? line.run : line.place), dashed: many && line.place > 0 };
        own.x = across(line.x, line.run);
        own.meanX = line.mean_x ? across(line.mean_x, line.run) : own.x;
        own.meanY = line.mean_y || line.y;
        own.badX = across(line.bad_x, line.run);
        found.push(own);
      }
      return found;
    }

    draw() {
      const width = this.plot.clientWidth;
      if (!width) return;
      if (this.chart) this.chart.destroy();
      this.drawn = this.lines();
      const legal = (y) => (this.log ? y.map((value) => (value > 0 ? value : null)) : y);
      const tables = [], series = [{}];
      for (const line of this.drawn) {
        const averaged = line.smooth && view.smoothing > 0 && line.meanX.length > 20;
        const stroke = line.colour;
        const common = { stroke, spanGaps: false, dash: line.dashed ? [6, 4] : undefined };
        const many_points = line.x.length > 60;
        tables.push([line.x, legal(line.y)]);
        series.push({ ...common, width: averaged ? 1 : 1.75, alpha: averaged ? 0.3 : 1, points: { show: !many_points, size: 5, fill: stroke } });
        if (averaged) {
          tables.push([line.meanX, legal(smoothed(line.meanX, line.meanY, view.smoothing))]);
          series.push({ ...common, width: 2, points: { show: false } });
        }
      }
      const joined = tables.length ? uPlot.join(tables.map(([x, y]) => [x, y])) : [[0, 1], [null, null]];
      if (!tables.length) series.push({ show: false });
      this.chart = new uPlot(this.options(series, width), joined, this.plot);
    }

    options(series, width) {
      const axis = { stroke: css("--soft"), grid: { stroke: css("--grid"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
      const across_format = view.axis === "seconds" ? duration : short;
      return {
        width,
        height: this.plot.clientHeight,
        series,
        legend: { show: false },
        padding: [8, 14, 0, 0],
        scales: { x: { time: false, range: (chart, low, high) => range(low, high) }, y: { distr: this.log ? 3 : 1 } },
        axes: [
          { ...axis, size: 32, space: 70, values: (chart, ticks) => ticks.map((x) => (x === null ? "" : across_format(x))) },
          { ...axis, size: 58, values: (chart, ticks) => ticks.map((y) => (y === null ? "" : short(y))) },
        ],
        cursor: { sync: { key: "megatrain", scales: ["x", null] }, drag: { x: true, y: false }, points: { show: false }, y: false },
        hooks: {
          setCursor: [(chart) => this.hover(chart)],
          setSelect: [(chart) => this.select(chart)],
          draw: [(chart) => this.marks(chart)],
        },
      };
    }

    // Where resumed attempts began, as dashed lines; where a value is not finite, as crosses at the foot.
    marks(chart) {
      const { ctx } = chart, { left, top, width, height } = chart.bbox, ratio = uPlot.pxRatio;
      ctx.save();
      ctx.beginPath();
      ctx.rect(left, top, width, height);
      ctx.clip();
      ctx.lineWidth = ratio;
      ctx.setLineDash([3 * ratio, 4 * ratio]);
      ctx.strokeStyle = css("--soft");
      data.runs.forEach((run, number) => {
        if (!shown[number]) return;
        for (const step of across(run.resumed, number)) {
          const x = Math.round(chart.valToPos(step, "x", true)) + 0.5;
          ctx.beginPath();
          ctx.moveTo(x, top);
          ctx.lineTo(x, top + height);
          ctx.stroke();
        }
      });
      ctx.setLineDash([]);
      ctx.lineWidth = 2 * ratio;
      ctx.strokeStyle = css("--bad");
      for (const line of this.drawn) {
        for (const step of line.badX) {
          const x = chart.valToPos(step, "x", true), y = top + height - 8 * ratio, r = 4 * ratio;
          ctx.beginPath();
          ctx.moveTo(x - r, y - r);
          ctx.lineTo(x + r, y + r);
          ctx.moveTo(x + r, y - r);
          ctx.lineTo(x - r, y + r);
          ctx.stroke();
        }
      }
      ctx.restore();
    }

    select(chart) {
      if (chart.select.width < 4) return;
      const low = chart.posToVal(chart.select.left, "x");
      const high = chart.posToVal(chart.select.left + chart.select.width, "x");
      chart.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
      zoom([low, high]);
    }

    hover(chart) {
      const { left } = chart.cursor;
      if (left === null || left === undefined || left < 0 || !this.drawn.length) {
        this.tip.hidden = true;
        return;
      }
      const x = chart.posToVal(left, "x");
      this.tip.replaceChildren(make("div", "sub", place(x)));
      for (const line of this.drawn) {
        const row = make("div"), swatch = make("i", "swatch");
        swatch.style.background = line.colour;
        const what = many ? `${data.runs[line.run].name} ${this.kinds > 1 ? line.label : ""}` : line.label;
        row.append(swatch, `${what.trim()} ${this.reading(line, x)}${this.spec.suffix}`);
        this.tip.append(row);
      }
      this.tip.hidden = false;
      const wide = this.tip.offsetWidth, room = this.box.clientWidth;
      const from = this.plot.offsetLeft + chart.bbox.left / uPlot.pxRatio + left;
      this.tip.style.left = `${Math.max(4, Math.min(from + 14 + wide > room ? from - wide - 14 : from + 14, room - wide - 4))}px`;
      this.tip.style.top = `${this.plot.offsetTop + 8}px`;
    }

    get kinds() {
      return new Set(this.spec.lines.map((line) => line.place)).size;
    }

    // The value nearest to x. Of a thinned series: the mean of its share, and how far its values reach.
    reading(line, x) {
      if (!line.mean_x) return format(line.y[nearest(line.x, x)]);
      const at = nearest(line.meanX, x), near = nearest(line.x, line.meanX[at]);
      const values = line.y.slice(Math.max(0, near - 1), near + 2).filter((value) => value !== null);
      return `${format(line.meanY[at])} (${format(Math.min(...values))} to ${format(Math.max(...values))})`;
    }

    key(event) {
      const chart = this.chart, { min, max } = chart.scales.x, width = chart.over.clientWidth;
      const now = chart.cursor.left >= 0 ? chart.cursor.left : width / 2, step = event.shiftKey ? width / 10 : width / 100;
      const centre = chart.posToVal(now, "x"), half = (max - min) / 2;
      const moves = { ArrowLeft: now - step, ArrowRight: now + step, Home: 0, End: width };
      if (event.key in moves) {
        chart.setCursor({ left: Math.max(0, Math.min(width, moves[event.key])), top: 10 });
        document.getElementById("said").textContent = [...this.tip.children].map((row) => row.textContent).join(", ");
      } else if (event.key === "+" || event.key === "=") zoom([centre - half / 2, centre + half / 2]);
      else if (event.key === "-") zoom([centre - half * 2, centre + half * 2]);
      else if (event.key === "0" || event.key === "Escape") zoom(null);
      else return;
      event.preventDefault();
    }
  }

  const whole = () => {
    const ends = data.runs.filter((run, number) => shown[number]).map((run) => run.axes[view.axis]);
    const low = Math.min(...ends.map((values) => values[0])), high = Math.max(...ends.map((values) => values[values.length - 1]));
    return ends.length ? [low, high] : [0, 1];
  };
  const range = (low, high) => {
    const [first, last] = view.zoom || whole();
    return first < last ? [first, last] : [first - 1, first + 1];
  };
  const zoom = (to) => {
    const [first, last] = whole();
    const legal = to && [Math.max(first, to[0]), Math.min(last, to[1])];
    view.zoom = legal && legal[1] > legal[0] && (legal[0] > first || legal[1] < last) ? legal : null;
    document.getElementById("reset").disabled = !view.zoom;
    for (const each of built) {
      const [min, max] = range();
      if (each.chart) each.chart.setScale("x", { min, max });
    }
  };
  const redraw = () => built.forEach((each) => each.draw());
  const paint = () => {
    for (const swatch of document.querySelectorAll(".swatch[data-run]")) swatch.style.background = colour(+swatch.dataset.run);
  };

  const parent = document.getElementById("charts");
  for (const spec of data.charts) built.push(new Chart(spec, parent));

  const list = document.getElementById("runs");
  if (many) {
    data.runs.forEach((run, number) => {
      const button = make("button", "");
      const swatch = make("i", "swatch");
      swatch.dataset.run = number;
      button.type = "button";
      button.setAttribute("aria-pressed", "true");
      button.append(swatch, run.name);
      button.addEventListener("click", () => {
        shown[number] = !shown[number];
        button.setAttribute("aria-pressed", String(shown[number]));
        zoom(null);
        redraw();
      });
      list.append(button);
    });
  } else list.remove();

  if (data.runs.some((run) => run.resumed.length)) document.getElementById("notes").textContent = "A dashed vertical line is where the run was resumed.";
  const axis = document.getElementById("axis");
  for (const option of [...axis.options]) {
    if (!data.runs.every((run) => run.axes[option.value].some((value) => value > 0))) option.remove();
  }
  axis.addEventListener("change", () => { view.axis = axis.value; zoom(null); redraw(); });
  const smoothing = document.getElementById("smoothing");
  smoothing.addEventListener("change", () => { view.smoothing = +smoothing.value; redraw(); });
  document.getElementById("reset").addEventListener("click", () => zoom(null));
  parent.addEventListener("dblclick", () => zoom(null));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { paint(); redraw(); });
  let width = parent.clientWidth;
  new ResizeObserver(() => {
    if (parent.clientWidth === width) return;
    width = parent.clientWidth;
    for (const each of built) {
      if (each.chart) each.chart.setSize({ width: each.plot.clientWidth, height: each.plot.clientHeight });
    }
  }).observe(parent);
  paint();
})();
