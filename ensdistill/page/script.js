// Themes and sorting. Without it the page is whole, and follows the system's theme.
(() => {
  const root = document.documentElement;
  const remember = (theme) => {
    try { localStorage.setItem("theme", theme); } catch { /* not allowed, as in a frame */ }
  };
  try {
    const known = localStorage.getItem("theme");
    if (known === "light" || known === "dark") root.dataset.theme = known;
  } catch { /* not allowed */ }

  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const other = () => ((root.dataset.theme ?? (prefersDark.matches ? "dark" : "light")) === "dark" ? "light" : "dark");

  function themes(button) {
    const name = () => {
      button.textContent = other() === "dark" ? "Dark" : "Light";
      button.setAttribute("aria-label", `Change to the ${other()} theme`);
    };
    button.addEventListener("click", () => {
      root.dataset.theme = other();
      remember(root.dataset.theme);
      name();
    });
    prefersDark.addEventListener("change", name);
    button.hidden = false;
    name();
  }

  // Rows that belong together are a tbody. Pressing goes from the better end to the other, and back
  // to the study's order; systems without a number are always last.
  function sorting(table) {
    const given = [...table.tBodies];
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, place) => {
      const button = head.querySelector("button");
      const first = button.dataset.better === "1" ? "descending" : "ascending";
      const second = first === "ascending" ? "descending" : "ascending";
      button.addEventListener("click", () => {
        const now = head.getAttribute("aria-sort");
        const next = now === first ? second : now === second ? null : first;
        heads.forEach((it) => it.removeAttribute("aria-sort"));
        if (next) head.setAttribute("aria-sort", next);
        table.append(...(next ? sorted(given, place, next === "ascending" ? 1 : -1) : given));
      });
    });
    const hint = document.querySelector(".sorting");
    if (hint) hint.hidden = false;
  }

  function sorted(bodies, place, sign) {
    const value = (body) => body.rows[0].cells[place].dataset.value;
    const [known, unknown] = [[], []];
    bodies.forEach((body) => (value(body) === undefined ? unknown : known).push(body));
    const compare = place === 0
      ? (a, b) => value(a).localeCompare(value(b), "en", { numeric: true })
      : (a, b) => Number(value(a)) - Number(value(b));
    return [...known.sort((a, b) => sign * compare(a, b)), ...unknown];
  }

  document.addEventListener("DOMContentLoaded", () => {
    root.classList.add("scripted");
    themes(document.getElementById("theme"));
    const table = document.getElementById("table");
    if (table) sorting(table);
  });
})();
