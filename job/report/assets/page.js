"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data-of-page").textContent);
  const at = (id) => document.getElementById(id);
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const element = (tag, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };
  const dot = (color, faint = false) => {
    const made = element("span", { className: "dot" });
    made.style.background = style(color);
    if (faint) made.style.opacity = 0.35;
    return made;
  };
  const short = (value) => {
    if (value == null) return "";
    const size = Math.abs(value);
    return size && size < 1e-3 ? value.toExponential(1) : value.toLocaleString("en", { maximumSignificantDigits: 4 });
  };

  // A page that lies in a bucket does not know how old it is.
  const secondsSince = (moment) => Math.max(0, (Date.now() - Date.parse(moment)) / 1000);
  const tellAges = () => {
    for (const time of document.querySelectorAll("[data-ago]")) {
      const seconds = secondsSince(time.dateTime);
      const [size, unit] = seconds < 60 ? [1, "s"] : seconds < 3600 ? [60, "min"] : seconds < 172800 ? [3600, "h"] : [86400, "d"];
      if (Number.isFinite(seconds)) time.textContent = `${Math.floor(seconds / size)} ${unit} ago`;
    }
  };
  tellAges();
  setInterval(tellAges, 5000);

  const enlarged = element("dialog", { id: "enlarged" });
  document.body.append(enlarged);
  enlarged.addEventListener("click", () => enlarged.close());
  const enlargeable = (image) => {
    const button = element("button", { type: "button", className: "picture", ariaLabel: `Enlarge: ${image.alt}` });
    image.replaceWith(button);
    button.append(image);
    button.addEventListener("click", () => {
      const large = element("img", { src: image.src, alt: image.alt });
      const fitting = Math.min(innerWidth, (innerHeight * image.naturalWidth) / image.naturalHeight);
      large.style.width = `${Math.max(fitting, image.naturalWidth)}px`;
      enlarged.replaceChildren(large, element("button", { type: "button" }, "Close"));
      enlarged.ariaLabel = image.alt;
      enlarged.showModal();
    });
    return button;
  };
  document.querySelectorAll("main img").forEach(enlargeable);

  const scrubber = at("scrubber");
  if (scrubber) {
    const show = (image, caption, grid) => {
      image.src = grid.src;
      image.alt = `Sample grid of ${grid.moment}`;
      image.parentElement.ariaLabel = `Enlarge: ${image.alt}`;
      caption.textContent = grid.moment;
    };
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
    at("beside").addEventListener("change", (event) => {
      const chosen = event.target.value;
      at("other").classList.toggle("hidden", chosen === "");
      if (chosen !== "") show(at("other-grid"), at("other-caption"), data.grids[Number(chosen)]);
    });
  }

  const redraws = [];
  // Draws curves, with a tooltip and a legend. `shown` returns their { unit, logarithmic, lines }: a line has a label,
  // a color, x and values, and perhaps text `about` it; a faint one is not in the tooltip.
  const chart = (plot, shown) => {
    const figure = plot.parentElement;
    const tooltip = element("div", { className: "tooltip hidden" });
    tooltip.setAttribute("role", "status");
    const legend = element("ul", { className: "legend" });
    figure.append(tooltip, legend);
    let drawn, spec, columns;

    const nearest = ({ x: xs, values }, x) => {
      let [low, high] = [0, xs.length];
      while (low < high) {
        const middle = (low + high) >> 1;
        if (xs[middle] < x) low = middle + 1;
        else high = middle;
      }
      if (!xs.length || x < xs[0] || low === xs.length) return null;
      return values[low > 0 && x - xs[low - 1] < xs[low] - x ? low - 1 : low];
    };
    const told = (x) => {
      const { unit, lines } = spec;
      const said = [element("b", {}, `${unit} ${short(x)}`)];
      for (const line of lines) {
        const value = line.faint ? null : nearest(line, x);
        if (value != null) said.push(element("div", {}, dot(line.color), `${line.label} ${short(value)}`));
      }
      return said;
    };
    const point = (u) => {
      const { idx: index, left } = u.cursor;
      const hide = index == null || left < 0;
      tooltip.classList.toggle("hidden", hide);
      if (hide) return;
      tooltip.replaceChildren(...told(columns[0][index]));
      const x = left + u.bbox.left / devicePixelRatio;
      const width = tooltip.offsetWidth;
      tooltip.style.left = `${Math.max(0, Math.min(figure.clientWidth - width, x + (x > figure.clientWidth / 2 ? -width - 12 : 12)))}px`;
      tooltip.style.top = `${plot.offsetTop + 10}px`;
    };
    const draw = () => {
      drawn?.destroy();
      drawn = undefined;
      tooltip.classList.add("hidden");
      spec = shown();
      const { unit, lines } = spec;
      const entries = lines.map(({ label, color, faint, about }) =>
        element("li", {}, dot(color, faint), element("b", {}, label), ...(about ? [`: ${about}`] : [])));
      legend.replaceChildren(...(spec.legend ? entries : []));
      if (!lines.length) return;
      columns = uPlot.join(lines.map(({ x, values }) => [x, values]));
      const positive = columns.slice(1).every((values) => values.every((value) => value == null || value > 0));
      const axis = { stroke: style("faint"), grid: { stroke: style("line"), width: 1 }, ticks: { stroke: style("line"), width: 1 } };
      const series = lines.map((line) => ({
        label: line.label, stroke: style(line.color), alpha: line.faint ? 0.35 : 1, dash: line.dash,
        width: line.width ?? 1.2, spanGaps: true, points: { show: line.values.length < 30, size: 5 },
      }));
      drawn = new uPlot({
        width: Math.max(280, plot.clientWidth), height: 300,
        scales: { x: { time: false }, y: { distr: spec.logarithmic && positive ? 3 : 1 } },
        axes: [{ ...axis, label: unit, labelSize: 22 }, { ...axis, size: 62, values: (_, ticks) => ticks.map((tick) => (tick == null ? null : short(tick))) }],
        series: [{ label: unit }, ...series],
        cursor: { y: false, points: { size: 6 } },
        legend: { show: false },
        hooks: { setCursor: [point] },
      }, columns, plot);
    };
    plot.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
      if (by === undefined || !drawn) return;
      event.preventDefault();
      const last = columns[0].length - 1;
      const index = Math.max(0, Math.min(last, (drawn.cursor.idx ?? (by < 0 ? last + 1 : -1)) + by));
      drawn.setCursor({ left: drawn.valToPos(columns[0][index], "x"), top: 20 });
    });
    redraws.push(draw);
    return draw;
  };
  const line = (x, values, more) => {
    const known = [...x.keys()].filter((index) => x[index] != null && values[index] != null);
    return { ...more, x: known.map((index) => x[index]), values: known.map((index) => values[index]) };
  };
  // As `ddpm.figures.smoothed` does.
  const smoothed = (values, radius) => values.map((_, index) => {
    const near = Math.min(index, radius);
    const some = values.slice(index - near, index + near + 1);
    return some.reduce((sum, value) => sum + value, 0) / some.length;
  });

  const charts = at("charts");
  for (const made of charts ? data.charts : []) {
    const plot = element("div", { className: "plot", tabIndex: 0, role: "img" });
    plot.ariaLabel = `Chart: ${made.title}. ${made.summary}. Arrow keys move along it.`;
    const controls = element("div", { className: "controls" });
    const box = (name, text, checked) => {
      const input = element("input", { type: "checkbox", id: `${name}-${made.name}`, checked });
      controls.append(element("label", {}, input, ` ${text}`));
      input.addEventListener("change", () => draw());
      return input;
    };
    const log = made.log === undefined ? null : box("log", "Logarithmic scale", made.log);
    const more = made.series.some((series) => series.more) ? box("more", made.more, false) : null;
    charts.append(element("figure", { className: "chart", id: `chart-${made.name}` },
      element("h3", {}, made.title), element("figcaption", {}, made.summary), controls, plot));
    const lines = made.series.map((series) => line(made.x, series.values, { ...series, width: series.color === "loss" ? 2.2 : 1.2 }));
    if (made.smooth) {
      const raw = { ...lines[0], label: `${lines[0].label}, each row`, about: "not smoothed", faint: true, width: 1.2 };
      for (const each of lines.filter(({ label }) => label !== "held out")) {
        each.values = smoothed(each.values, Math.floor(each.values.length / 25));
      }
      lines.push(raw);
    }
    const draw = chart(plot, () => ({
      unit: data.unit, logarithmic: log?.checked, legend: lines.some(({ about }) => about),
      lines: lines.filter((each) => !each.more || more?.checked),
    }));
  }

  const table = at("runs");
  for (const button of table?.querySelectorAll("th button") ?? []) {
    const head = button.parentElement;
    const cell = (row) => row.cells[head.cellIndex];
    const value = (row) => cell(row)?.dataset.value ?? cell(row)?.textContent ?? "";
    button.addEventListener("click", () => {
      const ascending = head.getAttribute("aria-sort") !== "ascending";
      for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => (ascending ? 1 : -1) * value(a).localeCompare(value(b), "en", { numeric: true }));
      table.tBodies[0].append(...rows);
    });
  }

  if (at("losses")) {
    const marks = [...table.querySelectorAll(".mark input")];
    // A run keeps its colour while it is marked.
    const places = [];
    const marked = () => {
      const names = marks.filter((mark) => mark.checked).map((mark) => mark.value);
      places.forEach((name, place) => names.includes(name) || delete places[place]);
      for (const name of names.filter((each) => !places.includes(each))) {
        const free = places.findIndex((each) => each === undefined);
        places[free < 0 ? places.length : free] = name;
      }
      return names.map((name) => {
        const place = places.indexOf(name);
        return { name, color: `run${place % 8}`, dash: [[], [8, 4], [2, 4]][Math.floor(place / 8) % 3], run: data.runs[name] };
      });
    };
    const draw = chart(at("losses"), () => {
      const axis = at("axis").value;
      const lines = marked().map(({ name, color, dash, run: { loss, epoch_images: epoch } }) => {
        const x = { epochs: loss.images.map((images) => (epoch ? images / epoch : null)), images: loss.images, hours: loss.hours }[axis];
        const radius = Math.round((loss.values.length * at("smoothing").valueAsNumber) / 100);
        return line(x, smoothed(loss.values, radius), { label: name, color, dash, width: 2 });
      });
      const unit = { epochs: "epoch", images: "images seen", hours: "hours" }[axis];
      return { unit, logarithmic: at("log-losses").checked, lines, legend: true };
    });
    const compare = () => {
      const runs = marked();
      const figures = runs.map(({ name, color }) => {
        const { src } = table.querySelector(`img[data-run="${name}"]`) ?? {};
        const caption = element("figcaption", {}, dot(color), name);
        if (!src) return element("figure", {}, caption);
        const figure = element("figure", {}, element("img", { src, alt: `Newest sample grid of ${name}` }), caption);
        enlargeable(figure.firstChild);
        return figure;
      });
      at("grids").replaceChildren(...figures);
      const head = (text, scope) => Object.assign(element("th", {}, text), { scope });
      const shown = (value) => (value === undefined ? "none" : JSON.stringify(value));
      const keys = Object.keys(Object.assign({}, ...runs.map(({ run }) => run.config)));
      const rows = keys.map((key) => [key, ...runs.map(({ run }) => shown(run.config[key]))]).filter(([, ...values]) => new Set(values).size > 1);
      at("differing").tHead.rows[0].replaceChildren(head("Key", "col"), ...runs.map(({ name }) => head(name, "col")));
      at("differing").tBodies[0].replaceChildren(...rows.map(([key, ...values]) =>
        element("tr", {}, head(key, "row"), ...values.map((value) => element("td", {}, value)))));
      at("differing").classList.toggle("hidden", !rows.length);
      draw();
    };
    for (const mark of marks) mark.addEventListener("change", compare);
    at("clear").addEventListener("click", () => {
      for (const mark of marks) mark.checked = false;
      compare();
    });
    for (const id of ["axis", "smoothing", "log-losses"]) at(id).addEventListener("input", draw);
    compare();
  }
  // Once all of them have their place.
  redraws.forEach((draw) => draw());

  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width) redraws.forEach((draw) => draw());
    width = innerWidth;
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraws.forEach((draw) => draw()));

  if (data.running) {
    const written = document.querySelector("header time").dateTime;
    const controls = () => document.querySelectorAll("input, select, details");
    for (const control of controls()) {
      const kept = history.state?.[control.id];
      if (kept === undefined) continue;
      if (control.tagName === "DETAILS") control.open = kept;
      else if (control.type === "checkbox") control.checked = kept;
      else control.value = kept;
      control.dispatchEvent(new Event(control.type === "range" ? "input" : "change"));
    }
    const reload = () => {
      const kept = {};
      for (const control of controls()) {
        // The newest grid stays the newest.
        if (control === scrubber && control.value === control.max) continue;
        kept[control.id] = control.tagName === "DETAILS" ? control.open : control.type === "checkbox" ? control.checked : control.value;
      }
      history.replaceState(kept, "");
      location.reload();
    };
    const loaded = Date.now();
    let touched = 0;
    for (const kind of ["pointermove", "pointerdown", "keydown", "wheel"]) {
      addEventListener(kind, () => (touched = Date.now()), { passive: true });
    }
    setInterval(() => {
      const age = secondsSince(written);
      at("silent").classList.toggle("hidden", age < 1800);
      // The longer the run is silent, the rarer; a killed one stays silent for ever.
      const due = (Date.now() - loaded) / 1000 > Math.max(15, age / 10) && age < 86400;
      const busy = document.hidden || enlarged.open || Date.now() - touched < 5000 || !getSelection().isCollapsed;
      if (due && !busy) reload();
    }, 1000);
  }
})();
