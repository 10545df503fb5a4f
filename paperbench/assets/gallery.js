/* The gallery on the home page, and the sorting and filtering of tables. Everything is in the page already; this hides and moves. */
(() => {
  "use strict";

  const words = (text) => text.toLowerCase().split(/\s+/).filter(Boolean);
  const holds = (text, wanted) => wanted.every((w) => text.includes(w));

  /* ---- the gallery ---- */

  function gallery(root) {
    const form = root.querySelector(".pb-filters"), list = root.querySelector(".pb-cards");
    const count = root.querySelector("[data-total]"), none = root.querySelector(".pb-none");
    const cards = [...list.children].map((element) => ({ element, ...element.dataset }));
    const names = ["q", "chapter", "from", "to", "verdict", "kernel", "sort"];
    const field = (name) => form.elements[name];

    const orders = {
      "": (a, b) => (a.title < b.title ? -1 : 1),
      new: (a, b) => (b.year || 0) - (a.year || 0),
      old: (a, b) => (a.year || 9999) - (b.year || 9999),
      chapter: (a, b) => (a.chapter < b.chapter ? -1 : a.chapter > b.chapter ? 1 : 0),
    };
    let order = "";

    function update() {
      const value = Object.fromEntries(names.map((n) => [n, field(n).value]));
      const wanted = words(value.q);
      let shown = 0;
      for (const c of cards) {
        const keep =
          holds(c.text, wanted) &&
          (!value.chapter || c.chapter === value.chapter) &&
          (!value.from || (c.year && Number(c.year) >= Number(value.from))) &&
          (!value.to || (c.year && Number(c.year) <= Number(value.to))) &&
          (!value.verdict || c.verdicts.split(" ").includes(value.verdict)) &&
          (!value.kernel || c.kernel === value.kernel);
        if (c.element.hidden === keep) c.element.hidden = !keep;
        shown += keep;
      }
      if (value.sort !== order) {
        order = value.sort;
        const sorted = [...cards].sort(orders[""]).sort(orders[order]);
        list.append(...sorted.map((c) => c.element));
      }
      const all = Number(count.dataset.total), noun = all === 1 ? "method" : "methods";
      count.textContent = shown === all ? `${all} ${noun}` : `${shown} of ${all} ${noun}`;
      none.hidden = shown > 0;
      const query = new URLSearchParams(names.filter((n) => value[n].trim()).map((n) => [n, value[n].trim()])).toString();
      history.replaceState(null, "", location.pathname + (query ? `?${query}` : "") + location.hash);
    }

    function restore() {
      const asked = new URLSearchParams(location.search);
      names.forEach((n) => (field(n).value = asked.get(n) || ""));
      names.forEach((n) => field(n).value === "" && field(n).selectedIndex > 0 && (field(n).selectedIndex = 0));
      update();
      return names.some((n) => asked.get(n));
    }

    form.addEventListener("input", update);
    form.addEventListener("change", update);
    form.addEventListener("submit", (e) => e.preventDefault());
    form.addEventListener("reset", () => setTimeout(() => { update(); field("q").focus(); }));
    form.hidden = false;
    if (restore()) root.scrollIntoView();
  }

  /* ---- tables: each column sorts, buttons and a box filter ---- */

  function table(root) {
    const body = root.querySelector("tbody"), heads = [...root.querySelectorAll("thead th")];
    const rows = [...body.rows];
    const key = (row, column, kind) => {
      const cell = row.cells[column], value = cell.dataset.value ?? cell.textContent.trim().toLowerCase();
      return kind === "number" ? (value === "" || Number.isNaN(Number(value)) ? null : Number(value)) : value;
    };
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "pb-sort";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((h) => h.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const way = down ? -1 : 1;
        rows.sort((a, b) => {
          const x = key(a, column, head.dataset.kind), y = key(b, column, head.dataset.kind);
          if (x === null || y === null) return (x === null) - (y === null);
          return (x < y ? -1 : x > y ? 1 : 0) * way;
        });
        body.append(...rows);
      });
    });
    const form = root.querySelector(".pb-filters");
    if (!form) return;
    const buttons = [...form.querySelectorAll("[data-verdict]")], box = form.elements.q;
    function update() {
      const verdict = buttons.find((b) => b.getAttribute("aria-pressed") === "true").dataset.verdict, wanted = words(box.value);
      rows.forEach((r) => (r.hidden = !((!verdict || r.dataset.verdict === verdict) && holds(r.dataset.text, wanted))));
    }
    buttons.forEach((b) => b.addEventListener("click", () => {
      buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === b)));
      update();
    }));
    box.addEventListener("input", update);
    form.addEventListener("submit", (e) => e.preventDefault());
    form.hidden = false;
  }

  function start() {
    document.querySelectorAll("#pb-gallery").forEach(gallery);
    document.querySelectorAll("[data-ledger]").forEach(table);
  }

  document.readyState === "loading" ? document.addEventListener("DOMContentLoaded", start) : start();
})();
