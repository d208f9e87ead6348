// The browser's half of the explorer. It draws what the kernel sends and keeps nothing: figures and completions arrive as
// custom messages, never as widget state, so a saved notebook holds none of them.

const sections = `
  <h4 data-title="tokens"></h4><div data-html="tokens"></div>
  <h4 data-title="map"></h4><div class="sgx-plot" data-plot="map"></div>
  <div class="sgx-columns">
    <div><h4 data-title="gap"></h4><div class="sgx-plot" data-plot="gap"></div></div>
    <div><h4 data-title="focus"></h4><div data-html="focus"></div>
         <h4 data-title="next"></h4><div data-html="next"></div></div>
  </div>
  <h4 data-title="answers"></h4><div class="sgx-answers"></div>
  <h4 data-title="trajectory"></h4><div class="sgx-plot" data-plot="trajectory"></div>`;

async function unpacked(buffer) {
  const stream = new Blob([buffer]).stream().pipeThrough(new DecompressionStream("gzip"));
  return await new Response(stream).text();
}

// plotly.js comes with the Python package and is sent once per page; nothing is loaded from a server.
async function loadPlotly(buffer) {
  if (window.__sgxPlotly) return window.__sgxPlotly;
  const code = await unpacked(buffer);
  const wrapped = `const module = { exports: {} };
    (function (module, exports, define) { ${code}
    }).call(globalThis, module, module.exports, undefined);
    export default module.exports;`;
  const url = URL.createObjectURL(new Blob([wrapped], { type: "text/javascript" }));
  try {
    const loaded = (await import(/* webpackIgnore: true */ url)).default;
    window.__sgxPlotly = loaded && loaded.react ? loaded : window.Plotly;
  } finally {
    URL.revokeObjectURL(url);
  }
  return window.__sgxPlotly;
}

// The page's own background says what it looks like, in every host.
function themeOf(element) {
  const named = document.body.dataset.jpThemeLight;
  if (named !== undefined) return named === "false" ? "dark" : "light";
  for (let node = element; node; node = node.parentElement) {
    const parts = getComputedStyle(node).backgroundColor.match(/[\d.]+/g);
    if (parts && (parts.length < 4 || Number(parts[3]) > 0)) {
      return 0.299 * parts[0] + 0.587 * parts[1] + 0.114 * parts[2] < 128 ? "dark" : "light";
    }
  }
  return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}

function render({ model, el }) {
  el.classList.add("sgx");
  el.innerHTML = sections;
  const part = (kind, name) => el.querySelector(`[data-${kind}="${name}"]`);
  const answers = el.querySelector(".sgx-answers");
  const waiting = new Map();
  let plotly = null;
  let theme = null;

  async function draw(name, figure) {
    const place = part("plot", name);
    if (!place) return;
    if (!figure) {
      if (plotly) plotly.purge(place);
      place.innerHTML = "";
      return;
    }
    if (!plotly) {
      waiting.set(name, figure);
      return;
    }
    const config = { responsive: true, displaylogo: false, displayModeBar: "hover" };
    await plotly.react(place, figure.data, figure.layout, config);
    if (!place.dataset.listens) {
      place.dataset.listens = "yes";
      place.on("plotly_click", (event) => {
        const point = event.points && event.points[0];
        if (name === "map" && point && point.customdata && point.data.name === "shift") {
          model.send({ kind: "cell", layer: point.customdata[0], column: point.customdata[1] });
        } else if (name === "gap" && point) {
          model.send({ kind: "layer", layer: point.x });
        }
      });
    }
  }

  function answer(message) {
    let box = answers.querySelector(`[data-arm="${message.arm}"]`);
    if (!box) {
      box = document.createElement("div");
      box.className = "sgx-answer";
      box.dataset.arm = message.arm;
      box.innerHTML = "<header><span></span><span></span></header><div class='sgx-text'></div>";
      answers.append(box);
    }
    const [name, state] = box.querySelector("header").children;
    name.innerHTML = message.heading;
    state.textContent = message.state;
    const text = box.querySelector(".sgx-text");
    text.classList.toggle("sgx-hidden", message.text === null);
    text.textContent = message.text === null ? "hidden" : message.text;
  }

  async function receive(message, buffers) {
    if (message.kind === "plotly") {
      plotly = await loadPlotly(buffers[0]);
      for (const [name, figure] of waiting) await draw(name, figure);
      waiting.clear();
    } else if (message.kind === "html") {
      part("html", message.name).innerHTML = message.html;
    } else if (message.kind === "title") {
      part("title", message.name).innerHTML = message.html;
    } else if (message.kind === "figure") {
      await draw(message.name, message.figure);
    } else if (message.kind === "answer") {
      answer(message);
    } else if (message.kind === "copy") {
      if (navigator.clipboard) navigator.clipboard.writeText(message.text).catch(() => {});
    }
  }

  function announce(first) {
    const now = themeOf(el);
    if (!first && now === theme) return;
    theme = now;
    el.classList.toggle("sgx-dark", theme === "dark");
    model.send(first ? { kind: "ready", theme, plotly: !window.__sgxPlotly } : { kind: "theme", theme });
  }

  model.on("msg:custom", receive);
  const observer = new MutationObserver(() => announce(false));
  observer.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "class"] });
  // Known only once the element is on the page.
  requestAnimationFrame(() => {
    announce(true);
    if (window.__sgxPlotly) plotly = window.__sgxPlotly;
  });

  return () => {
    observer.disconnect();
    model.off("msg:custom", receive);
    if (plotly) el.querySelectorAll(".sgx-plot").forEach((place) => plotly.purge(place));
  };
}

export default { render };
