"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const runs = data.runs;
  const at = (id) => document.getElementById(id);
  const make = (tag, text, name) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text; // never innerHTML: texts of models are shown here
    if (name) made.className = name;
    return made;
  };
  const shown = runs.map(() => true);
  const number = (value) => (value === null || value === undefined ? "–" : Number.isInteger(+value) ? String(+value) : String(+(+value).toPrecision(6)));
  const whole = (value) => value.toLocaleString("en");
  // What a CSS variable comes to under the theme that holds.
  const probe = document.body.appendChild(make("i"));
  probe.hidden = true;
  const color = (name) => {
    probe.style.color = `var(${name})`;
    return getComputedStyle(probe).color;
  };

  // ---- the head ------------------------------------------------------------------------------------------------

  at("title").textContent = runs.map((run) => run.name).join(" and ");
  document.title = at("title").textContent;
  at("summary").textContent = runs
    .map((run) => {
      const parts = [`${run.name}: ${whole(run.updates)} updates`];
      if (run.trajectories) parts.push(`${whole(run.trajectories)} trajectories in them`);
      if (run.rollouts) parts.push(`${whole(run.rollouts)} rollouts saved`);
      else parts.push("no rollouts saved, which `save_rollouts=True` does; distribution, calibration and completions need them");
      if (run.skipped.length) parts.push(`skipped updates: ${run.skipped.slice(0, 20).join(", ")}${run.skipped.length > 20 ? ", …" : ""}`);
      return parts.join("; ");
    })
    .join(". ") + `. Written by tbrm-trl ${data.version}.`;

  const advised = runs.filter((run) => run.advice.length);
  at("advice").hidden = !advised.length;
  advised.forEach((run) => {
    if (runs.length > 1) at("advice").append(make("h3", run.name));
    const list = at("advice").appendChild(make("ul"));
    run.advice.forEach((sentence) => list.append(make("li", sentence)));
  });

  const settings = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))];
  at("settings").hidden = !settings.length;
  const table = at("settings").querySelector("table");
  const head = table.insertRow();
  ["", ...runs.map((run) => run.name)].forEach((name) => head.append(make("th", name)));
  settings.forEach((name) => {
    const row = table.insertRow();
    const values = runs.map((run) => run.settings[name] ?? "–");
    [name, ...values].forEach((value) => (row.insertCell().textContent = value));
    if (new Set(values).size > 1) row.className = "differs";
  });

  if (runs.length > 1)
    runs.forEach((run, i) => {
      const label = make("label");
      const box = make("input");
      box.type = "checkbox";
      box.checked = true;
      box.addEventListener("change", () => { shown[i] = box.checked; draw(); });
      const swatch = make("span", undefined, "swatch");
      swatch.style.borderTopStyle = i ? "dashed" : "solid";
      label.append(box, swatch, run.name);
      at("runs").append(label, " ");
    });

  // ---- charts --------------------------------------------------------------------------------------------------

  const titles = [...new Set(runs.flatMap((run) => run.charts.map((chart) => chart.title)))];
  const order = ["Reward", "Evaluation", "Residual", "Distribution of the residual", "Soft value and log-ratio", "KL", "Entropy", "Length"];
  const rank = (title) => (order.includes(title) ? order.indexOf(title) : order.length + titles.indexOf(title));
  titles.sort((a, b) => rank(a) - rank(b));
  const cursor = uPlot.sync("report");
  let plots = [];

  const smoothed = (values, factor) => {
    let mean = null, weight = 0;
    return values.map((value) => {
      if (value === null || value === undefined || !factor) return value;
      mean = (mean ?? 0) * factor + value * (1 - factor);
      weight = weight * factor + 1 - factor;
      return mean / weight;
    });
  };
  const axes = (unit) => {
    const both = { stroke: color("--quiet"), grid: { stroke: color("--line"), width: 1 }, ticks: { stroke: color("--line") }, font: "12px system-ui" };
    return [both, { ...both, size: 62, label: unit, labelSize: unit ? 18 : 0, labelFont: "12px system-ui", values: (u, ticks) => ticks.map((t) => number(t)) }];
  };
  const put = (options, values, place) => plots.push(new uPlot(options, values, place));

  function drawChart(title, place) {
    const charts = runs.map((run, i) => shown[i] && run.charts.find((chart) => chart.title === title));
    const names = [...new Set(charts.flatMap((chart) => (chart ? Object.keys(chart.lines) : [])))];
    if (!names.length) return;
    const first = charts.find(Boolean);
    const factor = +at("smoothing").value;
    const tables = [], series = [{ label: "update", value: (u, v) => number(v) }], bands = [];
    charts.forEach((chart, i) => {
      if (!chart) return;
      const mine = names.filter((name) => name in chart.lines);
      const start = series.length;
      tables.push([chart.steps, ...mine.map((name) => smoothed(chart.lines[name], factor))]);
      mine.forEach((name) => {
        const hue = names.length === 1 || names.includes("25%") ? i : names.indexOf(name) % 8;
        const faint = names.includes("25%") && name !== "median";
        series.push({
          label: (runs.length > 1 ? `${runs[i].name} ` : "") + name.replace(/^(completions|residual|rewards)\//, ""), stroke: color(`--c${hue}`), width: faint ? 0.7 : 1.7,
          dash: i ? [6, 4] : undefined, spanGaps: true, value: (u, v) => number(v), points: { show: chart.steps.length < 2 },
        });
      });
      [["95%", "5%"], ["75%", "25%"]].forEach(([top, bottom]) => {
        if (mine.includes(top) && mine.includes(bottom))
          bands.push({ series: [start + mine.indexOf(top), start + mine.indexOf(bottom)], fill: color(`--c${i}`).replace("rgb(", "rgba(").replace(")", ", 0.14)") });
      });
    });
    const values = tables.length > 1 ? uPlot.join(tables) : tables[0];
    // uPlot's own range, but for zeros alone, which it would show from 0 to 100.
    const range = (u, low, high) => low === null ? [null, null] : low === 0 && high === 0 ? [0, 1] : uPlot.rangeNum(low, high, 0.1, true);
    put({ width: place.clientWidth, height: 240, series, bands, axes: axes(first.unit), scales: { x: { time: false }, y: { range } }, cursor: { sync: { key: cursor.key } } }, values, place);
  }

  const places = titles.map((title) => {
    const card = make("div", undefined, "card");
    const charts = runs.map((run) => run.charts.find((one) => one.title === title));
    const notes = charts.flatMap((chart, i) => (chart && chart.entries_per_point > 1 ? [`Each point${runs.length > 1 ? ` of ${runs[i].name}` : ""} is a mean of ${chart.entries_per_point} log entries.`] : []));
    const place = make("div", undefined, "chart");
    place.dataset.title = title;
    card.append(make("h2", title), make("p", [charts.find(Boolean).text, ...notes].join(" ")), place);
    at("charts").append(card);
    return place;
  });

  // ---- calibration ---------------------------------------------------------------------------------------------

  const periods = Math.max(...runs.map((run) => run.calibration.length));
  at("calibration").hidden = !periods;
  at("period").max = periods - 1;
  at("period").value = periods - 1;

  function drawCalibration() {
    if (!periods) return;
    const wanted = +at("period").value;
    const chosen = runs.map((run, i) => (shown[i] ? run.calibration[Math.min(wanted, run.calibration.length - 1)] : undefined));
    const some = chosen.flatMap((one) => (one ? [...one.realised, ...one.predicted] : [])).filter((v) => v !== null);
    const low = Math.min(...some), high = Math.max(...some), room = (high - low || 1) * 0.05;
    const range = some.length ? [low - room, high + room] : [0, 1];
    const tables = [[range, range]];
    const series = [{ label: "realised", value: (u, v) => number(v) }, { label: "equal", stroke: color("--quiet"), dash: [4, 4], points: { show: false }, spanGaps: true, value: (u, v) => number(v) }];
    chosen.forEach((one, i) => {
      if (!one) return;
      // uPlot wants every x once: points of equal x are moved apart by less than can be seen.
      let last = -Infinity;
      const xs = one.realised.map((x) => (last = Math.max(x, last + (range[1] - range[0]) * 1e-7)));
      tables.push([xs, one.predicted]);
      series.push({ label: runs.length > 1 ? runs[i].name : "predicted", stroke: color(`--c${i}`), fill: color(`--c${i}`), paths: () => null, points: { show: true, size: 5, fill: color(`--c${i}`) }, value: (u, v) => number(v) });
    });
    const place = at("calibration-chart");
    const [across, up] = axes("predicted, reward");
    put({ width: place.clientWidth, height: Math.min(440, place.clientWidth * 0.8), series, axes: [{ ...across, label: "realised, reward", labelSize: 18, labelFont: "12px system-ui", size: 36, values: (u, ticks) => ticks.map((t) => number(t)) }, up], scales: { x: { time: false, range: () => range }, y: { range: () => range } }, cursor: { drag: { x: false, y: false } } }, uPlot.join(tables), place);
    const said = [...new Set(chosen.filter(Boolean).map((one) => `updates ${one.first} to ${one.last}`))];
    at("period-value").textContent = said.length === 1 ? said[0] : "";  // else each run has its own, said below
    at("calibration-text").textContent = chosen
      .flatMap((one, i) => (one ? [`${runs[i].name}, updates ${one.first} to ${one.last}: predicted less realised is ${number(one.mean_gap)} in the mean, ${number(one.rms_gap)} in root mean square, over ${whole(one.prompts)} prompts${one.prompts > one.realised.length ? `, of which ${one.realised.length} are shown` : ""}`] : []))
      .join(". ") + ".";
  }

  function draw() {
    plots.forEach((plot) => plot.destroy());
    plots = [];
    at("smoothing-value").textContent = (+at("smoothing").value).toFixed(2);
    titles.forEach((title, i) => drawChart(title, places[i]));
    drawCalibration();
  }
  at("smoothing").addEventListener("input", draw);
  at("period").addEventListener("input", draw);
  at("theme").addEventListener("change", () => { document.documentElement.style.colorScheme = at("theme").value; draw(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; draw(); } });

  // ---- completions ---------------------------------------------------------------------------------------------

  const PAGE = 40;
  let found = [], listed = 0;
  const withSome = runs.filter((run) => run.completions.length);
  at("completions").hidden = !withSome.length;
  at("which").hidden = withSome.length < 2;
  withSome.forEach((run) => at("run").append(new Option(run.name, runs.indexOf(run))));
  const inRange = (value, low, high) => (low === "" || (value !== null && value >= +low)) && (high === "" || (value !== null && value <= +high));
  const keys = { surprise: (one) => -Math.abs(one.residual ?? 0) };

  function search() {
    const run = runs[+at("run").value || 0];
    const text = at("text").value.toLowerCase(), by = at("order").value, key = keys[by] ?? ((one) => one[by] ?? -Infinity);
    found = run.completions
      .filter((one) => inRange(one.update, at("from").value, at("to").value) && inRange(one.reward, at("low").value, at("high").value))
      .filter((one) => !text || one.prompt.toLowerCase().includes(text) || one.completion.toLowerCase().includes(text))
      .sort((a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : a.update - b.update));
    at("completions-text").textContent = run.completions.length < run.rollouts
      ? `${whole(run.completions.length)} of ${whole(run.rollouts)} saved rollouts, spread evenly over updates and over the rewards of each.`
      : `All ${whole(run.rollouts)} saved rollouts.`;
    at("found").textContent = `${whole(found.length)} found.`;
    at("list").replaceChildren();
    listed = 0;
    more();
  }
  function more() {
    found.slice(listed, listed + PAGE).forEach((one) => {
      const article = make("article"), line = make("header");
      const fact = (name, value) => { const span = make("span", `${name} `); span.append(make("b", value)); line.append(span); };
      fact("drawn for update", number(one.update));
      fact("reward", number(one.reward));
      fact("β δ", number(one.residual));
      fact("β V", number(one.soft_value));
      if (one.origin) fact("last used", `${one.origin}, update ${one.last_update}`);
      fact("tokens", `${one.length}, ${one.end}`);
      article.append(line, make("pre", one.prompt, "prompt"), make("pre", one.completion));
      at("list").append(article);
    });
    listed = Math.min(found.length, listed + PAGE);
    at("more").hidden = listed >= found.length;
  }
  ["run", "from", "to", "low", "high", "text", "order"].forEach((id) => at(id).addEventListener("input", search));
  at("more").addEventListener("click", more);

  draw();
  if (withSome.length) search();
})();
