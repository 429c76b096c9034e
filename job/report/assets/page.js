"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data-of-page").textContent);
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const element = (tag, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };
  const short = (value) => {
    if (value == null) return "";
    const size = Math.abs(value);
    return size && size < 1e-3 ? value.toExponential(1) : value.toLocaleString("en", { maximumSignificantDigits: 4 });
  };

  // How long ago: a page that lies in a bucket does not know it otherwise.
  for (const time of document.querySelectorAll("[data-ago]")) {
    const minutes = Math.round((Date.now() - Date.parse(time.dateTime)) / 60000);
    const [count, unit] = minutes < 60 ? [minutes, "minute"] : minutes < 2880 ? [Math.round(minutes / 60), "hour"] : [Math.round(minutes / 1440), "day"];
    if (Number.isFinite(minutes) && minutes >= 0) time.textContent = `${time.dateTime} (${count} ${unit}${count === 1 ? "" : "s"} ago)`;
  }

  const scrubber = document.getElementById("scrubber");
  if (scrubber) {
    const show = (image, caption, grid) => {
      image.src = grid.src;
      image.alt = `Sample grid of ${grid.moment}`;
      caption.textContent = grid.moment;
    };
    const at = (id) => document.getElementById(id);
    const move = () => {
      const grid = data.grids[scrubber.valueAsNumber];
      show(at("grid"), at("caption"), grid);
      at("moment").textContent = grid.moment;
      scrubber.setAttribute("aria-valuetext", grid.moment);
    };
    const step = (by) => {
      scrubber.value = scrubber.valueAsNumber + by;
      move();
    };
    scrubber.addEventListener("input", move);
    at("earlier").addEventListener("click", () => step(-1));
    at("later").addEventListener("click", () => step(1));
    at("beside")?.addEventListener("change", (event) => {
      const chosen = event.target.value;
      at("other").classList.toggle("hidden", chosen === "");
      if (chosen !== "") show(at("other-grid"), at("other-caption"), data.grids[Number(chosen)]);
    });
  }

  const charts = document.getElementById("charts");
  const redraws = [];
  for (const chart of charts ? data.charts ?? [] : []) {
    const plot = element("div", { className: "plot", tabIndex: 0 });
    plot.setAttribute("role", "img");
    plot.setAttribute("aria-label", `Chart: ${chart.title}. ${chart.summary}. Arrow keys move along it.`);
    const tooltip = element("div", { className: "tooltip hidden" });
    tooltip.setAttribute("role", "status");
    const log = element("button", { type: "button" });
    const figure = element("figure", { className: "chart", id: `chart-${chart.name}` },
      element("h3", {}, chart.title), element("figcaption", {}, chart.summary), plot, tooltip);
    if (chart.log !== undefined) figure.insertBefore(element("div", { className: "controls" }, log), plot);
    charts.append(figure);
    let logarithmic = chart.log === true;
    let drawn;

    const columns = [chart.x, ...chart.series.map((series) => series.values)];
    const interpolated = (ends, x) => {
      const { band } = chart;
      const after = band.x.findIndex((each) => each >= x);
      if (after < 0 || (after === 0 && x < band.x[0])) return null;
      if (after === 0) return ends[0];
      const share = (x - band.x[after - 1]) / (band.x[after] - band.x[after - 1]);
      return ends[after - 1] + share * (ends[after] - ends[after - 1]);
    };
    const bands = [];
    if (chart.band) {
      columns.push(chart.x.map((x) => interpolated(chart.band.low, x)), chart.x.map((x) => interpolated(chart.band.high, x)));
      bands.push({ series: [columns.length - 1, columns.length - 2] });
    }

    const told = (index) => {
      const lines = [element("b", {}, `${data.unit ?? "epoch"} ${short(chart.x[index])}`)];
      for (const series of chart.series) {
        const value = series.values[index];
        if (value == null || series.faint) continue;
        const dot = element("i");
        dot.style.background = style(series.color);
        lines.push(element("div", {}, dot, `${series.label} ${short(value)}`));
      }
      if (chart.band && columns.at(-1)[index] != null) {
        lines.push(element("div", {}, `usual ${short(columns.at(-2)[index])} to ${short(columns.at(-1)[index])}`));
      }
      return lines;
    };
    const point = (u) => {
      const { idx: index, left } = u.cursor;
      const hide = index == null || left < 0;
      tooltip.classList.toggle("hidden", hide);
      if (hide) return;
      tooltip.replaceChildren(...told(index));
      const x = left + u.bbox.left / devicePixelRatio;
      const width = tooltip.offsetWidth;
      tooltip.style.left = `${Math.max(0, Math.min(figure.clientWidth - width, x + (x > figure.clientWidth / 2 ? -width - 12 : 12)))}px`;
      tooltip.style.top = `${plot.offsetTop + 10}px`;
    };
    const draw = () => {
      drawn?.destroy();
      const axis = { stroke: style("faint"), grid: { stroke: style("line"), width: 1 }, ticks: { stroke: style("line"), width: 1 } };
      const positive = columns.slice(1).every((values) => values.every((value) => value == null || value > 0));
      const lines = chart.series.map((series) => ({
        label: series.label, stroke: style(series.color) + (series.faint ? "55" : ""), width: series.color === "loss" && !series.faint ? 2.2 : 1.2,
        spanGaps: true, points: { show: series.values.filter((value) => value != null).length < 30, size: 5 },
      }));
      const ends = chart.band ? ["low", "high"].map((end) => ({ label: `usual, ${end}`, stroke: style("faint"), width: 1, dash: [4, 4], spanGaps: true, points: { show: false } })) : [];
      drawn = new uPlot({
        width: Math.max(280, plot.clientWidth), height: 300,
        scales: { x: { time: false }, y: { distr: logarithmic && positive ? 3 : 1 } },
        axes: [{ ...axis, label: data.unit ?? "epoch", labelSize: 22 }, { ...axis, size: 62, values: (_, ticks) => ticks.map((tick) => (tick == null ? null : short(tick))) }],
        series: [{ label: data.unit ?? "epoch" }, ...lines, ...ends],
        bands: bands.map((band) => ({ ...band, fill: style("band") })),
        cursor: { y: false, points: { size: 6 } },
        legend: { live: false },
        hooks: { setCursor: [point] },
      }, columns, plot);
      log.textContent = logarithmic ? "Linear scale" : "Logarithmic scale";
      log.disabled = !positive;
    };
    log.addEventListener("click", () => {
      logarithmic = !logarithmic;
      draw();
    });
    plot.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
      if (by === undefined) return;
      event.preventDefault();
      const last = chart.x.length - 1;
      const index = Math.max(0, Math.min(last, (drawn.cursor.idx ?? (by < 0 ? last + 1 : -1)) + by));
      drawn.setCursor({ left: drawn.valToPos(chart.x[index], "x"), top: 20 });
    });
    redraws.push(draw);
  }
  // Once all of them have their place.
  redraws.forEach((draw) => draw());

  const table = document.getElementById("runs");
  for (const [place, button] of [...(table?.querySelectorAll("th button") ?? [])].entries()) {
    const cell = (row) => row.cells[place + 1];
    const value = (row) => cell(row)?.dataset.value ?? cell(row)?.textContent ?? "";
    button.addEventListener("click", () => {
      const head = button.parentElement;
      const ascending = head.getAttribute("aria-sort") !== "ascending";
      for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => (ascending ? 1 : -1) * value(a).localeCompare(value(b), "en", { numeric: true }));
      table.tBodies[0].append(...rows);
    });
  }

  const sides = ["first", "second"].map((side) => document.getElementById(side));
  if (sides[0]) {
    let losses;
    const draw = () => {
      const chosen = sides.map((side) => data.runs[side.value]);
      for (const [number, side] of sides.entries()) {
        const image = document.getElementById(`${side.id}-grid`);
        const { src = "" } = table.querySelector(`img[data-run="${side.value}"]`) ?? {};
        image.classList.toggle("hidden", !src);
        image.src = src;
        image.alt = `Newest sample grid of ${side.value}`;
        document.getElementById(`${side.id}-caption`).textContent = side.value;
        document.getElementById(`${side.id}-head`).textContent = side.value;
      }
      const keys = Object.keys({ ...chosen[0].config, ...chosen[1].config });
      const shown = (value) => (value === undefined ? "none" : JSON.stringify(value));
      const rows = keys.filter((key) => shown(chosen[0].config[key]) !== shown(chosen[1].config[key])).map((key) =>
        element("tr", {}, Object.assign(element("th", {}, key), { scope: "row" }), ...chosen.map((run) => element("td", {}, shown(run.config[key])))));
      document.getElementById("differing").tBodies[0].replaceChildren(...rows);
      losses?.destroy();
      const plot = document.getElementById("losses");
      const axis = { stroke: style("faint"), grid: { stroke: style("line"), width: 1 }, ticks: { stroke: style("line"), width: 1 } };
      const lines = sides.map((side, number) => ({ label: side.value, stroke: style(["loss", "q3"][number]), width: 2, spanGaps: true, points: { show: false } }));
      losses = new uPlot({
        width: Math.max(280, plot.clientWidth), height: 300, scales: { x: { time: false }, y: { distr: 3 } },
        axes: [{ ...axis, label: "epoch", labelSize: 22 }, { ...axis, size: 62, values: (_, ticks) => ticks.map((tick) => (tick == null ? null : short(tick))) }],
        series: [{ label: "epoch", value: (_, x) => short(x) }, ...lines.map((line) => ({ ...line, value: (_, y) => short(y) }))],
      }, uPlot.join(chosen.map((run) => [run.loss.x, run.loss.values])), plot);
    };
    for (const side of sides) side.addEventListener("change", draw);
    draw();
    redraws.push(draw);
  }

  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width) redraws.forEach((draw) => draw());
    width = innerWidth;
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraws.forEach((draw) => draw()));
})();
