/* The player of Paperbench explorations and figures on static pages.
   It draws figures that were computed when the notebook ran; it computes nothing and asks for nothing.
   TEMPLATES (light and dark plotly templates) is put in front of this file by paperbench.explore.runtime(). */
(() => {
  "use strict";

  const CONFIG = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };

  /* The theme is whatever the reader sees: the luminance of the nearest painted background. */
  function isDark(element) {
    for (let e = element; e; e = e.parentElement) {
      const m = getComputedStyle(e).backgroundColor.match(/[\d.]+/g);
      if (m && (m.length < 4 || Number(m[3]) > 0.5)) return 0.2126 * m[0] + 0.7152 * m[1] + 0.0722 * m[2] < 128;
    }
    return false;
  }

  function draw(element, figure) {
    const layout = { ...figure.layout, template: TEMPLATES[isDark(element) ? "dark" : "light"], autosize: true };
    return Plotly.react(element, figure.data, layout, CONFIG);
  }

  async function inflate(text) {
    const bytes = Uint8Array.from(atob(text.trim()), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  const TYPES = { f4: Float32Array, f8: Float64Array, i4: Int32Array, i2: Int16Array, i1: Int8Array, u1: Uint8Array, u2: Uint16Array };

  /* Bytes of one array, stored plane by plane (all first bytes, all second bytes, ...), back in order. */
  function unpack(bytes, spec) {
    const Type = TYPES[spec.t], size = Type.BYTES_PER_ELEMENT, n = spec.n, out = new Uint8Array(n * size);
    for (let p = 0; p < size; p++) for (let i = 0; i < n; i++) out[i * size + p] = bytes[spec.o + p * n + i];
    const flat = new Type(out.buffer);
    if (!spec.s) return flat;
    return Array.from({ length: spec.s[0] }, (_, r) => flat.subarray(r * spec.s[1], (r + 1) * spec.s[1]));
  }

  /* Payload: 4 bytes length of the header, the header as JSON, the arrays. */
  async function decode(text) {
    const bytes = await inflate(text);
    const length = new DataView(bytes.buffer).getUint32(0, true);
    const header = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + length)));
    const pool = header.arrays.map((spec) => unpack(bytes.subarray(4 + length), spec));
    const fill = (v) => {
      if (Array.isArray(v)) return v.map(fill);
      if (v && typeof v === "object") {
        if ("$" in v) return pool[v.$];
        return Object.fromEntries(Object.entries(v).map(([k, x]) => [k, fill(x)]));
      }
      return v;
    };
    return { frames: header.frames, traces: header.traces, layouts: header.layouts, fill };
  }

  async function explore(root) {
    const plot = root.querySelector(".pb-plot"), status = root.querySelector(".pb-status");
    const inputs = [...root.querySelectorAll("[data-control]")];
    const data = await decode(root.querySelector("script.pb-data").textContent);
    const cache = new Map();
    const figure = (k) => {
      if (!cache.has(k)) {
        const [traces, layout] = data.frames[k];
        cache.set(k, { data: traces.map((t) => data.fill(data.traces[t])), layout: data.fill(data.layouts[layout]) });
      }
      return structuredClone(cache.get(k));
    };
    const index = (e) => (e.type === "checkbox" ? Number(e.checked) : Number(e.value));
    const count = (e) => Number(e.dataset.count);
    const texts = new Map(inputs.map((e) => [e, JSON.parse(e.dataset.texts)]));
    let shown = -1;
    async function update() {
      let k = 0;
      for (const e of inputs) {
        const i = index(e), text = texts.get(e)[i];
        k = k * count(e) + i;
        if (e.type === "range") {
          e.setAttribute("aria-valuetext", text);
          root.querySelector(`output[for="${e.id}"]`).textContent = text;
        }
      }
      if (k === shown) return;
      shown = k;
      root.dataset.frame = k;
      await draw(plot, figure(k));
    }
    inputs.forEach((e) => e.addEventListener(e.tagName === "SELECT" || e.type === "checkbox" ? "change" : "input", update));
    root.querySelector(".pb-reset").addEventListener("click", () => {
      stop();
      for (const e of inputs) e.type === "checkbox" ? (e.checked = e.dataset.initial === "1") : (e.value = e.dataset.initial);
      update();
    });
    const play = root.querySelector(".pb-play");
    let timer = null;
    function stop() {
      if (timer === null) return;
      clearInterval(timer);
      timer = null;
      play.textContent = "▶ Play";
      play.setAttribute("aria-pressed", "false");
    }
    if (play) {
      const slider = inputs.find((e) => e.dataset.control === play.dataset.slider);
      play.addEventListener("click", () => {
        if (timer !== null) return stop();
        play.textContent = "❚❚ Pause";
        play.setAttribute("aria-pressed", "true");
        if (Number(slider.value) === count(slider) - 1) slider.value = -1;
        timer = setInterval(() => {
          slider.value = Number(slider.value) + 1;
          update();
          if (Number(slider.value) === count(slider) - 1) stop();
        }, 700);
      });
      slider.addEventListener("pointerdown", stop);
      slider.addEventListener("keydown", stop);
    }
    inputs.forEach((e) => (e.disabled = false));
    root.querySelectorAll("button").forEach((b) => (b.disabled = false));
    status.textContent = "";
    status.hidden = true;
    root.pbRedraw = () => { shown = -1; return update(); };
    await update();
    root.classList.add("pb-ready");
  }

  async function plain(root) {
    const figure = JSON.parse(root.querySelector("script").textContent);
    const plot = root.querySelector(".pb-plot");
    root.pbRedraw = () => draw(plot, structuredClone(figure));
    await root.pbRedraw();
    root.classList.add("pb-ready");
  }

  function fail(root, error) {
    const status = root.querySelector(".pb-status") || root.appendChild(document.createElement("p"));
    status.hidden = false;
    status.textContent = `This figure could not be drawn: ${error.message}`;
    console.error(error);
  }

  function start() {
    const roots = [...document.querySelectorAll(".pb-explore, .pb-figure")];
    /* Draw what is near the window first and the rest when it comes near, so that long pages open at once. */
    const seen = new IntersectionObserver((entries) => entries.forEach((entry) => {
      if (!entry.isIntersecting) return;
      seen.unobserve(entry.target);
      const root = entry.target;
      (root.classList.contains("pb-explore") ? explore(root) : plain(root)).catch((e) => fail(root, e));
    }), { rootMargin: "800px" });
    roots.forEach((root) => seen.observe(root));
    let dark = isDark(document.body);
    const retheme = () => {
      if (isDark(document.body) === dark) return;
      dark = !dark;
      roots.forEach((root) => root.pbRedraw && root.pbRedraw());
    };
    const later = () => [30, 250, 600].forEach((ms) => setTimeout(retheme, ms));
    const watch = new MutationObserver(later);
    [document.documentElement, document.body].forEach((e) => watch.observe(e, { attributes: true }));
    watch.observe(document.head, { attributes: true, subtree: true, attributeFilter: ["rel", "media", "disabled"] });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", later);
  }

  document.readyState === "loading" ? document.addEventListener("DOMContentLoaded", start) : start();
})();
